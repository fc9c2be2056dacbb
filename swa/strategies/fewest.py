"""The budget turned round: as few full layers as a tolerance allows."""

from __future__ import annotations

from swa.problem import Problem
from swa.strategies.base import Move, Plain, Proposal, Strategy, ask
from swa.strategies.joint import Joint
from swa.strategies.rankings import Path
from swa.strategies.refine import LocalSearch


def fewest(strategy: Strategy | Plain, problem: Problem, tolerance: float) -> Proposal:
    """The fewest layers found whose measured mean loss is within `tolerance` of full attention.

    The size is bracketed by halving; then the strategy proposes at smaller and smaller sizes, and
    layers are dropped from what it proposes, as long as the loss stays within the tolerance. Every
    step is measured; that no smaller selection exists is not proven.

    tolerance: nats per answer token, >= 0.
    """
    problem = problem.fresh()
    everything = problem.selectable
    limit = float(problem.loss(everything).mean()) + tolerance
    moves = [Move("full attention", everything, loss=limit - tolerance)]

    def within(what: str, layers: tuple[int, ...]) -> bool:
        loss = float(problem.loss(layers).mean())
        moves.append(Move(what, layers, loss=loss))
        return loss <= limit

    if within("no layer", ()):
        return Proposal((), tuple(moves), problem.cost)
    chosen, low = everything, 0  # within the limit; too few by all that is known
    bracketing = Path() if isinstance(strategy, Joint) else strategy
    while len(chosen) - low > 1:
        size = (low + len(chosen)) // 2
        layers = ask(bracketing, problem, size).layers
        if within(f"{size} layers", layers):
            chosen = layers
        else:
            low = size
    chosen = _stripped(problem, chosen, limit, moves)
    while chosen:
        fewer = ask(strategy, problem, len(chosen) - 1).layers
        if not within(f"{len(chosen) - 1} layers", fewer):
            break
        chosen = _stripped(problem, fewer, limit, moves)
    return Proposal(chosen, tuple(moves), problem.cost)


def _stripped(
    problem: Problem, layers: tuple[int, ...], limit: float, moves: list[Move]
) -> tuple[int, ...]:
    """What is left when layers are dropped as long as the mean loss stays within `limit`."""
    search = LocalSearch(problem, layers)
    search.prune(limit)
    moves += search.moves
    return search.layers
