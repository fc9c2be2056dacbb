"""Our side: the kernels through their hooks, models through the public API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

import swa
from benchmarks.memory_32k import random_engine
from benchmarks.worker import Measured
from swa import _core
from swa.examples import Example
from swa.model import Model

DECODED_TOKENS = 48

Run = Callable[[], Measured]


def num_threads() -> int:
    return int(os.environ["OMP_NUM_THREADS"])


def peak(kind: str, tier: str | None = None, n_bytes: int | None = None) -> Run:
    """FLOP/s of multiply-adds from registers, or bytes/s of reading a buffer."""
    settings: Any = {"tier": tier, "num_threads": num_threads()}
    if n_bytes is not None:
        settings["n_bytes"] = n_bytes
    return lambda: (_core.peak(kind, **settings), None)


def linear(m: int, n: int, k: int, dtype: str, tier: str | None = None) -> Run:
    """Seconds of [m, k] times the transpose of packed weights [n, k]."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((m, k), dtype=np.float32)
    w = rng.standard_normal((n, k), dtype=np.float32)
    settings: Any = {"dtype": dtype, "tier": tier, "num_threads": num_threads()}
    return lambda: (_core.linear(x, w, timed=True, **settings)[1], None)


def attention(
    n_tokens: int, n_heads: int, n_kv_heads: int, head_dim: int, dtype: str, window: int = 0
) -> Run:
    """Seconds of causal attention, K and V packed anew each time; window 0 is full attention."""
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((n_tokens, heads, head_dim), dtype=np.float32)
        for heads in (n_heads, n_kv_heads, n_kv_heads)
    )
    settings: Any = {"dtype": dtype, "num_threads": num_threads()}

    def run() -> Measured:
        timed = _core.attention(q, k, v, window, 0, n_tokens, timed=True, **settings)
        return timed[1], None

    return run


@cache
def _model(path: str, n_threads: int) -> Model:
    return swa.load(path, num_threads=n_threads, max_position_embeddings=1 << 17)


def prefill(path: str, ids: list[int], window: int, sinks: int) -> Run:
    """Seconds to the logits of the last row; window 0 is full attention. Result: the logits."""
    model = _model(path, num_threads())
    n_layers, n_tokens = model.config.num_hidden_layers, len(ids)
    tokens = np.array(ids, np.int32)
    rows = [np.full(n_layers, value, np.int64) for value in (window, sinks, n_tokens)]

    def run() -> Measured:
        begun = time.perf_counter()
        logits = model.engine.logits(tokens, *rows, first_row=n_tokens - 1)
        return time.perf_counter() - begun, logits[0].tolist()

    return run


def sweep(path: str, prompt: list[int], answer: list[int], window: int, sinks: int) -> Run:
    """Seconds of an example's sweep. Result: mean NLL of the base run, then of each layer's run."""
    model = _model(path, num_threads())
    example = Example(tuple(prompt), tuple(answer))
    policy = swa.AttentionPolicy(sliding_window=window, num_sink_tokens=sinks)

    def run() -> Measured:
        begun = time.perf_counter()
        result = model.sweep_example(example, policy, (), model.selectable_layers, to_full=True)
        seconds = time.perf_counter() - begun
        return seconds, [result.base_nll.mean(), *result.run_nll.mean(axis=1).tolist()]

    return run


@cache
def _random_engine() -> _core.Engine:
    return random_engine("bfloat16", 0)


def decode(path: str | None, ids: list[int]) -> Run:
    """Tokens/s of greedy decoding after a short prompt; no path: the random 0.5B model.

    Result: the bytes of weights that a token reads.
    """
    engine = _model(path, num_threads()).engine if path else _random_engine()
    n_layers = engine.num_hidden_layers
    full = np.zeros(n_layers, np.int64)

    def run() -> Measured:
        session = engine.start(
            np.array(ids, np.int32), full, full, full, full, full, len(ids) + DECODED_TOKENS
        )
        token = int(session.logits().argmax())
        begun = time.perf_counter()
        for _ in range(DECODED_TOKENS):
            token = int(session.step(token).argmax())
        return DECODED_TOKENS / (time.perf_counter() - begun), engine.weight_bytes

    return run


def load(folder: str, what: str) -> Run:
    """The seconds, or the peak bytes, of `swa.load` in a process that has done nothing else."""

    def run() -> Measured:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.load_probe", folder],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        told = json.loads(done.stdout)
        return told[what], told["weight_bytes"]

    return run
