"""Local search on the exact loss: swap, add and drop layers while that helps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from swa.policy import format_layers
from swa.problem import Problem
from swa.runs import F64
from swa.strategies.base import (
    Batches,
    Move,
    Plain,
    Proposal,
    Strategy,
    ask,
    check_count,
    gates,
    helps,
)

PATIENCE = 6  # changes in a row that do not help, before the search ends


@dataclass(frozen=True, order=True)
class Change:
    """Layers that come and go, and what that should do."""

    estimate: float
    """Estimated change of the mean loss. Of equal ones, those come first that add nothing."""
    added: tuple[int, ...]
    removed: tuple[int, ...]

    def applied(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({*layers, *self.added} - {*self.removed}))

    def __str__(self) -> str:
        words = (("drop", self.removed), ("add", self.added))
        return ", ".join(f"{word} {format_layers(layers)}" for word, layers in words if layers)


class LocalSearch:
    """A selection that gets better: one gradient tells what to try, exact losses decide.

    Args:
        problem: judges.
        layers: the selection to start from.
        left: how many prefills an example may still be spent.
        least: the gain that a swap must promise to be tried, nats per answer token.
    """

    def __init__(
        self,
        problem: Problem,
        layers: tuple[int, ...],
        left: Callable[[], float] = lambda: math.inf,
        least: float = 0.0,
    ) -> None:
        self.problem, self.left, self.least = problem, left, least
        self.layers, self.losses = layers, problem.loss(layers)
        self.moves: list[Move] = []
        self._slopes: dict[tuple[int, ...], F64] = {}
        # A change must help on a part of the examples, spread over the tasks, before it is
        # measured on all.
        n = problem.n_examples
        sizes = sorted({math.ceil(n / 4), math.ceil(n / 2), n})
        self._parts = [Batches(problem.tasks, size, 0).next() for size in sizes]

    @property
    def loss(self) -> float:
        """Mean over the examples, nats per answer token."""
        return float(self.losses.mean())

    def improve(self, size: int) -> None:
        """Swap one layer for another, or add one while there are fewer than `size`."""
        tried = {self.layers}
        while (slope := self._slope()) is not None:
            begun_at, failures = self.layers, 0
            while failures < PATIENCE and (change := self._exchange(slope, size, tried)):
                if self.left() < 1:
                    return
                failures = 0 if self._try(change, tried) else failures + 1
            if self.layers == begun_at:  # nothing that the gradient promises is true
                return

    def prune(self, ceiling: float | None = None) -> None:
        """Drop layers as long as the loss does not rise, or with a `ceiling` not above that.

        Those that promise no rise are tried together, then by halves; others one by one.
        """
        slope, tried = self._slope(), {self.layers}
        if slope is None:
            return
        failures = 0
        order = sorted(self.layers, key=lambda layer: (-slope[layer], layer))
        free = [layer for layer in order if slope[layer] >= 0]
        groups = [free, *([layer] for layer in order[len(free) :])]
        while groups and failures < PATIENCE and self.left() >= 1:
            group = groups.pop(0)
            if not group:
                continue
            change = Change(-float(slope[group].sum()), (), tuple(sorted(group)))
            if self._try(change, tried, self.loss if ceiling is None else ceiling):
                failures = 0
            elif len(group) > 1:
                groups[:0] = [group[: len(group) // 2], group[len(group) // 2 :]]
            else:
                failures += 1

    def _slope(self) -> F64 | None:
        """float64 [L]: the gradient here, or None where it cannot be afforded.

        It gets half of what is left at most, if need be on a part of the examples.
        """
        if self.layers not in self._slopes:
            alpha = gates(self.problem.num_layers, self.layers)
            price, left = self.problem.gradient_price, self.left()
            parts = [part for part in self._parts if price(alpha, part) <= left / 2]
            if not parts:
                return None
            self._slopes[self.layers] = self.problem.gradient(alpha, parts[-1])[1].mean(axis=0)
        return self._slopes[self.layers]

    def _exchange(self, slope: F64, size: int, tried: set[tuple[int, ...]]) -> Change | None:
        """The most promising swap or addition that has not been tried; None if none promises."""
        outside = [layer for layer in self.problem.selectable if layer not in self.layers]
        removals: list[tuple[int, ...]] = [(layer,) for layer in self.layers]
        if len(self.layers) < size:
            removals.append(())
        changes = (
            Change(float(slope[new] - slope[list(old)].sum()), (new,), old)
            for old in removals
            for new in outside
        )
        left = (change for change in changes if change.applied(self.layers) not in tried)
        found = min(left, default=None)
        return None if found is None or found.estimate > -self.least else found

    def _try(
        self, change: Change, tried: set[tuple[int, ...]], ceiling: float | None = None
    ) -> bool:
        """Make a change that helps, or with a `ceiling` one that does not rise above that."""
        layers = change.applied(self.layers)
        tried.add(layers)
        for part in self._parts:
            new, old = self.problem.loss(layers, part), self.losses[part]
            rise = float((new - old).mean())
            if not helps(new, old) if ceiling is None else rise > ceiling - self.loss:
                return False
        self.layers, self.losses = layers, self.problem.loss(layers)
        self.moves.append(Move(str(change), layers, change.estimate, self.loss))
        return True


@dataclass(frozen=True)
class Fixed:
    """The layers that it is given."""

    layers: tuple[int, ...]

    def propose(self, problem: Problem, size: int) -> Proposal:
        return Proposal(self.layers)


@dataclass(frozen=True)
class Refine:
    """Swap search: from another strategy's proposal, exchange layers while the exact loss falls.

    Args:
        start: a strategy or its name, with settings if it needs any ("random:seed=3"), or the
            layers themselves.
        prefills: most work after the start, in prefills an example; None: no limit.
    """

    start: str | Strategy | Plain | tuple[int, ...] = "first_order"
    prefills: int | None = None

    def __post_init__(self) -> None:
        check_count(self.prefills, "prefills")

    def propose(self, problem: Problem, size: int) -> Proposal:
        from swa.strategies import resolve  # which knows this class

        start = Fixed(self.start) if isinstance(self.start, tuple) else resolve(self.start)
        begun = ask(start, problem, size)
        limit = problem.cost.prefills + (self.prefills or math.inf)
        search = LocalSearch(problem, begun.layers, lambda: limit - problem.cost.prefills)
        moves = (*begun.trace, Move("start", begun.layers, loss=search.loss))
        search.improve(size)
        return Proposal(search.layers, moves + tuple(search.moves))
