"""Our side: the kernels through their hooks, models through the public API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import cache
from typing import Any, Literal

import numpy as np

import swa
from benchmarks import operands
from benchmarks.worker import Measured, Run
from swa import _core
from swa.examples import Example
from swa.gates import gate_gradient
from swa.model import Model

DECODED_TOKENS = 48

Dtype = Literal["bfloat16", "float32"]


def num_threads() -> int:
    return int(os.environ["OMP_NUM_THREADS"])


def peak(kind: str, tier: str | None = None, n_bytes: int | None = None) -> Run:
    """FLOP/s of multiply-adds from registers, or bytes/s of reading a buffer."""
    settings: Any = {"tier": tier, "num_threads": num_threads()}
    if n_bytes is not None:
        settings["n_bytes"] = n_bytes
    return lambda: (_core.peak(kind, **settings), None)


def linear(m: int, n: int, k: int, dtype: str, tier: str | None = None) -> Run:
    """Seconds of [m, k] times the transpose of packed weights [n, k]. Result: some outputs."""
    x, w = operands.linear(m, n, k)
    settings: Any = {"dtype": dtype, "tier": tier, "num_threads": num_threads(), "timed": True}

    def run() -> Measured:
        out, seconds = _core.linear(x, w, **settings)
        return seconds, operands.shown(out)

    return run


def attention(dtype: str, window: int = 0, **shape: int) -> Run:
    """Seconds of causal attention, K and V packed anew each time; window 0 is full attention.

    Result: some outputs.
    """
    q, k, v = operands.attention(**shape)
    settings: Any = {"dtype": dtype, "num_threads": num_threads(), "timed": True}

    def run() -> Measured:
        out, seconds = _core.attention(q, k, v, window, 0, len(q), **settings)
        return seconds, operands.shown(out)

    return run


@cache
def _model(path: str, dtype: Dtype) -> Model:
    return swa.load(path, dtype=dtype, num_threads=num_threads(), max_position_embeddings=1 << 17)


def prefill(
    path: str,
    ids: list[int],
    window: int,
    sinks: int,
    dtype: Dtype = "bfloat16",
    n_rows: int = 1,
) -> Run:
    """Seconds to the logits of the last rows; window 0 is full attention. Result: some of them."""
    model = _model(path, dtype)
    n_layers, n_tokens = model.config.num_hidden_layers, len(ids)
    tokens = np.array(ids, np.int32)
    rows = [np.full(n_layers, value, np.int64) for value in (window, sinks, n_tokens)]

    def run() -> Measured:
        begun = time.perf_counter()
        logits = model.engine.logits(tokens, *rows, first_row=n_tokens - n_rows)
        return time.perf_counter() - begun, operands.some_logits(logits)

    return run


def sweep(
    path: str,
    prompt: list[int],
    answer: list[int],
    window: int,
    sinks: int,
    dtype: Dtype = "bfloat16",
) -> Run:
    """Seconds of an example's sweep. Result: mean NLL of the base run, then of each layer's run."""
    model = _model(path, dtype)
    example = Example(tuple(prompt), tuple(answer))
    policy = swa.AttentionPolicy(sliding_window=window, num_sink_tokens=sinks)

    def run() -> Measured:
        begun = time.perf_counter()
        result = model.sweep_example(example, policy, (), model.selectable_layers, to_full=True)
        seconds = time.perf_counter() - begun
        return seconds, [result.base_nll.mean(), *result.run_nll.mean(axis=1).tolist()]

    return run


def gradient(path: str, prompt: list[int], answer: list[int], window: int, sinks: int) -> Run:
    """Seconds of an example's loss and its gradient over all layers' gates, where all slide.

    Result: the loss, the mean NLL of the answer, and the FLOPs that the engine counted.
    """
    model = _model(path, "bfloat16")
    example = Example(tuple(prompt), tuple(answer))
    policy = swa.AttentionPolicy(sliding_window=window, num_sink_tokens=sinks)
    closed = np.zeros(model.config.num_hidden_layers)

    told: list[float] = []

    def run() -> Measured:
        begun = time.perf_counter()
        found = gate_gradient(
            model, example, policy, closed, progress=lambda done, total: told.append(total)
        )
        return time.perf_counter() - begun, [found.loss, told[-1]]

    return run


def decode(path: str, ids: list[int]) -> Run:
    """Tokens/s of greedy decoding after a short prompt.

    Result: the bytes of weights that a token reads.
    """
    engine = _model(path, "bfloat16").engine
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


def load(path: str, what: str) -> Run:
    """The seconds, or the peak bytes, of `swa.load` in a process that has done nothing else.

    Result: the bytes of the loaded weights.
    """

    def run() -> Measured:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.load_probe", path],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        told = json.loads(done.stdout)
        return told[what], told["weight_bytes"]

    return run
