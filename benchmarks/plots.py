"""Results as pictures: time against length, scaling, shares of the peak. Needs matplotlib."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Row
from benchmarks.render import in_order, quantity
from benchmarks.results import Results

COLOURS = ("#0b6e99", "#d1603d", "#6b8f3a", "#7a5195", "#b58900", "#4d4d4d", "#c2477f")
MARKERS = "osD^vPX"
DOTS_PER_INCH = 100

Cases = dict[str, list[Row]]
Lines = dict[str, dict[int, float]]  # by what they are of: values by where they are on the axis


def draw(results: Results, folder: Path) -> list[Path]:
    """Write the pictures that there are rows for; returns their paths, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, figure in _figures(results):
        drawn.append(folder / f"{name}.png")
        figure.savefig(drawn[-1], dpi=DOTS_PER_INCH, metadata={"Software": None})
    return drawn


def _figures(results: Results) -> Iterator[tuple[str, Any]]:
    """Name and matplotlib figure of each picture."""
    for name, subsets in (
        ("attention", ("attention",)),
        ("models", ("prefill", "sweep", "gradient")),
        ("scaling", ("threads", "depth")),
    ):
        cases: Cases = {}
        for subset in subsets:
            cases |= _along_an_axis(subset, results.rows(subset))
        if cases:
            yield name, _lines(cases)
    shares = {
        subset: _furthest([row for row in results.rows(subset) if row.share is not None])
        for subset in dict.fromkeys(case.subset for case in results.cases)
    }
    shares = {subset: rows for subset, rows in shares.items() if rows}
    if shares:
        yield "roofline", _bars(shares)


def _along_an_axis(subset: str, rows: Sequence[Row]) -> Cases:
    """The rows of each case that make a line: a single length makes none, threads begin at one."""
    cases = defaultdict(list)
    for row in rows:
        if row.at is not None:
            cases[f"{subset}: {row.case}"].append(row)
    return {
        case: rows
        for case, rows in cases.items()
        if rows[0].axis == "threads" or len({row.at for row in rows}) > 1
    }


def _furthest(rows: Sequence[Row]) -> list[Row]:
    """Of each case the row that is furthest along its axis."""
    return list({row.case: row for row in in_order(rows)}.values())


def _lines(cases: Cases) -> Any:
    """A panel for each case: ours and the peers' along its axis, both scales logarithmic."""
    from matplotlib.figure import Figure

    columns = min(2, len(cases))
    n_rows = -(-len(cases) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.0 * n_rows), layout="constrained")
    for place, (case, rows) in enumerate(cases.items(), 1):
        panel = figure.add_subplot(n_rows, columns, place)
        lines = _values(rows)
        for i, (name, values) in enumerate(lines.items()):
            at = sorted(values)
            panel.plot(
                at,
                [values[x] for x in at],
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=5,
                linewidth=2.4 if name == "ours" else 1.4,
                label=name,
            )
        _scale(panel, sorted(set().union(*lines.values())), rows[0])
        panel.set_title(case, fontsize=10)
        panel.legend(fontsize=8)
    return figure


def _values(rows: Sequence[Row]) -> Lines:
    """Ours first, then the peers in the order of the rows."""
    start = {1: 1.0} if rows[0].axis == "threads" else {}
    lines: Lines = {"ours": dict(start)}
    for row in rows:
        assert row.at is not None
        lines["ours"][row.at] = row.ours
        if row.theirs is not None:
            lines.setdefault(row.peer, dict(start))[row.at] = row.theirs
    return lines


def _scale(panel: Any, at: Sequence[int], row: Row) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    panel.set_xscale("log", base=2)
    panel.set_xticks(at, [f"{x:,}" for x in at])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("tokens" if row.axis == "T" else row.axis)
    if row.axis == "threads":
        panel.set_ylim(bottom=0)
        panel.set_ylabel("times as fast as one thread")
    else:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(lambda y, _: _short(y, row.unit))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.set_ylabel("time")
    panel.grid(color="0.88", linewidth=0.8)
    panel.set_axisbelow(True)


def _short(value: float, unit: str) -> str:
    """`quantity` of a round number."""
    number, _, name = quantity(value, unit).partition(" ")
    return f"{float(number.replace(',', '')):g} {name}"


def _bars(groups: Mapping[str, Sequence[Row]]) -> Any:
    """Shares of the peak by subset, and marks of what is to reach."""
    from matplotlib.figure import Figure

    n_rows = sum(map(len, groups.values()))
    figure = Figure(figsize=(8.4, 0.24 * (n_rows + len(groups)) + 1.0), layout="constrained")
    panel = figure.subplots()
    ticks: dict[float, str] = {}
    y = 0.0
    for (subset, rows), colour in zip(groups.items(), COLOURS, strict=False):
        for row in rows:
            share = 100 * (row.share or 0.0)
            panel.barh(y, share, color=colour, height=0.68)
            panel.text(share + 0.8, y, f"{share:.0f}", va="center", fontsize=8)
            if row.share_target is not None:
                target = 100 * row.share_target
                panel.plot([target] * 2, [y - 0.42, y + 0.42], color="black", linewidth=2)
            ticks[y] = f"{subset}: {row.title}"
            y += 1
        y += 0.6
    panel.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    panel.set_ylim(y - 0.6, -1)
    panel.set_xlim(0, 105)
    panel.set_xlabel("% of the machine's own peak, measured beside it; black: to reach")
    panel.grid(axis="x", color="0.88", linewidth=0.8)
    panel.set_axisbelow(True)
    return figure
