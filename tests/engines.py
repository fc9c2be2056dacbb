"""Engines made from checkpoint folders, on any tier: what `swa.load` does, without its choices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from reference import Choices, Gated, Rows, Sweep

from swa import _core
from swa.checkpoint import open_checkpoint

TIERS: tuple[str, ...] = _core.build_info()["tiers_supported"]
THREADS = (1, 2, 3, 4, 7)


def open_engine(
    folder: Path, *, dtype: str = "float32", tier: str | None = None, num_threads: int = 1
) -> _core.Engine:
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config.engine_dict()
    engine = _core.Engine(config, dtype=dtype, num_threads=num_threads, tier=tier)
    for p in checkpoint.parameters():
        engine.load_rows(p.tensor, p.layer, p.row_start, p.dtype, p.data)
    engine.finish()
    return engine


def logits(engine: _core.Engine, ids: Sequence[int], rows: Rows) -> np.ndarray:
    return engine.logits(np.array(ids, np.int32), *rows.arrays)


def nll(
    engine: _core.Engine, ids: Sequence[int], prompt_len: int, rows: Rows
) -> tuple[np.ndarray, np.ndarray]:
    return engine.nll(np.array(ids, np.int32), prompt_len, *rows.arrays)


def sweep(
    engine: _core.Engine,
    ids: Sequence[int],
    prompt_len: int,
    rows: Rows,
    flip_window: Sequence[int],
) -> Sweep:
    flips = np.array(flip_window, np.int64)
    return Sweep(*engine.sweep(np.array(ids, np.int32), prompt_len, *rows.arrays, flips))


def gates(
    engine: _core.Engine,
    ids: Sequence[int],
    prompt_len: int,
    choices: Choices,
    weights: np.ndarray,
    reference: np.ndarray | None = None,
) -> Gated:
    ids = np.array(ids, np.int32)
    return Gated(*engine.gates(ids, prompt_len, *choices.arrays, weights, reference=reference))
