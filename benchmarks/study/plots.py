"""The page's plots, as SVG files beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.study.cells import DEFAULT, MAIN, TOPK
from benchmarks.study.results import CellResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    TOPK: "#8494a8",
    DEFAULT: "#1769d2",
    "first_order": "#b5476b",
    "path": "#d58a3c",
    "periodic": "#4d9a77",
}
OTHER = "#d9dee5"


def draw(groups: dict[str, list[CellResults]], folder: Path) -> Iterator[str]:
    """Write what can be drawn, and give the Markdown that shows it."""
    drawings = {
        "headline": _headline(groups["headline"]),
        "budgets": _budgets([*groups["headline"], *groups.get("budget", [])]),
        "examples": _examples(groups.get("examples", [])),
    }
    found = {name: series for name, series in drawings.items() if series}
    if not found:
        return
    try:
        import matplotlib

        matplotlib.use("svg")
        from matplotlib import pyplot
    except ImportError:
        yield "(matplotlib is missing: no plots.)"
        return
    folder.mkdir(parents=True, exist_ok=True)
    look = {"svg.hashsalt": "swa", "svg.fonttype": "none", "font.size": 9}
    yield "## Plots"
    for name, series in found.items():
        with matplotlib.rc_context(look):
            figure, axes = pyplot.subplots(figsize=(6.5, 3.4), layout="constrained")
            title = _PLOTS[name](axes, series)
            axes.set_title(title)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            pyplot.close(figure)
        yield f"![{title}]({folder.name}/{name}.svg)"


def _headline(own: list[CellResults]) -> list[tuple[str, float]]:
    """(strategy, gap closed), best first."""
    bars = [
        (choice.strategy, gap)
        for of in own
        for choice in of.cell.choices
        if (measured := of.of(choice)) is not None and (gap := of.gap(measured)) is not None
    ]
    return sorted(bars, key=lambda bar: bar[1])


def _budgets(own: list[CellResults]) -> dict[str, list[tuple[float, float]]]:
    """strategy -> (share of the layers, gap closed), where there is more than one share."""
    return _lines(own, lambda choice: choice.share)


def _examples(own: list[CellResults]) -> dict[str, list[tuple[float, float]]]:
    """strategy -> (calibration examples, gap closed)."""
    return _lines(own, lambda choice: choice.n_examples)


def _lines(own: list[CellResults], place: Any) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for of in own:
        for choice in of.cell.choices:
            measured = of.of(choice) if choice.strategy in MAIN else None
            gap = None if measured is None else of.gap(measured)
            if gap is not None:
                lines.setdefault(choice.strategy, []).append((place(choice), gap))
    return {name: sorted(points) for name, points in lines.items() if len(points) > 1}


def _draw_headline(axes: Axes, bars: list[tuple[str, float]]) -> str:
    names, gaps = zip(*bars, strict=True)
    axes.barh(names, gaps, color=[COLOURS.get(name, OTHER) for name in names])
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel("gap closed")
    return "Headline setting: share of the gap closed by each strategy"


def _draw_lines(axes: Axes, lines: dict[str, list[tuple[float, float]]], label: str) -> None:
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name, color=COLOURS.get(name))
    axes.set_xscale("log", base=2)
    ticks = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel(label)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_ylabel("gap closed")
    axes.legend(frameon=False)


def _draw_budgets(axes: Axes, lines: dict[str, list[tuple[float, float]]]) -> str:
    _draw_lines(axes, lines, "share of the layers that is full")
    return "Share of the gap closed by the share of full layers"


def _draw_examples(axes: Axes, lines: dict[str, list[tuple[float, float]]]) -> str:
    _draw_lines(axes, lines, "calibration examples")
    return "Share of the gap closed by the number of calibration examples"


_PLOTS: dict[str, Any] = {
    "headline": _draw_headline,
    "budgets": _draw_budgets,
    "examples": _draw_examples,
}
