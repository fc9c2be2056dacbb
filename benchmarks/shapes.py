"""Shapes of well-known models, and random checkpoints of them: time does not depend on values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swa.config import ModelConfig

ONE = 0x3F80  # in bfloat16


@dataclass(frozen=True)
class Shape:
    """As a `config.json` names it."""

    name: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    tie_word_embeddings: bool

    def cut_to(self, num_hidden_layers: int, vocab_size: int | None = None) -> Shape:
        """The same layers, fewer of them, and fewer words."""
        return replace(
            self,
            num_hidden_layers=num_hidden_layers,
            vocab_size=vocab_size or self.vocab_size,
        )

    @property
    def qkv_bias(self) -> bool:
        return self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.model_type == "qwen3"

    def config_json(self) -> dict[str, Any]:
        sizes = {name: value for name, value in vars(self).items() if name != "name"}
        if self.model_type != "qwen3":  # the other families derive it
            assert sizes.pop("head_dim") == self.hidden_size // self.num_attention_heads
        return sizes | {
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
        }

    def config(self) -> ModelConfig:
        return ModelConfig.from_dict(self.config_json(), file=self.name)

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of a layer's matrices, by their names in a checkpoint."""
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        return {
            "self_attn.q_proj": (queries, self.hidden_size),
            "self_attn.k_proj": (keys, self.hidden_size),
            "self_attn.v_proj": (keys, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, queries),
            "mlp.gate_proj": (self.intermediate_size, self.hidden_size),
            "mlp.up_proj": (self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }


SMOLLM2_135M = Shape("SmolLM2-135M", "llama", 49_152, 576, 1536, 30, 9, 3, 64, 1e5, True)
QWEN25_05B = Shape("Qwen2.5-0.5B", "qwen2", 151_936, 896, 4864, 24, 14, 2, 64, 1e6, True)
QWEN3_4B = Shape("Qwen3-4B", "qwen3", 151_936, 2560, 9728, 36, 32, 8, 128, 1e6, True)
LLAMA31_8B = Shape("Llama-3.1-8B", "llama", 128_256, 4096, 14_336, 32, 32, 8, 128, 5e5, False)


def write_checkpoint(folder: Path, shape: Shape) -> int:
    """Write config.json and a random bfloat16 model.safetensors; the bytes of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config_json()))
    tensors = dict(_tensors(shape))
    header, n_bytes = {}, 0
    for name, sizes in tensors.items():
        end = n_bytes + 2 * math.prod(sizes)
        header[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": [n_bytes, end]}
        n_bytes = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, sizes in tensors.items():
            if name.endswith("norm.weight"):
                file.write(np.full(sizes, ONE, np.uint16).tobytes())
            else:
                file.write(_random_bf16(rng, sizes).tobytes())
    return n_bytes


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the file."""
    yield "model.embed_tokens.weight", (shape.vocab_size, shape.hidden_size)
    yield "model.norm.weight", (shape.hidden_size,)
    if not shape.tie_word_embeddings:
        yield "lm_head.weight", (shape.vocab_size, shape.hidden_size)
    for layer in range(shape.num_hidden_layers):
        name = f"model.layers.{layer}"
        yield f"{name}.input_layernorm.weight", (shape.hidden_size,)
        yield f"{name}.post_attention_layernorm.weight", (shape.hidden_size,)
        for matrix, sizes in shape.matrices().items():
            yield f"{name}.{matrix}.weight", sizes
            if shape.qkv_bias and matrix[-6:] in ("q_proj", "k_proj", "v_proj"):
                yield f"{name}.{matrix}.bias", sizes[:1]
        if shape.qk_norm:
            yield f"{name}.self_attn.q_norm.weight", (shape.head_dim,)
            yield f"{name}.self_attn.k_norm.weight", (shape.head_dim,)


def _random_bf16(rng: np.random.Generator, sizes: tuple[int, ...]) -> npt.NDArray[np.uint16]:
    """Both signs, and sizes such that outputs are about as large as inputs.

    Bits are drawn, not numbers: a sign and a mantissa under one exponent, for a large checkpoint
    would take a minute otherwise.
    """
    exponent = round(math.log2(1 / (1.5 * math.sqrt(sizes[-1])))) + 127
    drawn = rng.integers(0, 256, sizes, dtype=np.uint8).astype(np.uint16)
    bits: npt.NDArray[np.uint16] = (drawn & 0x80) << 8 | np.uint16(exponent << 7) | drawn & 0x7F
    return bits
