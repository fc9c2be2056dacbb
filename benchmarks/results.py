"""What a run measured, case by case: kept in a JSON file, gone on with, merged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.harness import Row
from swa import files


class ResultsError(Exception):
    """A file of results cannot be used; the message says which and why."""


@dataclass
class CaseResult:
    """The rows of one case."""

    subset: str
    name: str
    rows: list[Row]
    absent: dict[str, str] = field(default_factory=dict)
    """Peers that are not there, and why."""


@dataclass
class Run:
    """One start of the command: how its cases were measured."""

    options: str
    minutes: float
    others: float | None
    """Share of the CPUs' time that other processes took meanwhile; None where it is not known."""


@dataclass
class Results:
    """All cases measured on one machine, in one run or in several."""

    machine: dict[str, Any]
    quick: bool = False
    """Small sizes."""
    cases: list[CaseResult] = field(default_factory=list)
    cut: list[tuple[str, str]] = field(default_factory=list)
    """Subset and name of the cases that there was no time for."""
    runs: list[Run] = field(default_factory=list)

    def has(self, subset: str, name: str) -> bool:
        return any((case.subset, case.name) == (subset, name) for case in self.cases)

    def add(self, case: CaseResult) -> None:
        """In place of what was there for the same case, if anything."""
        key = (case.subset, case.name)
        self.cases = [other for other in self.cases if (other.subset, other.name) != key]
        self.cases.append(case)
        self.cut = [other for other in self.cut if other != key]

    def leave_out(self, subset: str, name: str) -> None:
        if not self.has(subset, name) and (subset, name) not in self.cut:
            self.cut.append((subset, name))

    def rows(self, subset: str | None = None) -> list[Row]:
        """Of one subset, or of all."""
        kept = (case.rows for case in self.cases if subset in (None, case.subset))
        return list(chain.from_iterable(kept))

    def subsets(self, order: Sequence[str]) -> Iterator[str]:
        """Those that have rows."""
        return (subset for subset in order if self.rows(subset))

    def absent(self) -> dict[str, str]:
        """Peers that were absent anywhere, and why."""
        return {name: why for case in self.cases for name, why in case.absent.items()}

    def save(self, path: Path) -> None:
        """Whole or not at all: a run may be ended at any time."""
        files.write_text(path, json.dumps(asdict(self), indent=1) + "\n")


def load(path: Path) -> Results:
    """What `Results.save` wrote.

    Raises:
        ResultsError: there is no such file, or it holds something else.
    """
    try:
        document: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        cases = [
            CaseResult(**{**case, "rows": [Row(**row) for row in case["rows"]]})
            for case in document["cases"]
        ]
        runs = [Run(**run) for run in document["runs"]]
        cut = [(subset, name) for subset, name in document["cut"]]
        return Results(document["machine"], document["quick"], cases, cut, runs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path} holds no results of this version: {error!r}") from None


def merge(paths: Sequence[Path]) -> Results:
    """Several files as one; where two have the same case, the later file's counts.

    Raises:
        ResultsError: a file cannot be read, or two are of different machines, libraries or sizes.
    """
    first, *others = (load(path) for path in paths)
    for path, other in zip(paths[1:], others, strict=True):
        require_same(first, other, str(paths[0]), str(path))
        for case in other.cases:
            first.add(case)
        first.runs += other.runs
        for subset, name in other.cut:
            first.leave_out(subset, name)
    return first


def require_same(one: Results, other: Results, one_name: str, other_name: str) -> None:
    """Raises ResultsError: measured on different machines, with other libraries or sizes."""
    first, second = (r.machine | {"quick": r.quick} for r in (one, other))
    for key in first.keys() | second.keys():
        if first.get(key) != second.get(key):
            raise ResultsError(
                f"{other_name} cannot go with {one_name}: {key} is {second.get(key)!r}, not"
                f" {first.get(key)!r}"
            )
