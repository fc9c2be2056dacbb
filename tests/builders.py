"""Small checkpoints on which every mistake shows: all parameters random, attention peaked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_files import (
    BYTE_BOS,
    BYTE_EOS,
    BYTE_VOCAB,
    CHAT_TEMPLATE,
    DTYPES,
    byte_tokenizer,
    write_checkpoint,
    write_tokenizer,
)

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Scaling recipes with an original context short enough that a test's positions go far beyond it.
ROPE_SCALING: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}


def rope_settings(rope: str, theta: float, spelling: str) -> dict[str, Any]:
    """The RoPE keys of config.json as transformers 4 ("v4") or 5 ("v5") writes them."""
    scaling = {"rope_type": rope, **ROPE_SCALING[rope]}
    if spelling == "v5":
        return {"rope_parameters": {"rope_theta": theta, **scaling}}
    return {"rope_theta": theta, "rope_scaling": None if rope == "default" else scaling}


def tiny_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    num_hidden_layers: int = 4,
    hidden_size: int = 64,
    intermediate_size: int = 96,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    head_dim: int = 16,
    vocab_size: int = BYTE_VOCAB,
    rope: str = "default",
    rope_theta: float = 10000.0,
    tied: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    dtype: str = "F32",
    shards: int = 1,
    seed: int = 0,
    spelling: str = "v5",
    max_position_embeddings: int = 256,
    tokenizer: bool = False,
    chat_template: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Write config.json, weights and, on request, a byte tokenizer to `folder`.

    `attention_bias` (llama, qwen3) and `mlp_bias` (llama) add the biases that the family's config
    offers; qwen2 always has its QKV bias. `overrides` goes into config.json last, for example
    `{"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}`.
    A RoPE recipe has an original context of 64 positions, so go beyond them to see its effect.
    """
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": tied,
        "bos_token_id": BYTE_BOS if tokenizer else None,
        "eos_token_id": BYTE_EOS if tokenizer else None,
        "torch_dtype" if spelling == "v4" else "dtype": DTYPES[dtype],
        **rope_settings(rope, rope_theta, spelling),
    }
    if family == "llama":
        config |= {"attention_bias": attention_bias, "mlp_bias": mlp_bias}
    elif family == "mistral":
        config["sliding_window"] = None
    elif family == "qwen3":
        config["attention_bias"] = attention_bias
    config |= overrides or {}
    write_checkpoint(folder, config, random_tensors(config, seed), dtype=dtype, shards=shards)
    if tokenizer:
        write_tokenizer(
            folder, byte_tokenizer(), chat_template=CHAT_TEMPLATE if chat_template else None
        )
    return folder


def random_tensors(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """float32 tensors by their names in the file.

    Query-key scores have a standard deviation of about 4 and logits one of about 3, so that
    attention is far from uniform and next-token distributions are neither flat nor certain.
    """
    rng = np.random.default_rng(seed)
    family, hidden, inner = config["model_type"], config["hidden_size"], config["intermediate_size"]
    head_dim = config["head_dim"]
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    attention_bias = config.get("attention_bias", False)
    qkv_bias = attention_bias or family == "qwen2"
    mlp_bias = config.get("mlp_bias", False)
    tensors: dict[str, np.ndarray] = {}

    def normal(shape: tuple[int, ...], deviation: float) -> np.ndarray:
        return (deviation * rng.standard_normal(shape)).astype(np.float32)

    def linear(name: str, outputs: int, inputs: int, bias: bool, gain: float = 1.0) -> None:
        tensors[f"{name}.weight"] = normal((outputs, inputs), gain / math.sqrt(inputs))
        if bias:
            tensors[f"{name}.bias"] = normal((outputs,), 0.3 * gain)

    def norm(name: str, size: int, gain: float = 1.0) -> None:
        tensors[f"{name}.weight"] = gain * (1 + normal((size,), 0.2))

    tensors["model.embed_tokens.weight"] = normal(
        (config["vocab_size"], hidden),
        3 / math.sqrt(hidden) if config["tie_word_embeddings"] else 1.0,
    )
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm", hidden)
        linear(f"{layer}.self_attn.q_proj", queries, hidden, qkv_bias, gain=2.0)
        linear(f"{layer}.self_attn.k_proj", keys, hidden, qkv_bias, gain=2.0)
        linear(f"{layer}.self_attn.v_proj", keys, hidden, qkv_bias)
        linear(f"{layer}.self_attn.o_proj", hidden, queries, attention_bias)
        if family == "qwen3":  # the norms undo the gain of the projections
            norm(f"{layer}.self_attn.q_norm", head_dim, gain=2.0)
            norm(f"{layer}.self_attn.k_norm", head_dim, gain=2.0)
        norm(f"{layer}.post_attention_layernorm", hidden)
        linear(f"{layer}.mlp.gate_proj", inner, hidden, mlp_bias)
        linear(f"{layer}.mlp.up_proj", inner, hidden, mlp_bias)
        linear(f"{layer}.mlp.down_proj", hidden, inner, mlp_bias)
    norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        linear("lm_head", config["vocab_size"], hidden, bias=False, gain=3.0)
    return tensors
