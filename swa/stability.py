"""How far scores can be trusted: would other examples choose the same layers, rank them alike?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from swa.budget import Budget
from swa.errors import InputError
from swa.layer_scores import LayerScores, LayerValues, checked_integer
from swa.resampling import F64, MAX_BOOTSTRAP, Strata, resampled_means, strata_of
from swa.selection import top_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUANTILES = (0.05, 0.5, 0.95)
DOUBT = 0.05  # a layer chosen less often than in all but this share of the resamples is in doubt
N_SPLITS = 200  # into halves, behind a reliability
LEAST_AGREEMENT = 0.2  # of halves; where it is less, all is chance, and nothing can be corrected


@dataclass(frozen=True, repr=False)
class SelectionStability:
    """How the top layers change when the examples are resampled; L layers."""

    layers: tuple[int, ...]
    """The selection, ascending."""
    frequency: LayerValues
    """[L]: share of the resamples that choose this layer; None where it cannot be chosen."""
    overlap: float
    """Mean number of the selected layers that a resample selects again."""
    spearman: tuple[float, float, float] | None
    """5%, 50% and 95% quantile of the rank correlation of the scores with resampled ones, of the
    layers that are not settled; None where those have one score."""
    n_examples: int
    n_bootstrap: int
    seed: int
    model_name: str

    @property
    def doubtful(self) -> tuple[int, ...]:
        """Layers that some resamples choose and others do not (5% to 95%), most often chosen first.

        They are near the boundary of the selection: more examples could swap them.
        """
        shares = {
            layer: share
            for layer, share in enumerate(self.frequency)
            if share is not None and DOUBT < share < 1 - DOUBT
        }
        return tuple(sorted(shares, key=lambda layer: -shares[layer]))

    def to_dict(self) -> dict[str, Any]:
        """The fields and `doubtful`, for JSON."""
        return asdict(self) | {"doubtful": self.doubtful}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the frequencies (needs the extra `plot`: matplotlib)."""
        from swa import plots

        return plots.selection_frequencies(self, ax=ax)

    def __repr__(self) -> str:
        n, size = self.n_examples, len(self.layers)
        lines = [
            f"SelectionStability: {size} layers, {self.n_bootstrap} resamples of {n} examples",
            f"  expected overlap: {self.overlap:.1f} of {size} layers",
        ]
        if self.spearman is not None:
            low, median, high = self.spearman
            lines.append(f"  rank correlation: {median:.2f} (90% within {low:.2f} to {high:.2f})")
        chosen = ", ".join(f"{layer} ({self.frequency[layer]:.0%})" for layer in self.layers)
        lines.append(f"  chosen: {chosen or 'none'}")
        rivals = [layer for layer in self.doubtful if layer not in self.layers]
        if rivals:
            shares = ", ".join(f"{layer} ({self.frequency[layer]:.0%})" for layer in rivals)
            lines.append(f"  next in line: {shares}")
        return "\n".join(lines)


def selection_stability(
    scores: LayerScores, budget: Budget, *, n_bootstrap: int = 2000, seed: int = 0
) -> SelectionStability:
    """How often each layer is among the top ones when the examples are drawn anew.

    Examples are resampled as for `LayerScores.interval`. Layers that were full in the base are in
    every selection; those that an adaptive sweep settled are in all or in none.

    Args:
        scores: of at least two examples.
        budget: what `select` is given.
        n_bootstrap: resamples.
        seed: of the resamples.

    Raises:
        InputError: a single example; a budget that `select` refuses, or other than that of an
            adaptive sweep; an option out of range.
    """
    n_bootstrap = checked_integer(n_bootstrap, "n_bootstrap", 1, MAX_BOOTSTRAP)
    seed = checked_integer(seed, "seed", 0)
    n_layers = scores.num_hidden_layers
    layers = top_layers(scores, budget.resolve(n_layers))
    if len(scores.tasks) == 1:
        raise InputError("one example tells nothing about others: score at least two")
    certain, excluded = _settled(scores, len(layers))
    open_columns = [
        column
        for column, layer in enumerate(scores.scored_layers)
        if layer not in certain and layer not in excluded
    ]
    values, strata = scores.table[:, open_columns], strata_of(scores.tasks)
    means = resampled_means(values, strata, n_bootstrap=n_bootstrap, seed=seed)
    frequency = dict.fromkeys(certain, 1.0) | dict.fromkeys(excluded, 0.0)
    for column, share in zip(
        open_columns, top_shares(means, len(layers) - len(certain)).tolist(), strict=True
    ):
        frequency[scores.scored_layers[column]] = share
    return SelectionStability(
        layers=layers,
        frequency=tuple(frequency.get(layer) for layer in range(n_layers)),
        overlap=sum(frequency[layer] for layer in layers),
        spearman=_spearman_quantiles(means, values.mean(axis=0)),
        n_examples=len(scores.tasks),
        n_bootstrap=n_bootstrap,
        seed=seed,
        model_name=scores.model_name,
    )


def _settled(scores: LayerScores, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The layers that are in every selection, and those in none."""
    if scores.adaptive is None or not scores.adaptive.settled:
        return scores.fixed_layers, ()
    if scores.adaptive.size != size:
        raise InputError(
            f"these scores were taken until the top {scores.adaptive.size} layers were known: what"
            f" was settled then says nothing about the top {size}"
        )
    return (*scores.fixed_layers, *scores.adaptive.layers("in")), scores.adaptive.layers("out")


def top_shares(means: F64, size: int) -> F64:
    """float64 [K]: share of the rows of `means` [B, K] with column k among the `size` largest.

    Ties go to the lower column, as everywhere.
    """
    places = np.argsort(np.argsort(-means, axis=1, kind="stable"), axis=1)
    shares: F64 = (places < size).mean(axis=0)
    return shares


def spearman(a: Sequence[float] | F64, b: Sequence[float] | F64) -> float | None:
    """Rank correlation of two lists, ties at their mean rank; None if all of one are equal."""
    correlation = float(
        _correlations(average_ranks(np.array([a])), average_ranks(np.array([b])))[0]
    )
    return None if np.isnan(correlation) else correlation


def average_ranks(values: F64) -> F64:
    """float64 [B, K]: the rank of each value within its row [K], from 0, ties at their mean."""
    ranks = np.zeros(values.shape)
    for column in range(values.shape[1]):
        one = values[:, column, None]
        ranks[:, column] = (values < one).sum(axis=1) + ((values == one).sum(axis=1) - 1) / 2
    return ranks


def _correlations(a: F64, b: F64) -> F64:
    """float64 [B]: Pearson's, of each row of `a` with that of `b`; NaN where one is constant."""
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    scale = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    products = (a * b).sum(axis=1)
    found: F64 = np.full(len(products), np.nan)
    np.divide(products, scale, out=found, where=scale > 0)
    return found


def _spearman_quantiles(means: F64, scores: F64) -> tuple[float, float, float] | None:
    if means.shape[1] < 2:
        return None
    found = _correlations(average_ranks(means), average_ranks(scores[None]))
    found = found[~np.isnan(found)]
    if not len(found):
        return None
    low, median, high = np.quantile(found, QUANTILES).tolist()
    return low, median, high


@dataclass(frozen=True, repr=False)
class RankAgreement:
    """Whether two sets of scores, of the same layers, rank them alike."""

    spearman: float | None
    """Rank correlation of the mean deltas; None if all of one are equal."""
    corrected: float | None
    """About what `spearman` would be of examples without end, up to 1: chance in either set lowers
    it, and chance that both share, as on the same examples, raises it. None where it is not known:
    of fewer than four examples, where their halves hardly agree, or after an adaptive sweep that
    left out some."""
    overlap: int
    """How many of the top layers are the same."""
    size: int
    """How many top layers there are."""
    ratio: float | None
    """Sum of the second's |delta| over the first's; None if the first has none."""

    def __repr__(self) -> str:
        rank = "none" if self.spearman is None else f"{self.spearman:.2f}"
        corrected = "" if self.corrected is None else f" (without chance {self.corrected:.2f})"
        return (
            f"RankAgreement: rank correlation {rank}{corrected},"
            f" {self.overlap} of {self.size} top layers the same"
        )


def rank_agreement(
    first: LayerScores, second: LayerScores, budget: Budget, *, seed: int = 0
) -> RankAgreement:
    """Compare two sets of scores: other lengths, windows, domains, or methods.

    Args:
        first, second: of models with as many layers; what only one of them scores is left out of
            the correlations and the ratio. Where the tasks of their examples are the same, the i-th
            example of one may be that of the other, or made alike.
        budget: what counts as the top; layers full in both bases are among the same.
        seed: of the splits into halves behind `corrected`.

    Raises:
        InputError: scores of different models, or with no layer in common.
    """
    if first.num_hidden_layers != second.num_hidden_layers:
        raise InputError(
            f"the scores are of models with {first.num_hidden_layers} and"
            f" {second.num_hidden_layers} layers"
        )
    common = [layer for layer in first.scored_layers if layer in second.scored_layers]
    if not common:
        raise InputError("the scores have no layer in common")
    a, b = (np.array([s.delta[layer] for layer in common], dtype=float) for s in (first, second))
    seed = checked_integer(seed, "seed", 0)
    size = budget.resolve(first.num_hidden_layers)
    tops = [set(top_layers(scores, size)) for scores in (first, second)]
    total = float(np.abs(a).sum())
    return RankAgreement(
        spearman=spearman(a, b),
        corrected=_corrected(first, second, common, seed),
        overlap=len(tops[0] & tops[1]),
        size=size,
        ratio=float(np.abs(b).sum()) / total if total else None,
    )


def reliability(scores: LayerScores, *, seed: int = 0) -> float | None:
    """Rank correlation to expect between these scores and those of as many other examples, 0 to 1.

    The mean over random splits of the examples into halves (within tasks), stepped up to the whole
    by Spearman and Brown's formula. None for fewer than four examples, where all deltas agree, or
    where an adaptive sweep left out some.
    """
    halves = _half_ranks(scores, seed, scores.scored_layers)
    found = None if halves is None else _mean_correlation(halves)
    if found is None:
        return None
    half = max(0.0, found)
    return 2 * half / (1 + half)


def _corrected(
    first: LayerScores, second: LayerScores, layers: Sequence[int], seed: int
) -> float | None:
    """Rank correlation without what chance does to it (Spearman's correction for attenuation).

    Between one half of the first's examples and the other half of the second's, which share none
    even where the examples are the same, over what the halves of each have with each other.
    """
    halves = [_half_ranks(scores, seed, layers) for scores in (first, second)]
    if halves[0] is None or halves[1] is None:
        return None
    (a, b), (c, d) = halves[0], halves[1]
    across = [r for pair in ((a, d), (b, c)) if (r := _mean_correlation(pair)) is not None]
    within = [_mean_correlation(pair) or 0.0 for pair in ((a, b), (c, d))]
    if not across or min(within) < LEAST_AGREEMENT:
        return None
    found = sum(across) / len(across) / math.sqrt(math.prod(within))
    return min(1.0, max(-1.0, found))


def _half_ranks(scores: LayerScores, seed: int, layers: Sequence[int]) -> tuple[F64, F64] | None:
    """Ranks [N_SPLITS, K] of mean deltas on random halves of the examples, and on the others."""
    table = scores.table[:, [scores.scored_layers.index(layer) for layer in layers]]
    if len(scores.tasks) < 4 or np.isnan(table).any():
        return None
    chosen = _halves(strata_of(scores.tasks), seed)
    a, b = (which @ table / which.sum(axis=1, keepdims=True) for which in (chosen, 1 - chosen))
    return average_ranks(a), average_ranks(b)


def _mean_correlation(pair: tuple[F64, F64]) -> float | None:
    """Of the splits that have one; None where none has."""
    found = _correlations(*pair)
    found = found[~np.isnan(found)]
    return float(found.mean()) if len(found) else None


def _halves(strata: Strata, seed: int) -> F64:
    """float64 [N_SPLITS, N]: 1 for a random half of each stratum, else 0; of odd ones, a whole
    number next to the half, the larger and the smaller in turns."""
    bits = np.random.PCG64(seed)
    chosen = np.zeros((N_SPLITS, sum(map(len, strata))))
    for members in strata:
        n = len(members)
        places = np.argsort(bits.random_raw(N_SPLITS * n).reshape(N_SPLITS, n), axis=1)
        sizes = (n + np.arange(N_SPLITS) % 2) // 2
        chosen[:, list(members)] = places < sizes[:, None]
    return chosen
