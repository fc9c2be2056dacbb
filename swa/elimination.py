"""Stopping a sweep early: how many examples are enough, at a stated confidence.

Two rules work together. Both look after *units*: single examples; where all tasks have equally
many, a round of one example of each.

**Elimination** looks for the exact top k. For a pair of layers take the differences x of their
deltas, n of them in r rounds of G tasks, with mean m, and w = d (sum over tasks of the variance
within the task) / G, where d are Satterthwaite's degrees of freedom, from r - 1 (one task varies)
to n - G (all vary alike). With q = n m^2,

    E = sqrt(c / (n + c)) * ((w + q) / (w + q c / (n + c))) ^ ((d + 1) / 2)

is the likelihood ratio of the t-test for effects of variance 1 / c: for normal x of any variance
a test martingale of mean 1 under "no difference" (Lai 1976; Wang and Ramdas 2023; exactly so where
tasks vary alike, or there is one). So it exceeds p with probability 1 / p at most *over all n
together*, and looking after every unit costs nothing. A pair is told apart once
E > 2 k (K - k) / (1 - confidence): so many pairs could spoil the top k of K layers, and half of the
error is left for the other rule. A layer that k others beat is out, one that beats K - k others is
in; both are *settled*, and need no more runs.

**Shortfall** asks for less, since layers near the boundary may be as good as tied: how much more
could the best k layers be worth than the k chosen now, as a share of what those are worth? The
bound is a quantile of the bootstrap over examples (see `swa.resampling`): of the difference
between the best k of a resample and the chosen ones in it. It is looked at whenever the examples
have grown by 40%, with the other half of the error divided by the number of looks (Bonferroni).

The sweep ends when all layers are settled, or the shortfall is within the tolerance. That promises:
with probability `confidence` no layer is settled wrongly and the shortfall is no larger than said,
for examples like those drawn. Deltas of few examples are not quite normal, and what shows in one
example of twenty can hide from all of them: `tests/test_elimination.py` measures how often the
rules err on skewed, heavy-tailed and unequal noise (less often than they may).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from swa.errors import InputError
from swa.policy import format_layers
from swa.resampling import F64, checked_confidence, resampled_means, student_tail

if TYPE_CHECKING:
    from swa.budget import Budget

PRIOR_EXAMPLES = 1.0  # c above: effects of about one standard deviation are looked for
FIRST_LOOK, GROWTH = 8, 1.4  # examples at the first look at the shortfall, and until the next
MIN_UNITS = 3  # before that
N_BOOTSTRAP = 2000

Verdict = Literal["in", "out"]


@dataclass(frozen=True)
class AdaptiveStop:
    """When `score_layers` may stop: once the top layers are known well enough, this surely.

    Raises:
        InputError: a value out of range.
    """

    budget: Budget
    """Whose top layers are looked for."""
    confidence: float = 0.95
    tolerance: float = 0.05
    """How much more the best layers may be worth than the chosen ones, as a share of these."""

    def __post_init__(self) -> None:
        checked_confidence(self.confidence)
        if not isinstance(self.tolerance, (int, float)) or not 0 <= self.tolerance < math.inf:
            raise InputError(f"tolerance must be a number >= 0, not {self.tolerance!r}")


@dataclass(frozen=True)
class Settled:
    """A layer whose place was known before the examples were used up."""

    layer: int
    verdict: Verdict
    n_examples: int
    """How many it took; later ones have no delta of it."""


@dataclass(frozen=True)
class Adaptive:
    """How a sweep with an AdaptiveStop went; part of its scores."""

    size: int
    """Full layers looked for, those of the base included."""
    confidence: float
    tolerance: float
    is_decided: bool
    """Whether the examples were enough."""
    shortfall: float | None
    """Bound at the last look, as a share of what the chosen layers are worth; None before the
    first, or where they are worth nothing."""
    settled: tuple[Settled, ...]
    """In the order of settling."""
    examples: tuple[int, ...]
    """[N]: which of the examples offered were scored, in that order (they were shuffled)."""
    n_offered: int
    flops: float
    """Estimated work of the sweep as it went."""
    flops_offered: float
    """That of all layers on all examples offered."""

    @property
    def saved(self) -> float:
        """Share of the work that was not needed."""
        return 1 - self.flops / self.flops_offered

    def layers(self, verdict: Verdict) -> tuple[int, ...]:
        """The layers settled so, ascending."""
        return tuple(sorted(each.layer for each in self.settled if each.verdict == verdict))

    def __str__(self) -> str:
        enough = "enough" if self.is_decided else "not enough"
        bound = "" if self.shortfall is None else f": others add {self.shortfall:.0%} at most"
        return (
            f"{len(self.examples)} of {self.n_offered} examples were {enough} for the top"
            f" {self.size} layers (within {self.tolerance:.0%}, {self.confidence:.0%} sure){bound};"
            f" settled: {format_layers(self.layers('in')) or 'none'} in,"
            f" {format_layers(self.layers('out')) or 'none'} out;"
            f" {self.saved:.0%} of the work saved"
        )


def shuffled_units(tasks: Sequence[str], seed: int) -> list[tuple[int, ...]]:
    """The examples, by index, in the random order that the rules need, a tuple for each unit.

    Where all tasks have equally many examples, that is a design: a unit is one of each. Not where
    that would leave too few units to tell anything from.
    """
    groups: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        groups.setdefault(task, []).append(index)
    sizes = {len(members) for members in groups.values()}
    if len(sizes) > 1 or min(sizes) < MIN_UNITS:
        groups = {"": list(range(len(tasks)))}
    bits = np.random.PCG64(seed)  # raw, since NumPy keeps that stream for all time
    shuffled = [
        [members[place] for place in np.argsort(bits.random_raw(len(members)))]
        for members in groups.values()
    ]
    return list(zip(*shuffled, strict=True))


class Elimination:
    """The first rule's state, fed with one unit after the other.

    Args:
        layers: the K layers to choose from.
        size: how many of them are chosen, 1 to K - 1.
        error: probability of a wrong verdict, at most.

    Raises:
        InputError: another size, which leaves nothing to find out.
    """

    def __init__(self, layers: Sequence[int], size: int, error: float) -> None:
        if not 0 < size < len(layers):
            raise InputError(
                f"choosing {size} of {len(layers)} layers leaves nothing to find out: score without"
                " a rule to stop"
            )
        self.open = tuple(layers)
        """Layers that are neither in nor out yet."""
        self.slots = size
        """How many of the open layers will be chosen."""
        self._limit = math.log(size * (len(layers) - size) / error)
        self._n_units = 0
        # Of each pair's differences within each task: sums and sums of squares, [G, K, K].
        self._sums = self._squares = np.zeros((1, len(layers), len(layers)))
        self._better = np.zeros((len(layers), len(layers)), dtype=bool)

    def observe(self, unit: F64) -> dict[int, Verdict]:
        """Take in a unit, float64 [G, open layers]; returns the layers that this settles."""
        differences = unit[:, :, None] - unit[:, None, :]
        self._n_units += 1
        self._sums = self._sums + differences
        self._squares = self._squares + differences**2
        # A claim once made stands: the bound is over all looks together.
        self._better |= _log_evidence(self._n_units, self._sums, self._squares) > self._limit
        verdicts = self._verdicts()
        self.slots -= sum(verdict == "in" for verdict in verdicts.values())
        kept = np.flatnonzero([layer not in verdicts for layer in self.open])
        self.open = tuple(self.open[index] for index in kept)
        pairs = np.ix_(kept, kept)
        self._sums, self._squares = (
            self._sums[:, pairs[0], pairs[1]],
            self._squares[:, pairs[0], pairs[1]],
        )
        self._better = self._better[pairs]
        return verdicts

    def _verdicts(self) -> dict[int, Verdict]:
        better = self._better & ~self._better.T  # claims that contradict each other are void
        n_open = len(self.open)
        won = better.sum(axis=1) >= n_open - self.slots
        lost = better.sum(axis=0) >= self.slots
        if won.sum() > self.slots or lost.sum() > n_open - self.slots:
            return {}  # so are those in a circle
        verdicts: list[Verdict | None] = [
            "in" if w else "out" if o else None for w, o in zip(won, lost, strict=True)
        ]
        return {layer: v for layer, v in zip(self.open, verdicts, strict=True) if v is not None}


def _log_evidence(n_units: int, sums: F64, squares: F64) -> F64:
    """float64 [K, K]: log E of each pair, -inf where the first layer is not the better one.

    `sums` and `squares`, float64 [G, K, K], are of the differences within each task.
    """
    if n_units < 2:
        return np.full(sums.shape[1:], -np.inf)
    n_tasks = len(sums)
    n = n_units * n_tasks
    variance = np.maximum(squares - sums**2 / n_units, 0) / (n_units - 1)
    spread, total = variance.sum(axis=0), sums.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = (n_units - 1) * spread**2 / (variance**2).sum(axis=0)
        freedom = np.where(spread > 0, freedom, n - n_tasks)
        within, effect = freedom * spread / n_tasks, total**2 / n
        shrunk = effect * PRIOR_EXAMPLES / (n + PRIOR_EXAMPLES)
        ratio: F64 = np.log((within + effect) / (within + shrunk))
    evidence = (freedom + 1) / 2 * ratio - math.log1p(n / PRIOR_EXAMPLES) / 2
    return np.where(total > 0, evidence, -np.inf)


def shortfall(values: F64, n_tasks: int, slots: int, error: float, seed: int) -> float:
    """By how much the best `slots` columns could be better than those with the largest means.

    Args:
        values: float64 [n, K], rows of the G tasks in turns.
        n_tasks: G.
        slots: how many columns are chosen.
        error: probability that the result is too small.
        seed: of the bootstrap.

    Returns:
        Sum of the best columns' means less that of the chosen ones', in the unit of the values.
    """
    n = len(values)
    strata = tuple(tuple(range(task, n, n_tasks)) for task in range(n_tasks))
    means = resampled_means(values, strata, n_bootstrap=N_BOOTSTRAP, seed=seed)
    chosen = np.argsort(-values.mean(axis=0), kind="stable")[:slots]
    best = np.sort(means, axis=1)[:, values.shape[1] - slots :].sum(axis=1)
    tail = student_tail(error, n - n_tasks)
    return float(np.quantile(best - means[:, chosen].sum(axis=1), 1 - tail))


def looks_of(n_units: int, n_tasks: int) -> tuple[int, ...]:
    """After how many of so many units, each of so many examples, the shortfall is looked at."""
    looks, unit = [], max(MIN_UNITS, -(-FIRST_LOOK // n_tasks))
    if n_units < unit:
        return ()
    while unit < n_units:
        looks.append(unit)
        unit = max(unit + 1, math.floor(GROWTH * unit))
    return (*looks, n_units)


class StoppingRule:
    """An AdaptiveStop at work in a sweep.

    Args:
        stop: what was asked for.
        layers: those that the sweep flips.
        size: full layers that the budget of `stop` comes to.
        n_fixed: how many of those are full in the base already.
        tasks: [N], of the examples offered.
        seed: of their order, and of the bootstrap.

    Raises:
        InputError: the budget leaves nothing to choose.
    """

    def __init__(
        self,
        stop: AdaptiveStop,
        layers: Sequence[int],
        size: int,
        n_fixed: int,
        tasks: Sequence[str],
        seed: int,
    ) -> None:
        self.units = shuffled_units(tasks, seed)
        """Indices of examples, in the order of running."""
        self.is_decided = False
        """Whether no more examples are needed."""
        self._stop, self._size, self._seed = stop, size, seed
        self._n_offered, self._n_tasks = len(tasks), len(self.units[0])
        self._error = (1 - stop.confidence) / 2  # of each rule
        self._elimination = Elimination(layers, size - n_fixed, self._error)
        self._looks = looks_of(len(self.units), self._n_tasks)
        self._rows: list[Sequence[float | None]] = []
        self._settled: list[Settled] = []
        self._examples: list[int] = []
        self._flops = 0.0
        self._shortfall: float | None = None

    @property
    def identity(self) -> dict[str, float]:
        """What a run depends on beside the inputs of its examples."""
        stop = self._stop
        return {
            "size": self._size,
            "confidence": stop.confidence,
            "tolerance": stop.tolerance,
            "seed": self._seed,
        }

    @property
    def open_layers(self) -> tuple[int, ...]:
        """The layers to flip in the next examples."""
        return self._elimination.open

    def observe(self, deltas: Mapping[int, Sequence[float | None]], flops: float) -> bool:
        """Take in a unit, deltas [L] by example, and its work; whether less is left than before."""
        self._examples += deltas
        self._rows += deltas.values()
        self._flops += flops
        unit = np.array([[row[layer] for layer in self.open_layers] for row in deltas.values()])
        verdicts = self._elimination.observe(unit)
        self._settled += [Settled(*each, len(self._examples)) for each in verdicts.items()]
        if not 0 < self._elimination.slots < len(self.open_layers):
            self.is_decided, self._shortfall = True, 0.0
        elif len(self._examples) // self._n_tasks in self._looks:
            self._look()
        return bool(verdicts) or self.is_decided

    def _look(self) -> None:
        """Bound the shortfall of the open layers; the settled ones are where they belong."""
        slots = self._elimination.slots
        values = np.array([[row[layer] for layer in self.open_layers] for row in self._rows])
        bound = shortfall(values, self._n_tasks, slots, self._error / len(self._looks), self._seed)
        certain = [each.layer for each in self._settled if each.verdict == "in"]
        worth = float(np.sort(values.mean(axis=0))[-slots:].sum())
        for layer in certain:
            worth += float(np.mean([d for row in self._rows if (d := row[layer]) is not None]))
        self._shortfall = bound / worth if worth > 0 else None
        self.is_decided = self._shortfall is not None and self._shortfall <= self._stop.tolerance

    def record(self, flops_offered: float) -> Adaptive:
        """How it went, for the scores."""
        return Adaptive(
            size=self._size,
            confidence=self._stop.confidence,
            tolerance=float(self._stop.tolerance),
            is_decided=self.is_decided,
            shortfall=self._shortfall,
            settled=tuple(self._settled),
            examples=tuple(self._examples),
            n_offered=self._n_offered,
            flops=self._flops,
            flops_offered=flops_offered,
        )
