"""What a run costs in floating-point operations, from the model's shape and the policy alone.

Estimates for progress bars and for `swa estimate`: right in proportion, from one example to the
next, which is what an honest time of arrival needs. A multiply-add counts as two operations.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from swa.config import ModelConfig
    from swa.policy import AttentionPolicy, Rows


class Work(NamedTuple):
    """FLOPs by what they are spent on, since the two run at different speeds."""

    products: float
    """Multiplying by weights."""
    attention: float

    @property
    def flops(self) -> float:
        return self.products + self.attention


def nll_work(
    config: ModelConfig,
    policy: AttentionPolicy,
    full_layers: Collection[int],
    prompt_len: int,
    answer_len: int,
) -> Work:
    """One teacher-forced pass over prompt and answer, with the logits of the answer rows."""
    n_tokens = prompt_len + answer_len
    rows = policy.rows(config, full_layers, prompt_len, n_tokens)
    keys = sum(_attended(rows, layer, n_tokens).sum() for layer in range(config.num_hidden_layers))
    linear = config.num_hidden_layers * n_tokens * (_qkv_flops(config) + _rest_flops(config))
    return Work(float(linear + answer_len * _head_flops(config)), float(keys * _key_flops(config)))


def prefill_work(
    config: ModelConfig, policy: AttentionPolicy, full_layers: Collection[int], prompt_tokens: int
) -> Work:
    """Reading a prompt, with the logits of its last row."""
    products, attention = nll_work(config, policy, full_layers, prompt_tokens, 0)
    return Work(products + _head_flops(config), attention)


def kv_bytes(
    config: ModelConfig,
    policy: AttentionPolicy,
    full_layers: Collection[int],
    n_tokens: int,
    bytes_per_value: int = 2,
) -> int:
    """Keys and values that generation keeps after so many tokens, without padding."""
    rows = policy.decode_rows(config, full_layers)
    kept = np.where(rows.window == 0, n_tokens, np.minimum(rows.window + rows.sinks, n_tokens))
    each = 2 * config.num_key_value_heads * config.head_dim * bytes_per_value
    return int(kept.sum()) * each


def sweep_work(
    config: ModelConfig,
    policy: AttentionPolicy,
    base: Collection[int],
    flips: Collection[int],
    prompt_len: int,
    answer_len: int,
) -> Work:
    """The base pass and one fork for each layer of `flips`, as the engine walks them.

    The rows that no window has reached yet are the same in all runs and run once; a fork reuses the
    base's queries, keys and values of its own layer and runs all layers above.
    """
    n_tokens = prompt_len + answer_len
    n_layers = config.num_hidden_layers
    rows = policy.rows(config, base, prompt_len, n_tokens)
    windows = policy.windows(n_layers)
    shared = min(min(windows[layer] for layer in flips) + policy.num_sink_tokens, n_tokens)
    own = n_tokens - shared
    products, attention = nll_work(config, policy, base, prompt_len, answer_len)
    # Keys that a layer's rows above the shared ones attend to in the base.
    keys = [float(_attended(rows, layer, n_tokens)[shared:].sum()) for layer in range(n_layers)]
    for layer in flips:
        flipped = policy.rows(config, set(base) ^ {layer}, prompt_len, n_tokens)
        fork_keys = _attended(flipped, layer, n_tokens)[shared:].sum() + sum(keys[layer + 1 :])
        attention += float(fork_keys * _key_flops(config))
        above = (n_layers - 1 - layer) * (_qkv_flops(config) + _rest_flops(config))
        products += own * (_rest_flops(config) + above) + answer_len * _head_flops(config)
    return Work(products, attention)


def gradient_work(
    config: ModelConfig,
    policy: AttentionPolicy,
    weights: npt.NDArray[np.float64],
    prompt_len: int,
    answer_len: int,
    windows: Sequence[int] = (0,),
) -> Work:
    """The loss and its gradient over gates: forward, again by layer, and backward.

    The backward takes as many products as the forward; its attention takes five where the forward
    takes two, in the branches that have weight. The forward needs those branches alone, the second
    one all branches.

    weights: [L, 1 + len(windows)], of the policy's own window and of each of `windows` (0: full).
    """
    n_tokens, n_layers = prompt_len + answer_len, config.num_hidden_layers
    fixed = np.array([window is not None for window in config.native_sliding_window])
    rows = policy.rows(config, (), prompt_len, n_tokens)
    keys = np.zeros(weights.shape)
    for choice, window in enumerate((None, *windows)):
        mixed = rows if window is None else rows._replace(window=np.full(n_layers, window))
        counts = [float(_attended(mixed, layer, n_tokens).sum()) for layer in range(n_layers)]
        keys[:, choice] = np.where(fixed & (choice > 0), 0, counts)
    attention = 3.5 * keys[weights > 0].sum() + keys.sum()
    products = nll_work(config, policy, (), prompt_len, answer_len).products
    return Work(3 * products, float(attention * _key_flops(config)))


def _attended(rows: Rows, layer: int, n_tokens: int) -> npt.NDArray[np.int64]:
    """int64 [n_tokens]: how many keys each row of a layer attends to."""
    causal = np.arange(1, n_tokens + 1)
    window = rows.window[layer]
    if window == 0:
        return causal
    sinks = np.minimum(rows.sinks[layer], np.maximum(causal - window, 0))
    return np.where(causal > rows.full_from[layer], causal, np.minimum(causal, window) + sinks)


def _key_flops(config: ModelConfig) -> int:
    """One row attending to one key: a dot product and a weighted sum in each query head."""
    return 4 * config.num_attention_heads * config.head_dim


def _qkv_flops(config: ModelConfig) -> int:
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    return 2 * config.hidden_size * heads * config.head_dim


def _rest_flops(config: ModelConfig) -> int:
    """The output projection and the MLP of one row."""
    attention_out = config.num_attention_heads * config.head_dim
    return 2 * config.hidden_size * (attention_out + 3 * config.intermediate_size)


def _head_flops(config: ModelConfig) -> int:
    return 2 * config.hidden_size * config.vocab_size
