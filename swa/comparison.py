"""Policies side by side on the same examples: values by task, and paired differences."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from swa.errors import InputError, ScoresError
from swa.evaluation import Evaluation, Measure, gap_closed
from swa.files import read_document, write_text
from swa.grading import Judge
from swa.jsonio import dumps_document
from swa.layer_scores import mean
from swa.policy import AttentionPolicy
from swa.selection import Selection
from swa.statistics import PairedDifference, paired_bootstrap

if TYPE_CHECKING:
    from rich.table import Table

    from swa.examples import Example
    from swa.model import Model

SCHEMA = "swa.comparison/1"
FULL, SLIDING = "full attention", "all sliding"

MEASURES: dict[Measure, str] = {
    "nll": "NLL, nats per token",
    "greedy_match": "greedy match",
    "score": "score of replies",
}


@dataclass(frozen=True, repr=False)
class Comparison:
    """Evaluations of the same examples by name, in order, and how each differs from the baseline.

    Raises:
        InputError: no evaluations, no such baseline, evaluations of different examples or tasks,
            replies in some of them only.
    """

    evaluations: Mapping[str, Evaluation]
    baseline: str
    """Name of the evaluation that all others are compared with."""
    n_bootstrap: int = 2000
    seed: int = 0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not self.evaluations:
            raise InputError("there are no evaluations to compare")
        if self.baseline not in self.evaluations:
            raise InputError(
                f"there is no {self.baseline!r} to compare with: choose from"
                f" {', '.join(self.evaluations)}"
            )
        first = self._base
        for name, evaluation in self.evaluations.items():
            same = evaluation.examples_hash == first.examples_hash
            if not same or evaluation.tasks != first.tasks or evaluation.units != first.units:
                raise InputError(
                    f"{name!r} was measured on other examples than {self.baseline!r}: only the same"
                    " ones can be compared in pairs"
                )
            if (evaluation.replies is None) != (first.replies is None):
                raise InputError(
                    f"one of {name!r} and {self.baseline!r} has replies, the other has none"
                )

    @property
    def _base(self) -> Evaluation:
        return self.evaluations[self.baseline]

    @property
    def tasks(self) -> tuple[str, ...]:
        """In order of first appearance."""
        return tuple(dict.fromkeys(self._base.tasks))

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What there is to compare: scores only of replies, greedy matches only if there is one."""
        matched = any(any(e.greedy_match_per_example) for e in self.evaluations.values())
        there = {"nll": True, "greedy_match": matched, "score": self._base.replies is not None}
        return tuple(measure for measure in MEASURES if there[measure])

    def value(self, name: str, measure: Measure = "nll", task: str | None = None) -> float:
        """The mean over a task's examples, or over all."""
        return mean(self._values(name, measure, task)[0])

    def difference(
        self, name: str, measure: Measure = "nll", task: str | None = None
    ) -> PairedDifference:
        """How `name` differs from the baseline over a task's examples, or over all, in pairs.

        Over all, the examples of a task are resampled among themselves; what is of one text is
        resampled together.
        """
        key = (name, measure, task)
        if key not in self._differences:
            values, strata = self._values(name, measure, task)
            base, _ = self._values(self.baseline, measure, task)
            self._differences[key] = paired_bootstrap(
                values,
                base,
                tasks=strata,
                higher_is_better=measure != "nll",
                n_bootstrap=self.n_bootstrap,
                seed=self.seed,
                confidence=self.confidence,
            )
        return self._differences[key]

    def verdict(self, name: str, measure: Measure = "nll", task: str | None = None) -> str:
        """ "better" or "worse" than the baseline where the interval tells, else empty."""
        difference = self.difference(name, measure, task)
        if name == self.baseline or not difference.excludes_zero:
            return ""
        return "better" if (difference.difference > 0) == (measure != "nll") else "worse"

    @cached_property
    def _differences(self) -> dict[tuple[str, Measure, str | None], PairedDifference]:
        return {}

    def _values(
        self, name: str, measure: Measure, task: str | None
    ) -> tuple[list[float], list[str]]:
        """One value for each independent unit, and the stratum that it belongs to.

        Units count by their size: the mean of the values is that over examples.
        """
        evaluation = self.evaluations[name]
        per_example: Sequence[float] | None = {
            "nll": evaluation.nll_per_example,
            "greedy_match": evaluation.greedy_match_per_example,
            "score": evaluation.score_per_example,
        }[measure]
        if per_example is None:
            raise InputError("the evaluations have no replies, so no scores")
        rows = [i for i, of in enumerate(evaluation.tasks) if task in (None, of)]
        if not rows:
            raise InputError(f"there is no task {task!r}: choose from {', '.join(self.tasks)}")
        if evaluation.units is None:
            return [float(per_example[i]) for i in rows], [evaluation.tasks[i] for i in rows]
        units: dict[int, list[int]] = {}
        for i in rows:
            units.setdefault(evaluation.units[i], []).append(i)
        scale = len(units) / len(rows)
        # Units of the same tasks are alike.
        return (
            [scale * math.fsum(per_example[i] for i in unit) for unit in units.values()],
            [" ".join(sorted({evaluation.tasks[i] for i in unit})) for unit in units.values()],
        )

    def gap_closed(self, name: str) -> float | None:
        """Share of the NLL gap between all sliding and full attention that `name` closes.

        None where an end of the gap, under the policy of `name`, was not measured, or sliding costs
        nothing.
        """
        policy = self.evaluations[name].policy
        full = next((e for e in self.evaluations.values() if e.policy is None), None)
        sliding = next(
            (
                e
                for e in self.evaluations.values()
                if e.policy is not None
                and not e.policy.full_attention_layers
                and (policy is None or not e.policy.differs_from(policy))
            ),
            None,
        )
        if full is None or sliding is None:
            return None
        return gap_closed(self.evaluations[name].nll, full=full.nll, sliding=sliding.nll)

    def warnings(self) -> list[str]:
        """What a reader should know before trusting the comparison."""
        base = self._base
        found = []
        for name, evaluation in self.evaluations.items():
            if evaluation.model_fingerprint != base.model_fingerprint:
                found.append(f'"{name}" and "{self.baseline}" are different models.')
            if evaluation.dtype != base.dtype:
                found.append(f'"{name}" was measured in {evaluation.dtype}, not in {base.dtype}.')
            if evaluation.judge != base.judge:
                found.append(
                    f'The replies of "{name}" were judged by {evaluation.judge}, not by'
                    f" {base.judge}."
                )
        few = [
            task for task in self.tasks if not self.difference(self.baseline, task=task).is_trusted
        ]
        if few:
            more = ", ..." if len(few) > 4 else ""
            found.append(
                f"Too few examples for intervals to be trusted: {', '.join(few[:4])}{more}."
            )
        return found

    def table(self, measure: Measure = "nll") -> Table:
        """A rich table: tasks down, policies across, differences with their intervals below."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=MEASURES[measure], caption=escape(self.caption))
        table.add_column("task")
        for name in self.evaluations:
            table.add_column(escape(name), justify="right")
        for task in self.tasks:
            table.add_row(
                escape(task), *(self._cell(name, measure, task) for name in self.evaluations)
            )
        if len(self.tasks) > 1:
            table.add_section()
            table.add_row("all", *(self._cell(name, measure, None) for name in self.evaluations))
        if measure == "nll":
            shares = [self.gap_closed(name) for name in self.evaluations]
            if any(share is not None for share in shares):
                table.add_section()
                closed = ("" if share is None else f"{share:.0%}" for share in shares)
                table.add_row("gap closed", *closed)
        return table

    @property
    def caption(self) -> str:
        """How to read the table."""
        return (
            f"Below each value: {self.confidence:.0%} interval of its difference from"
            f" {self.baseline!r} on the same examples (paired bootstrap); * where that leaves out"
            " zero."
        )

    def _cell(self, name: str, measure: Measure, task: str | None) -> str:
        from rich.markup import escape

        value = format_value(self.value(name, measure, task), measure)
        if name == self.baseline:
            return value
        difference = self.difference(name, measure, task)
        text = escape(format_cell(difference, measure))
        if verdict := self.verdict(name, measure, task):
            text = f"[bold {'green' if verdict == 'better' else 'red'}]{text}[/]"
        return f"{value}\n{text}"

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, schema "swa.comparison/1"; `from_dict` reads it back.

        "table" has a row for each name, measure and task; its task is null over all of them.
        """
        tasks = (*self.tasks, None)
        return {
            "schema": SCHEMA,
            "baseline": self.baseline,
            "n_bootstrap": self.n_bootstrap,
            "seed": self.seed,
            "confidence": self.confidence,
            "gap_closed": {name: self.gap_closed(name) for name in self.evaluations},
            "table": [
                self._row(name, measure, task)
                for measure in self.measures
                for name in self.evaluations
                for task in tasks
            ],
            "evaluations": {name: e.to_dict() for name, e in self.evaluations.items()},
        }

    def _row(self, name: str, measure: Measure, task: str | None) -> dict[str, Any]:
        value, difference = self.value(name, measure, task), self.difference(name, measure, task)
        row = {"name": name, "measure": measure, "task": task, "value": value}
        interval = None if difference.interval is None else list(difference.interval)
        return row | difference.to_dict() | {"interval": interval}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Comparison:
        """Read what `to_dict` gave. Raises ScoresError: not such a mapping."""
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            raise ScoresError(f"a comparison is a JSON object with schema {SCHEMA!r}")
        try:
            return cls(
                {str(n): Evaluation.from_dict(e) for n, e in data["evaluations"].items()},
                data["baseline"],
                data["n_bootstrap"],
                data["seed"],
                data["confidence"],
            )
        except KeyError as error:
            raise ScoresError(f"the comparison has no {error}") from error
        except (TypeError, AttributeError, InputError) as error:
            raise ScoresError(f"not a valid comparison: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON form to `path`, atomically. Raises OSError."""
        write_text(path, dumps_document(self.to_dict()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read a comparison file. Raises OSError, or ScoresError naming the file."""
        return read_document(path, cls.from_dict)

    def report(self, path: str | os.PathLike[str], *, title: str | None = None) -> None:
        """Write the comparison as one self-contained HTML file, atomically. Raises OSError."""
        from swa.comparison_page import render

        write_text(path, render(self, title=title))

    def __repr__(self) -> str:
        lines = [f"Comparison of {len(self.evaluations)} with {self.baseline!r}:"]
        for name in self.evaluations:
            value = format_value(self.value(name), "nll")
            difference = format_difference(self.difference(name), "nll")
            lines.append(
                f"  {name}: NLL {value}" + (f", {difference}" if name != self.baseline else "")
            )
        return "\n".join(lines)


def compare(
    model: Model,
    policies: Mapping[str, AttentionPolicy | Selection | None],
    examples: Sequence[Example],
    *,
    baseline: str | None = None,
    ends: bool = True,
    suite: str | None = None,
    generate: bool = False,
    scorer: str | None = None,
    judge: Judge | None = None,
    seed: int = 0,
    progress: bool = False,
    journal: str | os.PathLike[str] | None = None,
) -> Comparison:
    """Evaluate a model under several policies on the same examples, and compare them in pairs.

    Args:
        model: as loaded; its own policy, if it has one, is not used.
        policies: by name: a selection, a policy (its `layer_types` say which layers are full), or
            None for full attention.
        examples: at least one; a task with fewer than five has no interval to trust.
        baseline: the name to compare with; None: the first of `policies`.
        ends: measure "full attention" and "all sliding" (under the first policy), too.
        suite: that the examples are of, if they are of one ("perplexity" is measured differently).
        generate, scorer, judge, journal: as in `swa.evaluate`.
        seed: of the bootstrap.
        progress: show a bar for each policy on stderr.

    Raises:
        InputError: no policies, or no such baseline.
        and as `swa.evaluate`.
    """
    from swa import suites

    chosen = check(
        model,
        policies,
        examples,
        baseline=baseline,
        ends=ends,
        suite=suite,
        generate=generate,
        scorer=scorer,
        judge=judge,
        journal=journal,
    )
    full = model if model.policy is None else replace(model, policy=None)
    evaluations = {}
    for name, policy in chosen.items():
        if progress:
            print(f"swa: {name}", file=sys.stderr)
        evaluations[name] = suites.evaluate(
            suite,
            full,
            examples,
            policy=policy,
            generate=generate,
            scorer=scorer,
            judge=judge,
            progress=progress,
            journal=journal,
        )
    baseline = next(iter(policies)) if baseline is None else baseline
    return Comparison(evaluations, baseline, seed=seed)


def check(
    model: Model,
    policies: Mapping[str, AttentionPolicy | Selection | None],
    examples: Sequence[Example],
    *,
    baseline: str | None = None,
    ends: bool = True,
    suite: str | None = None,
    generate: bool = False,
    scorer: str | None = None,
    judge: Judge | None = None,
    journal: str | os.PathLike[str] | None = None,
) -> dict[str, AttentionPolicy | None]:
    """What `compare` evaluates, by name.

    Raises what it would for these arguments, before anything has run.
    """
    from swa import suites

    if not policies:
        raise InputError("there are no policies to compare")
    chosen = {
        name: policy.policy if isinstance(policy, Selection) else policy
        for name, policy in policies.items()
    }
    if ends:
        chosen = with_ends(chosen)
    if baseline is not None and baseline not in chosen:
        raise InputError(
            f"there is no {baseline!r} to compare with: choose from {', '.join(chosen)}"
        )
    for policy in chosen.values():
        if policy is not None:
            model.patch(policy)  # refuses another model's
    suites.check(
        suite, model, examples, generate=generate, scorer=scorer, judge=judge, journal=journal
    )
    return chosen


def with_ends(
    policies: Mapping[str, AttentionPolicy | None],
) -> dict[str, AttentionPolicy | None]:
    """`policies` after both ends of the gap, if these are not among them.

    The first policy says how layers slide where all do.
    """
    given = [policy for policy in policies.values() if policy is not None]
    found: dict[str, AttentionPolicy | None] = {}
    if None not in policies.values():
        found[FULL] = None
    if given and all(policy.full_attention_layers for policy in given):
        found[SLIDING] = replace(given[0], layer_types=None)
    for name in found.keys() & policies.keys():
        raise InputError(f"{name!r} is the name of another policy here: choose another name")
    return found | dict(policies)


def format_value(value: float, measure: Measure) -> str:
    """For people: nats with three decimals, or per cent."""
    return f"{value:.3f}" if measure == "nll" else f"{value:.0%}"


def format_difference(difference: PairedDifference, measure: Measure) -> str:
    """For people: nats, or percentage points, and the interval if there is one."""
    scale, digits = _UNITS[measure]
    text = f"{scale * difference.difference:+.{digits}f}"
    return f"{text} {format_interval(difference, measure)}".rstrip()


def format_interval(difference: PairedDifference, measure: Measure) -> str:
    """The interval, with a star where it leaves out zero; empty if there is none."""
    if difference.interval is None:
        return ""
    scale, digits = _UNITS[measure]
    low, high = (f"{scale * bound:+.{digits}f}" for bound in difference.interval)
    return f"[{low}, {high}]{'*' if difference.excludes_zero else ''}"


def format_cell(difference: PairedDifference, measure: Measure) -> str:
    """The interval alone, for tables that are wide enough; without one, the difference."""
    return format_interval(difference, measure) or format_difference(difference, measure)


# What differences are multiplied with for people, and decimals shown.
_UNITS: dict[Measure, tuple[int, int]] = {
    "nll": (1, 3),
    "greedy_match": (100, 0),
    "score": (100, 0),
}
