"""The relaxed problem: gates between 0 and 1 whose sum is the budget."""

from __future__ import annotations

from dataclasses import dataclass

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
        seed: of the turns.
    """

    steps: int = 8
    batch: int | None = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self.steps, "steps")
        check_count(self.batch, "batch")

    def propose(self, problem: Problem, size: int) -> Proposal:
        layers = problem.selectable
        alpha = gates(problem.num_layers, layers, size / len(layers))
        batches, moves = Batches(problem.n_examples, self.batch, self.seed), []
        for step in range(self.steps):
            loss, gradient = problem.gradient(alpha, batches.next())
            slope = gradient.mean(axis=0)
            toward = best(-slope, layers, size)
            share = 2 / (step + 3)
            move = share * (gates(problem.num_layers, toward) - alpha)
            moves.append(
                Move(f"step {step + 1} toward", toward, float(slope @ move), float(loss.mean()))
            )
            alpha = alpha + move
        return Proposal(best(alpha, layers, size), tuple(moves))
