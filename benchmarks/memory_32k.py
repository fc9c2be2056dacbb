"""Peak memory of a long run on a model of 0.5B parameters, against what the engine promised.

    python benchmarks/memory_32k.py                      # nll of 32,768 tokens, all layers sliding
    python benchmarks/memory_32k.py --kind sweep --tokens 8192

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

from swa import _core

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 896, 4864, 24, 14, 2, 64, 151_936
MATRICES = {
    "q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "gate_proj": (INNER, HIDDEN),
    "up_proj": (INNER, HIDDEN),
    "down_proj": (HIDDEN, INNER),
}
GIB = 1 << 30


def random_engine(dtype: str, num_threads: int) -> _core.Engine:
    config = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "qk_norm": False,
        "inv_freq": (1e6 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)).astype(np.float32),
        "rope_scale": 1.0,
        **dict.fromkeys(("q_bias", "k_bias", "v_bias"), True),
        **dict.fromkeys(("o_bias", "gate_bias", "up_bias", "down_bias"), False),
    }
    engine = _core.Engine(config, dtype=dtype, num_threads=num_threads)
    rng = np.random.default_rng(0)

    def load(tensor: str, layer: int, *shape: int) -> None:
        for start in range(0, shape[0], 8192):  # chunks, as a checkpoint is loaded
            rows = min(8192, shape[0] - start)
            x = rng.standard_normal((rows, *shape[1:]), dtype=np.float32) / shape[-1] ** 0.5
            engine.load_rows(tensor, layer, start, "F32", x)

    load("embed_tokens", -1, VOCAB, HIDDEN)
    load("norm", -1, HIDDEN)
    for layer in range(LAYERS):
        load("input_layernorm", layer, HIDDEN)
        load("post_attention_layernorm", layer, HIDDEN)
        for name, shape in MATRICES.items():
            load(name, layer, *shape)
        for name in ("q_proj", "k_proj", "v_proj"):
            load(f"{name}.bias", layer, MATRICES[name][0])
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
    engine = random_engine(options.dtype, options.threads)
    loaded = peak_bytes()
    prompt_len = options.tokens - options.answer_tokens
    ids = np.random.default_rng(1).integers(0, VOCAB, options.tokens).astype(np.int32)
    policy = [np.full(LAYERS, value) for value in (options.window, options.sinks, prompt_len)]
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
            flips = np.zeros(LAYERS, np.int64)
            nll = engine.sweep(ids, prompt_len, *policy, flips, progress=progress)[1]
    if not np.isfinite(nll).all():
        sys.exit("the run gave numbers that are not finite")
    over = peak_bytes() - before - engine.weight_bytes
    print(f"peak over weights  {over / GIB:6.3f} GiB in {time.perf_counter() - start:.0f} s")
    if over > GIB:
        sys.exit("the promise of 1 GiB over the packed weights is broken")


if __name__ == "__main__":
    main()
