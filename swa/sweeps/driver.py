"""Running tasks on anything that has `submit`: each counts once, whatever happens to workers."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from typing import Any, Protocol

from swa.errors import InputError, WorkerError
from swa.sweeps.tasks import Outcome, Task, run_task

ATTEMPTS = 3
"""How often a task is given to the executor before its worker's death counts as its own fault."""
TICK = 0.5  # seconds between looks for tasks that are lost


class Executor(Protocol):
    """`submit(function, *arguments)` gives a future with `result` and `add_done_callback`."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Any: ...


class Driver:
    """Runs tasks, and those that follow from their results, until none is left.

    What follows comes first, so that what was begun is finished before the next is. The first
    result of a task counts, whoever else still brings one. Where a worker dies, what it was doing
    is done anew.

    Args:
        executor: where tasks run.
        in_flight: how many are there at once; None: all that are ready.
        lost_after: seconds without any result after which tasks that are away are given to the
            executor once more, since some lose tasks; None: trust it.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        in_flight: int | None = None,
        lost_after: float | None = None,
    ) -> None:
        if lost_after is not None and not lost_after > 0:
            raise InputError(f"lost_after must be a number of seconds above 0, not {lost_after!r}")
        self._executor, self._in_flight, self._lost_after = executor, in_flight, lost_after
        self._running: dict[str, _Running] = {}
        self._done = queue.SimpleQueue[tuple[str, int]]()
        """Key and attempt of what is back, or failed."""
        self._heard = time.monotonic()
        self._ended = False
        """Whether no task begins any more."""

    def run(
        self,
        tasks: Iterable[Task],
        finished: Callable[[Task, Outcome], Iterable[Task]],
        begins: Callable[[], bool] = lambda: True,
    ) -> None:
        """Run `tasks` and whatever `finished`, called with each outcome in turn, returns.

        A task that is given again, by key, is not run again.

        When `begins` says no, no task is begun any more: those that wait for their turn are taken
        back from the executor, those under way are waited for.

        Raises:
            WorkerError: a task's worker died ATTEMPTS times.
            InputError: what `submit` gives is no future.
        """
        self._done, self._ended = queue.SimpleQueue(), False  # nothing of an earlier run
        ready = deque(tasks)
        seen = {task.key for task in ready}

        def settle(wait: bool) -> bool:
            """Take in one result, if there is one; whether there was."""
            settled = self._next(wait)
            if settled is None:
                return False
            following = [task for task in finished(*settled) if task.key not in seen]
            seen.update(task.key for task in following)
            ready.extendleft(reversed(following))
            return True

        try:
            while self._running or (ready and not self._ended):
                if not self._ended and not begins():
                    self._ended = True
                    self._take_back()
                elif ready and not self._ended and self._has_room():
                    self._submit(_Running(ready.popleft()))
                    while settle(wait=False):
                        pass
                else:
                    settle(wait=True)
        finally:
            self._give_up()

    def _give_up(self) -> None:
        """Leave undone what is away."""
        for running in self._running.values():
            running.cancel()
        self._running.clear()

    def _has_room(self) -> bool:
        return self._in_flight is None or len(self._running) < self._in_flight

    def _submit(self, running: _Running) -> None:
        key = running.task.key
        self._running[key] = running
        running.attempts += 1
        # The number of the attempt keeps executors that know their tasks by content (Dask) from
        # answering with what became of the last one.
        try:
            future = self._executor.submit(run_task, running.task, running.attempts)
        except BrokenExecutor as error:
            raise WorkerError(
                f"the executor is broken ({error}): start a new one and repeat the call, with the"
                " same journal to go on where it stopped"
            ) from error
        if not callable(getattr(future, "add_done_callback", None)):
            raise InputError(
                f"{type(self._executor).__name__}.submit returns a {type(future).__name__}, which"
                " has no add_done_callback: give an executor like those of concurrent.futures, or"
                " a Dask client"
            )
        attempt, done = running.attempts, self._done
        running.away[attempt] = future
        future.add_done_callback(lambda _: done.put((key, attempt)))

    def _take_back(self) -> None:
        """Cancel what has not begun, which is then left undone."""
        begun = _begun(self._executor)
        for key, running in list(self._running.items()):
            running.take_back(begun)
            if not running.away:
                del self._running[key]

    def _next(self, wait: bool) -> tuple[Task, Outcome] | None:
        """The next outcome that counts; None: there is none yet."""
        while True:
            try:
                key, attempt = self._done.get(block=wait, timeout=TICK)
            except queue.Empty:
                self._resubmit_lost()
                return None
            self._heard = time.monotonic()
            running = self._running.get(key)
            if running is None or attempt not in running.away:
                continue  # it had a result already, or was taken back
            try:
                outcome = running.away.pop(attempt).result()
                if not isinstance(outcome, Outcome) or outcome.key != key:
                    raise WorkerError("the executor returned what is not this task's result")
            except Exception as error:
                self._failed(running, error)
                continue
            del self._running[key]
            return running.task, outcome

    def _failed(self, running: _Running, error: BaseException) -> None:
        """The executor could not run a task (a task's own error comes as its outcome)."""
        if self._ended:
            if not running.away:
                del self._running[running.task.key]  # left undone
            return
        if running.attempts >= ATTEMPTS:
            raise WorkerError(
                f"{running.task.name} failed {ATTEMPTS} times, its worker died or could not run it"
                f" ({type(error).__name__}: {error}): is there enough memory for it?"
            ) from error
        self._submit(running)

    def _resubmit_lost(self) -> None:
        """Where all is silent for too long, what is away is lost."""
        if self._lost_after is None or time.monotonic() - self._heard < self._lost_after:
            return
        self._heard = time.monotonic()
        if self._ended:
            self._give_up()
        for running in list(self._running.values()):
            if running.attempts >= ATTEMPTS:
                raise WorkerError(
                    f"{running.task.name} was given to the executor {ATTEMPTS} times, and did not"
                    f" come back, nor did anything for {self._lost_after:g} s"
                )
            self._submit(running)


class _Running:
    """A task that was given to the executor."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.attempts = 0
        self.away: dict[int, Any] = {}
        """The futures of attempts that are not back."""

    def cancel(self) -> None:
        for future in self.away.values():
            with contextlib.suppress(Exception):
                future.cancel()

    def take_back(self, begun: Container[str]) -> None:
        """Cancel the attempts that have not begun.

        Args:
            begun: keys of futures that run, and would be cancelled all the same.
        """
        for attempt, future in list(self.away.items()):
            with contextlib.suppress(Exception):  # it cannot cancel, so it is waited for
                if getattr(future, "key", None) in begun or future.done():
                    continue
                future.cancel()
                if future.cancelled():
                    del self.away[attempt]


def _begun(executor: Executor) -> set[str]:
    """Keys of the futures of a Dask client that run: it would cancel these, too.

    Futures of `concurrent.futures` that run refuse.
    """
    client: Any = executor
    with contextlib.suppress(Exception):  # it is no such client; or a worker is gone
        running: Mapping[str, Mapping[str, Any]] = client.call_stack()
        return {key for of_worker in running.values() for key in of_worker}
    return set()


class Inline:
    """Runs a task in this process, at once."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


class LocalWorkers:
    """Processes on this machine, each in a pool of its own: the death of one concerns no other.

    They are started by spawning, so a script that uses them needs the usual
    `if __name__ == "__main__":`.
    """

    def __init__(self, n_workers: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._pools = [self._new_pool() for _ in range(n_workers)]
        self._given: list[list[Future[Any]]] = [[] for _ in range(n_workers)]

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Give the work to the process that has the least."""
        self._given = [[future for future in own if not future.done()] for own in self._given]
        place = min(range(len(self._pools)), key=lambda i: len(self._given[i]))
        try:
            future = self._pools[place].submit(function, *arguments)
        except BrokenExecutor:
            self._pools[place].shutdown(wait=False)
            self._pools[place] = self._new_pool()
            future = self._pools[place].submit(function, *arguments)
        self._given[place].append(future)
        return future

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=self._context, initializer=_begin_worker)

    def __enter__(self) -> LocalWorkers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Taken now, since a pool that shuts down forgets them; what still starts is among them.
        processes = [process for pool in self._pools for process in list(pool._processes.values())]
        for pool in self._pools:
            pool.shutdown(wait=kind is None, cancel_futures=True)
        if kind is not None:  # what they are doing is of no use any more
            for process in processes:
                process.terminate()


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)  # nobody is there to take a result


@contextlib.contextmanager
def executing(executor: Executor | None, n_workers: int) -> Iterator[tuple[Executor, int | None]]:
    """The executor to use, and how many tasks it is to have at once."""
    if executor is not None:
        yield executor, None
    elif n_workers:
        with LocalWorkers(n_workers) as workers:
            yield workers, n_workers
    else:
        yield Inline(), 1
