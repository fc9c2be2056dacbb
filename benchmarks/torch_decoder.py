"""A llama decoder written by hand in plain torch, as somebody without this package would.

bfloat16, SDPA, block-wise windows, and a sweep that forks at each layer instead of starting anew.
The weights are those that transformers reads from the same checkpoint.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from benchmarks import operands, transformers_peer
from benchmarks.torch_kernels import window_attention, window_mask
from benchmarks.worker import Measured, Run

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def prefill(
    path: str,
    ids: list[int],
    window: int,
    sinks: int,
    dtype: str = "bfloat16",
    n_rows: int = 1,
) -> Run:
    """Seconds to the logits of the last rows, all layers sliding. Result: some of them."""
    decoder = Decoder(path, dtype)
    sequence = Sequence(decoder, len(ids), len(ids), window, sinks)

    def run() -> Measured:
        with torch.inference_mode():
            begun = time.perf_counter()
            x = decoder.embed(ids)
            for layer in range(decoder.n_layers):
                x = sequence.layer(layer, x)
            logits = decoder.logits(x[-n_rows:])
            seconds = time.perf_counter() - begun
        return seconds, operands.some_logits(logits.numpy())

    return run


def sweep(
    path: str,
    prompt: list[int],
    answer: list[int],
    window: int,
    sinks: int,
    dtype: str = "bfloat16",
) -> Run:
    """Seconds of an example's sweep. Result: mean NLL of the base run, then of each layer's run.

    The base run walks up once; at layer l a fork takes full attention over the base's own Q, K and
    V, then slides to the top.
    """
    decoder = Decoder(path, dtype)
    ids = [*prompt, *answer]
    sequence = Sequence(decoder, len(ids), len(prompt), window, sinks)
    answers = torch.tensor(answer)

    def nll(x: torch.Tensor) -> float:
        logits = decoder.logits(x[len(prompt) - 1 : -1])
        return float(F.cross_entropy(logits, answers))

    def run() -> Measured:
        with torch.inference_mode():
            begun = time.perf_counter()
            x, runs = decoder.embed(ids), []
            for layer in range(decoder.n_layers):
                q, k, v = decoder.qkv(layer, x, sequence.rope)
                fork = decoder.rest(layer, x, sequence.full(q, k, v))
                for above in range(layer + 1, decoder.n_layers):
                    fork = sequence.layer(above, fork)
                runs.append(nll(fork))
                x = decoder.rest(layer, x, sequence.sliding(q, k, v))
            return time.perf_counter() - begun, [nll(x), *runs]

    return run


class Decoder:
    """The weights, and what does not depend on who attends to whom."""

    def __init__(self, path: str, dtype: str) -> None:
        model = transformers_peer.load(path, dtype)
        config = model.config
        self.weights = {name: x.detach() for name, x in model.state_dict().items()}
        self.dtype: torch.dtype = model.dtype
        self.n_layers, self.eps = config.num_hidden_layers, config.rms_norm_eps
        width = config.hidden_size // config.num_attention_heads
        self.head_dim: int = getattr(config, "head_dim", None) or width
        self.theta = config.rope_parameters["rope_theta"]

    def embed(self, ids: list[int]) -> torch.Tensor:
        """[T, hidden]."""
        return F.embedding(torch.tensor(ids), self.weights["model.embed_tokens.weight"])

    def rope(self, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [T, d], each half the same; angles in float32."""
        speeds = self.theta ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        angles = torch.arange(n_tokens).float()[:, None] * speeds
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def qkv(self, layer: int, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> QKV:
        """q [1, H, T, d], k and v [1, G, T, d], q and k rotated."""
        name = f"model.layers.{layer}.self_attn"
        h = self._norm(x, f"model.layers.{layer}.input_layernorm")
        q, k, v = (
            self._linear(h, f"{name}.{matrix}_proj")
            .view(1, len(x), -1, self.head_dim)
            .transpose(1, 2)
            for matrix in "qkv"
        )
        if f"{name}.q_norm.weight" in self.weights:
            q, k = self._norm(q, f"{name}.q_norm"), self._norm(k, f"{name}.k_norm")
        return _rotate(q, *rope), _rotate(k, *rope), v

    def rest(self, layer: int, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The layer after attention [1, H, T, d]: projection, MLP, both residuals."""
        name = f"model.layers.{layer}"
        joined = attended.transpose(1, 2).reshape(len(x), -1)
        x = x + self._linear(joined, f"{name}.self_attn.o_proj")
        h = self._norm(x, f"{name}.post_attention_layernorm")
        gate = F.silu(self._linear(h, f"{name}.mlp.gate_proj"))
        return x + self._linear(
            gate * self._linear(h, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj"
        )

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [rows, vocabulary]."""
        return F.linear(self._norm(x, "model.norm"), self.weights["lm_head.weight"]).float()

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weights[f"{name}.weight"], self.eps)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))


class Sequence:
    """Who attends to whom among T tokens, of which the first `n_prompt` slide."""

    def __init__(
        self, decoder: Decoder, n_tokens: int, n_prompt: int, window: int, sinks: int
    ) -> None:
        self._decoder, self._n_prompt = decoder, n_prompt
        self._window, self._sinks = window, sinks
        self.rope = decoder.rope(n_tokens)
        self._mask = window_mask(window, sinks, decoder.dtype)
        answers = torch.arange(n_prompt, n_tokens)
        seen = torch.arange(n_tokens) <= answers[:, None]
        self._answer_mask = (
            torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf).to(decoder.dtype)
        )

    def layer(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """A sliding layer."""
        return self._decoder.rest(layer, x, self.sliding(*self._decoder.qkv(layer, x, self.rope)))

    def sliding(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Prompt rows see window and sinks, answer rows everything."""
        n = self._n_prompt
        out = window_attention(
            q[:, :, :n], k[:, :, :n], v[:, :, :n], self._window, self._sinks, self._mask
        )
        if n == q.shape[2]:
            return out
        answers = F.scaled_dot_product_attention(
            q[:, :, n:], k, v, self._answer_mask, enable_gqa=True
        )
        return torch.cat([out, answers], dim=2)

    def full(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-b, a], dim=-1) * sines
