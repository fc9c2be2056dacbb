"""`swa.sweep`: score, select and evaluate every point of a grid; nothing shared is done twice."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

from tqdm.auto import tqdm

from swa import __version__
from swa.errors import InputError, ScoresError, SwaWarning, TokenizerError
from swa.examples import Example
from swa.gates import OBJECTIVES, Objective
from swa.journal import Journal
from swa.layer_scores import read_number
from swa.model import Dtype, Model, find_tokenizer, plan
from swa.strategies import Strategy
from swa.strategies.base import Plain
from swa.sweeps.driver import Driver, Executor, executing
from swa.sweeps.grid import Grid, as_sequence
from swa.sweeps.model_sweep import ModelSweep
from swa.sweeps.table import SweepTable
from swa.sweeps.tasks import ModelSource, Outcome, Task, close_model
from swa.tokenizer import Tokenizer

Examples: TypeAlias = Sequence[Example] | Callable[[Tokenizer], Sequence[Example]]


def sweep(
    models: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    calibration: Examples,
    heldout: Examples,
    *,
    windows: Iterable[int],
    sinks: Iterable[int] = (0,),
    tails: Iterable[int] = (0,),
    consumers: Iterable[str | None] = (None,),
    strategies: Iterable[str | Strategy | Plain] = ("topk",),
    budgets: Iterable[Any] = (0.25,),
    dtypes: Iterable[Dtype] = ("bfloat16",),
    objective: Objective = "nll",
    executor: Executor | None = None,
    workers: int = 0,
    threads: int | None = None,
    journal: str | os.PathLike[str] | None = None,
    max_seconds: float | None = None,
    lost_after: float | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    max_position_embeddings: int | None = None,
    progress: bool = False,
) -> SweepTable:
    """Select layers at every point of a grid, and measure each choice on held-out examples.

    A point is a model, a dtype, a policy (window, sinks and tail, or a consumer's), a strategy and
    a budget. The work is cut into tasks: an example's exact deltas, a selection, an example's NLL
    under a choice. What points share is done once, results do not depend on who did it, and a
    worker that dies loses the task it was at.

    Args:
        models: paths or hub ids, as for `swa.load`; every worker must find the same there.
        calibration: to select on; or what makes them of a model's tokenizer.
        heldout: to evaluate on, likewise.
        windows, sinks, tails: in tokens, see AttentionPolicy.
        consumers: None for the policies above, a name for `AttentionPolicy.for_consumer`.
        strategies: as `swa.select` takes them; those of your own must be the same in every process:
            functions of a module, or dataclasses.
        budgets: shares of the layers (float), numbers of layers (int), or Budgets.
        objective: that strategies minimise, as for `swa.select`.
        executor: anything whose `submit(function, *arguments)` gives a future with `result` and
            `add_done_callback`: an executor of `concurrent.futures`, a Dask client, ...
        workers: without an executor, so many processes on this machine; 0: this process alone.
            They are spawned, so a script needs the usual `if __name__ == "__main__":`.
        threads: of one task. Required with an executor; by default all cores, shared by `workers`.
        journal: a file to which every task is added when done. Any sweep may use it again, for the
            same grid or another: what it holds is not done anew.
        max_seconds: begin no task later than that; points that are not done have no row.
        lost_after: for executors that lose tasks: seconds without any result after which those that
            are away are given out once more. More than the longest task takes.
        revision, local_files_only, max_position_embeddings: as for `swa.load`.
        progress: show a bar on stderr.

    Warns:
        SwaWarning: tasks failed (their points have no row, see `SweepTable.failures`), or policies
            of the grid hide nothing from any calibration example and were left out.

    Raises:
        InputError: the grid is not valid, or `threads` is missing.
        ScoresError: the journal is of another version, damaged or in use, or kernels of different
            instruction sets took part, whose results differ in the last bits.
        WorkerError: workers keep dying.
        SwaError: no point could be done; the first error.
    """
    grid = Grid.of(
        windows=windows,
        sinks=sinks,
        tails=tails,
        consumers=consumers,
        strategies=strategies,
        budgets=budgets,
    )
    if executor is not None and (threads is None or workers):
        raise InputError(
            "with an executor, say how many threads= a task may use, and leave out workers="
        )
    if objective not in OBJECTIVES:
        raise InputError(f"objective must be one of {OBJECTIVES}, not {objective!r}")
    if workers < 0:
        raise InputError(f"workers must be 0 or more, not {workers}")
    if threads is None:
        threads = max(1, (os.cpu_count() or 1) // workers) if workers else 0
    runs = []
    for path in as_sequence(models):
        for dtype in dict.fromkeys(dtypes):
            planned = plan(
                path,
                revision=revision,
                local_files_only=local_files_only,
                dtype=dtype,
                num_threads=threads,
                max_position_embeddings=max_position_embeddings,
            )
            source = ModelSource(
                path=os.path.abspath(path) if os.path.exists(path) else os.fspath(path),
                dtype=dtype,
                fingerprint=planned.fingerprint,
                num_threads=threads,
                revision=revision,
                local_files_only=local_files_only,
                max_position_embeddings=max_position_embeddings,
            )
            runs.append(
                ModelSweep(
                    grid,
                    planned,
                    source,
                    _made(calibration, planned),
                    _made(heldout, planned),
                    objective,
                )
            )
    deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
    inputs = {"version": __version__, "what": "sweep"}
    with (
        Journal(journal, inputs) if journal is not None else nullcontext() as opened,
        executing(executor, workers) as (used, in_flight),
    ):
        store = _Store(opened)
        # One model after the other: a worker keeps one open.
        for run in runs:
            driver = Driver(used, in_flight=in_flight, lost_after=lost_after)
            try:
                _complete(run, driver, store, deadline, progress)
            finally:
                close_model()
    return _table(runs, store)


def _made(examples: Examples, planned: Model) -> Sequence[Example]:
    if not callable(examples):
        return examples
    tokenizer = find_tokenizer(planned.checkpoint)
    if tokenizer is None:
        raise TokenizerError(f"{planned.name} has no tokenizer to make examples with: give them")
    return examples(tokenizer)


def _complete(
    run: ModelSweep, driver: Driver, store: _Store, deadline: float, progress: bool
) -> None:
    """Do what is missing of one model's grid."""
    tasks = run.begin(store.results)
    n_tasks = len(tasks)
    with tqdm(total=n_tasks, desc="sweeping", unit="task", disable=not progress) as bar:

        def finished(task: Task, outcome: Outcome) -> list[Task]:
            nonlocal n_tasks
            following = run.follow(task, store.results) if store.add(task, outcome) else []
            n_tasks += len(following)
            bar.total = n_tasks
            bar.update()
            return following

        driver.run(tasks, finished, begins=lambda: time.monotonic() < deadline)


def _table(runs: Sequence[ModelSweep], store: _Store) -> SweepTable:
    found = [made for run in runs for made in run.rows(store.results, store.seconds)]
    done = [made for made in found if made is not None]
    errors = [error for _, error in store.failures.values()]
    if errors and not any(made.row["budget"] is not None for made in done):
        raise errors[0]
    table = SweepTable(
        rows=tuple(made.row for made in done),
        examples=tuple(
            {"point": point} | example
            for point, made in enumerate(done)
            for example in made.examples
        ),
        failures={
            name: f"{type(error).__name__}: {error}" for name, error in store.failures.values()
        },
        unfinished=len(found) - len(done),
        notes=tuple(dict.fromkeys(note for run in runs for note in run.notes)),
        timings=tuple(made.timing for made in done),
    )
    for note in table.notes:
        warnings.warn(note, SwaWarning, stacklevel=3)
    if table.failures:
        warnings.warn(
            f"{len(table.failures)} tasks failed, and {table.unfinished} points have no row; the"
            f" first: {next(iter(table.failures.values()))}",
            SwaWarning,
            stacklevel=3,
        )
    return table


class _Store:
    """Results by key: those of the journal, and those that come in."""

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal
        self.results: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        self.failures: dict[str, tuple[str, Exception]] = {}
        self._tier: str | None = None
        for number, record in enumerate(journal.records if journal else (), start=2):
            try:
                key, result, tier = record["key"], record["result"], record["tier"]
                seconds = read_number(record["seconds"])
                if key in self.results or not isinstance(result, dict):
                    raise ValueError("a task twice, or without a result")
            except (KeyError, TypeError, ValueError) as error:
                raise ScoresError(
                    f"{journal.path}: line {number} is not the record of a task ({error!r}): delete"  # type: ignore[union-attr]
                    " this file to start anew"
                ) from error
            self._check_tier(tier)
            self.results[key], self.seconds[key] = result, seconds

    def add(self, task: Task, outcome: Outcome) -> bool:
        """Keep what became of a task; whether it has a result."""
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
        return True

    def _check_tier(self, tier: str) -> None:
        if self._tier not in (None, tier):
            raise ScoresError(
                f"one task ran on the kernels {tier}, others on {self._tier}, whose results differ"
                " in the last bits: set SWA_TIER alike for all workers, and begin a new journal"
            )
        self._tier = tier
