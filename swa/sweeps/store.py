"""Results by the key of their task: what a journal holds, and what comes in."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm.auto import tqdm

from swa import __version__
from swa.errors import ScoresError
from swa.journal import Journal
from swa.layer_scores import read_number
from swa.sweeps.driver import Driver
from swa.sweeps.graph import Graph
from swa.sweeps.tasks import Outcome, SelectTask, Task

INPUTS = {"version": __version__, "what": "sweep"}
"""What every result in a journal depends on, beside its own inputs."""


def searches_beside(journal: str | os.PathLike[str]) -> str:
    """The folder for what selections under way have run, which belongs to a journal."""
    return os.path.abspath(journal) + ".searches"


class Store:
    """What was found, each task once.

    Args:
        journal: what it holds is read, what comes in is added.
        tier: read what kernels of this one found, and the layers that were chosen on any; None: the
            journal may hold one tier only, whichever comes first.

    Raises:
        ScoresError: the journal is damaged, or kernels of a second instruction set took part.
    """

    def __init__(self, journal: Journal | None, *, tier: str | None = None) -> None:
        self._journal = journal
        self.results: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        """That each took, where it ran."""
        self.failures: dict[str, tuple[str, Exception]] = {}
        """Name and error of the tasks that failed in this run."""
        self.tier = tier
        """Of the kernels that took part; None: not known yet."""
        if journal is not None:
            self._restore(journal)

    def add(self, task: Task, outcome: Outcome) -> bool:
        """Keep what became of a task; whether it has a result. Raises OSError, ScoresError."""
        if outcome.result is None:
            error = outcome.error or ScoresError("the task has no result")
            self.failures[task.key] = (task.name, error)
            return False
        self._check_tier(outcome.tier)
        if self._journal is not None:
            self._journal.append(
                {
                    "key": task.key,
                    "inputs": task.inputs,
                    "result": outcome.result,
                    "tier": outcome.tier,
                    "seconds": outcome.seconds,
                }
            )
        self.results[task.key], self.seconds[task.key] = outcome.result, outcome.seconds
        if isinstance(task, SelectTask):
            task.forget()
        return True

    def complete(
        self,
        graph: Graph,
        driver: Driver,
        deadline: float = math.inf,
        *,
        progress: bool = False,
    ) -> None:
        """Do what is missing of a graph, beginning nothing after `deadline` (`time.monotonic`).

        Raises as `add` and `Driver.run`.
        """
        tasks = graph.begin(self.results)
        n_tasks = len(tasks)
        with (
            _folder(graph.source.searches),
            tqdm(total=n_tasks, desc="sweeping", unit="task", disable=not progress) as bar,
        ):

            def finished(task: Task, outcome: Outcome) -> list[Task]:
                nonlocal n_tasks
                following = graph.follow(task, self.results) if self.add(task, outcome) else []
                n_tasks += len(following)
                bar.total = n_tasks
                bar.update()
                return following

            driver.run(tasks, finished, begins=lambda: time.monotonic() < deadline)

    def _restore(self, journal: Journal) -> None:
        wanted = self.tier

        def parse(record: dict[str, Any]) -> Any:
            key, result, tier = record["key"], record["result"], record["tier"]
            seconds = read_number(record["seconds"])
            if wanted in (None, tier) or record["inputs"]["stage"] == SelectTask.STAGE:
                if key in self.results or not isinstance(result, dict):
                    raise ValueError("a task twice, or without a result")
                self.results[key], self.seconds[key] = result, seconds
            return tier

        for tier in journal.read("a task", parse):
            if wanted is None:
                self._check_tier(tier)

    def _check_tier(self, tier: str) -> None:
        if self.tier not in (None, tier):
            raise ScoresError(
                f"one task ran on the kernels {tier}, others on {self.tier}, whose results differ"
                " in the last bits: set SWA_TIER alike for all workers, and begin a new journal"
            )
        self.tier = tier


@contextmanager
def _folder(path: str | None) -> Iterator[None]:
    """A folder for the time being; it stays if there is something in it then. Raises OSError."""
    if path is None:
        yield
        return
    os.makedirs(path, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):
            os.rmdir(path)
