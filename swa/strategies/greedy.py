"""Strategies that build a selection up or strip it down, with a new gradient each round."""

from __future__ import annotations

from dataclasses import dataclass

from swa.errors import InputError
from swa.problem import Problem
from swa.strategies.base import Batches, Move, Proposal, best, check_count, gates


@dataclass(frozen=True)
class Forward:
    """Greedy adding: from all sliding, a few layers a round, by the gradient at what is chosen.

    Args:
        each: layers a round.
        batch: examples a round, in turns; None: all.
        seed: of the turns.
    """

    each: int = 2
    batch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self.each, "each")
        check_count(self.batch, "batch")
        check_count(self.seed, "seed", 0)

    def propose(self, problem: Problem, size: int) -> Proposal:
        batches, moves = Batches(problem.tasks, self.batch, self.seed), []
        chosen: tuple[int, ...] = ()
        while len(chosen) < size:
            loss, gradient = problem.gradient(gates(problem.num_layers, chosen), batches.next())
            slope = gradient.mean(axis=0)
            left = [layer for layer in problem.selectable if layer not in chosen]
            added = best(-slope, left, min(self.each, size - len(chosen)))
            moves.append(Move("add", added, float(slope[list(added)].sum()), float(loss.mean())))
            chosen = tuple(sorted(chosen + added))
        return Proposal(chosen, tuple(moves))


@dataclass(frozen=True)
class Backward:
    """Elimination: from all full, in equal rounds, those whose removal promises to hurt least.

    It is blind where full attention answers with certainty: there all gradients vanish; with the
    divergence from full attention they always do, so that is refused.

    Args:
        rounds: number of gradients.
        batch: examples a round, in turns; None: all.
        seed: of the turns.
    """

    rounds: int = 6
    batch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self.rounds, "rounds")
        check_count(self.batch, "batch")
        check_count(self.seed, "seed", 0)

    def propose(self, problem: Problem, size: int) -> Proposal:
        if problem.objective == "kl":
            raise InputError(
                "backward starts from full attention, where the divergence from it has no gradient:"
                ' take another strategy, or the objective "nll"'
            )
        batches, moves = Batches(problem.tasks, self.batch, self.seed), []
        chosen = problem.selectable
        excess = len(chosen) - size
        rounds = min(self.rounds, excess)
        for left in reversed(range(rounds)):
            loss, gradient = problem.gradient(gates(problem.num_layers, chosen), batches.next())
            slope = gradient.mean(axis=0)
            kept = best(-slope, chosen, size + excess * left // rounds)
            removed = tuple(layer for layer in chosen if layer not in kept)
            change = -float(slope[list(removed)].sum())
            moves.append(Move("remove", removed, change, float(loss.mean())))
            chosen = kept
        return Proposal(chosen, tuple(moves))
