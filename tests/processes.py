"""Fresh Python processes for tests: their output, their memory; other builds of the extension."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parent
BUILT_FROM = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "swa/__init__.py")


def run_python(code: str, *arguments: object, seconds: float = 120.0, **environment: str) -> str:
    """Run code in a fresh interpreter that can import the tests' modules; its output.

    It must end well, and in time.
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def interrupt(command: Sequence[str], journal: Path, n_lines: int) -> str:
    """Press Ctrl-C once a command's journal has so many lines; what it says on stderr."""
    with subprocess.Popen(
        [sys.executable, "-m", "swa.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=journal.parent,
    ) as process:
        while not journal.exists() or journal.read_bytes().count(b"\n") < n_lines:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    return errors


def peak_bytes() -> int:
    """The most memory that this process has had at once.

    Not getrusage: its peak is that of the process it was forked from, if that was higher.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def measure_peak(setup: str, task: str) -> int:
    """Bytes that `task` adds to the peak memory of a fresh Python process after `setup`."""
    parts = ("from processes import peak_bytes", setup, "before = peak_bytes()", task)
    code = "\n".join(map(textwrap.dedent, parts)) + "\nprint(peak_bytes() - before)"
    return int(run_python(code))


def build_core(folder: Path, **environment: str) -> Path:
    """Build the extension from a copy of the sources, under the switches of `environment`."""
    root, sources = TESTS.parent, folder / "sources"
    shutil.copytree(root / "csrc", sources / "csrc")
    (sources / "swa").mkdir()
    for name in BUILT_FROM:
        shutil.copy(root / name, sources / name)
    built = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", folder / "built"],
        cwd=sources,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr
    (extension,) = (folder / "built" / "swa").glob("_core*")
    return extension
