"""What an open checkpoint yields, and changes to its config.json."""

from __future__ import annotations

import json
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
