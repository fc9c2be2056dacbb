"""`swa.sweep`: score, select and evaluate every point of a grid; nothing shared is done twice."""

from __future__ import annotations

import itertools
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeAlias

from swa import _core
from swa.errors import InputError, SwaWarning
from swa.examples import Example
from swa.gates import Objective, check_objective
from swa.journal import Journal
from swa.model import Dtype, Model, plan
from swa.strategies import Strategy
from swa.strategies.base import Plain
from swa.sweeps.driver import Driver, Executor, executing
from swa.sweeps.grid import Grid, as_sequence
from swa.sweeps.model_sweep import ModelSweep
from swa.sweeps.store import INPUTS, Store, searches_beside
from swa.sweeps.table import SweepTable
from swa.sweeps.tasks import ModelSource, close_model

Examples: TypeAlias = Sequence[Example] | Callable[[Model], Sequence[Example]]
Models: TypeAlias = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def sweep(
    models: Models,
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
        calibration: to select on; or what makes them of a model (whose tokenizer it may use; the
            model's weights are not loaded).
        heldout: to evaluate on, likewise.
        windows, sinks, tails: in tokens, see AttentionPolicy.
        consumers: None for the policies above, a name for `AttentionPolicy.for_consumer`.
        strategies: as `swa.select` takes them; those of your own must be the same in every process:
            functions of a module, or dataclasses.
        budgets: shares of the layers (float), numbers of layers (int), or Budgets of any kind.
        objective: that strategies minimise, as for `swa.select`.
        executor: anything whose `submit(function, *arguments)` gives a future with `result` and
            `add_done_callback`: an executor of `concurrent.futures`, a Dask client, ...
        workers: without an executor, so many processes on this machine; 0: this process alone.
            They are spawned, so a script needs the usual `if __name__ == "__main__":`.
        threads: of one task. Required with an executor; by default all cores that this process
            may use, shared by `workers`.
        journal: a file to which every task is added when done. Any sweep may use it again, for the
            same grid or another: what it holds is not done anew. Beside it, in a folder of its name
            and ".searches", workers that have it keep what selections under way have run: where one
            was killed, the next that does its work goes on from there.
        max_seconds: begin no task later than that, and take back what waits in the executor; points
            that are not done have no row.
        lost_after: for executors that lose tasks: seconds without any result after which those that
            are away are given out once more. More than the longest task takes.
        revision, local_files_only, max_position_embeddings: as for `swa.load`.
        progress: show a bar on stderr.

    Warns:
        SwaWarning: tasks failed (their points have no row, see `SweepTable.failures`), or policies
            of the grid hide nothing from any calibration example and were left out.

    Raises:
        InputError: the grid is not valid, or `threads` is missing.
        ExampleError: there are no examples, or no policy hides anything from any of them.
        ScoresError: the journal is of another version, damaged or in use, or kernels of different
            instruction sets took part, whose results differ in the last bits.
        WorkerError: workers keep dying.
        SwaError: no point could be done; the first error.
    """
    if executor is not None and (threads is None or workers):
        raise InputError(
            "with an executor, say how many threads= a task may use, and leave out workers="
        )
    runs = model_sweeps(
        models,
        calibration,
        heldout,
        windows=windows,
        sinks=sinks,
        tails=tails,
        consumers=consumers,
        strategies=strategies,
        budgets=budgets,
        dtypes=dtypes,
        objective=objective,
        threads=threads_of(workers) if threads is None else threads,
        journal=journal,
        revision=revision,
        local_files_only=local_files_only,
        max_position_embeddings=max_position_embeddings,
    )
    deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
    with (
        Journal(journal, INPUTS) if journal is not None else nullcontext() as opened,
        executing(executor, workers) as (used, in_flight),
    ):
        store = Store(opened)
        # One model after the other: a worker keeps one open.
        for run in runs:
            driver = Driver(used, in_flight=in_flight, lost_after=lost_after)
            try:
                store.complete(run.graph, driver, deadline, progress=progress)
            finally:
                close_model()
    return _table(runs, store)


def threads_of(workers: int) -> int:
    """What a task may use of the cores that this process may, where so many run at once; 0: all.

    Raises InputError.
    """
    if workers < 0:
        raise InputError(f"workers must be 0 or more, not {workers}")
    return max(1, _core.build_info()["num_threads"] // workers) if workers else 0


def model_sweeps(
    models: Models,
    calibration: Examples,
    heldout: Examples,
    *,
    dtypes: Iterable[Dtype] = ("bfloat16",),
    objective: Objective = "nll",
    threads: int = 0,
    journal: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    max_position_embeddings: int | None = None,
    **axes: Iterable[Any],
) -> list[ModelSweep]:
    """The grid for each model and dtype. Arguments, the `axes` among them, are those of `sweep`.

    Raises as `sweep`.
    """
    grid = Grid.of(**axes)
    check_objective(objective)
    if threads < 0:
        raise InputError(f"threads must be 0 (all cores) or more, not {threads}")
    options: dict[str, Any] = {
        "num_threads": threads,
        "revision": revision,
        "local_files_only": local_files_only,
        "max_position_embeddings": max_position_embeddings,
    }
    runs = []
    for path, dtype in itertools.product(as_sequence(models), dict.fromkeys(dtypes)):
        planned = plan(
            path,
            dtype=dtype,
            with_tokenizer=callable(calibration) or callable(heldout),
            **options,
        )
        planned = replace(planned, policy=None)  # as workers open it
        source = ModelSource(
            path=os.path.abspath(path) if os.path.exists(path) else os.fspath(path),
            dtype=dtype,
            fingerprint=planned.fingerprint,
            searches=None if journal is None else searches_beside(journal),
            **options,
        )
        made = (
            examples(planned) if callable(examples) else examples
            for examples in (calibration, heldout)
        )
        runs.append(ModelSweep(grid, planned, source, *made, objective=objective))
    return runs


def _table(runs: Sequence[ModelSweep], store: Store) -> SweepTable:
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
