"""What an open checkpoint yields, changes to its config.json, the memory that a task takes."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from swa.checkpoint import Checkpoint


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def collect(checkpoint: Checkpoint) -> dict[tuple[str, int], tuple[str, bytes]]:
    """(tensor, layer): (dtype, bytes), whose chunks were checked to be whole rows in order."""
    found: dict[tuple[str, int], tuple[str, bytes]] = {}
    for chunk in checkpoint.parameters():
        key = chunk.tensor, chunk.layer
        dtype, data = found.get(key, (chunk.dtype, b""))
        if data:
            assert list(found)[-1] == key  # one tensor after the other
            assert chunk.row_start * (len(data) // chunk.row_start) == len(data)
        else:
            assert chunk.row_start == 0
        assert chunk.dtype == dtype
        found[key] = dtype, data + bytes(chunk.data)
    return found


def file_name(tensor: str, layer: int) -> str:
    """As transformers calls the engine's tensor."""
    module, _, bias = tensor.partition(".")
    inner = "self_attn" if module[0] in "qkvo" else "mlp"
    path = f"{inner}.{module}" if module.endswith(("_proj", "q_norm", "k_norm")) else module
    if layer >= 0:
        path = f"model.layers.{layer}.{path}"
    elif module != "lm_head":
        path = f"model.{path}"
    return f"{path}.{bias or 'weight'}"


_PEAK = """
def peak():  # not getrusage: its peak is that of the parent process, if that was higher
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
"""


def measure_peak(setup: str, task: str) -> int:
    """Bytes that `task` adds to the peak memory of a fresh Python process after `setup`."""
    parts = (_PEAK, setup, "before = peak()", task, "print(peak() - before)")
    code = "\n".join(map(textwrap.dedent, parts))
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, timeout=60
    )
    return int(done.stdout)
