"""How time grows with threads and layers, and what larger models would take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

import swa
from benchmarks import agreement
from benchmarks.harness import Call, Case, Row, Side
from benchmarks.model_cases import ROWS_TOLD, SINKS, WINDOW
from benchmarks.rows import Medians, Results, Title, by_rate, by_seconds
from benchmarks.setting import DECODER, OURS, TRANSFORMERS, Setting, wakeful
from benchmarks.shapes import LLAMA31_8B, QWEN3_4B, QWEN25_05B, SMOLLM2_135M, Shape
from swa import cost

FEW_WORDS = 1024  # the vocabulary of random checkpoints: only scored rows would see more
ANSWER_LEN = 8


def threads(setting: Setting) -> Iterator[Case]:
    """Prefill and sweep on more threads, against the scaling of the peak loop itself."""
    n_tokens = 256 if setting.quick else 512
    prompt, answer = setting.prompt(n_tokens)
    shared = {"path": setting.model_path, "sinks": SINKS}
    works = {
        "prefill": shared | {"ids": [*prompt, *answer], "window": 0},
        "sweep": shared | {"prompt": prompt, "answer": answer, "window": n_tokens // 12},
    }
    counts = [1 << i for i in range(1, int(math.log2(setting.num_threads)) + 1)]
    for work, arguments in works.items():
        if counts:
            yield _threads(setting, work, arguments, n_tokens, counts)


def _threads(
    setting: Setting, work: str, arguments: dict[str, Any], n_tokens: int, counts: list[int]
) -> Case:
    calls = {}
    for count in (1, *counts):
        side = wakeful(Side(OURS.module, (("OMP_NUM_THREADS", str(count)),)))
        calls[f"{count} threads"] = Call(side, work, arguments)
        calls[f"peak, {count} threads"] = setting.peak(side=side)

    def rows(median: Medians, _: Results) -> list[Row]:
        peer = "scaling of the peak loop"
        return [
            row
            for count in counts
            for row in by_rate(
                Title(f"SmolLM2 {work}, T {n_tokens}, over one thread", "threads", count),
                "x",
                median["1 threads"] / median[f"{count} threads"],
                {peer: median[f"peak, {count} threads"] / median["peak, 1 threads"]},
                {peer: 0.93},
            )
        ]

    return Case(f"threads {work}", calls, rows)


def depth(setting: Setting) -> Iterator[Case]:
    """Sweeps of more layers and more tokens against what the cost model makes of fewer."""
    few, many = (2, (4,)) if setting.quick else (4, (8, 16))
    short, longer = (256, (512,)) if setting.quick else (1024, (2048, 4096))
    base = SMOLLM2_135M.cut_to(few, FEW_WORDS)
    yield _by_the_model(
        setting,
        "layers",
        (base, short),
        {n: (SMOLLM2_135M.cut_to(n, FEW_WORDS), short) for n in many},
    )
    yield _by_the_model(setting, "T", (base, short), {n: (base, n) for n in longer})


def _by_the_model(
    setting: Setting, axis: str, small: tuple[Shape, int], large: dict[int, tuple[Shape, int]]
) -> Case:
    sizes = {"small": small, **{f"{axis} {at}": size for at, size in large.items()}}
    calls = {
        name: Call(OURS, "sweep", _random_example(setting, shape, n_tokens))
        for name, (shape, n_tokens) in sizes.items()
    }
    flops = {name: _sweep_flops(shape, n_tokens) for name, (shape, n_tokens) in sizes.items()}
    shape, n_tokens = small
    of = f"T {n_tokens}" if axis == "layers" else f"{shape.num_hidden_layers} layers"
    told = f"cost model, from {shape.num_hidden_layers} layers, T {n_tokens}"

    def rows(median: Medians, _: Results) -> list[Row]:
        return [
            row
            for at in large
            for row in by_seconds(
                Title(f"sweep of SmolLM2's layers, {of}", axis, at),
                median[f"{axis} {at}"],
                {told: median["small"] * flops[f"{axis} {at}"] / flops["small"]},
                {told: None},
            )
        ]

    return Case(f"sweep by {axis}", calls, rows)


def shapes(setting: Setting) -> Iterator[Case]:
    """A few layers of larger models with random weights, scaled to all of them.

    Ours by the cost model, which counts what the engine does; peers, which run every layer whole,
    by the number of layers that they run.
    """
    sizes, n_tokens = {QWEN25_05B: 4, QWEN3_4B: 3, LLAMA31_8B: 3}, 3072
    if setting.quick:
        sizes, n_tokens = {QWEN25_05B: 2, QWEN3_4B: 2}, 384
    for shape, n_layers in sizes.items():
        yield _shape_prefill(setting, shape, n_layers, n_tokens)
        yield _shape_sweep(setting, shape, n_layers, n_tokens)


def _shape_prefill(setting: Setting, shape: Shape, n_layers: int, n_tokens: int) -> Case:
    small = shape.cut_to(n_layers, FEW_WORDS)
    work = {"path": setting.checkpoint(small), "ids": _random_ids(n_tokens), **ROWS_TOLD}
    peer = "transformers bf16"
    calls = {
        "ours": Call(OURS, "prefill", {**work, "window": 0, "sinks": 0}),
        peer: Call(TRANSFORMERS, "prefill", work),
    }
    policy = swa.AttentionPolicy(sliding_window=n_tokens)
    all_layers, few = (
        cost.nll_work(model.config(), policy, (), n_tokens, 1).flops for model in (shape, small)
    )

    def rows(median: Medians, _: Results) -> list[Row]:
        return by_seconds(
            Title(f"{_scaled(shape, n_layers)}, prefill, full", "T", n_tokens),
            median["ours"] * all_layers / few,
            {peer: median[peer] * shape.num_hidden_layers / n_layers},
            {peer: None},
        )

    return Case(f"prefill {shape.name}", calls, rows, agreement.same_logits)


def _shape_sweep(setting: Setting, shape: Shape, n_layers: int, n_tokens: int) -> Case:
    small = shape.cut_to(n_layers, FEW_WORDS)
    work = _random_example(setting, small, n_tokens)
    peer = "hand-written torch, forks"
    calls = {"ours": Call(OURS, "sweep", work), peer: Call(DECODER, "sweep", work)}

    def same(result: Results) -> None:
        found = np.abs(np.array(result["ours"]) - np.array(result[peer])).max()
        agreement.require(found, agreement.BFLOAT16_NATS, f"NLLs of a sweep, ours and {peer},")

    def runs(n: int) -> int:
        """Layers that a base pass and a fork at each layer run."""
        return n + n * (n + 1) // 2

    def rows(median: Medians, _: Results) -> list[Row]:
        work = _sweep_flops(shape, n_tokens) / _sweep_flops(small, n_tokens)
        layers = runs(shape.num_hidden_layers) / runs(n_layers)
        return by_seconds(
            Title(f"{_scaled(shape, n_layers)}, sweep, window {_window(n_tokens)}", "T", n_tokens),
            median["ours"] * work,
            {peer: median[peer] * layers},
            {peer: None},
        )

    return Case(f"sweep {shape.name}", calls, rows, same)


def _scaled(shape: Shape, n_layers: int) -> str:
    return f"{shape.name}, {shape.num_hidden_layers} layers scaled from {n_layers}"


def _random_ids(n_tokens: int) -> list[int]:
    ids: list[int] = np.random.default_rng(0).integers(0, FEW_WORDS, n_tokens).tolist()
    return ids


def _window(n_tokens: int) -> int:
    return min(WINDOW, n_tokens // 3)


def _random_example(setting: Setting, shape: Shape, n_tokens: int) -> dict[str, Any]:
    ids = _random_ids(n_tokens)
    return {
        "path": setting.checkpoint(shape),
        "prompt": ids[:-ANSWER_LEN],
        "answer": ids[-ANSWER_LEN:],
        "window": _window(n_tokens),
        "sinks": SINKS,
    }


def _sweep_flops(shape: Shape, n_tokens: int) -> float:
    policy = swa.AttentionPolicy(sliding_window=_window(n_tokens), num_sink_tokens=SINKS)
    layers = range(shape.num_hidden_layers)
    prompt_len = n_tokens - ANSWER_LEN
    return cost.sweep_work(shape.config(), policy, (), layers, prompt_len, ANSWER_LEN).flops
