"""The decoder in float64 NumPy, as plain as the formulas: the truth that the engine is held to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_files import read_tensors, round_bf16
from reference import Reference, Rows, visible

Round = Callable[[np.ndarray], np.ndarray]


def exact(x: np.ndarray) -> np.ndarray:
    return x


def bf16(x: np.ndarray) -> np.ndarray:
    return round_bf16(x).astype(np.float64)


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, rounded: Round = exact
) -> np.ndarray:
    """q [T, H, d], k and v [T, G, d], mask [T, T] of visible keys -> float64 [T, H, d].

    Query head h reads KV head h // (H / G). `rounded` is applied to every operand of a product.
    A NaN that a row sees stays NaN; what it does not see cannot reach it.
    """
    n_heads, n_kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    q, k, v = (rounded(np.asarray(x, dtype=np.float64)) for x in (q, k, v))
    out = np.empty(q.shape)
    with np.errstate(invalid="ignore"):
        for h in range(n_heads):
            g = h // (n_heads // n_kv_heads)
            for t, seen in enumerate(mask):
                scores = k[seen, g] @ q[t, h] / math.sqrt(head_dim)
                weights = np.exp(scores - scores.max())
                out[t, h] = rounded(weights / weights.sum()) @ v[seen, g]
    return out


def inverse_frequencies(config: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """float64 [head_dim / 2] angular speeds of the rotation, and the factor on cos and sin."""
    rope = config.get("rope_parameters") or {
        "rope_theta": config["rope_theta"],
        **(config.get("rope_scaling") or {}),
    }
    d, theta = config["head_dim"], rope["rope_theta"]
    speeds = theta ** (-np.arange(0, d, 2) / d)
    kind, factor = rope.get("rope_type", "default"), rope.get("factor", 1.0)
    if kind == "linear":
        return speeds / factor, 1.0
    if kind == "llama3":  # turns within the original context decide: many keep, few stretch
        turns = rope["original_max_position_embeddings"] * speeds / (2 * np.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return speeds * (keep + (1 - keep) / factor), 1.0
    if kind == "yarn":  # the same, but the ramp is linear in the index of the pair

        def index(turns: float) -> float:
            original = rope["original_max_position_embeddings"]
            return d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(index(rope.get("beta_fast", 32))), 0)
        high = min(math.ceil(index(rope.get("beta_slow", 1))), d - 1)
        keep = 1 - np.clip((np.arange(d // 2) - low) / (high - low), 0, 1)
        return speeds * (keep + (1 - keep) / factor), 0.1 * math.log(factor) + 1
    return speeds, 1.0


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


class Decoder(Reference):
    """llama, mistral, qwen2 and qwen3, from the files of a checkpoint.

    With `rounded=bf16` weights and every operand of a product are rounded to bfloat16 and all else
    is exact: the error of this naive implementation is the yardstick for the engine's bf16 mode.
    The methods below `logits` are what test_mutations.py gets wrong on purpose.
    """

    def __init__(self, folder: Path, rounded: Round = exact) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        tensors = {name: x.astype(np.float64) for name, x in read_tensors(folder).items()}
        self.tensors = {n: rounded(x) if x.ndim == 2 else x for n, x in tensors.items()}
        self.rounded = rounded

    def logits(self, ids: Sequence[int], rows: Rows, first_row: int = 0) -> np.ndarray:
        x = self.tensors["model.embed_tokens.weight"][list(ids)]
        for i, (window, sinks, full_from) in enumerate(rows.per_layer):
            layer = f"model.layers.{i}"
            x = x + self.attention_block(x, layer, self.visible(len(x), window, sinks, full_from))
            h = self.norm(x, f"{layer}.post_attention_layernorm")
            gate = silu(self.linear(h, f"{layer}.mlp.gate_proj"))
            x = x + self.linear(
                gate * self.linear(h, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj"
            )
        x = self.norm(x[first_row:], "model.norm")
        tied = self.config.get("tie_word_embeddings", False)
        return self.linear(x, "model.embed_tokens" if tied else "lm_head")

    def attention_block(self, x: np.ndarray, layer: str, mask: np.ndarray) -> np.ndarray:
        d = self.config["head_dim"]
        h = self.norm(x, f"{layer}.input_layernorm")
        q, k, v = (
            self.linear(h, f"{layer}.self_attn.{name}").reshape(len(x), -1, d)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if f"{layer}.self_attn.q_norm.weight" in self.tensors:
            q = self.norm(q, f"{layer}.self_attn.q_norm")
            k = self.norm(k, f"{layer}.self_attn.k_norm")
        positions = np.arange(len(x))
        q = self.rotate(q, self.query_positions(positions))
        k, v = (self.grouped(y, q.shape[1]) for y in (self.rotate(k, positions), v))
        out = attention(q, k, v, mask, self.rounded)
        return self.linear(out.reshape(len(x), -1), f"{layer}.self_attn.o_proj")

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return rms_norm(x, self.tensors[f"{name}.weight"], self.config["rms_norm_eps"])

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return self.rounded(x) @ self.tensors[f"{name}.weight"].T + self.tensors.get(
            f"{name}.bias", 0.0
        )

    def rotate(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """RoPE of x [T, heads, d]: element i turns with element i + d / 2.

        Angles are float32 products, as all implementations of these models have them.
        """
        speeds, factor = inverse_frequencies(self.config)
        angles = positions.astype(np.float32)[:, None] * speeds.astype(np.float32)
        cosines = factor * np.cos(angles.astype(np.float64))[:, None]
        sines = factor * np.sin(angles.astype(np.float64))[:, None]
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cosines - b * sines, b * cosines + a * sines], axis=-1)

    def query_positions(self, positions: np.ndarray) -> np.ndarray:
        return positions

    def grouped(self, x: np.ndarray, n_heads: int) -> np.ndarray:
        """[T, G, d] -> [T, H, d]: the KV head of each query head."""
        return np.repeat(x, n_heads // x.shape[1], axis=1)

    def visible(self, n_tokens: int, window: int, sinks: int, full_from: int) -> np.ndarray:
        return visible(n_tokens, window, sinks, full_from)
