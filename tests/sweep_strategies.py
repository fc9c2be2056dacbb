"""Strategies for tests of sweeps, in a module that worker processes can import."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from swa.problem import Problem
from swa.strategies import Proposal


@dataclass(frozen=True)
class Slow:
    """The lowest layers, after a while; leaves a file named by its process when it begins."""

    directory: str
    seconds: float = 0.4

    def propose(self, problem: Problem, size: int) -> Proposal:
        descriptor, _ = tempfile.mkstemp(prefix=f"{os.getpid()}-", dir=self.directory)
        os.close(descriptor)
        time.sleep(self.seconds)
        return Proposal(problem.selectable[:size])


@dataclass(frozen=True)
class Deadly:
    """Kills the process that runs it, unless that is `spared`."""

    spared: int

    def propose(self, problem: Problem, size: int) -> Proposal:
        if os.getpid() != self.spared:
            os.kill(os.getpid(), signal.SIGKILL)
        return Proposal(problem.selectable[:size])


@dataclass(frozen=True)
class Dying:
    """Kills its process after some runs, unless it finds in `folder` those of an earlier life."""

    folder: str

    def propose(self, problem: Problem, size: int) -> Proposal:
        (kept,) = Path(self.folder).iterdir()
        lived_before = kept.read_text().count("\n") > 1  # the header alone
        problem.loss(())
        if not lived_before:
            os.kill(os.getpid(), signal.SIGKILL)
        return Proposal(problem.selectable[:size])


def highest(problem: Problem, size: int) -> list[int]:
    return list(problem.selectable[len(problem.selectable) - size :])


def refusing(problem: Problem, size: int) -> list[int]:
    raise ValueError(f"no {size} layers today")


def kill_first(directory: Path) -> int:
    """Wait for a `Slow` to begin, kill its process, and return its id."""
    while not (marks := list(directory.iterdir())):
        time.sleep(0.02)
    process = int(marks[0].name.partition("-")[0])
    os.kill(process, signal.SIGKILL)
    return process
