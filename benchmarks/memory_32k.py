"""Peak memory of a long run on a model of 0.5B parameters, against what the engine promised.

    python -m benchmarks.memory_32k                      # nll of 32,768 tokens, all layers sliding
    python -m benchmarks.memory_32k --kind sweep --tokens 8192

The promise: peak memory <= packed weights + 1 GiB, and `workspace_bytes` tells it beforehand.
Weights are random (memory and time do not depend on them), in the shape of Qwen2.5-0.5B.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import numpy as np
from tqdm import tqdm

from benchmarks.shapes import QWEN25_05B, Shape
from swa import _core

SHAPE = QWEN25_05B
GIB = 1 << 30


def random_engine(shape: Shape, dtype: str, num_threads: int) -> _core.Engine:
    config = shape.config().engine_dict()
    engine = _core.Engine(config, dtype=dtype, num_threads=num_threads)
    rng = np.random.default_rng(0)

    def load(tensor: str, layer: int, *sizes: int) -> None:
        for start in range(0, sizes[0], 8192):  # chunks, as a checkpoint is loaded
            rows = min(8192, sizes[0] - start)
            x = rng.standard_normal((rows, *sizes[1:]), dtype=np.float32) / sizes[-1] ** 0.5
            engine.load_rows(tensor, layer, start, "F32", x)

    load("embed_tokens", -1, shape.vocab_size, shape.hidden_size)
    load("norm", -1, shape.hidden_size)
    for layer in range(shape.num_hidden_layers):
        load("input_layernorm", layer, shape.hidden_size)
        load("post_attention_layernorm", layer, shape.hidden_size)
        for name, sizes in shape.matrices().items():
            load(name.split(".")[1], layer, *sizes)
        for name in ("q_proj", "k_proj", "v_proj"):
            load(f"{name}.bias", layer, shape.matrices()[f"self_attn.{name}"][0])
    engine.finish()
    return engine


def peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--sinks", type=int, default=10)
    parser.add_argument("--kind", choices=["nll", "sweep"], default="nll")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()

    before = peak_bytes()
    engine = random_engine(SHAPE, options.dtype, options.threads)
    loaded = peak_bytes()
    prompt_len = options.tokens - options.answer_tokens
    ids = np.random.default_rng(1).integers(0, SHAPE.vocab_size, options.tokens).astype(np.int32)
    policy = [
        np.full(SHAPE.num_hidden_layers, value)
        for value in (options.window, options.sinks, prompt_len)
    ]
    prefix = min(prompt_len, options.window + options.sinks) if options.kind == "sweep" else 0
    told = engine.workspace_bytes(options.kind, options.tokens, prefix)
    print(
        f"{options.kind} of {options.tokens:,} tokens, {options.dtype}, {engine.tier} kernels,"
        f" {engine.num_threads} threads"
    )
    print(f"packed weights     {engine.weight_bytes / GIB:6.3f} GiB")
    print(f"peak while loading {(loaded - before) / GIB:6.3f} GiB")
    print(f"workspace, told    {told / GIB:6.3f} GiB", flush=True)

    start = time.perf_counter()
    with tqdm(unit="FLOP", unit_scale=True) as bar:

        def progress(done: float, total: float) -> None:
            bar.total = total
            bar.update(done - bar.n)

        if options.kind == "nll":
            nll = engine.nll(ids, prompt_len, *policy, progress=progress)[0]
        else:
            flips = np.zeros(SHAPE.num_hidden_layers, np.int64)
            nll = engine.sweep(ids, prompt_len, *policy, flips, progress=progress)[1]
    if not np.isfinite(nll).all():
        sys.exit("the run gave numbers that are not finite")
    over = peak_bytes() - before - engine.weight_bytes
    print(f"peak over weights  {over / GIB:6.3f} GiB in {time.perf_counter() - start:.0f} s")
    if over > GIB:
        sys.exit("the promise of 1 GiB over the packed weights is broken")


if __name__ == "__main__":
    main()
