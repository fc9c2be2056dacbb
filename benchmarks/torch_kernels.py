"""torch's side of single kernels: matrix products and attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import operands
from benchmarks.worker import Measured, Run


def _timed(work: Callable[[], torch.Tensor], shown: Callable[[torch.Tensor], list[Any]]) -> Run:
    def run() -> Measured:
        with torch.inference_mode():
            begun = time.perf_counter()
            out = work()
            seconds = time.perf_counter() - begun
        return seconds, shown(out)

    return run


def linear(m: int, n: int, k: int, dtype: str) -> Run:
    """[m, k] times the transpose of [n, k], into memory that is there already."""
    x, w = (torch.from_numpy(y).to(getattr(torch, dtype)) for y in operands.linear(m, n, k))
    out = torch.empty(m, n, dtype=x.dtype)
    return _timed(
        lambda: torch.mm(x, w.t(), out=out), lambda out: operands.shown(out.float().numpy())
    )


def attention_operands(dtype: str, **shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [1, H, T, d], k and v [1, G, T, d]."""
    q, k, v = (
        torch.from_numpy(x).to(getattr(torch, dtype)).transpose(0, 1)[None].contiguous()
        for x in operands.attention(**shape)
    )
    return q, k, v


def attended(out: torch.Tensor) -> list[Any]:
    """What is shown of attention [1, H, T, d]."""
    return operands.shown(out[0].transpose(0, 1).float().numpy())


def causal(**shape: Any) -> Run:
    """SDPA's own causal mode."""
    q, k, v = attention_operands(**shape)
    return _timed(
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), attended
    )


def dense_mask(window: int, **shape: Any) -> Run:
    """SDPA with the window as a mask [T, T], made beforehand in the operands' dtype."""
    q, k, v = attention_operands(**shape)
    row = torch.arange(q.shape[2])
    seen = (row[:, None] >= row) & (row[:, None] - row < window)
    mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
    return _timed(lambda: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True), attended)


def blockwise(window: int, **shape: Any) -> Run:
    """`window_attention` below, its mask made beforehand."""
    q, k, v = attention_operands(**shape)
    mask = window_mask(window, 0, q.dtype)
    return _timed(lambda: window_attention(q, k, v, window, 0, mask), attended)


def window_mask(window: int, sinks: int, dtype: torch.dtype) -> torch.Tensor:
    """What a block of `window` rows adds to its scores: [W, S + 2 W].

    Its keys are the sinks, the block before it and its own: the same picture for every block but
    the first, which has no block before it and needs no sinks.
    """
    row = torch.arange(window)[:, None]
    before, own = row < torch.arange(window), row >= torch.arange(window)
    seen = torch.cat([torch.ones(window, sinks, dtype=torch.bool), before, own], dim=1)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    sinks: int,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Rows see `window` keys and the sinks (fewer than `window`), computed block by block."""
    n_tokens = q.shape[2]
    out = torch.empty_like(q)
    first = min(window, n_tokens)
    out[:, :, :first] = F.scaled_dot_product_attention(
        q[:, :, :first], k[:, :, :first], v[:, :, :first], is_causal=True, enable_gqa=True
    )
    for start in range(window, n_tokens, window):
        end = min(start + window, n_tokens)
        before = start - window
        shown = mask[: end - start, : sinks + window + end - start]
        keys, values = k[:, :, before:end], v[:, :, before:end]
        if sinks:
            keys, values = (
                torch.cat([x[:, :, :sinks], y], dim=2) for x, y in ((k, keys), (v, values))
            )
            if before < sinks:  # the block before holds the sinks: hide them in it, see them once
                shown = shown.clone()
                shown[:, sinks : sinks + sinks - before] = -torch.inf
        out[:, :, start:end] = F.scaled_dot_product_attention(
            q[:, :, start:end], keys, values, shown, enable_gqa=True
        )
    return out
