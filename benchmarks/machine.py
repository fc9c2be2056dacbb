"""The machine, described by what matters to the numbers and by nothing that identifies it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from swa import _core

FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
LIBRARIES = ("numpy", "torch", "transformers", "llama_cpp_python")


def num_cpus() -> int:
    """CPUs that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def describe(num_threads: int) -> dict[str, Any]:
    build = _core.build_info()
    return {
        "architecture": platform.machine(),
        "cpu_flags": [flag for flag in FLAGS if flag in _cpu_flags()],
        "tier": build["tier"],
        "tiers": list(build["tiers_supported"]),
        "num_threads": num_threads,
        "python": platform.python_version(),
        "compiler": build["compiler"],
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def installed(*modules: str) -> bool:
    return all(find_spec(module) is not None for module in modules)


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _cpu_flags() -> frozenset[str]:
    """Empty where there is no /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


class Others:
    """How busy the CPUs were with what is not ours: times taken beside it are worth less."""

    def __init__(self) -> None:
        self._before = self._seconds()

    def share(self) -> float | None:
        """Of all CPUs' time since then; None where it cannot be told."""
        if self._before is None or (now := self._seconds()) is None:
            return None
        busy, total, own = (b - a for a, b in zip(self._before, now, strict=True))
        return max(0.0, busy - own) / total if total > 0 else None

    @staticmethod
    def _seconds() -> tuple[float, float, float] | None:
        """Busy time of all CPUs (stolen included), all time of all CPUs, time of our processes."""
        path = Path("/proc/stat")
        if not path.exists():
            return None
        ticks = [int(x) for x in path.read_text().split("\n", 1)[0].split()[1:9]]
        idle = ticks[3] + ticks[4]  # idle, and waiting for a disk
        per_second = os.sysconf("SC_CLK_TCK")
        own = sum(os.times()[:4]) + sum(map(_ticks_of, _children())) / per_second
        return (sum(ticks) - idle) / per_second, sum(ticks) / per_second, own


def _children() -> list[str]:
    """Ids of the processes that we started and that have not ended: `os.times` lacks them."""
    lists = Path("/proc/self/task").glob("*/children")
    return [child for path in lists for child in path.read_text().split()]


def _ticks_of(process: str) -> int:
    """Of its CPU time, and of those it started that have ended."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:  # ended meanwhile
        return 0
    return sum(map(int, stat.rpartition(")")[2].split()[11:15]))
