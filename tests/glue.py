"""Engines of random weights, straight from arrays: no checkpoint and no tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np

from swa import _core

BIASES = ("q_bias", "k_bias", "v_bias", "o_bias", "gate_bias", "up_bias", "down_bias")


def small_config(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "rope_scale": 1.0,
        "tie_word_embeddings": True,
        "qk_norm": False,
        **dict.fromkeys(BIASES, False),
        **changes,
    }
    half = config["head_dim"] // 2
    config.setdefault("inv_freq", (10000.0 ** (-np.arange(half) / half)).astype(np.float32))
    return config


def tensors(config: dict[str, Any]) -> list[tuple[str, int, np.ndarray]]:
    """Name, layer and random values of every tensor of a model without biases."""
    random = np.random.default_rng(0)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    per_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    shapes: list[tuple[str, int, tuple[int, ...]]] = [
        ("embed_tokens", -1, (config["vocab_size"], hidden)),
        ("norm", -1, (hidden,)),
    ]
    for layer in range(config["num_hidden_layers"]):
        shapes += [(name, layer, shape) for name, shape in per_layer.items()]

    def values(shape: tuple[int, ...]) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32) / np.float32(shape[-1] ** 0.5)

    return [(name, layer, values(shape)) for name, layer, shape in shapes]


def small_engine(
    *, dtype: str = "float32", num_threads: int = 1, tier: str | None = None, **changes: Any
) -> _core.Engine:
    config = small_config(**changes)
    engine = _core.Engine(config, dtype=dtype, num_threads=num_threads, tier=tier)
    for name, layer, values in tensors(config):
        engine.load_rows(name, layer, 0, "F32", values)
    engine.finish()
    return engine


def large_engine(*, num_threads: int = 2) -> _core.Engine:
    """One whose runs over `long_inputs` take many seconds: something to interrupt."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 32}
    return small_engine(
        num_threads=num_threads, num_hidden_layers=12, num_attention_heads=8, **sizes
    )


def inputs(
    engine: _core.Engine, n_tokens: int = 24, *, window: int = 6, sinks: int = 1
) -> tuple[np.ndarray, int, np.ndarray, np.ndarray, np.ndarray]:
    """ids, prompt_len, window, sinks and full_from: all layers windowed, the answer's rows full."""
    n_layers = engine.num_hidden_layers
    ids = np.random.default_rng(1).integers(0, engine.vocab_size, n_tokens).astype(np.int32)
    prompt_len = n_tokens - 4
    layers = [np.full(n_layers, value, np.int64) for value in (window, sinks, prompt_len)]
    return ids, prompt_len, layers[0], layers[1], layers[2]


def long_inputs(
    engine: _core.Engine,
) -> tuple[np.ndarray, int, np.ndarray, np.ndarray, np.ndarray]:
    return inputs(engine, 30_000, window=0)
