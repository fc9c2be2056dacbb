"""What `swa eval` and `swa compare` measure on: the options of suites and judges, and their use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from swa.cli.helpers import floats, integers, load_examples, note
from swa.errors import InputError

if TYPE_CHECKING:
    from swa.evaluation import Evaluation
    from swa.examples import Example
    from swa.grading import Judge
    from swa.model import Model


def _list_suites(wanted: bool) -> None:
    if wanted:
        from swa.suites import SUITES

        for name, suite in SUITES.items():
            print(f"{name:<12}  {suite.summary}")
        raise typer.Exit


ListSuites = Annotated[
    bool,
    typer.Option("--list", callback=_list_suites, is_eager=True, help="Name the suites, and stop."),
]
SuiteName = Annotated[
    str | None,
    typer.Option("--suite", help="Measure on this suite (`swa eval --list` names them)."),
]
DataFiles = Annotated[
    list[Path] | None, typer.Option("--file", help="A suite's data file; may be repeated.")
]
Lengths = Annotated[
    str | None,
    typer.Option(metavar="T[,T...]", help="A suite's lengths in tokens, replies included."),
]
Depths = Annotated[
    str | None,
    typer.Option(metavar="D[,D...]", help="Of the needle, from 0 (the beginning) to 1."),
]
TaskNames = Annotated[
    str | None, typer.Option("--tasks", metavar="NAME[,NAME...]", help="Of the suite or the mix.")
]
Generate = Annotated[
    bool, typer.Option("--generate", help="Let the model reply, too, and score the replies.")
]
Scorer = Annotated[
    Literal["contains_all", "contains_any", "exact", "regex", "judge"] | None,
    typer.Option(help="Score all replies so, whatever the examples say."),
]
JudgeUrl = Annotated[
    str | None,
    typer.Option(help="OpenAI-compatible endpoint that judges replies (https://host/v1)."),
]
JudgeModel = Annotated[str | None, typer.Option(help="The judge's name at its endpoint.")]
JudgeKey = Annotated[
    str | None,
    typer.Option("--judge-key-variable", help="Environment variable with the judge's key."),
]


@dataclass(frozen=True)
class Source:
    """Where examples come from: a suite, a file of examples, or the built-in mix."""

    suite: str | None
    examples: Path | None
    files: Sequence[Path]
    tasks: str | None
    lengths: str | None
    depths: str | None
    examples_per_task: int | None
    prompt_tokens: int | None
    seed: int

    def __post_init__(self) -> None:
        if self.suite is None:
            for option, value in (
                ("--file", self.files),
                ("--lengths", self.lengths),
                ("--depths", self.depths),
            ):
                if value:
                    raise InputError(f"{option} shapes a suite: give --suite, or leave it out")
            if self.examples is not None and self.tasks is not None:
                raise InputError("--tasks picks from a suite or the built-in mix, not from a file")
            return
        from swa.suites import find_suite

        find_suite(self.suite)  # refuses a name that is none
        if self.examples is not None:
            raise InputError("give --suite or --examples, not both")
        if self.prompt_tokens is not None:
            raise InputError("--prompt-tokens shapes the built-in mix: a suite takes --lengths")

    def read(self, model: Model) -> list[Example]:
        """The examples; held out, where they are generated."""
        tasks = None if self.tasks is None else tuple(self.tasks.split(","))
        if self.suite is None:
            return load_examples(
                model,
                self.examples,
                self.examples_per_task,
                self.prompt_tokens,
                self.seed,
                "heldout",
                tasks,
            )
        from swa import suites

        found = suites.examples(
            self.suite,
            model.tokenizer,
            files=self.files,
            tasks=tasks,
            lengths=None if self.lengths is None else integers(self.lengths, "--lengths"),
            depths=None if self.depths is None else floats(self.depths, "--depths"),
            examples_per_task=self.examples_per_task,
            seed=self.seed,
        )
        longest = max(example.prompt_len + example.answer_len for example in found)
        note(f"{self.suite}: {len(found)} examples of up to {longest} tokens")
        return found


def judge_of(
    url: str | None,
    model: str | None,
    key_variable: str | None,
    scorer: str | None,
    generate: bool,
) -> Judge | None:
    """The judge that the options describe, if they do."""
    if url is None and (model is not None or key_variable is not None):
        raise InputError("a judge needs --judge-url")
    if url is not None and model is None:
        raise InputError("a judge needs --judge-model")
    if not generate and (url is not None or scorer is not None):
        raise InputError("--scorer and a judge are for replies: give --generate, too")
    if url is None or model is None:
        return None
    from swa.judge import EndpointJudge

    return EndpointJudge(url, model, key_variable)


def check_plot(suite: str | None, path: Path | None) -> None:
    """Refuse a chart of what has none."""
    from swa.suites import SUITES, find_suite

    if path is not None and (suite is None or find_suite(suite).chart is None):
        drawn = " and ".join(name for name, found in SUITES.items() if found.chart is not None)
        raise InputError(f"--plot draws the suites {drawn}")


def draw(suite: str | None, evaluations: Mapping[str, Evaluation], path: Path) -> None:
    """Write the chart of a suite that has one."""
    from swa.suites import find_suite

    chart = find_suite(suite).chart if suite else None
    if chart is not None:
        chart(evaluations).savefig(path)
        note(f"wrote {path}")
