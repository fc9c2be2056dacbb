"""Charts for notebooks, on matplotlib (extra `plot`); the report draws its own."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from swa.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from swa.controls import LengthControls
    from swa.frontier import Pareto, ParetoPoint
    from swa.gate_scores import GateScores
    from swa.layer_scores import LayerScores
    from swa.stability import SelectionStability
    from swa.transfer import TransferMatrix

CHOSEN, OTHER, NOISE = "#1769d2", "#a9b6c6", "#e5b84b"


def layer_deltas(
    scores: LayerScores, ax: Axes | None = None, *, chosen: Collection[int] = ()
) -> Axes:
    """Bars of the mean delta of each layer, with its bootstrap interval; `chosen` are coloured.

    Where the noise floor is known, a band shows what rounding alone may do, and bars within it are
    hollow. Intervals of too few examples are dotted.

    Returns the axes drawn on (new ones without `ax`). Raises ImportError: matplotlib is missing.
    """
    ax = new_axes(ax, width=9, height=3.2)
    layers = list(scores.scored_layers)
    delta = np.array([scores.delta[layer] for layer in layers], dtype=float)
    colours = [CHOSEN if layer in chosen else OTHER for layer in layers]
    bars = ax.bar(layers, delta, color=colours)
    if scores.noise_band is not None:
        ax.axhspan(-scores.noise_band, scores.noise_band, color=NOISE, alpha=0.25, linewidth=0)
        for layer, bar in zip(layers, bars, strict=True):
            if layer in scores.below_noise:
                bar.set(facecolor="none", edgecolor=bar.get_facecolor(), linewidth=1.5)
    for layer, interval in enumerate(scores.interval):
        if interval is not None:
            few = layer in scores.few_examples
            ax.vlines(layer, *interval, color="black", linewidth=1, linestyle=":" if few else "-")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_xlim(-0.6, scores.num_hidden_layers - 0.4)
    ax.set_xlabel("layer")
    ax.set_ylabel("NLL change (nats per token)")
    ax.set_title(f"{scores.model_name}, {scores.direction}")
    return ax


def heatmap(scores: LayerScores, ax: Axes | None = None) -> Axes:
    """The delta of every example (rows, labelled by task) and layer (columns).

    Returns the axes drawn on (new ones without `ax`). Raises ImportError: matplotlib is missing.
    """
    ax = new_axes(ax, width=9, height=1 + 0.25 * len(scores.tasks))
    values = np.array(scores.delta_per_example, dtype=float)  # None becomes NaN: left blank
    scale = np.nanmax(np.abs(values)) or 1.0
    image = ax.imshow(values, cmap="RdBu", vmin=-scale, vmax=scale, aspect="auto")
    ax.figure.colorbar(image, ax=ax, label="NLL change (nats per token)")
    ax.set_yticks(range(len(scores.tasks)), labels=list(scores.tasks))
    ax.set_xlabel("layer")
    return ax


def selection_frequencies(stability: SelectionStability, ax: Axes | None = None) -> Axes:
    """Bars of how often a resample chooses each layer; the selected ones are coloured.

    Returns the axes drawn on (new ones without `ax`). Raises ImportError: matplotlib is missing.
    """
    ax = new_axes(ax, width=9, height=2.8)
    shares = {i: share for i, share in enumerate(stability.frequency) if share is not None}
    colours = [CHOSEN if layer in stability.layers else OTHER for layer in shares]
    ax.bar(list(shares), [100 * share for share in shares.values()], color=colours)
    ax.set_xlim(-0.6, len(stability.frequency) - 0.4)
    ax.set_ylim(0, 100)
    ax.set_xlabel("layer")
    ax.set_ylabel("chosen in % of resamples")
    ax.set_title(
        f"{stability.model_name}: {len(stability.layers)} layers,"
        f" {stability.n_examples} examples resampled"
    )
    return ax


def gate_heads(scores: GateScores, ax: Axes | None = None) -> Axes:
    """The first-order score of every KV head (rows) in every layer (columns).

    Returns the axes drawn on (new ones without `ax`). Raises ImportError: matplotlib is missing.
    """
    values = scores.per_kv_head.T
    ax = new_axes(ax, width=9, height=1.4 + 0.3 * len(values))
    scale = float(np.abs(values).max()) or 1.0
    image = ax.imshow(values, cmap="RdBu", vmin=-scale, vmax=scale, aspect="auto")
    ax.figure.colorbar(image, ax=ax, label="nats per token")
    ax.set_yticks(range(len(values)))
    ax.set_ylabel("KV head")
    ax.set_xlabel("layer")
    ax.set_title(f"{scores.model_name}, -d {scores.objective} / d alpha")
    return ax


def length_controls(controls: LengthControls, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """One panel a control: its deltas over those at full length; the top layers are coloured.

    Returns the axes drawn on (new ones without `axes`). Raises ImportError: matplotlib is missing.
    """
    reference = controls.reference
    panels = [*controls.in_proportion, *controls.window_kept]
    if axes is None:
        from matplotlib import pyplot

        size = (3.2 * len(panels), 3.4)
        axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)[
            1
        ][0]
    scored = list(reference.scores.scored_layers)
    x = [reference.scores.delta[layer] for layer in scored]
    top = set(reference.scores.ranking[: reference.agreement.size])
    colours = [CHOSEN if layer in top else OTHER for layer in scored]
    for ax, control in zip(axes, panels, strict=True):
        ax.axhline(0, color="black", linewidth=0.8)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.scatter(x, [control.scores.delta[layer] for layer in scored], c=colours, s=18)
        agreement = control.agreement
        rank = (
            "all exactly 0"
            if control.largest_delta == 0
            else f"rank corr. {agreement.spearman:.2f}"
        )
        if control.largest_delta == 0:
            ax.set_ylim(-1, 1)
        ax.set_title(
            f"{control.prompt_tokens:,} tokens, window {control.window:,}\n"
            f"{control.cost:.0%} of the cost, {rank}",
            fontsize=10,
        )
        ax.set_xlabel(f"delta at {reference.prompt_tokens:,} tokens")
    axes[0].set_ylabel("delta (nats per token)")
    return axes


def transfer_matrix(matrix: TransferMatrix, ax: Axes | None = None) -> Axes:
    """Share of the gap closed: rows were calibrated on, columns evaluated on.

    Returns the axes drawn on (new ones without `ax`). Raises ImportError: matplotlib is missing.
    """
    rows, columns = matrix.rows, matrix.domains
    ax = new_axes(ax, width=2.2 + 1.5 * len(columns), height=1.2 + 0.6 * len(rows))
    shares = [[matrix.closed[row][column].share for column in columns] for row in rows]
    values = np.array(shares, dtype=float)  # None becomes NaN: left blank
    image = ax.imshow(100 * values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    ax.figure.colorbar(image, ax=ax, label="% of the gap closed")
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            cell = matrix.closed[row][column]
            dark = cell.share is not None and cell.share > 0.6
            text = "no gap" if cell.share is None else f"{cell.share:.0%}"
            if cell.interval is not None:
                text += "\n{:.0%} to {:.0%}".format(*cell.interval)
            ax.text(
                j, i, text, ha="center", va="center", color="white" if dark else "black", fontsize=9
            )
    ax.set_xticks(range(len(columns)), labels=columns)
    ax.set_yticks(range(len(rows)), labels=rows)
    ax.set_xlabel("evaluated on")
    ax.set_ylabel("calibrated on")
    ax.set_title(matrix.model_name)
    return ax


def pareto(curves: Pareto, ax: Axes | None = None) -> Axes:
    """Loss over the work of a prefill, a line a policy; what nothing beats is ringed.

    Returns the axes drawn on (new ones without `ax`). Raises ImportError: matplotlib is missing.
    """
    ax = new_axes(ax, width=7, height=4.2)
    lines: dict[str, list[ParetoPoint]] = {}
    for point in curves.points:
        lines.setdefault(point.semantics, []).append(point)
    for name, points in lines.items():
        work = [100 * point.prefill for point in points]
        ax.plot(work, [point.loss for point in points], marker=".", label=name)
    best = curves.best
    ax.scatter(
        [100 * point.prefill for point in best],
        [point.loss for point in best],
        s=60,
        facecolors="none",
        edgecolors="black",
        label="not beaten",
    )
    ax.axhline(float(np.mean(curves.loss_full)), color="black", linewidth=0.8, linestyle="--")
    ax.set_xlabel(f"prefill at {curves.prompt_tokens:,} tokens, % of full attention's FLOPs")
    ax.set_ylabel(f"{curves.objective} (nats per token)")
    ax.set_title(f"{curves.model_name}, {curves.strategy}")
    ax.legend()
    return ax


def check_file(path: str | os.PathLike[str]) -> None:
    """Refuse, before there is anything to draw, a file that no chart can be written to.

    Raises:
        InputError: its name does not end as matplotlib's formats do.
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib import backend_bases
    except ImportError:
        raise ImportError("charts need matplotlib: pip install 'swa[plot]'") from None
    formats = backend_bases.FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in formats:
        raise InputError(
            f"{os.fspath(path)}: a chart is written as .png, .svg or .pdf, as the name ends"
        )


def new_axes(ax: Axes | None, *, width: float, height: float) -> Axes:
    """`ax`, or the axes of a new figure of that size in inches."""
    if ax is not None:
        return ax
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")[1]
