"""Suites of examples to evaluate on: generated here, or read from published files.

    examples = swa.suites.examples("ruler", model.tokenizer, lengths=(4096,), tasks=("vt", "cwe"))
    swa.suites.evaluate("ruler", hybrid, examples, generate=True)

Each is a module with a function `examples(request)`; `SUITES` names them all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swa.errors import InputError
from swa.evaluation import Evaluation
from swa.evaluation import check as check_answers
from swa.evaluation import evaluate as evaluate_answers
from swa.examples import Example
from swa.grading import Judge
from swa.policy import AttentionPolicy
from swa.suites import babilong, longmemeval, needle, plots, positions, ruler
from swa.suites.request import Request
from swa.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from swa.model import Model

__all__ = ["SUITES", "Request", "Suite", "check", "evaluate", "examples", "find_suite"]


@dataclass(frozen=True)
class Suite:
    """A source of examples."""

    summary: str
    """One line, for `swa eval --list`."""
    tasks: tuple[str, ...]
    """What can be asked for; the names in results may say more (a length, say)."""
    examples: Callable[[Request], list[Example]]
    replies: bool = True
    """Whether there is something to reply to."""
    chart: Callable[[Mapping[str, Evaluation]], Figure] | None = None
    """Draws evaluations by name (extra `plot`)."""


SUITES: dict[str, Suite] = {
    "ruler": Suite(
        "RULER's 11 synthetic tasks, and its 2 of question answering from SQuAD or HotpotQA files",
        ruler.TASKS,
        ruler.examples,
    ),
    "needle": Suite(
        "one number to find, at every depth of texts of every length",
        needle.TASKS,
        needle.examples,
        chart=plots.needle_grids,
    ),
    "babilong": Suite(
        "facts spread over books, from BABILong's files", babilong.TASKS, babilong.examples
    ),
    "longmemeval": Suite(
        "questions about long chats, from LongMemEval's files; replies need a judge",
        longmemeval.TASKS,
        longmemeval.examples,
    ),
    "perplexity": Suite(
        "NLL of long text by position, every row sliding as in prefill",
        positions.TASKS,
        positions.examples,
        replies=False,
        chart=plots.position_figure,
    ),
}


def examples(
    suite: str,
    tokenizer: Tokenizer,
    *,
    files: Iterable[str | os.PathLike[str]] = (),
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    **wanted: Any,
) -> list[Example]:
    """Examples of a suite.

    Args:
        suite: of SUITES.
        tokenizer: the model's.
        files: published data files, for the suites that read some.
        tasks: of the suite; None: all.
        lengths: in tokens, of prompt and longest reply together; None: the suite's own. Where
            prompts come from files: the longest that are not left out.
        wanted: `depths`, `examples_per_task`, `seed`, `split`, `haystack`, `chat`: see `Request`.

    Raises:
        InputError: no such suite.
        ExampleError, OSError: as the suite's `examples`.
    """
    request = Request(
        tokenizer,
        tuple(map(Path, files)),
        None if tasks is None else tuple(tasks),
        None if lengths is None else tuple(lengths),
        **wanted,
    )
    return find_suite(suite).examples(request)


def evaluate(
    suite: str | None,
    model: Model,
    examples: Sequence[Example],
    *,
    policy: AttentionPolicy | None = None,
    generate: bool = False,
    scorer: str | None = None,
    judge: Judge | None = None,
    progress: bool = False,
    journal: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Evaluate on examples of a suite, or of none: but for "perplexity" it is `swa.evaluate`.

    Raises as `swa.evaluate`, and InputError: no such suite, or replies, or a journal, of one that
    has none.
    """
    if not _has_answers(suite, generate, journal):
        return positions.evaluate(model, examples, policy=policy, progress=progress)
    return evaluate_answers(
        model,
        examples,
        policy=policy,
        generate=generate,
        scorer=scorer,
        judge=judge,
        progress=progress,
        journal=journal,
    )


def check(
    suite: str | None,
    model: Model,
    examples: Sequence[Example],
    *,
    generate: bool = False,
    scorer: str | None = None,
    judge: Judge | None = None,
    journal: str | os.PathLike[str] | None = None,
) -> None:
    """Raise what `evaluate` would for these arguments, before anything has run."""
    if _has_answers(suite, generate, journal):
        check_answers(
            model, examples, generate=generate, scorer=scorer, judge=judge, journal=journal
        )
    else:
        model.check_examples(examples)


def _has_answers(suite: str | None, generate: bool, journal: str | os.PathLike[str] | None) -> bool:
    """Whether answers are measured. Raises InputError: they are not, and more was asked for."""
    if suite is None or find_suite(suite).replies:
        return True
    if generate:
        raise InputError(f"suite {suite!r} asks nothing, so there are no replies to generate")
    if journal is not None:
        raise InputError(f"suite {suite!r} keeps no journal")
    return False


def find_suite(name: str) -> Suite:
    """One of SUITES. Raises InputError: there is none of that name."""
    if name not in SUITES:
        raise InputError(f"there is no suite {name!r}: choose from {', '.join(SUITES)}")
    return SUITES[name]
