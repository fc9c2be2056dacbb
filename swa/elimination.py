"""Stopping a sweep early: which layers are in the top k, or out of it, at a stated confidence.

The rule. A unit is one example; where all tasks have equally many, a round of one example of each.
For a pair of layers take the differences x of their deltas, one a unit: sum S, sum of squares V.
Under "no difference", with normal x of any variance,

    E(n) = sqrt(c / (n + c)) * (V / (V - S^2 / (n + c))) ^ (n / 2)

is a test martingale of mean 1 (the t-test's likelihood ratio against effects of variance 1 / c, as
in Lai 1976 and Wang and Ramdas 2023), so it exceeds p with probability 1 / p at most, *over all n
together*: looking after every unit costs nothing. A pair is told apart once E > pairs / (1 -
confidence), the sign of S saying which is better; `pairs` = k (K - k) is the number of pairs that
could spoil the top k of K layers, so Bonferroni's bound covers all of them.

A layer that k others beat is out; one that beats K - k others is in; both are settled for good and
need no more runs. The selection is decided when all layers are settled, or when no layer left out
can be better than a chosen one by more than the tolerance (the same test of x + tolerance).

What that promises: with probability `confidence` no layer is settled wrongly, and no layer left out
of a decided selection is better than a chosen one by more than the tolerance, for examples like
those drawn. Differences of few examples are not quite normal; `tests/test_elimination.py` measures
how often the rule errs, on normal, skewed and heavy-tailed ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from swa.errors import InputError
from swa.policy import format_layers
from swa.resampling import F64, checked_confidence

if TYPE_CHECKING:
    from swa.selection import Budget

PRIOR_UNITS = 0.25  # c above: effects of about two standard deviations are looked for

Verdict = Literal["in", "out"]


@dataclass(frozen=True)
class AdaptiveStop:
    """When `score_layers` may stop: once the top layers are known at this confidence.

    Raises:
        InputError: a value out of range.
    """

    budget: Budget
    """Whose top layers are looked for."""
    confidence: float = 0.95
    tolerance: float = 0.0
    """In nats per answer token: how much better a layer left out may be than a chosen one."""

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
    """Whether the selection was known when the sweep ended."""
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
        return (
            f"{len(self.examples)} of {self.n_offered} examples were {enough} to know the top"
            f" {self.size} layers at {self.confidence:.0%}"
            + (f", up to {self.tolerance:g} nats" if self.tolerance else "")
            + f"; settled: {format_layers(self.layers('in')) or 'none'} in,"
            f" {format_layers(self.layers('out')) or 'none'} out;"
            f" {self.saved:.0%} of the work saved"
        )


def shuffled_units(tasks: Sequence[str], seed: int) -> list[tuple[int, ...]]:
    """The examples, by index, in the random order that the rule needs, a tuple for each unit.

    Where all tasks have equally many examples, that is a design: a unit is one of each.
    """
    groups: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        groups.setdefault(task, []).append(index)
    if len({len(members) for members in groups.values()}) > 1:
        groups = {"": list(range(len(tasks)))}
    bits = np.random.PCG64(seed)  # raw, since NumPy keeps that stream for all time
    shuffled = [
        [members[place] for place in np.argsort(bits.random_raw(len(members)))]
        for members in groups.values()
    ]
    return list(zip(*shuffled, strict=True))


class Elimination:
    """The rule's state, fed with one unit after the other.

    Args:
        layers: the K layers to choose from.
        size: how many of them are chosen, 1 to K - 1.

    Raises:
        InputError: another size, which leaves nothing to find out.
    """

    def __init__(
        self, layers: Sequence[int], size: int, confidence: float, tolerance: float
    ) -> None:
        if not 0 < size < len(layers):
            raise InputError(
                f"choosing {size} of {len(layers)} layers leaves nothing to find out: score without"
                " a rule to stop"
            )
        self.open = tuple(layers)
        """Layers that are neither in nor out yet."""
        self.is_decided = False
        self._slots = size  # of the open layers
        self._limit = math.log(size * (len(layers) - size) / (1 - confidence))
        self._n_units = 0
        self._totals = np.zeros(len(layers))
        # Of each pair's differences as they are, and of those plus the tolerance: sums, sums of
        # squares, and whether the first was ever found larger. A claim once made stands: the bound
        # is over all looks together.
        self._shifts = np.array([0.0, tolerance])[:, None, None]
        self._sums, self._squares = np.zeros((2, 2, len(layers), len(layers)))
        self._larger = np.zeros(self._sums.shape, dtype=bool)

    def observe(self, deltas: Mapping[int, float]) -> dict[int, Verdict]:
        """Take in a unit's delta of every open layer; returns the layers that this settles."""
        row = np.array([deltas[layer] for layer in self.open])
        differences = row[:, None] - row + self._shifts
        self._n_units += 1
        self._totals += row
        self._sums += differences
        self._squares += differences**2
        evidence = _log_evidence(self._n_units, self._sums, self._squares)
        self._larger |= evidence > self._limit
        verdicts = self._verdicts()
        self._slots -= sum(verdict == "in" for verdict in verdicts.values())
        self._keep([layer not in verdicts for layer in self.open])
        leads = np.isin(self.open, self.leading())
        self.is_decided = bool(self._larger[1][np.ix_(leads, ~leads)].all())
        return verdicts

    def leading(self) -> tuple[int, ...]:
        """The open layers that would be chosen now: those with the largest means, best first."""
        order = np.argsort(-self._totals, kind="stable")
        return tuple(self.open[index] for index in order[: self._slots])

    def _verdicts(self) -> dict[int, Verdict]:
        better = self._larger[0] & ~self._larger[0].T  # claims that contradict each other are void
        n_open = len(self.open)
        won = better.sum(axis=1) >= n_open - self._slots
        lost = better.sum(axis=0) >= self._slots
        if won.sum() > self._slots or lost.sum() > n_open - self._slots:
            return {}  # so are those in a circle
        verdicts: list[Verdict | None] = [
            "in" if w else "out" if o else None for w, o in zip(won, lost, strict=True)
        ]
        return {layer: v for layer, v in zip(self.open, verdicts, strict=True) if v is not None}

    def _keep(self, kept: Sequence[bool]) -> None:
        which = np.flatnonzero(kept)
        self.open = tuple(self.open[index] for index in which)
        self._totals = self._totals[which]
        pairs = np.ix_(np.arange(2), which, which)
        self._sums, self._squares = self._sums[pairs], self._squares[pairs]
        self._larger = self._larger[pairs]


def _log_evidence(n: int, sums: F64, squares: F64) -> F64:
    """log E of `n` differences, by their sums and sums of squares; -inf where a sum is <= 0."""
    rest = squares - sums**2 / (n + PRIOR_UNITS)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: F64 = np.log(squares / rest)
    evidence = n / 2 * ratio + math.log(PRIOR_UNITS / (n + PRIOR_UNITS)) / 2
    return np.where(sums > 0, evidence, -np.inf)


class StoppingRule:
    """An AdaptiveStop at work in a sweep.

    Args:
        stop: what was asked for.
        layers: those that the sweep flips.
        size: full layers that the budget of `stop` comes to.
        n_fixed: how many of those are full in the base already.
        tasks: [N], of the examples offered.
        seed: of their order.

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
        self._stop, self._size, self._seed = stop, size, seed
        self._n_offered = len(tasks)
        self._elimination = Elimination(layers, size - n_fixed, stop.confidence, stop.tolerance)
        self._settled: list[Settled] = []
        self._examples: list[int] = []
        self._flops = 0.0

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

    @property
    def is_decided(self) -> bool:
        """Whether no more examples are needed."""
        return self._elimination.is_decided

    def observe(self, deltas: Mapping[int, Sequence[float | None]], flops: float) -> bool:
        """Take in a unit, deltas [L] by example, and its work; whether that settled something."""
        self._examples += deltas
        self._flops += flops
        rows = np.array([[row[layer] for layer in self.open_layers] for row in deltas.values()])
        means = dict(zip(self.open_layers, rows.mean(axis=0).tolist(), strict=True))
        verdicts = self._elimination.observe(means)
        self._settled += [Settled(*each, len(self._examples)) for each in verdicts.items()]
        return bool(verdicts) or self.is_decided

    def record(self, flops_offered: float) -> Adaptive:
        """How it went, for the scores."""
        return Adaptive(
            size=self._size,
            confidence=self._stop.confidence,
            tolerance=float(self._stop.tolerance),
            is_decided=self.is_decided,
            settled=tuple(self._settled),
            examples=tuple(self._examples),
            n_offered=self._n_offered,
            flops=self._flops,
            flops_offered=flops_offered,
        )
