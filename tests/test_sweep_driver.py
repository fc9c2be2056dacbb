"""The driver of sweeps and its worker processes, without a model."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import run_python

from swa.sweeps import driver
from swa.sweeps.driver import Driver, LocalWorkers
from swa.sweeps.tasks import Outcome

SLEEPING = """
import os, time
from swa.sweeps.driver import LocalWorkers

if __name__ == "__main__":
    with LocalWorkers(1) as workers:
        print(workers.submit(os.getpid).result(), flush=True)
        workers.submit(time.sleep, 600)
        time.sleep(600)
"""


def lives(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE  # reaped by whoever is init
    except psutil.NoSuchProcess:
        return False


def ends(process: int, seconds: float = 30) -> bool:
    """Whether a process ends by itself in that time; it has ended afterwards."""
    deadline = time.monotonic() + seconds
    while lives(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    if lives(process):
        os.kill(process, signal.SIGKILL)
        return False
    return True


@pytest.mark.parametrize("began", [True, False])
def test_processes_end_with_an_error(began: bool) -> None:
    """Those that are still starting, too: nothing waits for what they are given."""
    before = multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="stop"), LocalWorkers(1) as workers:
        if began:
            assert workers.submit(os.getpid).result() != os.getpid()
        workers.submit(time.sleep, 600)
        (process,) = set(multiprocessing.active_children()) - set(before)
        raise RuntimeError("stop")
    assert process.pid is not None and ends(process.pid)


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_their_parent(tmp_path: Path, by: signal.Signals) -> None:
    """Killed, it cannot tell them."""
    script = tmp_path / "sleeping.py"
    script.write_text(SLEEPING)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.send_signal(by)
        assert parent.wait(60) == -by
        assert ends(worker)


def test_processes_share_the_cores_that_this_one_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large machine, a batch system may lend a few."""
    counting = """
        import os
        os.cpu_count = lambda: 64
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        from swa.sweeps.run import threads_of
        print(threads_of(0), threads_of(1), threads_of(2))
        """
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run_python(counting).split() == ["0", "1", "1"]
    counting = "from swa.sweeps.run import threads_of; print(threads_of(2), threads_of(3))"
    assert run_python(counting, OMP_NUM_THREADS="12").split() == ["6", "4"]


# ---- time that is up


@dataclass(frozen=True)
class Waiting:
    """Leaves a file when it begins, then waits for one that lets it end (a while at most)."""

    folder: str
    key: str

    @property
    def name(self) -> str:
        return f"waiting as {self.key}"

    def run(self) -> Outcome:
        Path(self.folder, f"{self.key}.begun").touch()
        deadline = time.monotonic() + 3
        while not Path(self.folder, "end").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        return Outcome(self.key, {})


@contextmanager
def executor_of(kind: str) -> Iterator[Any]:
    """With one worker."""
    if kind == "threads":
        with ThreadPoolExecutor(1) as executor:
            yield executor
        return
    from distributed import Client

    options: dict[str, Any] = {"n_workers": 1, "threads_per_worker": 1, "processes": False}
    with Client(dashboard_address=None, **options) as client:
        yield client


@pytest.mark.parametrize("kind", ["threads", "dask"])
def test_what_waits_is_taken_back_when_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What is under way is not: its result counts, and it alone was begun."""
    monkeypatch.setattr(driver, "run_task", lambda task, attempt: task.run())
    waiting: Any = [Waiting(str(tmp_path), f"t{i}") for i in range(4)]
    asked = itertools.count()
    finished: list[str] = []

    def begun() -> list[str]:
        return [path.stem for path in tmp_path.glob("*.begun")]

    def begins() -> bool:
        """Not once all are submitted, and one is under way."""
        if next(asked) < len(waiting):
            return True
        while not begun():
            time.sleep(0.01)
        threading.Timer(1, (tmp_path / "end").touch).start()
        return False

    def finish(task: Any, outcome: Outcome) -> list[Any]:
        finished.append(outcome.key)
        return [Waiting(str(tmp_path), "more")]

    with executor_of(kind) as executor:
        Driver(executor).run(waiting, finish, begins)
    assert len(finished) == 1
    assert begun() == finished


def test_what_fails_when_time_is_up_is_left_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beginning it anew would be beginning."""
    tried: list[int] = []
    began, up = threading.Event(), threading.Event()

    def fail(task: Any, attempt: int) -> Outcome:
        tried.append(attempt)
        began.set()
        up.wait(60)
        raise OSError("worker lost")

    monkeypatch.setattr(driver, "run_task", fail)
    asked = itertools.count()

    def begins() -> bool:
        if next(asked) == 0:
            return True
        began.wait(60)
        threading.Timer(0.2, up.set).start()
        return False

    with ThreadPoolExecutor(1) as executor:
        lost: Any = Waiting("", "lost")
        Driver(executor).run([lost], lambda task, outcome: [], begins)
    assert tried == [1]
