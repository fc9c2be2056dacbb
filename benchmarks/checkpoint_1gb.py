"""A random bfloat16 checkpoint of about 1 GB, in the shape of Qwen2.5-0.5B."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from benchmarks.memory_32k import HEADS, HIDDEN, INNER, KV_HEADS, LAYERS, MATRICES, VOCAB


def write(folder: Path) -> int:
    """Write config.json and model.safetensors; the size of the weights in bytes."""
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))

    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        shapes[f"{name}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{name}.post_attention_layernorm.weight"] = (HIDDEN,)
        for matrix, shape in MATRICES.items():
            block = "self_attn" if matrix in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            shapes[f"{name}.{block}.{matrix}.weight"] = shape
        for matrix in ("q_proj", "k_proj", "v_proj"):
            shapes[f"{name}.self_attn.{matrix}.bias"] = MATRICES[matrix][:1]

    header, n_bytes = {}, 0
    for name, shape in shapes.items():
        end = n_bytes + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [n_bytes, end]}
        n_bytes = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # Small finite values: bit patterns below 1 in both signs. What they are does not matter.
    rng = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            values = rng.integers(0x3C00, 0x3D00, math.prod(shape), dtype=np.uint16)
            file.write(values.tobytes())
    return n_bytes
