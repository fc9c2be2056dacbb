"""The driver of sweeps and its worker processes, without a model."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from swa.sweeps.driver import LocalWorkers

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
