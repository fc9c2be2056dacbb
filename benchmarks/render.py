"""Results as tables: for the terminal, and as Markdown between two markers of a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.harness import Row
from benchmarks.results import Results

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
HEADINGS = (
    *("case", "ours", "peer", "peer's", "ratio", "to reach"),
    *("at peak", "of peak", "to reach", "rounds"),
)
LEFT = (0, 2)  # the columns of words
RATIO, SHARE = 4, 7  # the columns that may have something to reach
SCALES = {
    "FLOP/s": (1e9, "GFLOP/s"),
    "B/s": (1e9, "GB/s"),
    "B": (2.0**30, "GiB"),
    "%": (0.01, "%"),
}


def terminal(subset: str, rows: Sequence[Row]) -> Table:
    table = Table(title=subset)
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if i in LEFT else "right")
    for row, texts in lines(rows):
        table.add_row(*texts, style="red" if missed(row) else None)
    return table


def in_order(rows: Sequence[Row]) -> list[Row]:
    """As they were measured, but those of one case along its axis."""
    cases = list(dict.fromkeys(row.case for row in rows))
    return sorted(rows, key=lambda row: (cases.index(row.case), row.at or 0))


def missed(row: Row) -> bool:
    """Whether a row is below what it was to reach."""
    pairs = ((row.ratio, row.target), (row.share, row.share_target))
    return any(
        value is not None and target is not None and value < target for value, target in pairs
    )


def lines(rows: Sequence[Row]) -> list[tuple[Row, tuple[str, ...]]]:
    """The rows in their order, each with its cells."""
    # One row of each title has the share of the peak.
    shares = {row.title: row.share for row in rows if row.share is not None}
    return [(row, cells(row, shares.get(row.title))) for row in in_order(rows)]


def cells(row: Row, share: float | None) -> tuple[str, ...]:
    """In the order of HEADINGS; `share` is the case's of the peak.

    "At peak" is the most that the ratio can be on this machine: if we ran at the peak itself.
    """
    at_peak = row.ratio / share if row.ratio is not None and share and share < 1 else None
    return (
        row.title,
        quantity(row.ours, row.unit),
        row.peer,
        "" if row.theirs is None else quantity(row.theirs, row.unit),
        "" if row.ratio is None else f"{row.ratio:,.2f}x",
        "" if row.target is None else f"{row.target:g}x",
        "" if at_peak is None else f"{at_peak:,.2f}x",
        "" if row.share is None else f"{row.share:.0%}",
        "" if row.share_target is None else f"{row.share_target:.0%}",
        str(row.rounds),
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
    if 0 < value < 0.01:
        return f"{value:.2g} {unit}"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


def notes(results: Results) -> Iterator[str]:
    """How it was measured, and what is missing."""
    for run in results.runs:
        quick = ", `--quick`: small sizes" if results.quick else ""
        others = ""
        if run.others is not None:
            others = f"; other processes took {run.others:.0%} of the CPUs meanwhile"
        yield (
            f"Medians of rounds taken in turns (`{run.options}`{quick}), in {run.minutes:.0f}"
            f" minutes{others}."
        )
    for name, reason in results.absent().items():
        yield f"Without {name}: {reason}."
    if results.cut:
        cut = "; ".join(f"{subset}: {name}" for subset, name in results.cut)
        yield f"There was no time for: {cut}."


def markdown(results: Results, order: Sequence[str], pictures: Sequence[str]) -> str:
    """The machine, the notes, the pictures, then a table for each subset in `order`."""
    machine = results.machine
    libraries = ", ".join(
        f"{name} {version}" for name, version in machine["libraries"].items() if version
    )
    parts = [
        f"Machine: {machine['architecture']} with {', '.join(machine['cpu_flags']) or 'no flags'};"
        f" {machine['num_threads']} threads, kernels: {machine['tier']}."
        f" Python {machine['python']}, {machine['compiler']}, {libraries}.",
        *notes(results),
        *(f"![{Path(path).stem}]({path})" for path in pictures),
    ]
    for subset in results.subsets(order):
        rule = ["---" if i in LEFT else "--:" for i in range(len(HEADINGS))]
        marked = [_marked(*line) for line in lines(results.rows(subset))]
        table = "\n".join(f"| {' | '.join(line)} |" for line in (HEADINGS, rule, *marked))
        parts.append(f"### {subset}\n\n{table}")
    return "\n\n".join(parts)


def _marked(row: Row, texts: Sequence[str]) -> list[str]:
    """The cells, with a mark at each value that had something to reach."""
    marked = list(texts)
    for value, target, i in (
        (row.ratio, row.target, RATIO),
        (row.share, row.share_target, SHARE),
    ):
        if value is not None and target is not None:
            marked[i] += " ✓" if value >= target else " ✗"
    return marked


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
