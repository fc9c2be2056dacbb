"""Comparing what was measured on the same examples: two strategies, or one with both ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from swa.errors import InputError
from swa.layer_scores import Interval, checked_integer, mean
from swa.resampling import (
    F64,
    FEW_FREEDOM,
    MAX_BOOTSTRAP,
    checked_confidence,
    intervals,
    resampled_means,
    strata_of,
)


@dataclass(frozen=True, repr=False)
class PairedDifference:
    """How two strategies differ on the same examples, in the unit of their values."""

    difference: float
    """Mean of a - b over the examples."""
    interval: Interval | None
    """(low, high) of the difference; None where there is only one example."""
    probability: float | None
    """Share of the resamples in which a is better (ties count half); None as `interval`."""
    n_examples: int
    freedom: int
    """Degrees of freedom of the standard error: examples less tasks, or fewer if some vary more."""
    confidence: float
    """Of the interval."""

    @property
    def is_trusted(self) -> bool:
        """Whether there are examples enough for the interval to mean what it says: five."""
        return self.freedom >= FEW_FREEDOM

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval, one to be trusted, leaves no room for no difference."""
        if self.interval is None or not self.is_trusted:
            return False
        return self.interval[0] > 0 or self.interval[1] < 0

    def to_dict(self) -> dict[str, Any]:
        """The fields, `is_trusted` and `excludes_zero`, for JSON."""
        derived = {"is_trusted": self.is_trusted, "excludes_zero": self.excludes_zero}
        return asdict(self) | derived

    def __repr__(self) -> str:
        examples = f"{self.n_examples} example{'s' * (self.n_examples != 1)}"
        if self.interval is None or self.probability is None:
            return f"PairedDifference: {self.difference:+.4f} on {examples}: no interval"
        low, high = self.interval
        few = "" if self.is_trusted else ", too few for the interval to be trusted"
        return (
            f"PairedDifference: {self.difference:+.4f}, {self.confidence:.0%} interval"
            f" [{low:+.4f}, {high:+.4f}], a better with probability {self.probability:.3f}"
            f" ({examples}{few})"
        )


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    *,
    tasks: Sequence[str] | None = None,
    higher_is_better: bool = False,
    n_bootstrap: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedDifference:
    """Compare two strategies by their values on the same examples, resampled in pairs.

    The interval is the percentile bootstrap's with the corrections for few examples that
    `swa.resampling` names and gives reasons for; below five examples it is not to be trusted, and
    the result says so.

    Args:
        a, b: [N], one value an example, in the same order: NLLs, or scores.
        tasks: [N], the task of each example. How many each task has then counts as design: the
            examples of a task are resampled among themselves.
        higher_is_better: the values are scores; False: they are losses, such as NLL.
        n_bootstrap: resamples.
        seed: of the resamples.
        confidence: of the interval.

    Raises:
        InputError: values that are not finite, or not one for each example; an option out of range.
    """
    first, second = _values(a, "a"), _values(b, "b")
    _check_lengths(first, {"b": second, "tasks": tasks})
    n_bootstrap, seed, confidence = _checked_options(n_bootstrap, seed, confidence)
    differences = (first - second)[:, None]
    strata = strata_of(("",) * len(first) if tasks is None else tasks)
    interval, probability, freedom = None, None, 0
    if len(first) > 1:
        means = resampled_means(differences, strata, n_bootstrap=n_bootstrap, seed=seed)
        ((low, high, freedom),) = intervals(means, differences, strata, confidence)
        better = means > 0 if higher_is_better else means < 0
        interval = (low, high)
        probability = float(better.mean() + (means == 0).mean() / 2)
    difference = mean(differences[:, 0].tolist())
    return PairedDifference(difference, interval, probability, len(first), freedom, confidence)


@dataclass(frozen=True, repr=False)
class GapClosed:
    """Which share of the gap between all sliding and full attention a selection closes."""

    share: float | None
    """1 = all of it; None where sliding costs nothing, so that there is no gap."""
    interval: Interval | None
    """(low, high) of the share; None where examples are too few, or some resamples have no gap."""

    def __repr__(self) -> str:
        if self.share is None:
            return "GapClosed: there is no gap"
        within = "" if self.interval is None else " ({:.0%} to {:.0%})".format(*self.interval)
        return f"GapClosed: {self.share:.0%}{within}"


def gap_closed_bootstrap(
    nll: Sequence[float],
    *,
    full: Sequence[float],
    sliding: Sequence[float],
    tasks: Sequence[str] | None = None,
    n_bootstrap: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> GapClosed:
    """Mean of (sliding - nll) over mean of (sliding - full), resampled in triples.

    Args:
        nll, full, sliding: [N], of the selection, of full attention and of all layers sliding, on
            the same examples.
        tasks, n_bootstrap, seed, confidence: as for `paired_bootstrap`.

    Raises:
        InputError: as `paired_bootstrap`.
    """
    columns = {"nll": nll, "full": full, "sliding": sliding}
    chosen, best, worst = (_values(values, name) for name, values in columns.items())
    _check_lengths(chosen, {"full": best, "sliding": worst, "tasks": tasks})
    n_bootstrap, seed, confidence = _checked_options(n_bootstrap, seed, confidence)
    closed, gap = worst - chosen, worst - best
    if gap.mean() <= 0:
        return GapClosed(None, None)
    share = float(closed.mean() / gap.mean())
    strata = strata_of(("",) * len(chosen) if tasks is None else tasks)
    both = np.stack([closed, gap], axis=1)
    if len(chosen) == 1:
        return GapClosed(share, None)
    means = resampled_means(both, strata, n_bootstrap=n_bootstrap, seed=seed)
    if (means[:, 1] <= 0).any():
        return GapClosed(share, None)
    # What each example moves the share by: its spread says how much stands behind the interval.
    moves = (closed - share * gap)[:, None] / gap.mean()
    ((low, high, freedom),) = intervals(means[:, :1] / means[:, 1:], moves, strata, confidence)
    return GapClosed(share, (low, high) if freedom >= FEW_FREEDOM else None)


def _values(values: Sequence[float], name: str) -> F64:
    """float64 [N], N >= 1, finite."""
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be one number for each example: {error}") from None
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise InputError(f"{name} must be one finite number for each example, at least one")
    return array


def _check_lengths(first: F64, others: Mapping[str, Sequence[Any] | F64 | None]) -> None:
    for name, values in others.items():
        if values is not None and len(values) != len(first):
            raise InputError(f"there are {len(first)} examples, but {name} has {len(values)}")


def _checked_options(n_bootstrap: int, seed: int, confidence: float) -> tuple[int, int, float]:
    return (
        checked_integer(n_bootstrap, "n_bootstrap", 1, MAX_BOOTSTRAP),
        checked_integer(seed, "seed", 0),
        checked_confidence(confidence),
    )
