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
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol


@dataclass(frozen=True)
class Side:
    """A module of this package and the environment of its process."""

    module: str
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Call:
    """A function of a side: it prepares what is measured, and returns what measures it once."""

    side: Side
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    is_bound: bool = False
    """What the machine can do at most: the best of the rounds counts, not their median, since
    whatever disturbs it can only take from it, and a low peak would flatter us."""


@dataclass(frozen=True)
class Row:
    """A line of the table: us against one peer, or one bound."""

    case: str
    unit: str
    """"s", "FLOP/s", "B", "B/s", "token/s" or "x"."""
    ours: float
    peer: str = ""
    theirs: float | None = None
    ratio: float | None = None
    """How many times better than the peer we are, whichever way the unit counts."""
    target: float | None = None
    share: float | None = None
    """Of the peak measured beside it."""
    share_target: float | None = None
    repeats: int = 0
    subset: str = ""


@dataclass(frozen=True)
class Case:
    """What is measured in turns, and the rows that its medians make."""

    name: str
    calls: Mapping[str, Call]
    rows: Callable[[Mapping[str, float]], list[Row]]
    agree: Callable[[Mapping[str, Any]], None] | None = None
    """Told the results of the first round; raises Disagreement."""
    warm_up: bool = True


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

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for worker in self._running.values():
            worker.close()


def measure(case: Case, workers: Workers, repeats: int, seconds: float) -> list[Row]:
    """Measure a case in turns and return its rows.

    After `repeats` rounds, or after the round in which `seconds` have passed, it is enough.

    Raises:
        Disagreement: the sides computed different things.
        SideError: a process failed.
    """
    asked = {name: workers.of(call.side) for name, call in case.calls.items()}
    try:
        for name, call in case.calls.items():
            asked[name].ask(prepare=name, function=call.function, arguments=dict(call.arguments))
        values: dict[str, list[float]] = {name: [] for name in case.calls}
        results: dict[str, Any] = {}
        begun = time.monotonic()
        for turn in range(-int(case.warm_up), repeats):
            for name in case.calls:
                answer = asked[name].ask(measure=name)
                if turn >= 0:
                    values[name].append(answer["value"])
                results.setdefault(name, answer.get("result"))
            if case.agree is not None and turn == -int(case.warm_up):
                case.agree(results)
            if turn >= 0 and time.monotonic() - begun > seconds:
                break
    finally:
        for name in case.calls:
            asked[name].ask(forget=name)
    medians = {
        name: max(taken) if case.calls[name].is_bound else statistics.median(taken)
        for name, taken in values.items()
    }
    n_repeats = min(map(len, values.values()))
    return [Row(**(vars(row) | {"repeats": n_repeats})) for row in case.rows(medians)]
