"""Whole models: prefill, sweep, decode, load, and how prefill and sweep scale with threads."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import swa
from benchmarks import checkpoint_1gb
from benchmarks.harness import Call, Case, Disagreement, Row, Side
from benchmarks.kernel_cases import READ_BYTES
from benchmarks.rows import by_rate, by_seconds, share_of
from benchmarks.setting import DECODER, OURS, TRANSFORMERS, Setting
from swa import cost
from swa.config import ModelConfig

WINDOW, SINKS = 512, 4
MAX_LOGITS_ERROR = 0.05  # of the logits' own spread
MAX_NLL_ERROR = 0.05  # nats


def _config(setting: Setting) -> ModelConfig:
    from swa.checkpoint import open_checkpoint

    return open_checkpoint(setting.model_path).config


def prefill(setting: Setting) -> Iterator[Case]:
    """SmolLM2 to the logits of the last row."""
    for n_tokens in (1536,) if setting.quick else (3072, 6144):
        yield _prefill(setting, n_tokens, window=0)
    yield _prefill(setting, 1536 if setting.quick else 6144, window=WINDOW)


def _prefill(setting: Setting, n_tokens: int, window: int) -> Case:
    ids = [token for part in setting.prompt(n_tokens) for token in part]
    shared = {"path": setting.model_path, "ids": ids}
    sliding = {**shared, "window": window, "sinks": SINKS}
    peer = Call(DECODER, "prefill", sliding) if window else Call(TRANSFORMERS, "prefill", shared)
    calls = {
        "ours": Call(OURS, "prefill", {**shared, "window": window, "sinks": SINKS}),
        "peer": peer,
        "peak": setting.peak(),
    }
    config = _config(setting)
    policy = swa.AttentionPolicy(sliding_window=window or n_tokens, num_sink_tokens=SINKS)
    flops = cost.nll_work(config, policy, (), n_tokens - 1, 1).flops

    def rows(median: dict[str, float]) -> list[Row]:
        attention = f"window {window}" if window else "full"
        name = "hand-written torch" if window else "transformers bf16"
        target = (4.0 if window else 2.3) if n_tokens == 6144 else None
        share = share_of(flops / median["ours"], median["peak"])
        return by_seconds(
            f"SmolLM2, {attention}, T {n_tokens}",
            median["ours"],
            {name: (median["peer"], target)},
            share,
        )

    return Case(f"prefill {n_tokens} {window}", calls, rows, _same_logits)


def _same_logits(results: Mapping[str, Any]) -> None:
    ours, theirs = (np.array(results[name]) for name in ("ours", "peer"))
    error = float(np.abs(ours - theirs).std() / ours.std())
    if not error < MAX_LOGITS_ERROR:
        raise Disagreement(f"the last row's logits differ by {error:.3f} of their spread")


def sweep(setting: Setting) -> Iterator[Case]:
    """One example of SmolLM2: every layer restored in turn, all others sliding."""
    n_tokens = 1536 if setting.quick else 6144
    prompt, answer = setting.prompt(n_tokens)
    work = {
        "path": setting.model_path,
        "prompt": prompt,
        "answer": answer,
        "window": WINDOW,
        "sinks": SINKS,
    }
    calls = {
        "ours": Call(OURS, "sweep", work),
        "forks": Call(DECODER, "sweep", work),
        "naive": Call(TRANSFORMERS, "masked_run", work),
        "peak": setting.peak(),
    }
    config = _config(setting)
    policy = swa.AttentionPolicy(sliding_window=WINDOW, num_sink_tokens=SINKS)
    layers = range(config.num_hidden_layers)
    flops = cost.sweep_work(config, policy, (), layers, len(prompt), len(answer)).flops

    def rows(median: dict[str, float]) -> list[Row]:
        n_runs = config.num_hidden_layers + 1
        hand_written = 4.0 if setting.has_amx else 2.0
        targets = (hand_written, 18.0) if n_tokens == 6144 else (None, None)
        return by_seconds(
            f"SmolLM2, T {n_tokens}, window {WINDOW}, {len(layers)} layers",
            median["ours"],
            {
                "hand-written torch, forks": (median["forks"], targets[0]),
                f"naive transformers ({n_runs} x one masked run)": (
                    n_runs * median["naive"],
                    targets[1],
                ),
            },
            share_of(flops / median["ours"], median["peak"]),
        )

    yield Case("sweep", calls, rows, _same_nll, warm_up=False)


def _same_nll(results: Mapping[str, Any]) -> None:
    """Every run's NLL, so the deltas, and the base run's by transformers."""
    ours, forks = np.array(results["ours"]), np.array(results["forks"])
    error = max(np.abs(ours - forks).max(), abs(ours[0] - results["naive"]))
    if not error < MAX_NLL_ERROR:
        raise Disagreement(f"the NLLs of a sweep's runs differ by up to {error:.3f} nats")


def decode(setting: Setting) -> Iterator[Case]:
    """Greedy decoding of one sequence after 16 tokens: the speed of reading the weights."""
    for name, path, n_bytes in (  # a buffer as large as the weights
        ("SmolLM2", setting.model_path, READ_BYTES // 4),
        ("random 0.5B", None, READ_BYTES),
    ):
        calls = {
            "ours": Call(OURS, "decode", {"path": path, "ids": list(range(16))}),
            "peer": Call(TRANSFORMERS, "generate", {"path": path, "ids": list(range(16))}),
            "read": setting.peak("read", n_bytes=n_bytes),
        }
        weights: dict[str, float] = {}

        def note(results: Mapping[str, Any], weights: dict[str, float] = weights) -> None:
            weights["bytes"] = results["ours"]

        def rows(
            median: dict[str, float], name: str = name, weights: dict[str, float] = weights
        ) -> list[Row]:
            return by_rate(
                f"{name}, one sequence",
                "token/s",
                median["ours"],
                {"transformers bf16": (median["peer"], None)},
                share_of(median["ours"] * weights["bytes"], median["read"]),
                0.70,
            )

        yield Case(f"decode {name}", calls, rows, note)


def load(setting: Setting) -> Iterator[Case]:
    """`swa.load` of a 1 GB checkpoint in fresh processes, the file in the page cache."""
    with tempfile.TemporaryDirectory(prefix="swa-benchmark-") as folder:
        n_bytes = checkpoint_1gb.write(Path(folder))
        calls = {
            what: Call(OURS, "load", {"folder": folder, "what": what})
            for what in ("seconds", "peak_bytes")
        }
        weights: dict[str, float] = {}

        def note(results: Mapping[str, Any]) -> None:
            weights["bytes"] = results["seconds"]

        def rows(median: dict[str, float]) -> list[Row]:
            seconds, peak = median["seconds"], median["peak_bytes"]
            limit, room = 1.5 * n_bytes / 1e9, weights["bytes"] + 2**29
            size = f"{n_bytes / 1e9:.2f} GB"
            return [
                *by_seconds(f"load {size}", seconds, {"limit: 1.5 s a GB": (limit, 1.0)}),
                Row(
                    f"peak memory, load {size}",
                    "B",
                    peak,
                    "limit: packed weights + 0.5 GiB",
                    room,
                    room / peak,
                    1.0,
                ),
            ]

        yield Case("load", calls, rows, note)


def threads(setting: Setting) -> Iterator[Case]:
    """Prefill and sweep on more threads, against the scaling of the peak loop itself."""
    n_tokens = 768 if setting.quick else 1024
    prompt, answer = setting.prompt(n_tokens)
    path = setting.model_path
    arguments = {
        "prefill": {"path": path, "ids": [*prompt, *answer], "window": 0, "sinks": 0},
        "sweep": {
            "path": path,
            "prompt": prompt,
            "answer": answer,
            "window": n_tokens // 12,
            "sinks": SINKS,
        },
    }
    counts = [1 << i for i in range(1, int(math.log2(setting.num_threads)) + 1)]
    for work, given in arguments.items():
        calls = {}
        for count in (1, *counts):
            side = Side(OURS.module, (("OMP_NUM_THREADS", str(count)),))
            calls[f"{work} {count}"] = Call(side, work, given)
            calls[f"peak {count}"] = setting.peak(side=side)

        def rows(median: dict[str, float], work: str = work) -> list[Row]:
            made = []
            for count in counts:
                ours = median[f"{work} 1"] / median[f"{work} {count}"]
                peak = median[f"peak {count}"] / median["peak 1"]
                made += by_rate(
                    f"SmolLM2 {work}, T {n_tokens}, {count} threads over 1",
                    "x",
                    ours,
                    {"scaling of the peak loop": (peak, 0.93)},
                )
            return made

        yield Case(f"threads {work}", calls, rows)
