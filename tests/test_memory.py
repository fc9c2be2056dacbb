"""Available memory, from made-up /proc and /sys trees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from swa.memory import GIB, available_bytes


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MACHINE = {"proc/meminfo": "MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n"}


def v2(limit: str, used: int, cache: int, group: str = "") -> dict[str, str]:
    base = f"sys/fs/cgroup{group}"
    return {
        f"{base}/memory.max": f"{limit}\n",
        f"{base}/memory.current": f"{used}\n",
        f"{base}/memory.stat": f"anon 5\nactive_file {cache // 2}\ninactive_file {cache // 2}\n",
    }


def test_the_machine_alone(tmp_path: Path) -> None:
    assert available_bytes(write(tmp_path, MACHINE)) == 8 * GIB


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (v2(str(4 * GIB), 3 * GIB, 0), GIB),
        (v2(str(4 * GIB), 3 * GIB, GIB), 2 * GIB),  # page cache is given up first
        (v2("max", 3 * GIB, 0), 8 * GIB),
        (v2(str(64 * GIB), 3 * GIB, 0), 8 * GIB),
        (v2(str(GIB), 3 * GIB, 0), 0),
        (v2("max", GIB, 0, "/a/b") | v2(str(6 * GIB), GIB, 0, "/a"), 5 * GIB),
        (v2(str(6 * GIB), GIB, 0, "/a/b") | v2(str(9 * GIB), GIB, 0, "/a"), 5 * GIB),
    ],
)
def test_control_groups(tmp_path: Path, groups: dict[str, str], expected: int) -> None:
    files = MACHINE | {"proc/self/cgroup": "0::/a/b\n"} | groups
    assert available_bytes(write(tmp_path, files)) == expected


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory"
    files = MACHINE | {
        "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/1\n1:name=systemd:/x\n",
        f"{base}/memory.limit_in_bytes": f"{3 * GIB}\n",
        f"{base}/memory.usage_in_bytes": f"{GIB}\n",
    }
    assert available_bytes(write(tmp_path, files)) == 2 * GIB


def test_a_machine_that_tells_less(tmp_path: Path) -> None:
    known = available_bytes(tmp_path)  # neither /proc nor /sys: the physical memory, or nothing
    assert known is None or known > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_machine() -> None:
    free = available_bytes()
    assert free is not None
    total = subprocess.run(
        ["getconf", "_PHYS_PAGES"], capture_output=True, text=True, check=True
    ).stdout
    assert 0 < free <= int(total) * 65536
