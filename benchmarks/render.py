"""Rows as a table: for the terminal, and as Markdown between two markers of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.harness import Row

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
HEADINGS = ("case", "ours", "peer", "peer's", "ratio", "to reach", "of peak", "to reach")
SCALES = {"FLOP/s": (1e9, "GFLOP/s"), "B/s": (1e9, "GB/s"), "B": (2.0**30, "GiB")}


def terminal(subset: str, rows: Sequence[Row]) -> Table:
    table = Table(title=subset)
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if i in (0, 2) else "right")
    for row in rows:
        table.add_row(*cells(row), style="red" if missed(row) else None)
    return table


def missed(row: Row) -> bool:
    """Whether a row is below what it was to reach."""
    pairs = ((row.ratio, row.target), (row.share, row.share_target))
    return any(
        value is not None and target is not None and value < target for value, target in pairs
    )


def cells(row: Row) -> tuple[str, ...]:
    """In the order of HEADINGS."""
    return (
        row.case,
        quantity(row.ours, row.unit),
        row.peer,
        "" if row.theirs is None else quantity(row.theirs, row.unit),
        "" if row.ratio is None else f"{row.ratio:.2f}x",
        "" if row.target is None else f"{row.target:g}x",
        "" if row.share is None else f"{row.share:.0%}",
        "" if row.share_target is None else f"{row.share_target:.0%}",
    )


def quantity(value: float, unit: str) -> str:
    """Three digits or more, in a unit that suits the size."""
    if unit == "s":
        factor, name = next(
            (pair for pair in ((1.0, "s"), (1e-3, "ms")) if value >= pair[0]), (1e-6, "µs")
        )
        value, unit = value / factor, name
    elif unit in SCALES:
        factor, unit = SCALES[unit]
        value /= factor
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


def markdown(machine: Mapping[str, Any], rows: Sequence[Row], run: str) -> str:
    """The machine, then a table for each subset; `run` says how it was measured."""
    libraries = ", ".join(
        f"{name} {version}" for name, version in machine["libraries"].items() if version
    )
    parts = [
        f"Machine: {machine['architecture']} with {', '.join(machine['cpu_flags']) or 'no flags'};"
        f" {machine['num_threads']} threads, kernels: {machine['tier']}."
        f" Python {machine['python']}, {machine['compiler']}, {libraries}. {run}",
    ]
    for subset, group in groupby(rows, lambda row: row.subset):
        lines = [list(HEADINGS), ["---" if i in (0, 2) else "--:" for i in range(len(HEADINGS))]]
        for row in group:
            texts = list(cells(row))
            for value, target, i in (
                (row.ratio, row.target, 4),
                (row.share, row.share_target, 6),
            ):
                if value is not None and target is not None:
                    texts[i] += " ✓" if value >= target else " ✗"
            lines.append(texts)
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"### {subset}\n\n{table}")
    return "\n\n".join(parts)


def insert(path: Path, text: str) -> None:
    """Put `text` between the markers of a file, in place of what was there.

    Raises:
        ValueError: the file does not have each marker once, in order.
    """
    document = path.read_text(encoding="utf-8")
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"{path} must have {BEGIN} and, after it, {END}, each once")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
