"""Strategies that rank the layers once and keep the best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from swa.problem import Problem
from swa.runs import F64
from swa.strategies.base import Batches, Move, Proposal, best, check_count, gates


@dataclass(frozen=True)
class TopK:
    """The paper's (arXiv 2606.27791): the largest exact single-layer deltas."""

    def propose(self, problem: Problem, size: int) -> Proposal:
        deltas = problem.deltas().mean(axis=0)
        # Not always that of the means: an adaptive sweep has fewer examples of layers far from
        # the top.
        ranking = problem.known_ranking or ()
        return _chosen(tuple(sorted(ranking[:size])), deltas, "largest deltas")


@dataclass(frozen=True)
class FirstOrder:
    """The deltas' first-order estimates: one gradient with all layers sliding."""

    def propose(self, problem: Problem, size: int) -> Proposal:
        _, gradient = problem.gradient(np.zeros(problem.num_layers))
        return _ranked(problem, -gradient.mean(axis=0), size, "steepest with all sliding")


@dataclass(frozen=True)
class Path:
    """Mean gradients along the way from all sliding to all full: one ranking for every budget.

    The integral of the gradient over alpha = s (1, ..., 1) adds up to what all layers are worth
    together, and gives each its share (Aumann and Shapley): layers that help each other, which a
    gradient at either end can miss, share what they are worth.

    Args:
        points: of the midpoint rule.
        batch: examples at each point, in turns; None: all.
        seed: of the turns.
    """

    points: int = 5
    batch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self.points, "points")
        check_count(self.batch, "batch")
        check_count(self.seed, "seed", 0)

    def benefit(self, problem: Problem) -> tuple[F64, tuple[Move, ...]]:
        """float64 [L]: each layer's share of the change from all sliding to all full."""
        batches, total, moves = Batches(problem.tasks, self.batch, self.seed), 0.0, []
        for point in range(self.points):
            weight = (point + 0.5) / self.points
            alpha = gates(problem.num_layers, problem.selectable, weight)
            loss, gradient = problem.gradient(alpha, batches.next())
            total = total - gradient.mean(axis=0) / self.points
            moves.append(Move(f"all gates at {weight:.3g}", loss=float(loss.mean())))
        return np.asarray(total), tuple(moves)

    def propose(self, problem: Problem, size: int) -> Proposal:
        benefit, moves = self.benefit(problem)
        ranked = _ranked(problem, benefit, size, "largest shares of the path")
        return Proposal(ranked.layers, moves + ranked.trace)


@dataclass(frozen=True)
class LightTransfer:
    """Least lazy layers (arXiv 2410.13846): those that attend farthest from the prompt's end.

    A layer's lazy ratio is the share of attention of the last tokens that falls on what a sliding
    layer would see. The published code leaves the causal mask out of the numerator, so its ratios
    can exceed 1; here they do not. It votes per example for a fixed half of the layers; for any
    budget, as here, the mean ratio ranks them.

    Args:
        last_tokens: whose attention counts (32 in the paper).
    """

    last_tokens: int = 32

    def __post_init__(self) -> None:
        check_count(self.last_tokens, "last_tokens")

    def propose(self, problem: Problem, size: int) -> Proposal:
        far = 1 - problem.lazy_ratios(self.last_tokens).mean(axis=0)
        chosen = best(far, problem.selectable, size)
        shares = ", ".join(f"{far[layer]:.3f}" for layer in chosen)
        return Proposal(chosen, (Move(f"attend farthest, shares {shares}", chosen),))


def _ranked(problem: Problem, benefit: F64, size: int, what: str) -> Proposal:
    return _chosen(best(benefit, problem.selectable, size), benefit, what)


def _chosen(layers: tuple[int, ...], benefit: F64, what: str) -> Proposal:
    return Proposal(layers, (Move(what, layers, -float(benefit[list(layers)].sum())),))
