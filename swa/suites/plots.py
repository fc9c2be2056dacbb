"""Charts of what some suites measure, on matplotlib (extra `plot`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from swa.plots import new_axes
from swa.suites import needle, positions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from swa.evaluation import Evaluation, Measure


def needle_grid(
    evaluation: Evaluation,
    measure: Measure = "nll",
    ax: Axes | None = None,
    *,
    darkest: float | None = None,
) -> Axes:
    """A needle at every depth (rows, the text's beginning on top) of every length (columns).

    Of an evaluation of the suite "needle". A value stands in its cell; the darker, the worse. Of
    NLLs the darkest colour is for the largest one, or `darkest`; of shares it is for zero.

    Returns the axes drawn on (new ones without `ax`). Raises ImportError: matplotlib is missing;
    InputError: an evaluation of another suite, or one without scores.
    """
    found = needle.grid(evaluation, measure)
    ax = new_axes(ax, width=2.4 + 0.9 * len(found.lengths), height=1.8 + 0.4 * len(found.depths))
    if measure == "nll":
        top = max(float(np.nanmax(found.values)), 1e-9) if darkest is None else darkest
        colours, worst = "Blues", top
    else:
        colours, top, worst = "Blues_r", 1.0, 0.0
    image = ax.imshow(found.values, cmap=colours, vmin=0, vmax=top, aspect="auto")
    for row, column in np.argwhere(~np.isnan(found.values)):
        value = found.values[row, column]
        dark = abs(value - worst) < 0.45 * top
        text = f"{value:.2f}" if measure == "nll" else f"{value:.0%}"
        ax.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
    ax.figure.colorbar(image, ax=ax, label=_MEASURES[measure])
    ax.set_xticks(range(len(found.lengths)), labels=[f"{length:,}" for length in found.lengths])
    ax.set_yticks(range(len(found.depths)), labels=[f"{depth:.0%}" for depth in found.depths])
    ax.set_xlabel("length (tokens)")
    ax.set_ylabel("depth of the needle")
    ax.set_title(_title(evaluation))
    return ax


def needle_grids(evaluations: Mapping[str, Evaluation]) -> Figure:
    """`needle_grid` of each evaluation (rows) and of all that was measured (columns), to one scale.

    Raises as `needle_grid`.
    """
    from matplotlib import pyplot

    first = next(iter(evaluations.values()))
    measures = [measure for measure in _MEASURES if measure != "score" or first.score is not None]
    found = needle.grid(first)
    nlls = [value for evaluation in evaluations.values() for value in evaluation.by_task.values()]
    darkest = max(*nlls, 1e-9)
    figure, axes = pyplot.subplots(
        len(evaluations),
        len(measures),
        figsize=(
            len(measures) * (2.4 + 0.9 * len(found.lengths)),
            len(evaluations) * (1.4 + 0.4 * len(found.depths)),
        ),
        layout="constrained",
        squeeze=False,
    )
    for row, (name, evaluation) in zip(axes, evaluations.items(), strict=True):
        for ax, measure in zip(row, measures, strict=True):
            needle_grid(evaluation, measure, ax, darkest=darkest).set_title(name)
    return figure


_MEASURES: dict[Measure, str] = {
    "nll": "NLL (nats per token)",
    "greedy_match": "greedy match",
    "score": "score of replies",
}


def position_figure(evaluations: Mapping[str, Evaluation]) -> Figure:
    """`nll_by_position`; of several, and how far they are from the first one below it.

    Raises as `nll_by_position`.
    """
    from matplotlib import pyplot

    n_rows = min(len(evaluations), 2)
    figure, axes = pyplot.subplots(
        n_rows, 1, figsize=(9, 3.2 * n_rows), layout="constrained", sharex=True, squeeze=False
    )
    nll_by_position(evaluations, axes[0, 0])
    if n_rows == 2:
        nll_by_position(evaluations, axes[1, 0], relative_to=next(iter(evaluations)))
        axes[0, 0].set_xlabel("")
    return figure


def nll_by_position(
    evaluations: Mapping[str, Evaluation],
    ax: Axes | None = None,
    *,
    relative_to: str | None = None,
) -> Axes:
    """NLL against the position in the text, a line for each evaluation of suite "perplexity".

    A step spans its bucket of positions. With `relative_to`, the name of one of them, it is the
    difference from that one on the same texts; the band is twice its standard error over texts.

    Returns the axes drawn on (new ones without `ax`). Raises ImportError: matplotlib is missing;
    InputError: an evaluation of another suite.
    """
    ax = new_axes(ax, width=9, height=3.6)
    spans = {name: positions.buckets(found) for name, found in evaluations.items()}
    values = {  # each [texts, buckets]
        name: np.array(found.nll_per_example).reshape(-1, len(spans[name]))
        for name, found in evaluations.items()
    }
    base = 0.0 if relative_to is None else values[relative_to]
    for name, of_name in values.items():
        edges = [first for first, _ in spans[name]] + [spans[name][-1][1] + 1]
        drawn = of_name - base
        middle = drawn.mean(axis=0)
        steps = ax.stairs(middle, edges, baseline=None, label=name, linewidth=1.8)
        if relative_to is not None and len(drawn) > 1:
            error = 2 * drawn.std(axis=0, ddof=1) / np.sqrt(len(drawn))
            colour = steps.get_edgecolor()
            ax.stairs(
                middle + error, edges, baseline=middle - error, fill=True, color=colour, alpha=0.15
            )
    ax.xaxis.set_major_formatter(lambda position, _: f"{position:,.0f}")
    ax.set_xlabel("position in the text (tokens)")
    if relative_to is None:
        ax.set_ylabel("NLL (nats per token)")
        ax.legend(frameon=False)
    else:
        ax.set_ylabel(f"difference from {relative_to}")
    return ax


def _title(evaluation: Evaluation) -> str:
    policy = evaluation.policy
    if policy is None:
        return f"{evaluation.model_name}, full attention"
    full = len(policy.full_attention_layers or ())
    return f"{evaluation.model_name}, {full} of {len(policy.layer_types or ())} layers full"
