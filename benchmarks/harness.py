"""Sides in processes of their own, measured in turns: one run of each, repeat, medians.

Machines are noisy, and what disturbs them lasts seconds: measured in turns, all sides get the same
share of it. Each side has a process of its own, so that no library's threads, allocator or
settings touch another's; what is idle sleeps (OMP_WAIT_POLICY=passive), for idle pools of OpenMP
spin by default and take the cores from whoever is measured.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

LONG_ROUND = 10.0
"""Seconds: a first round that takes longer counts, a shorter one only warms up."""


@dataclass(frozen=True)
class Side:
    """A module of this package and the environment of its process."""

    module: str
    environment: tuple[tuple[str, str], ...] = ()
    is_optional: bool = False
    """A peer that does not run everywhere: when it fails, the others are measured without it."""
    requires: str = ""
    """The library that an optional side is."""


@dataclass(frozen=True)
class Call:
    """A function of a side: it prepares what is measured, and returns what measures it once."""

    side: Side
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Those that are functions are called when the case begins."""
    is_bound: bool = False
    """What the machine can do at most: the best of the rounds counts, not their median, since
    whatever disturbs it can only take from it, and a low peak would flatter us."""


@dataclass(frozen=True)
class Row:
    """A line of the table: us against one peer, or one bound."""

    case: str
    unit: str
    """"s", "FLOP/s", "B", "B/s", "token/s", "x" or "%"."""
    ours: float
    peer: str = ""
    theirs: float | None = None
    ratio: float | None = None
    """How many times better than the peer we are, whichever way the unit counts."""
    target: float | None = None
    share: float | None = None
    """Of the peak measured beside it."""
    share_target: float | None = None
    axis: str = ""
    """What `at` counts, "T" (tokens) say: rows that differ in it alone make a line of a plot."""
    at: int | None = None
    rounds: int = 0

    @property
    def title(self) -> str:
        """The case and where it is on its axis."""
        return self.case if self.at is None else f"{self.case}, {self.axis} {self.at}"


@dataclass(frozen=True)
class Case:
    """What is measured in turns, and the rows that its medians make."""

    name: str
    """Of its own among the cases of a subset."""
    calls: Mapping[str, Call]
    """Peers go by the names that the table gives them; which of them are absent is not known."""
    rows: Callable[[Mapping[str, float], Mapping[str, Any]], list[Row]]
    """Of the medians, and of the results of the first round."""
    agree: Callable[[Mapping[str, Any]], None] | None = None
    """Told the results of the first round; raises Disagreement."""
    is_timed: bool = True
    """If not, one round is enough: its results count."""
    share: float = 1.0
    """Of its subset's time, beside the other cases' shares."""


@dataclass(frozen=True)
class Measured:
    """What became of a case."""

    rows: list[Row]
    absent: dict[str, str]
    """The calls that could not be made, and why."""


class Disagreement(Exception):
    """Two sides computed different things: their times cannot be compared."""


class SideError(Exception):
    """A side's process failed; the message is its traceback."""


class Process(Protocol):
    """What answers the requests of `worker.py`."""

    def ask(self, **request: Any) -> Any: ...


class Worker:
    """A side's process."""

    def __init__(self, side: Side, num_threads: int) -> None:
        self._name = side.module
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", side.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parent.parent,
            start_new_session=True,  # Ctrl-C is for us: see `kill`
            env=os.environ
            | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(num_threads)}
            | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
            | dict(side.environment),
        )

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SideError(f"{self._name}: the process ended with {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise SideError(f"{self._name}: {answer['error']}")
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Workers:
    """One process for each side, started when first asked for."""

    def __init__(self, num_threads: int, start: Callable[[Side, int], Any] = Worker) -> None:
        self._num_threads = num_threads
        self._start = start
        self._running: dict[Side, Any] = {}

    def of(self, side: Side) -> Process:
        if side not in self._running:
            self._running[side] = self._start(side, self._num_threads)
        worker: Process = self._running[side]
        return worker

    def drop(self, side: Side) -> None:
        """After a failure: the next call starts anew."""
        self._running.pop(side).kill()

    def kill(self) -> None:
        """End all: the next calls start anew."""
        for side in tuple(self._running):
            self.drop(side)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:  # they may be in the middle of something long
            self.kill()
        for worker in self._running.values():
            worker.close()


def measure(case: Case, workers: Workers, repeats: int, seconds: float) -> Measured:
    """Measure a case in turns and make its rows.

    There is one round at least, and there are `repeats` at most, and none begins that would end
    later than `seconds` from now, if it took as long as the one before.

    Raises:
        Disagreement: the sides computed different things.
        SideError: a process failed that must not.
    """
    begun = time.monotonic()
    turns = _Turns(case, workers)
    values: dict[str, list[float]] = {name: [] for name in case.calls}
    results: dict[str, Any] = {}
    is_warm, n_rounds = not case.is_timed, 0
    while n_rounds < (repeats if case.is_timed else 1):
        round_begun = time.monotonic()
        answers = turns.take()
        took = time.monotonic() - round_begun
        if not results:
            results = {name: answer.get("result") for name, answer in answers.items()}
            if case.agree is not None:
                case.agree(results)
        if is_warm or took > LONG_ROUND:
            for name, answer in answers.items():
                values[name].append(answer["value"])
            n_rounds += 1
        is_warm = True
        if n_rounds and time.monotonic() - begun + took > seconds:
            break
    turns.end()
    medians = {
        name: max(taken) if case.calls[name].is_bound else statistics.median(taken)
        for name, taken in values.items()
        if name not in turns.absent
    }
    rows = [replace(row, rounds=n_rounds) for row in case.rows(medians, results)]
    return Measured(rows, turns.absent)


class _Turns:
    """The sides of a case that are there, each having prepared its calls."""

    def __init__(self, case: Case, workers: Workers) -> None:
        self.absent: dict[str, str] = {}
        self._calls, self._workers = dict(case.calls), workers
        for name, call in case.calls.items():
            required = call.side.requires
            if required and find_spec(required) is None:
                self._lose(call.side, f"{required} is not installed")
            arguments = {k: v() if callable(v) else v for k, v in call.arguments.items()}
            self._ask(name, prepare=name, function=call.function, arguments=arguments)

    def take(self) -> dict[str, Any]:
        """The answers of a round."""
        answers = {name: self._ask(name, measure=name) for name in tuple(self._calls)}
        return {name: answer for name, answer in answers.items() if name in self._calls}

    def end(self) -> None:
        for name in tuple(self._calls):
            self._ask(name, forget=name)

    def _ask(self, name: str, **request: Any) -> Any:
        if name not in self._calls:
            return None
        side = self._calls[name].side
        try:
            return self._workers.of(side).ask(**request)
        except SideError as error:
            if not side.is_optional:
                raise
            self._lose(side, str(error).strip().splitlines()[-1])
            self._workers.drop(side)
            return None

    def _lose(self, side: Side, reason: str) -> None:
        for name in [name for name, call in self._calls.items() if call.side == side]:
            del self._calls[name]
            self.absent[name] = reason
