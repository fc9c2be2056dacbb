"""How well a model answers: NLL, greedy match, and scored replies; per example and per task."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from swa import jsonio
from swa.errors import ExampleError, InputError, PolicyError, ScoresError
from swa.examples import content_hash
from swa.files import read_document, write_text
from swa.grading import JUDGED, Grading, Judge, score_reply
from swa.journal import Journal, open_journal
from swa.layer_scores import mean, read_number
from swa.policy import AttentionPolicy

if TYPE_CHECKING:
    from rich.table import Table

    from swa.examples import Example
    from swa.model import Model

SCHEMA = "swa.evaluation/2"
_READABLE = ("swa.evaluation/1", SCHEMA)  # the first had no replies
Measure: TypeAlias = Literal["nll", "greedy_match", "score"]
_MORE_TOKENS = 16  # that a reply may have beyond the answer, where no grading says


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What `evaluate` measured; N examples, in their order.

    NLL is in nats per answer token: the mean over an example's answer, then over examples.
    An example matches greedily where every answer token is the model's first choice.
    """

    nll_per_example: tuple[float, ...]
    greedy_match_per_example: tuple[bool, ...]
    tasks: tuple[str, ...]
    policy: AttentionPolicy | None
    """None: the checkpoint's own attention, every layer as it was trained."""
    model_name: str
    model_fingerprint: str
    dtype: str
    examples_hash: str
    replies: tuple[str, ...] | None = None
    """Generated texts (greedy), one an example; None: nothing was generated."""
    score_per_example: tuple[float, ...] | None = None
    """How right each reply is, from 0 to 1; None without replies."""
    judge: str | None = None
    """Who judged replies, where somebody did."""
    units: tuple[int, ...] | None = None
    """The unit of each entry, where several are of one; None: each stands alone.

    Entries of one unit (see `Example`) are not independent, which intervals must know."""

    @property
    def nll(self) -> float:
        """Mean over examples, nats per answer token."""
        return mean(self.nll_per_example)

    @property
    def greedy_match(self) -> float:
        """Fraction of examples whose whole answer is the greedy one."""
        return mean(self.greedy_match_per_example)

    @property
    def score(self) -> float | None:
        """Mean score of the replies; None without replies."""
        return None if self.score_per_example is None else mean(self.score_per_example)

    @property
    def by_task(self) -> dict[str, float]:
        """Mean NLL of each task, in order of first appearance."""
        return self._by_task(self.nll_per_example)

    @property
    def greedy_match_by_task(self) -> dict[str, float]:
        """Greedy match of each task, in order of first appearance."""
        return self._by_task(self.greedy_match_per_example)

    @property
    def score_by_task(self) -> dict[str, float] | None:
        """Mean score of each task's replies, in order of first appearance; None without replies."""
        return None if self.score_per_example is None else self._by_task(self.score_per_example)

    def _by_task(self, values: Iterable[float]) -> dict[str, float]:
        groups: dict[str, list[float]] = {}
        for task, value in zip(self.tasks, values, strict=True):
            groups.setdefault(task, []).append(value)
        return {task: mean(group) for task, group in groups.items()}

    def table(self) -> Table:
        """A rich table: a row for each task, and one for all of them."""
        from rich.markup import escape
        from rich.table import Table

        table = Table("task")
        for column in ("examples", "NLL", "greedy", *(() if self.score is None else ("score",))):
            table.add_column(column, justify="right")

        def add(task: str, count: int, nll: float, greedy: float, score: float | None) -> None:
            shares = (greedy,) if score is None else (greedy, score)
            table.add_row(escape(task), str(count), f"{nll:.3f}", *(f"{s:.0%}" for s in shares))

        greedy, scores = self.greedy_match_by_task, self.score_by_task or {}
        for task, nll in self.by_task.items():
            add(task, self.tasks.count(task), nll, greedy[task], scores.get(task))
        if len(self.by_task) > 1:
            table.add_section()
            add("all", len(self.tasks), self.nll, self.greedy_match, self.score)
        return table

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, schema "swa.evaluation/2"; `from_dict` reads it back."""
        replied: dict[str, Any] = {}
        if self.replies is not None and self.score_per_example is not None:
            replied = {
                "score": self.score,
                "score_by_task": self.score_by_task,
                "score_per_example": list(self.score_per_example),
                "replies": list(self.replies),
                "judge": self.judge,
            }
        return {
            "schema": SCHEMA,
            "nll": self.nll,
            "greedy_match": self.greedy_match,
            "nll_by_task": self.by_task,
            "nll_per_example": list(self.nll_per_example),
            "greedy_match_per_example": list(self.greedy_match_per_example),
            "tasks": list(self.tasks),
            "policy": None if self.policy is None else self.policy.to_dict(),
            "model_name": self.model_name,
            "model_fingerprint": self.model_fingerprint,
            "dtype": self.dtype,
            "examples_hash": self.examples_hash,
            "units": None if self.units is None else list(self.units),
            **replied,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """Read what `to_dict` gave, in this version or an older one.

        Raises ScoresError: not such a mapping.
        """
        if not isinstance(data, Mapping) or data.get("schema") not in _READABLE:
            raise ScoresError(f"an evaluation is a JSON object with schema {SCHEMA!r}")
        try:
            policy = data["policy"]
            given: dict[str, Any] = {key: str(data[key]) for key in _TEXT_KEYS}
            for key, read in _OPTIONAL_KEYS.items():
                if data.get(key) is not None:
                    given[key] = read(data[key])
            evaluation = cls(
                nll_per_example=_numbers(data["nll_per_example"]),
                greedy_match_per_example=tuple(map(bool, data["greedy_match_per_example"])),
                tasks=tuple(map(str, data["tasks"])),
                policy=None if policy is None else AttentionPolicy.from_dict(policy),
                **given,
            )
        except KeyError as error:
            raise ScoresError(f"the evaluation has no {error}") from error
        except (TypeError, ValueError, PolicyError) as error:
            raise ScoresError(f"not a valid evaluation: {error}") from error
        if (evaluation.replies is None) != (evaluation.score_per_example is None):
            raise ScoresError("the evaluation must have replies and scores, or none of the two")
        lists = (
            evaluation.nll_per_example,
            evaluation.greedy_match_per_example,
            evaluation.tasks,
            evaluation.replies,
            evaluation.score_per_example,
            evaluation.units,
        )
        lengths = {len(values) for values in lists if values is not None}
        if len(lengths) != 1 or 0 in lengths:
            raise ScoresError("the evaluation's lists must have one entry for each example")
        return evaluation

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON form to `path`, atomically. Raises OSError."""
        write_text(path, jsonio.dumps_document(self.to_dict()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Read an evaluation file. Raises OSError, or ScoresError naming the file."""
        return read_document(path, cls.from_dict)

    def __repr__(self) -> str:
        tasks = ", ".join(f"{task} {nll:.3f}" for task, nll in self.by_task.items())
        score = "" if self.score is None else f"score={self.score:.3f}, "
        return (
            f"Evaluation(nll={self.nll:.4f}, greedy_match={self.greedy_match:.0%}, {score}"
            f"{len(self.nll_per_example)} examples: {tasks})"
        )


def _numbers(values: Iterable[Any]) -> tuple[float, ...]:
    numbers = tuple(map(read_number, values))
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a value is not finite")
    return numbers


_TEXT_KEYS = ("model_name", "model_fingerprint", "dtype", "examples_hash")
_OPTIONAL_KEYS: dict[str, Callable[[Any], Any]] = {
    "replies": lambda replies: tuple(map(str, replies)),
    "score_per_example": _numbers,
    "judge": str,
    "units": lambda units: tuple(map(int, units)),
}


def evaluate(
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
    """Teacher-forced answer NLL and greedy match of `model` over `examples`, replies if asked for.

    Args:
        model: as loaded (full attention) or patched.
        examples: at least one.
        policy: evaluate `model.patch(policy)` instead; its `layer_types` say which layers are full,
            without them all that can slide do.
        generate: let the model reply to each prompt, too (greedy, as long as the example's grading
            says), and score the replies. An example without a grading is looked for its answer.
        scorer: score all replies so, whatever the gradings say: see `swa.grading`.
        judge: scores the replies whose scorer is "judge": a function of grading and reply, such as
            `swa.judge.EndpointJudge`.
        progress: show a bar on stderr.
        journal: a file to which each example is added when done, under any policy: an evaluation
            that was stopped goes on from it. It knows a judge by its attribute `name`, or as a
            function of a module: a judge that has changed needs another name.

    Raises:
        ExampleError: no examples.
        ScoresError: an NLL is not finite; the journal is another model's, damaged or in use.
        InputError: replies are to be judged without a judge, or with a journal by one that has no
            name to know it by; no room for a reply after a prompt.
        TokenizerError: replies are asked for and the model has no tokenizer.
        JudgeError: as the judge.
        PolicyError, InputError, MemoryError: as `Model.patch` and `Model.nll`.
    """
    subject = model if policy is None else model.patch(policy)
    gradings = check(
        subject, examples, generate=generate, scorer=scorer, judge=judge, journal=journal
    )
    shown: Iterable[tuple[Example, Grading | None]] = zip(examples, gradings, strict=True)
    if progress:
        from tqdm import tqdm

        shown = tqdm(shown, total=len(examples), desc="evaluating", unit="example")
    with open_journal(journal, model, "evaluation") as opened:
        known = {} if opened is None else _recorded(opened)
        measured = []
        for index, (example, grading) in enumerate(shown):
            key = "" if opened is None else _key(subject.policy, example, grading, judge)
            found = known.get(key) or _measured(subject, example, grading, judge, index)
            if opened is not None and key not in known:
                known[key] = found
                opened.append({"key": key, **asdict(found)})
            measured.append(found)
    judged = any(grading is not None and grading.scorer == JUDGED for grading in gradings)
    return Evaluation(
        nll_per_example=tuple(one.nll for one in measured),
        greedy_match_per_example=tuple(one.greedy_match for one in measured),
        tasks=tuple(example.task for example in examples),
        policy=subject.policy,
        model_name=model.name,
        model_fingerprint=model.fingerprint,
        dtype=model.dtype,
        examples_hash=content_hash(examples),
        replies=tuple(str(one.reply) for one in measured) if generate else None,
        score_per_example=tuple(float(one.score or 0) for one in measured) if generate else None,
        judge=_judge_name(judge) if judged else None,
        units=_units(examples),
    )


def check(
    model: Model,
    examples: Sequence[Example],
    *,
    generate: bool = False,
    scorer: str | None = None,
    judge: Judge | None = None,
    journal: str | os.PathLike[str] | None = None,
) -> Sequence[Grading | None]:
    """How each reply is scored, where there are any.

    Raises what `evaluate` would for these arguments, before anything has run.
    """
    if not examples:
        raise ExampleError("there are no examples to evaluate on")
    gradings = _gradings(model, examples, scorer, judge) if generate else [None] * len(examples)
    judged = any(grading is not None and grading.scorer == JUDGED for grading in gradings)
    if judged and journal is not None and not _has_name(judge):
        raise InputError(
            f"the journal could not tell this judge ({_judge_name(judge)}) from others: give it an"
            " attribute name, or define it as a function of a module"
        )
    model.check_examples(examples)
    return gradings


@dataclass(frozen=True)
class _Measured:
    """What was found on one example: a line of the journal."""

    nll: float
    greedy_match: bool
    reply: str | None = None
    score: float | None = None


def _measured(
    model: Model, example: Example, grading: Grading | None, judge: Judge | None, index: int
) -> _Measured:
    result = model.nll_example(example)
    if not math.isfinite(result.mean):
        raise ScoresError(
            f"the NLL of example {index} is {result.mean}: the checkpoint's weights overflow or"
            ' are not numbers (if dtype is "bfloat16", try "float32")'
        )
    is_greedy = bool(result.is_greedy.all())
    if grading is None:
        return _Measured(result.mean, is_greedy)
    reply = model.generate(example.prompt_ids, max_new_tokens=grading.max_new_tokens).text
    return _Measured(result.mean, is_greedy, reply, score_reply(grading, reply, judge))


def _key(
    policy: AttentionPolicy | None, example: Example, grading: Grading | None, judge: Judge | None
) -> str:
    """Of all that a result depends on beside the model."""
    asked = None
    if grading is not None:
        by = _judge_name(judge) if grading.scorer == JUDGED else None
        asked = [grading.to_dict(), by]
    parts = [None if policy is None else policy.to_dict(), content_hash([example]), asked]
    return jsonio.digest(parts)


def _recorded(journal: Journal) -> dict[str, _Measured]:
    def parse(record: dict[str, Any]) -> tuple[str, _Measured]:
        reply, score = record["reply"], record["score"]
        return str(record["key"]), _Measured(
            read_number(record["nll"]),
            bool(record["greedy_match"]),
            None if reply is None else str(reply),
            None if score is None else read_number(score),
        )

    return dict(journal.read("an example", parse))


def _units(examples: Sequence[Example]) -> tuple[int, ...] | None:
    """Numbers in order of first appearance; one of its own for an example without unit."""
    if all(example.unit is None for example in examples):
        return None
    numbers: dict[str | int, int] = {}
    named = (index if e.unit is None else e.unit for index, e in enumerate(examples))
    return tuple(numbers.setdefault(name, len(numbers)) for name in named)


def _gradings(
    model: Model, examples: Sequence[Example], scorer: str | None, judge: Judge | None
) -> list[Grading]:
    """How each reply is scored. Refuses what would fail later."""
    _ = model.tokenizer  # replies are texts: refuse now if there can be none
    gradings = []
    for index, example in enumerate(examples):
        grading = example.grading
        if grading is None:
            answer = model.tokenizer.decode(example.answer_ids, skip_special_tokens=True).strip()
            if not answer:
                raise ExampleError(f"the answer of example {index} has no text: give a grading")
            grading = Grading((answer,), max_new_tokens=example.answer_len + _MORE_TOKENS)
        if scorer is not None:
            grading = replace(grading, scorer=scorer)
        if grading.scorer == JUDGED and judge is None:
            score_reply(grading, "", None)  # says what to do
        room = model.max_position_embeddings - example.prompt_len
        if room < 1:
            raise InputError(
                f"the prompt of example {index} has {example.prompt_len} tokens, which leave no"
                f" room for a reply in the model's {model.max_position_embeddings} positions"
            )
        gradings.append(replace(grading, max_new_tokens=min(grading.max_new_tokens, room)))
    return gradings


def _judge_name(judge: Judge | None) -> str:
    if name := getattr(judge, "name", None):
        return str(name)
    named: Any = judge if hasattr(judge, "__qualname__") else type(judge)
    return f"{named.__module__}.{named.__qualname__}"


def _has_name(judge: Judge | None) -> bool:
    """Whether no other judge should have the same `_judge_name`."""
    if getattr(judge, "name", None):
        return True
    of_object = not isinstance(getattr(judge, "__self__", None), type | ModuleType | None)
    qualname = getattr(judge, "__qualname__", "<none>")
    return not of_object and "<" not in qualname  # <lambda>, <locals>


def gap_closed(nll: float, *, full: float, sliding: float) -> float | None:
    """Share of the gap between all-sliding and full attention that `nll` closes; 1 = all of it.

    None where sliding costs nothing, so that there is no gap.
    """
    gap = sliding - full
    return (sliding - nll) / gap if gap > 0 else None
