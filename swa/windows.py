"""Several windows at once: each layer gets one of them, or full attention, within a budget.

The gates of a layer are the weights of its choices. The gradient over them gives every choice a
value, the budget's price of a choice is known, and the best choice of all layers is a
multiple-choice knapsack. As among layers, values change with what others have: so there are several
proposals, from all-smallest windows and from mixtures (Frank-Wolfe, whose steps are knapsacks,
too), and the exact loss decides.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from swa import cost
from swa.budget import Budget
from swa.errors import InputError
from swa.gates import Objective, finite_gradient
from swa.knapsack import knapsack
from swa.layer_scores import checked_integer
from swa.policy import AttentionPolicy, compact
from swa.problem import CalibrationProblem
from swa.runs import F64, Cost
from swa.strategies.base import Batches, Move

if TYPE_CHECKING:
    from swa.config import ModelConfig
    from swa.examples import Example
    from swa.journal import Journal
    from swa.model import Model

FULL = 0  # as a window
MAX_WINDOWS = 7  # beside full attention
STEPS, MOMENTUM = 8, 0.5  # of Frank-Wolfe
FRANK_WOLFE_SHARE = 0.6  # of what is left after the first measurements
TRIES = 6  # exchanges in a row that do not help, before the search ends

Assignment = tuple[int, ...]  # [L]: the choice of each layer


@dataclass(frozen=True)
class Mixture:
    """What `choose_windows` found."""

    policy: AttentionPolicy
    """With a window for each layer, and without `layer_types`."""
    layers: tuple[int, ...]
    """The full ones."""
    losses: F64
    """float64 [N], of these."""
    trace: tuple[Move, ...]


class MixtureProblem(CalibrationProblem):
    """The problem under the smallest window, where layers may have others, too.

    Args:
        policy: with one window, which is among the choices.
        windows: the other choices, beside full attention.
        model, examples, objective, progress, journal: as CalibrationProblem.

    Raises:
        InputError: not window sizes, too many of them, or a policy with a window for each layer;
            and as CalibrationProblem.
    """

    def __init__(
        self,
        model: Model,
        examples: Sequence[Example],
        policy: AttentionPolicy,
        windows: Sequence[int],
        objective: Objective = "nll",
        *,
        progress: Callable[[Cost], None] | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.windows = _checked_windows(policy, windows)
        smallest = replace(policy, sliding_window=self.windows[0])
        super().__init__(model, examples, smallest, objective, progress=progress, journal=journal)

    @property
    def n_choices(self) -> int:
        """C."""
        return len(self.windows)

    def split(self, choice: Assignment) -> tuple[AttentionPolicy, tuple[int, ...]]:
        """The policy with a window for each layer, and the layers that are full."""
        full = tuple(i for i, c in enumerate(choice) if self.windows[c] == FULL)
        own = tuple(self.windows[c] or self.windows[0] for c in choice)
        return replace(self.policy, sliding_window=own), full

    def describe(self, choice: Assignment) -> str:
        """For a trace: the windows by runs of layers."""
        return compact(tuple(self.windows[c] or "full" for c in choice))

    def mixed_loss(self, choice: Assignment) -> F64:
        """float64 [N]: the exact loss of an assignment."""
        policy, full = self.split(choice)
        windows = tuple(self.windows[c] for c in choice)
        losses = []
        for index in range(self.n_examples):
            self.prepare(index)
            work = cost.nll_work(self.model.config, policy, full, *self._lengths(index)).flops

            def run(index: int = index) -> F64:
                return np.array([self.hybrid_loss(policy, full, index)])

            key = "loss of windows", windows, index
            losses.append(self._runs.get(key, run, self._prefills(work))[0][0])
        return np.array(losses)

    def mixed_gradient(self, weights: F64, examples: Sequence[int]) -> F64:
        """float64 [L, C]: the mean gradient over the weights [L, C] of these examples."""
        total = np.zeros(weights.shape)
        for index in examples:
            self.prepare(index)

            def run(index: int = index) -> F64:
                found = self.model.gates_example(
                    self.examples[index],
                    self.policy,
                    weights,
                    self.windows[1:],
                    reference=self.reference(index),
                )
                return finite_gradient(np.asarray(found.gradient.sum(axis=2)), index).ravel()

            key = "gradient of windows", (*self.windows, *weights.ravel().tolist()), index
            work = self._mixed_work(weights, index)
            total += self._runs.get(key, run, self._prefills(work))[0].reshape(weights.shape)
        return total / len(examples)

    def mixed_price(self, weights: F64) -> float:
        """What a gradient takes, in prefills an example."""
        work = (self._mixed_work(weights, index) for index in range(self.n_examples))
        return self._prefills(sum(work))

    def _mixed_work(self, weights: F64, index: int) -> float:
        lengths = self._lengths(index)
        return cost.gradient_work(*self._shape, weights, *lengths, self.windows[1:]).flops


def choose_windows(
    problem: MixtureProblem, budget: Budget, seed: int = 0, prefills: int | None = None
) -> Mixture:
    """Give each layer one of the problem's windows or full attention, within a budget.

    Args:
        budget: of `prefill_flops` or `kv_bytes`.
        seed: of the turns that examples take.
        prefills: most work, in prefills an example; None: the number of layers. One gradient, and
            a pass for each proposal, are made in any case.

    Raises:
        InputError: another budget, or one that the smallest window in every layer exceeds.
    """
    search = _Search(problem, *_prices(problem, budget), prefills or problem.num_layers)
    n_layers, n_choices = problem.num_layers, problem.n_choices
    smallest = np.zeros((n_layers, n_choices))
    smallest[:, 0] = 1
    everything = list(range(problem.n_examples))
    slope = problem.mixed_gradient(smallest, everything)
    search.measure("smallest windows", (0,) * n_layers)
    search.measure("first order", search.best(-slope))
    weights, mean = _frank_wolfe(search, smallest, seed)
    if weights is not None:
        slope = mean
        search.measure("Frank-Wolfe", search.best(weights))
        search.measure("mean gradient", search.best(-slope))
    for place in range(n_choices - 1):  # one window and full, as elsewhere
        alone = np.full(slope.shape, -np.inf)
        alone[:, [place, -1]] = -slope[:, [place, -1]]
        if search.fits((place,) * n_layers):
            search.measure(f"{problem.windows[place]} and full", search.best(alone))
    search.exchange(everything)
    policy, full = problem.split(search.choice)
    return Mixture(policy, full, search.losses, tuple(search.moves))


def _frank_wolfe(search: _Search, smallest: F64, seed: int) -> tuple[F64 | None, F64]:
    """Weights [L, C] whose price is the limit, and the mean gradient on the way to them.

    From the budget spent evenly on full attention; None where no step can be afforded.
    """
    problem = search.problem
    full = np.zeros(smallest.shape)
    full[:, -1] = 1
    share = min(1.0, search.limit / max(float(search.price[:, -1].sum()), 1e-300))
    weights = (1 - share) * smallest + share * full
    weights[search.fixed] = smallest[search.fixed]
    price = problem.mixed_price(weights) / problem.n_examples
    left = FRANK_WOLFE_SHARE * (search.left - 1 - problem.n_choices)  # a pass for each proposal
    steps = min(STEPS, int(left / price))
    mean = np.zeros(smallest.shape)
    if steps <= 0:
        return None, mean
    size = min(problem.n_examples, int(left / price / steps))
    batches, slope = Batches(problem.tasks, size, seed), np.zeros(smallest.shape)
    for step in range(steps):
        here = problem.mixed_gradient(weights, batches.next())
        slope = MOMENTUM * slope + (1 - MOMENTUM if step else 1) * here
        mean += here / steps
        toward = np.eye(problem.n_choices)[list(search.best(-slope))]
        weights = weights + 2 / (step + 3) * (toward - weights)
    return weights, mean


class _Search:
    """The best assignment so far.

    price: [L, C], beyond that of the smallest window; limit: of its sum.
    """

    def __init__(self, problem: MixtureProblem, price: F64, limit: float, prefills: float) -> None:
        self.problem, self.price, self.limit = problem, price, limit
        self.fixed = [i for i in range(problem.num_layers) if i not in problem.selectable]
        self.moves: list[Move] = []
        self.choice: Assignment = ()
        self.losses = np.full(problem.n_examples, np.inf)
        self._end = problem.spent.prefills + prefills
        self._known: set[Assignment] = set()

    @property
    def left(self) -> float:
        """Prefills an example."""
        return self._end - self.problem.spent.prefills

    def fits(self, choice: Assignment) -> bool:
        return float(self.price[range(len(choice)), choice].sum()) <= self.limit

    def best(self, value: F64) -> Assignment:
        """The assignment of the largest sum of values [L, C] that fits."""
        value = value.copy()
        value[self.fixed] = -np.inf
        value[self.fixed, 0] = 0.0
        return knapsack(value, self.price, self.limit)

    def measure(self, what: str, choice: Assignment, estimate: float | None = None) -> bool:
        """Whether it is better than all before it; what was measured before is not again."""
        if choice in self._known:
            return False
        self._known.add(choice)
        losses = self.problem.mixed_loss(choice)
        text, full = f"{what}: {self.problem.describe(choice)}", self.problem.split(choice)[1]
        self.moves.append(Move(text, full, estimate, float(losses.mean())))
        if losses.mean() >= self.losses.mean():
            return False
        self.choice, self.losses = choice, losses
        return True

    def exchange(self, examples: Sequence[int]) -> None:
        """Change the choice of a layer, or of two, as long as that helps and can be afforded."""
        improved = True
        while improved:
            weights = np.eye(self.problem.n_choices)[list(self.choice)]
            if self.problem.mixed_price(weights) > self.left / 2:
                return
            slope = self.problem.mixed_gradient(weights, examples)
            improved = False
            for estimate, choice in itertools.islice(self._changes(slope), TRIES):
                if self.left < 1:
                    return
                if self.measure("exchange", choice, estimate):
                    improved = True
                    break

    def _changes(self, slope: F64) -> Iterator[tuple[float, Assignment]]:
        """What fits and promises to help, the most promising first."""
        here = slope[range(len(self.choice)), self.choice]
        single = [
            (float(slope[layer, c] - here[layer]), ((layer, c),))
            for layer in self.problem.selectable
            for c in range(self.problem.n_choices)
            if c != self.choice[layer]
        ]
        pairs = (
            (a[0] + b[0], a[1] + b[1])
            for a, b in itertools.combinations(single, 2)
            if a[1][0][0] != b[1][0][0]
        )
        for estimate, change in sorted(c for c in (*single, *pairs) if c[0] < 0):
            choice = list(self.choice)
            for layer, c in change:
                choice[layer] = c
            if self.fits(tuple(choice)) and tuple(choice) not in self._known:
                yield estimate, tuple(choice)


def _prices(problem: MixtureProblem, budget: Budget) -> tuple[F64, float]:
    """What each choice costs beyond the smallest window, [L, C], and how much they may in all."""
    config: ModelConfig = problem.model.config
    price, limit = budget.priced(config, problem.policy)
    smallest = price(problem.policy, ())
    table = np.zeros((problem.num_layers, problem.n_choices))
    for layer in problem.selectable:
        for c in range(1, problem.n_choices):
            choice = [0] * problem.num_layers
            choice[layer] = c
            table[layer, c] = price(*problem.split(tuple(choice))) - smallest
    return table, limit - smallest


def name_of(windows: Sequence[int]) -> str:
    """What a selection among these windows has in the place of a strategy's name."""
    return f"windows {', '.join(map(str, windows))}"


def chosen_among(strategy: str) -> tuple[int, ...]:
    """The windows, ascending, that `name_of` named; none if it is the name of a strategy."""
    if not re.fullmatch(r"windows [0-9]+(, [0-9]+)+", strategy):
        return ()
    return tuple(map(int, strategy.removeprefix("windows ").split(", ")))


def _checked_windows(policy: AttentionPolicy, windows: Sequence[int]) -> tuple[int, ...]:
    """The choices, ascending, FULL last."""
    own = policy.sliding_window
    if not isinstance(own, int):
        raise InputError("windows= are choices for every layer: give the policy one sliding_window")
    sizes = sorted({own, *(checked_integer(window, "a window", 1) for window in windows)})
    if not 2 <= len(sizes) <= MAX_WINDOWS:
        raise InputError(
            f"windows= takes two to {MAX_WINDOWS} sizes, the policy's own among them, not {sizes}"
        )
    return (*sizes, FULL)
