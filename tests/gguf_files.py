"""GGUF files as llama.cpp's converter writes them, out of the checkpoints of `builders`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from checkpoint_files import read_tensors
from gguf import GGMLQuantizationType as Type

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

Stored = tuple[np.ndarray, Type]
"""The bytes or numbers of a tensor as they lie in the file, and their type."""


def gguf_name(name: str) -> str:
    """`model.layers.2.mlp.up_proj.weight` is `blk.2.ffn_up.weight`."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.{kind}"
    layer, _, stem = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[stem]}.{kind}"


def permuted(x: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of Q or K as llama.cpp's converter orders them for the llama architecture."""
    heads = x.reshape(n_heads, 2, x.shape[0] // n_heads // 2, *x.shape[1:])
    return heads.swapaxes(1, 2).reshape(x.shape)


def store(x: np.ndarray, kind: Type) -> Stored:
    """Vectors stay float32, as in real files."""
    kind = kind if x.ndim == 2 else Type.F32
    return gguf.quants.quantize(np.ascontiguousarray(x, np.float32), kind), kind


def gguf_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the architecture, without its prefix; integers, floats, booleans, text."""
    keys = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_parameters"]["rope_theta"],
        "rope.dimension_count": config["head_dim"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "vocab_size": config["vocab_size"],
    }
    rope = config["rope_parameters"]
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        length = rope["original_max_position_embeddings"]
        keys["rope.scaling.original_context_length"] = length
    return keys


def llama3_factors(config: Mapping[str, Any]) -> np.ndarray:
    """float32 [head_dim / 2]: what `rope_freqs.weight` holds for Llama 3.1's scaling."""
    rope, head_dim = config["rope_parameters"], config["head_dim"]
    factor, length = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((length / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def from_folder(
    folder: Path,
    path: Path,
    *,
    kind: Type = Type.F32,
    keys: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    edit: Callable[[dict[str, Stored]], None] | None = None,
) -> dict[str, Stored]:
    """Convert a folder that `tiny_checkpoint` wrote; what is stored, by GGUF's names.

    `keys` replaces keys of the architecture (None: leaves out), or with a leading "/" any other;
    `edit` changes the tensors before they are written.
    """
    config = json.loads((folder / "config.json").read_text())
    stored: dict[str, Stored] = {}
    for name, x in read_tensors(folder).items():
        for projection, heads in (("q", "attention"), ("k", "key_value")):
            if config["model_type"] == "llama" and f".{projection}_proj." in name:
                x = permuted(x, config[f"num_{heads}_heads"])
        stored[gguf_name(name)] = store(x, kind)
    if config["rope_parameters"]["rope_type"] == "llama3":
        stored["rope_freqs.weight"] = llama3_factors(config), Type.F32
    if edit:
        edit(stored)
    arch = {key: value for key, value in (keys or {}).items() if not key.startswith("/")}
    other = {key[1:]: value for key, value in (keys or {}).items() if key.startswith("/")}
    write_gguf(
        path,
        config["model_type"],
        {**gguf_keys(config), **arch},
        stored,
        {**(tokenizer or {}), **other},
    )
    return stored


def write_gguf(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    other: Mapping[str, Any],
) -> None:
    """Write with the gguf package; a value's Python type decides its type in the file.

    `keys` are those of the architecture, without its prefix; `other` may replace any key.
    """
    named = {f"{architecture}.{key}": value for key, value in keys.items()}
    general = {"general.architecture": architecture, "general.quantization_version": 2}
    everything = {**general, **named, **other}
    writer = gguf.GGUFWriter(path, everything.pop("general.architecture"))
    for key, value in everything.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokenizer_keys(
    backend: tokenizers.Tokenizer,
    pre: str,
    *,
    normal: Sequence[str] = (),
    control: Sequence[str] = (),
    user_defined: Sequence[str] = (),
    padded_to: int = 0,
) -> dict[str, Any]:
    """`tokenizer.ggml.*` of a byte-level BPE with further tokens of each type."""
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    tokens += normal
    types = [1] * len(tokens) + [CONTROL] * len(control) + [USER_DEFINED] * len(user_defined)
    tokens += [*control, *user_defined]
    unused = range(len(tokens), padded_to)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens + [f"[PAD{i}]" for i in unused],
        "tokenizer.ggml.token_type": types + [UNUSED] * len(unused),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
    }
