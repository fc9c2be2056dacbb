"""What the cells say, as numbers: from whatever of them is done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from benchmarks.study.cells import Cell, Selected
from benchmarks.study.runner import Study
from swa.evaluation import gap_closed
from swa.layer_scores import LayerScores, mean
from swa.selection import top_layers
from swa.stability import reliability, spearman
from swa.statistics import PairedDifference, paired_bootstrap
from swa.strategies.base import best
from swa.sweeps.graph import FULL, SLIDING, Choice, End
from swa.sweeps.tasks import Task

LEAST_GAP = 0.01
"""Nats per answer token; a share of less is a share of noise."""


@dataclass(frozen=True)
class Measured:
    """A choice in a cell; NLLs in nats per answer token."""

    layers: tuple[int, ...]
    nll_per_example: tuple[float, ...]
    tasks: tuple[str, ...]
    greedy_match: float
    prefills: float
    """What choosing takes, in prefills a calibration example."""
    passes: float
    """The same for all calibration examples together, in full passes at the headline's length."""

    @property
    def nll(self) -> float:
        return mean(self.nll_per_example)

    def of_task(self, task: str) -> float:
        """Mean NLL of one task."""
        pairs = zip(self.nll_per_example, self.tasks, strict=True)
        return mean([nll for nll, own in pairs if own == task])

    def against(self, other: Measured) -> PairedDifference:
        """NLL of this one less that of the other, on the same examples."""
        return paired_bootstrap(self.nll_per_example, other.nll_per_example, tasks=self.tasks)


@dataclass(frozen=True)
class FirstOrder:
    """First-order scores against the exact deltas of the same examples."""

    spearman: float | None
    """Of the means over the examples."""
    reliability: float | None
    """Rank correlation to expect between the exact deltas and those of as many other examples."""
    overlap: int
    """How many of the layers that either ranks highest are the same."""
    size: int
    """How many of those layers there are."""
    n_examples: int
    gradient_seconds: float
    """An example's, as `exact_seconds` and `prefill_seconds`."""
    exact_seconds: float
    prefill_seconds: float


class CellResults:
    """What is done of one cell."""

    def __init__(self, study: Study, cell: Cell) -> None:
        self.cell = cell
        self._study = study
        self._store = study.store_of(cell)
        self._found: dict[Selected | End, Measured | None] = {}

    @property
    def tier(self) -> str:
        """Of the kernels whose numbers these are."""
        return self._store.tier or ""

    @property
    def n_heldout(self) -> int:
        return len(self._study.heldout(self.cell).examples)

    @property
    def n_done(self) -> int:
        """Choices that are measured."""
        return len(self.done())

    def of(self, choice: Selected | End) -> Measured | None:
        """None: not done yet."""
        if choice not in self._found:
            self._found[choice] = self._measure(choice)
        return self._found[choice]

    def done(self, strategy: str | None = None) -> list[tuple[Selected, Measured]]:
        """The choices (of one strategy) that are measured, in order."""
        return [
            (choice, measured)
            for choice in self.cell.choices
            if strategy in (None, choice.strategy) and (measured := self.of(choice)) is not None
        ]

    def made_here(self, strategy: str, share: float | None = None) -> Measured | None:
        """What that strategy chose (within that share) at the cell's own setting."""
        return next(
            (
                measured
                for choice, measured in self.done(strategy)
                if choice.at == self.cell.setting and share in (None, choice.share)
            ),
            None,
        )

    def gap(self, measured: Measured, task: str | None = None) -> float | None:
        """Share of the way from all sliding to full attention, in this cell."""
        full, sliding = self.of(FULL), self.of(SLIDING)
        if full is None or sliding is None:
            return None
        if task is None:
            return gap_closed(measured.nll, full=full.nll, sliding=sliding.nll)
        values = (of.of_task(task) for of in (measured, full, sliding))
        nll, top, bottom = values
        return gap_closed(nll, full=top, sliding=bottom)

    def has_gap(self) -> bool | None:
        """Whether sliding hurts here beyond noise, of examples and numbers; None: unknown."""
        full, sliding = self.of(FULL), self.of(SLIDING)
        if full is None or sliding is None:
            return None
        difference = sliding.against(full)
        is_sure = difference.excludes_zero or not difference.is_trusted
        return is_sure and difference.difference > LEAST_GAP

    def first_order(self) -> FirstOrder | None:
        """None: not asked for here, or not all of it is done."""
        study, results, seconds = self._study, self._store.results, self._store.seconds
        selected, tasks = study.first_order(self.cell)
        if selected is None or any(task.key not in results for task in tasks):
            return None
        scores = self._scores(selected)
        full = study.graph(self.cell).evaluations(study.point(self.cell, FULL), results)
        if scores is None or any(task.key not in seconds for task in full):
            return None

        def median_seconds(tasks: Iterable[Task]) -> float:
            return float(np.median([seconds[task.key] for task in tasks]))

        estimates = np.array([results[task.key]["scores"] for task in tasks]).mean(axis=0)
        exact = [scores.delta[layer] or 0.0 for layer in scores.scored_layers]
        size = study.choice(selected).budget.resolve(scores.num_hidden_layers)
        tops = top_layers(scores, size), best(estimates, scores.scored_layers, size)
        return FirstOrder(
            spearman=spearman(exact, estimates[list(scores.scored_layers)]),
            reliability=reliability(scores),
            overlap=len(set(tops[0]) & set(tops[1])),
            size=size,
            n_examples=len(tasks),
            gradient_seconds=median_seconds(tasks),
            exact_seconds=median_seconds(study.base(selected).scoring),
            prefill_seconds=median_seconds(full),
        )

    def deltas(self, choice: Selected) -> list[float] | None:
        """[L]: mean exact deltas behind a top-k choice (0 where there is none); None: not done."""
        scores = self._scores(choice)
        return None if scores is None else [delta or 0.0 for delta in scores.delta]

    def _scores(self, choice: Selected) -> LayerScores | None:
        base = self._study.base(choice)
        return self._study.graph(self.cell).scores(base, self._store.results)

    def _measure(self, choice: Selected | End) -> Measured | None:
        study, results = self._study, self._store.results
        point, graph = study.point(self.cell, choice), study.graph(self.cell)
        found, chosen = graph.measured(point, results), graph.chosen(point.choice, results)
        if found is None or chosen is None:
            return None
        passes = 0.0
        if isinstance(point.choice, Choice):
            passes = chosen[1] * sum(map(study.passes, point.choice.base.examples))
        return Measured(
            layers=chosen[0],
            nll_per_example=tuple(nll for nll, _ in found),
            tasks=tuple(example.task for example in point.heldout.examples),
            greedy_match=mean([match for _, match in found]),
            prefills=chosen[1],
            passes=passes,
        )
