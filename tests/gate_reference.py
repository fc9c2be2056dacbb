"""The gated decoder in torch: the answers' loss, and its gradient over the gates by autograd."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint_files import read_tensors
from oracle import inverse_frequencies
from reference import Choices, Gated, visible


@contextmanager
def one_thread() -> Iterator[None]:
    """Of torch: with products as small as these, several wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class GatedDecoder:
    """llama, mistral, qwen2 and qwen3, from the files of a checkpoint.

    Layer l's attention output is the sum over c of weights[l, c] times attention under choice c.
    In float64 it is the truth; in bfloat16, where every tensor has that type but norms and softmax
    go through float32 as everywhere, it is the naive implementation whose error is the yardstick.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float64) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.dtype = dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.tensors = {n: torch.tensor(x).to(dtype) for n, x in read_tensors(folder).items()}

    @one_thread()
    def gates(
        self,
        ids: Sequence[int],
        prompt_len: int,
        choices: Choices,
        weights: np.ndarray,
        reference: np.ndarray | None = None,
    ) -> Gated:
        """weights [L, C], or [L, C, G] to weigh KV heads apart; reference: logits [A, V].

        The gradient is that of moving weight from choice 0 to choice c in one layer and KV head.
        """
        n_layers, n_choices, *_ = weights.shape
        kv_heads = self.config["num_key_value_heads"]
        moved = torch.zeros(n_layers, n_choices, kv_heads, dtype=self.wide, requires_grad=True)
        shares = torch.tensor(weights, dtype=self.wide).reshape(n_layers, n_choices, -1)
        logits = self.logits(ids, choices, shares.expand_as(moved), moved)[prompt_len - 1 : -1]
        log_probs = logits.to(self.wide).log_softmax(dim=-1)
        answer = torch.tensor(list(ids[prompt_len:]))
        if reference is None:
            loss = -log_probs[torch.arange(len(answer)), answer]
        else:
            theirs = torch.tensor(reference, dtype=self.wide).log_softmax(dim=-1)
            loss = (theirs.exp() * (theirs - log_probs)).sum(dim=-1)
        (gradient,) = torch.autograd.grad(loss.mean(), moved)
        greedy = log_probs.argmax(dim=-1) == answer
        return Gated(loss.detach().double().numpy(), greedy.numpy(), gradient.double().numpy())

    def logits(
        self,
        ids: Sequence[int],
        choices: Choices,
        shares: torch.Tensor,
        moved: torch.Tensor,
    ) -> torch.Tensor:
        """[T, V]; shares and moved [L, C, G]."""
        embedding = self.tensors["model.embed_tokens.weight"]
        x = embedding[torch.tensor(list(ids))]
        for i, (windows, sinks, full_from) in enumerate(choices.per_layer):
            layer = f"model.layers.{i}"
            masks = [torch.tensor(visible(len(ids), w, sinks, full_from)) for w in windows]
            h = self.norm(x, f"{layer}.input_layernorm")
            mixed = self.attention(h, f"{layer}.self_attn", masks, shares[i], moved[i])
            x = x + self.linear(mixed, f"{layer}.self_attn.o_proj")
            h = self.norm(x, f"{layer}.post_attention_layernorm")
            up = self.linear(h, f"{layer}.mlp.up_proj")
            gate = torch.nn.functional.silu(self.linear(h, f"{layer}.mlp.gate_proj"))
            x = x + self.linear(gate * up, f"{layer}.mlp.down_proj")
        x = self.norm(x, "model.norm")
        return x @ embedding.T if self.config["tie_word_embeddings"] else self.linear(x, "lm_head")

    def attention(
        self,
        h: torch.Tensor,
        layer: str,
        masks: list[torch.Tensor],
        shares: torch.Tensor,
        moved: torch.Tensor,
    ) -> torch.Tensor:
        """[T, H * d] of h [T, hidden] with one mask [T, T] a choice; shares and moved [C, G]."""
        head_dim = self.config["head_dim"]
        q, k, v = (
            self.linear(h, f"{layer}.{name}").reshape(len(h), -1, head_dim).transpose(0, 1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if f"{layer}.q_norm.weight" in self.tensors:
            q, k = self.norm(q, f"{layer}.q_norm"), self.norm(k, f"{layer}.k_norm")
        q, k = self.rotate(q), self.rotate(k)
        group = len(q) // len(k)
        k, v, shares, moved = (  # query head h reads KV head h // group
            x.repeat_interleave(group, dim=dim)
            for x, dim in (
                (k, 0),
                (v, 0),
                (shares[..., None, None], 1),
                (moved[..., None, None], 1),
            )
        )
        scores = (q @ k.transpose(1, 2)).to(self.wide) * head_dim**-0.5
        outputs = [
            scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).to(self.dtype) @ v
            for mask in masks
        ]
        mixed = sum(
            share * output + move * (output - outputs[0])
            for share, move, output in zip(shares, moved, outputs, strict=True)
        )
        return mixed.to(self.dtype).transpose(0, 1).reshape(len(h), -1)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        wide = x.to(self.wide)
        scale = (wide.square().mean(dim=-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return (wide * scale).to(self.dtype) * self.tensors[f"{name}.weight"]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        product = x @ self.tensors[f"{name}.weight"].T
        bias = self.tensors.get(f"{name}.bias")
        return product if bias is None else product + bias

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """RoPE of x [heads, T, d]; angles are float32 products as in the oracle."""
        speeds, factor = inverse_frequencies(self.config)
        positions = torch.arange(x.shape[1], dtype=torch.float32)
        angles = (positions[:, None] * torch.tensor(speeds, dtype=torch.float32)).to(self.wide)
        cosines, sines = ((factor * f(angles)).to(self.dtype) for f in (torch.cos, torch.sin))
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cosines - b * sines, b * cosines + a * sines], dim=-1)
