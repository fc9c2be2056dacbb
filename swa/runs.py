"""What a model is run for during a search: nothing twice, its cost, and what outlives the process.

A search of many passes over a large model takes hours; with a journal, what was run survives a
crash or Ctrl-C, and serves later searches on the same model: other budgets, other strategies.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from swa.journal import Journal
from swa.layer_scores import read_integer, read_number

F64 = npt.NDArray[np.float64]

Key = tuple[str, tuple[float, ...], int]
"""What was run, at which layers or gates, on which example."""


@dataclass(frozen=True)
class Cost:
    """Work done: in prefills an example (FLOPs over those of one pass in full attention), and time.

    One full-attention pass over every calibration example is one prefill.
    """

    prefills: float = 0.0
    seconds: float = field(default=0.0, compare=False)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.prefills + other.prefills, self.seconds + other.seconds)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.prefills - other.prefills, self.seconds - other.seconds)

    def __str__(self) -> str:
        return f"{self.prefills:.1f} prefills an example, {self.seconds:.1f} s"


NOTHING = Cost()


class Spending:
    """A line on stderr that says what has been spent so far, on `what`."""

    def __init__(self, what: str, *, shown: bool) -> None:
        self._bar: Any = None
        if shown:
            from tqdm.auto import tqdm

            self._bar = tqdm(bar_format=what + ": {n:.1f} prefills an example [{elapsed}]")

    def __enter__(self) -> Spending:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, spent: Cost) -> None:
        if self._bar is not None:
            self._bar.update(spent.prefills - self._bar.n)


class Runs:
    """Runs by what was asked for. One that a journal holds counts as if it were run now.

    Args:
        progress: told what was spent, after every run.
        journal: open; every new run is added to it.
        problem: which runs of the journal these are: a name of all that results depend on beside
            the model.

    Raises:
        ScoresError: a line of the journal is not the record of a run.
    """

    def __init__(
        self,
        progress: Callable[[Cost], None] | None = None,
        journal: Journal | None = None,
        problem: str = "",
    ) -> None:
        self.spent = NOTHING
        self._progress, self._journal, self._problem = progress, journal, problem
        self._recorded = {} if journal is None else _recorded(journal, problem)
        self._found: dict[Key, tuple[F64, Cost]] = {}

    def journaled(self, journal: Journal, problem: str) -> Runs:
        """With all that these know, now and later, and a journal for whatever is asked here.

        Raises ScoresError as the class.
        """
        other = Runs(self._progress, journal, problem)
        other._found = self._found
        return other

    def __contains__(self, key: Key) -> bool:
        """Whether `get` was asked for it; what only the journal knows does not count."""
        return key in self._found

    def get(self, key: Key, run: Callable[[], F64], prefills: float) -> tuple[F64, Cost]:
        """The finite float64 [n] that `run` gives, and what that takes."""
        if key not in self._found:
            if key in self._recorded:
                values, seconds = self._recorded[key]
                cost = self.spend(Cost(prefills, seconds))
            else:
                begun = time.perf_counter()
                values = run()
                cost = self.spend(Cost(prefills, time.perf_counter() - begun))
            self._found[key] = values, cost
        self._record(key, *self._found[key])
        return self._found[key]

    def spend(self, cost: Cost) -> Cost:
        """Count work, and tell `progress`."""
        self.spent += cost
        if self._progress is not None:
            self._progress(self.spent)
        return cost

    def _record(self, key: Key, values: F64, cost: Cost) -> None:
        if self._journal is not None and key not in self._recorded:
            what, at, example = key
            self._journal.append(
                {
                    "problem": self._problem,
                    "run": what,
                    "at": at,
                    "example": example,
                    "values": values.tolist(),
                    "seconds": round(cost.seconds, 3),
                }
            )
            self._recorded[key] = values, cost.seconds


def _recorded(journal: Journal, problem: str) -> dict[Key, tuple[F64, float]]:
    """A problem's values and seconds."""
    found: dict[Key, tuple[F64, float]] = {}

    def parse(record: dict[str, Any]) -> None:
        at = tuple(map(read_number, record["at"]))
        key = str(record["run"]), at, read_integer(record["example"])
        values = np.array(list(map(read_number, record["values"])), dtype=np.float64)
        seconds = read_number(record["seconds"])
        if not values.size or not math.isfinite(seconds):
            raise ValueError("a run without values")
        if record["problem"] == problem:
            found[key] = values, seconds

    journal.read("a run", parse)
    return found
