"""Results as pictures: time against length, scaling, shares of the peak. Needs matplotlib."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Row
from benchmarks.results import Results

COLOURS = ("#0b6e99", "#d1603d", "#6b8f3a", "#7a5195", "#b58900", "#4d4d4d", "#c2477f")
MARKERS = "osD^vPX"
DOTS_PER_INCH = 110

Line = dict[str, dict[int, float]]  # what is drawn: its values by where they are on the axis


def draw(results: Results, folder: Path) -> list[Path]:
    """Write the pictures that there are rows for; returns their paths, in order."""
    import matplotlib

    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, figure in _figures(results):
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
        drawn.append(path)
    return drawn


def _figures(results: Results) -> Iterator[tuple[str, Any]]:
    """Name and matplotlib figure of each picture."""
    panels = {
        "attention": _cases(results.rows("attention")),
        "models": _cases(results.rows("prefill")) | _cases(results.rows("sweep"), "sweep: "),
        "scaling": _cases(results.rows("threads")) | _cases(results.rows("depth")),
    }
    for name, cases in panels.items():
        if cases:
            yield name, _lines(cases)
    shares = [row for row in results.rows() if row.share is not None]
    if shares:
        yield "roofline", _bars(shares)


def _cases(rows: Sequence[Row], prefix: str = "") -> dict[str, list[Row]]:
    """Rows that lie on an axis, by their case; a single point makes no line."""
    cases = defaultdict(list)
    for row in rows:
        if row.at is not None:
            cases[prefix + row.case].append(row)
    return {case: rows for case, rows in cases.items() if len({row.at for row in rows}) > 1}


def _lines(cases: dict[str, list[Row]]) -> Any:
    """A panel for each case: ours and the peers' along its axis, both scales logarithmic."""
    from matplotlib.figure import Figure

    columns = min(2, len(cases))
    n_rows = -(-len(cases) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.0 * n_rows), layout="constrained")
    panels = figure.subplots(n_rows, columns, squeeze=False).flat
    for panel, (case, rows) in zip(panels, cases.items(), strict=False):
        for i, (name, values) in enumerate(_values(rows).items()):
            at = sorted(values)
            style = {"linewidth": 2.4} if name == "ours" else {"linewidth": 1.4, "alpha": 0.9}
            panel.plot(
                at,
                [values[x] for x in at],
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=5,
                label=name,
                **style,
            )
        first = rows[0]
        _scale(panel, sorted({row.at for row in rows if row.at is not None}))
        panel.set_title(case, fontsize=10)
        panel.set_xlabel("tokens" if first.axis == "T" else first.axis)
        panel.set_ylabel({"s": "seconds", "x": "times as fast"}.get(first.unit, first.unit))
        panel.legend(fontsize=8)
    for panel in list(panels)[len(cases) :]:
        panel.set_visible(False)
    return figure


def _values(rows: Sequence[Row]) -> Line:
    """Ours first, then the peers in the order of the rows."""
    lines: Line = {"ours": {}}
    for row in rows:
        assert row.at is not None
        lines["ours"][row.at] = row.ours
        if row.theirs is not None:
            lines.setdefault(row.peer, {})[row.at] = row.theirs
    return lines


def _scale(panel: Any, at: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(at, [f"{x:,}" for x in at])
    panel.minorticks_off()
    panel.grid(color="0.88", linewidth=0.8)
    panel.set_axisbelow(True)


def _bars(rows: Sequence[Row]) -> Any:
    """Shares of the peak, and the mark of what is to reach."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 0.24 * len(rows) + 1.2), layout="constrained")
    panel = figure.subplots()
    height: Callable[[Row], float] = lambda row: 100 * (row.share or 0.0)  # noqa: E731
    where = range(len(rows), 0, -1)
    panel.barh(list(where), [height(row) for row in rows], color=COLOURS[0], height=0.68)
    for y, row in zip(where, rows, strict=True):
        panel.text(height(row) + 0.8, y, f"{height(row):.0f}", va="center", fontsize=8)
        if row.share_target is not None:
            panel.plot(
                [100 * row.share_target] * 2, [y - 0.42, y + 0.42], color=COLOURS[1], linewidth=2
            )
    panel.set_yticks(list(where), [row.title for row in rows], fontsize=8)
    panel.set_ylim(0.3, len(rows) + 0.7)
    panel.set_xlim(0, 105)
    panel.set_xlabel("% of the machine's own peak, measured beside it; orange: to reach")
    panel.grid(axis="x", color="0.88", linewidth=0.8)
    panel.set_axisbelow(True)
    return figure
