"""The default: several proposals, each measured, the best made better."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from swa.problem import Problem
from swa.strategies.base import Move, Proposal, Strategy, best, check_count, gates, helps
from swa.strategies.frank_wolfe import FrankWolfe
from swa.strategies.greedy import Forward
from swa.strategies.rankings import Path
from swa.strategies.refine import LocalSearch

SEARCH_SHARE = 0.35  # of what is left after the first measurements
NO_LAYER, FIRST_ORDER = "no layer", "first order"  # what the trace calls them
LEAST_GAIN = 1e-3  # of what is gained already: swaps that promise less are not tried
FEWEST = 4  # steps that Frank-Wolfe needs


@dataclass(frozen=True)
class Joint:
    """A verified portfolio: the best of several proposals by exact loss, refined by swaps.

    No single strategy is safe: gradients at one end miss layers that help each other, those at the
    other end vanish where the model is certain, and gates in between leak. So first order (and the
    exact top-k where scores are there), Frank-Wolfe, greedy adding and the path propose, each from
    a part of the examples, and one pass an example measures each. The better of first order and
    exact top-k stands until another proposal, and then swaps, lower the mean loss, and not by a few
    examples alone. Layers that do not lower the loss are dropped: the budget is an upper bound. On
    the calibration examples it is never worse than first order or exact top-k.

    Args:
        prefills: most work, in prefills an example; None: the number of layers, which with a pass
            in full attention to compare with is what a plain sweep takes. First order is measured
            in any case.
        seed: of the turns that examples take.
    """

    prefills: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self.prefills, "prefills")
        check_count(self.seed, "seed", 0)

    def propose(self, problem: Problem, size: int) -> Proposal:
        limit = problem.cost.prefills + (self.prefills or problem.num_layers)
        layers, n = problem.selectable, problem.n_examples
        none_full = np.zeros(problem.num_layers)
        slope = problem.gradient(none_full)[1].mean(axis=0)
        candidates = {NO_LAYER: (), FIRST_ORDER: best(-slope, layers, size)}
        if problem.known_ranking is not None:
            candidates["exact top-k"] = tuple(sorted(problem.known_ranking[:size]))
        losses = {name: problem.loss(chosen) for name, chosen in candidates.items()}
        start = min(losses, key=lambda name: losses[name].mean())

        price = problem.gradient_price(gates(problem.num_layers, layers, 0.5)) / n
        until = limit - SEARCH_SHARE * (limit - problem.cost.prefills)
        for name, (weight, make) in PORTFOLIO.items():
            share = weight * (until - problem.cost.prefills)
            if name == "Frank-Wolfe":  # the one that must not be left out, if it can be had at all
                share = max(share, min(FEWEST * price + 1, limit - problem.cost.prefills))
            strategy = make(self.seed, int((share - 1) / price), n, size)
            if size > 0 and strategy is not None:
                candidates[name] = strategy.propose(problem, size).layers
                losses[name] = problem.loss(candidates[name])
                if helps(losses[name], losses[start]):
                    start = name

        search = LocalSearch(
            problem,
            candidates[start],
            left=lambda: limit - problem.cost.prefills,
            least=LEAST_GAIN * float((losses[NO_LAYER] - losses[start]).mean()),
        )
        search.improve(size)
        search.prune()
        search.improve(size)  # where pruning has made room
        moves = [Move(name, candidates[name], loss=float(losses[name].mean())) for name in losses]
        return Proposal(search.layers, (*moves, *search.moves))


def _frank_wolfe(seed: int, n_gradients: int, n: int, size: int) -> Strategy | None:
    steps = min(8, n_gradients)
    if steps < FEWEST:
        return None
    return FrankWolfe(steps, min(math.ceil(n / 2), n_gradients // steps), seed=seed)


def _path(seed: int, n_gradients: int, n: int, size: int) -> Strategy | None:
    points = min(5, n_gradients)
    return Path(points, min(n, n_gradients // points), seed) if points >= 2 else None


def _forward(seed: int, n_gradients: int, n: int, size: int) -> Strategy | None:
    rounds = min(5, n_gradients, size)
    if rounds < 2:
        return None
    return Forward(math.ceil(size / rounds), min(n, n_gradients // rounds), seed)


# In the order in which they get their part of what is left of the work.
PORTFOLIO = {"Frank-Wolfe": (0.6, _frank_wolfe), "forward": (0.5, _forward), "path": (1.0, _path)}
