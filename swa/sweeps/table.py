"""What a sweep found, as tidy tables: a row for each point, and one for each of its examples."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swa.errors import InputError
from swa.files import replacing, write_text

Row = dict[str, Any]


@dataclass(frozen=True, repr=False)
class SweepTable:
    """The points of a sweep, in the order of its grid; the same whoever computed them.

    Besides the points asked for, every model and policy has the rows "full attention" and "all
    sliding", which the others lie between.
    """

    rows: tuple[Row, ...]
    """One a point: model, dtype, policy, strategy, objective, budget, `layers` (as "0,3,5"),
    `select_prefills` (what choosing them takes, in prefills a calibration example), held-out `nll`
    (nats per answer token, mean over examples), `greedy_match` (share of the examples), and
    `gap_closed`: share of the way from all sliding to full attention under the same policy (None
    where sliding costs nothing)."""
    examples: tuple[Row, ...]
    """One a point and held-out example, in the order of `rows`: `point` (index in `rows`),
    `example`, `task`, `nll`, `greedy_match`."""
    failures: Mapping[str, str]
    """What went wrong, by the name of the work."""
    unfinished: int = 0
    """Points that have no row: they failed, or the time was up before they were done."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""
    timings: tuple[Row, ...] = field(default=(), compare=False)
    """One a point: `score_seconds`, `select_seconds` and `evaluate_seconds` of its tasks, as they
    took where they ran; those that points share count in each."""

    def nll_per_example(self, point: int) -> tuple[float, ...]:
        """[N]: held-out NLLs of a point, by its index in `rows`."""
        return tuple(row["nll"] for row in self.examples if row["point"] == point)

    def to_csv(self, path: str | os.PathLike[str], *, examples: bool = False) -> None:
        """Write the rows, or those of the examples, atomically. Raises OSError."""
        rows = self.examples if examples else self.rows
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, text.getvalue())

    def to_parquet(self, path: str | os.PathLike[str], *, examples: bool = False) -> None:
        """Write them as parquet, with pyarrow or else polars, atomically.

        Raises:
            ImportError: neither is installed.
            OSError: the file cannot be written.
        """
        write = _parquet_writer()
        with replacing(path) as temporary:
            write(list(self.examples if examples else self.rows), temporary)

    def save(self, path: str | os.PathLike[str], *, examples: bool = False) -> None:
        """Write a .csv or a .parquet, as the name ends.

        Raises:
            InputError: another ending.
            ImportError, OSError: as `to_parquet`.
        """
        writer_of(path)(self, path, examples=examples)

    def to_pandas(self, *, examples: bool = False) -> Any:
        """A pandas DataFrame. Raises ImportError: pandas is missing."""
        import pandas

        return pandas.DataFrame(list(self.examples if examples else self.rows))

    def to_polars(self, *, examples: bool = False) -> Any:
        """A polars DataFrame. Raises ImportError: polars is missing."""
        import polars

        rows = list(self.examples if examples else self.rows)
        return polars.DataFrame(rows, infer_schema_length=None)

    def __repr__(self) -> str:
        lines = [f"SweepTable: {len(self.rows)} points"]
        lines += (f"  {_described(row)}" for row in self.rows)
        if self.unfinished:
            lines.append(f"  {self.unfinished} points are not done")
        lines += (f"  failed: {name}: {error}" for name, error in self.failures.items())
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def writer_of(path: str | os.PathLike[str]) -> Callable[..., None]:
    """How a file of that name is written. Raises InputError: neither .csv nor .parquet."""
    writers = {".csv": SweepTable.to_csv, ".parquet": SweepTable.to_parquet}
    suffix = Path(path).suffix.lower()
    if suffix not in writers:
        raise InputError(f"{os.fspath(path)}: a table is written as .csv or .parquet")
    return writers[suffix]


def _described(row: Row) -> str:
    policy = f"W {row['sliding_window']}, S {row['num_sink_tokens']}, n {row['num_tail_tokens']}"
    if row["consumer"]:
        policy = f"W {row['sliding_window']} ({row['consumer']})"
    gap = "" if row["gap_closed"] is None else f"  {row['gap_closed']:4.0%}"
    budget = "" if row["budget"] is None else f" {row['budget']}"
    return f"{row['model']}  {policy}  {row['strategy']}{budget}  nll {row['nll']:.4f}{gap}"


def _parquet_writer() -> Callable[[Sequence[Row], Path], None]:
    try:
        from pyarrow import Table, parquet
    except ImportError:
        pass
    else:
        return lambda rows, path: parquet.write_table(Table.from_pylist(list(rows)), path)
    try:
        import polars
    except ImportError:
        raise ImportError(
            "parquet needs pyarrow or polars: pip install 'swa[sweep]', or write a .csv"
        ) from None
    return lambda rows, path: polars.DataFrame(list(rows), infer_schema_length=None).write_parquet(
        path
    )
