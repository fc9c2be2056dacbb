"""Where the last rows' attention goes, against the softmax itself in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from builders import tiny_checkpoint
from engines import THREADS, open_engine
from oracle import Decoder
from reference import Rows

T, NEAR, SINKS, LAST = 150, 20, 3, 70


class Probe(Decoder):
    """Also keeps, layer by layer, what the last rows give to near keys."""

    def __init__(self, folder: Path, near: int, sinks: int, last: int) -> None:
        super().__init__(folder)
        self.near, self.sinks, self.last = near, sinks, last
        self.mass: list[np.ndarray] = []

    def attention_block(self, x: np.ndarray, layer: str, mask: np.ndarray) -> np.ndarray:
        d, h = self.config["head_dim"], self.norm(x, f"{layer}.input_layernorm")
        q, k = (
            self.linear(h, f"{layer}.self_attn.{name}").reshape(len(x), -1, d)
            for name in ("q_proj", "k_proj")
        )
        if f"{layer}.self_attn.q_norm.weight" in self.tensors:
            q, k = (self.norm(y, f"{layer}.self_attn.{n}_norm") for y, n in ((q, "q"), (k, "k")))
        positions = np.arange(len(x))
        q, k = self.rotate(q, positions), self.grouped(self.rotate(k, positions), q.shape[1])
        distance = positions[:, None] - positions
        near = mask & ((distance < self.near) | (positions < self.sinks))
        scores = np.where(mask[:, None], np.einsum("thd,jhd->thj", q, k) / math.sqrt(d), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        share = np.where(near[:, None], weights, 0).sum(axis=-1)
        self.mass.append(share[-self.last :].mean(axis=0))
        return super().attention_block(x, layer, mask)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_is_the_softmax(tmp_path: Path, tier: str, family: str) -> None:
    folder = tiny_checkpoint(tmp_path / "model", family)
    probe = Probe(folder, NEAR, SINKS, LAST)
    ids = np.random.default_rng(0).integers(0, 97, T).astype(np.int32)
    n_layers = probe.config["num_hidden_layers"]
    probe.logits(ids.tolist(), Rows.of(n_layers, range(n_layers), T, T, window=1))
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.05)):
        engine = open_engine(folder, dtype=dtype, tier=tier)
        full = np.zeros(n_layers, np.int64)
        found = engine.attention_mass(ids, full, NEAR, SINKS, LAST)
        assert found.shape == (n_layers, probe.config["num_attention_heads"])
        assert np.abs(found - probe.mass).max() < tolerance
        assert ((found > 0) & (found <= 1 + 1e-6)).all()
        for n in THREADS:
            engine.num_threads = n
            assert np.array_equal(engine.attention_mass(ids, full, NEAR, SINKS, LAST), found)


def test_everything_is_near(tmp_path: Path) -> None:
    engine = open_engine(tiny_checkpoint(tmp_path / "model"))
    ids = np.random.default_rng(0).integers(0, 97, 80).astype(np.int32)
    full = np.zeros(engine.num_hidden_layers, np.int64)
    assert (engine.attention_mass(ids, full, 80, 0, 80) == 1).all()
    # What a layer does not see is nobody's: a window of its own is all there is.
    assert (engine.attention_mass(ids, full + 9, 9, 0, 80) == 1).all()
    for bad in ((0, 0, 1), (1, -1, 1), (1, 0, 0), (1, 0, 81)):
        with pytest.raises(ValueError, match="it must be at least"):
            engine.attention_mass(ids, full, *bad)
