"""Random operands of single kernels, the same for every side, and what sides are compared by."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def linear(m: int, n: int, k: int) -> tuple[Array, Array]:
    """x [m, k] and w [n, k]."""
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(sizes, dtype=np.float32) for sizes in ((m, k), (n, k)))
    return x, w


def attention(
    n_tokens: int, n_heads: int, n_kv_heads: int, head_dim: int
) -> tuple[Array, Array, Array]:
    """q [T, H, d], k and v [T, G, d]."""
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((n_tokens, heads, head_dim), dtype=np.float32)
        for heads in (n_heads, n_kv_heads, n_kv_heads)
    )
    return q, k, v


def shown(out: npt.NDArray[Any]) -> list[Any]:
    """The first 64 numbers of a few rows of out [rows, ...], the first and the last among them."""
    rows = np.linspace(0, len(out) - 1, 9).astype(int)
    sample: list[Any] = out[rows].reshape(len(rows), -1)[:, :64].astype(float).tolist()
    return sample


def some_logits(logits: npt.NDArray[Any]) -> list[Any]:
    """Every 97th of logits [rows, V]."""
    sample: list[Any] = logits[:, ::97].astype(float).tolist()
    return sample
