"""Choices that look at no gradient: the usual patterns, as baselines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from swa.patterns import first, last, periodic, periodic_choices
from swa.problem import Problem
from swa.strategies.base import Move, Proposal, check_count


@dataclass(frozen=True)
class Periodic:
    """Evenly spaced layers; of all offsets the one with the least loss, unless one is named."""

    offset: int | None = None

    def propose(self, problem: Problem, size: int) -> Proposal:
        total = len(problem.selectable)
        if size == 0:
            return Proposal(())
        if self.offset is not None:
            return Proposal(_named(problem, periodic(total, size, self.offset)))
        choices = [_named(problem, places) for places in periodic_choices(total, size)]
        losses = [float(problem.loss(layers).mean()) for layers in choices]
        trace = tuple(
            Move(f"offset {offset}", layers, loss=loss)
            for offset, (layers, loss) in enumerate(zip(choices, losses, strict=True))
        )
        return Proposal(choices[int(np.argmin(losses))], trace)


@dataclass(frozen=True)
class First:
    """The lowest layers."""

    def propose(self, problem: Problem, size: int) -> Proposal:
        return Proposal(_named(problem, first(len(problem.selectable), size)))


@dataclass(frozen=True)
class Last:
    """The highest layers."""

    def propose(self, problem: Problem, size: int) -> Proposal:
        return Proposal(_named(problem, last(len(problem.selectable), size)))


@dataclass(frozen=True)
class Random:
    """Layers drawn at random."""

    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self.seed, "seed", 0)

    def propose(self, problem: Problem, size: int) -> Proposal:
        # Raw bits, since NumPy keeps that stream for all time.
        keys = np.random.PCG64(self.seed).random_raw(len(problem.selectable))
        return Proposal(_named(problem, np.argsort(keys, kind="stable")[:size]))


def _named(problem: Problem, places: np.typing.ArrayLike) -> tuple[int, ...]:
    """Places among the selectable layers as those layers."""
    return tuple(sorted(problem.selectable[place] for place in np.asarray(places, int).tolist()))
