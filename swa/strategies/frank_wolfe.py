"""The relaxed problem: gates between 0 and 1 whose sum is the budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from swa.errors import InputError
from swa.problem import Problem
from swa.strategies.base import Batches, Move, Proposal, best, check_count, gates


@dataclass(frozen=True)
class FrankWolfe:
    """Frank-Wolfe over gates that add up to the budget, rounded to the largest.

    It starts with the budget spread evenly over all layers, where layers that are useful only
    together can be seen; each step moves toward the layers whose gates promise most.

    Args:
        steps: number of gradients.
        batch: examples a step, in turns; None: all.
        momentum: weight of the steps before in the gradient that a step follows, in 0..1.
        seed: of the turns.
    """

    steps: int = 8
    batch: int | None = 4
    momentum: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self.steps, "steps")
        check_count(self.batch, "batch")
        check_count(self.seed, "seed", 0)
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum must be in 0..1, without 1, not {self.momentum!r}")

    def propose(self, problem: Problem, size: int) -> Proposal:
        layers = problem.selectable
        if size in (0, len(layers)):
            return Proposal(layers[:size])
        alpha = gates(problem.num_layers, layers, size / len(layers))
        batches, moves = Batches(problem.tasks, self.batch, self.seed), []
        slope = np.zeros(problem.num_layers)
        for step in range(self.steps):
            loss, gradient = problem.gradient(alpha, batches.next())
            here = gradient.mean(axis=0)
            slope = self.momentum * slope + (1 - self.momentum if step else 1) * here
            toward = best(-slope, layers, size)
            share = 2 / (step + 3)
            move = share * (gates(problem.num_layers, toward) - alpha)
            moves.append(
                Move(f"step {step + 1} toward", toward, float(slope @ move), float(loss.mean()))
            )
            alpha = alpha + move
        return Proposal(best(alpha, layers, size), tuple(moves))
