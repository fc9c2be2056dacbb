"""torch's flex_attention, compiled for the CPU: its C++ needs a compiler when it runs."""

from __future__ import annotations

import time

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks import torch_kernels
from benchmarks.worker import Measured, Run

_compiled = torch.compile(flex_attention)


def window(window: int, n_tokens: int, **shape: int) -> Run:
    """Seconds of windowed attention in bfloat16; mask and code are made beforehand."""
    q, k, v = torch_kernels.attention_operands("bfloat16", n_tokens=n_tokens, **shape)

    def sees(
        batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return (key <= row) & (row - key < window)

    blocks = create_block_mask(sees, None, None, n_tokens, n_tokens, device="cpu")

    def run() -> Measured:
        with torch.inference_mode():
            begun = time.perf_counter()
            out = _compiled(q, k, v, block_mask=blocks, enable_gqa=True)
            seconds = time.perf_counter() - begun
        return seconds, torch_kernels.attended(out)

    run()
    return run
