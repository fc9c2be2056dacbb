"""Loads a checkpoint in a fresh process and prints seconds, peak memory and weights as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import swa
import swa.model  # not timed: the import


def peak_bytes() -> int:
    """Not getrusage: its peak is that of the process this one was forked from, if higher."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    before = peak_bytes()
    begun = time.perf_counter()
    model = swa.load(sys.argv[1])
    seconds = time.perf_counter() - begun
    told = {
        "seconds": seconds,
        "peak_bytes": peak_bytes() - before,
        "weight_bytes": model.engine.weight_bytes,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
