"""How much memory a run may take on this machine, without dependencies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

GIB = 2**30


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that can be allocated now: the machine's, or what the control group still allows.

    Page cache counts as free, swap does not. None where the system tells neither.
    `root` holds `proc` and `sys`.
    """
    known = [bytes_ for bytes_ in (_machine(root), *_control_groups(root)) if bytes_ is not None]
    return max(0, min(known)) if known else None


def _machine(root: Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    try:  # not Linux: all of the memory is the best that can be said
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _control_groups(root: Path) -> Iterator[int | None]:
    """The headroom of every group this process is in, and of the groups above."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, limit, usage = "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, limit = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            usage = "memory.usage_in_bytes"
        else:
            continue
        base = root / mount
        group = base / path.lstrip("/")
        # In a container the path may be the host's: then only the mount point itself exists.
        for directory in (group, *group.parents):
            yield _headroom(directory, limit, usage)
            if directory == base:
                break


def _headroom(directory: Path, limit: str, usage: str) -> int | None:
    allowed, used = _lines(directory / limit), _lines(directory / usage)
    if not allowed or not used or not allowed[0].isdigit():  # "max" is no limit
        return None
    statistics = dict(line.split() for line in _lines(directory / "memory.stat"))
    cache = sum(int(statistics.get(name, 0)) for name in ("active_file", "inactive_file"))
    return int(allowed[0]) - int(used[0]) + cache


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, ValueError):
        return []
