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

    def seconds(self, speed: Work) -> float:
        """At so many FLOP/s of each kind."""
        return self.products / speed.products + self.attention / speed.attention


def nll_work(
    config: ModelConfig,
    policy: AttentionPolicy,
    full_layers: Collection[int],
    prompt_len: int,
    answer_len: int,
) -> Work:
    """One teacher-forced pass over prompt and answer, as the engine makes it.

    The last token is not read, and the last layer makes keys and values of all rows but finishes
    only those that predict the answer.
    """
    n_rows = prompt_len + answer_len - 1
    rows = policy.rows(config, full_layers, prompt_len, n_rows + 1)
    first = _first_rows(config, prompt_len)
    layers = (_layer_work(config, rows, layer, 0, at, n_rows) for layer, at in enumerate(first))
    return _total(Work(float(answer_len * _head_flops(config)), 0.0), *layers)


def prefill_work(
    config: ModelConfig, policy: AttentionPolicy, full_layers: Collection[int], prompt_tokens: int
) -> Work:
    """Reading a prompt, every layer whole, with the logits of its last row: what serving takes."""
    rows = policy.rows(config, full_layers, prompt_tokens, prompt_tokens)
    layers = (
        _layer_work(config, rows, layer, 0, 0, prompt_tokens)
        for layer in range(config.num_hidden_layers)
    )
    return _total(Work(float(_head_flops(config)), 0.0), *layers)


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
    n_rows, n_layers = prompt_len + answer_len - 1, config.num_hidden_layers
    rows = policy.rows(config, base, prompt_len, n_rows + 1)
    shared = shared_rows(policy, n_layers, flips, prompt_len - 1)
    first = _first_rows(config, prompt_len, shared)
    work = nll_work(config, policy, base, prompt_len, answer_len)
    above = Work(float(answer_len * _head_flops(config)), 0.0)  # a fork, once its layer is done
    for layer in reversed(range(n_layers)):
        if layer in flips:
            flipped = policy.rows(config, set(base) ^ {layer}, prompt_len, n_rows + 1)
            work = _total(work, _finish_work(config, flipped, layer, first[layer], n_rows), above)
        own = _layer_work(config, rows, layer, shared, first[layer], n_rows)
        above = _total(above, own)
    return work


def shared_rows(policy: AttentionPolicy, num_layers: int, flips: Collection[int], most: int) -> int:
    """The first rows, `most` at most, that all runs of a sweep share: none there loses a key.

    A row t < W + S sees every earlier key, and only in layers of `flips` do runs differ. The engine
    rounds down to whole tiles. Raises PolicyError: a policy for another number of layers.
    """
    windows = policy.windows(num_layers)
    seen = (windows[layer] + policy.num_sink_tokens for layer in flips)
    return min(most, min(seen, default=0))


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


def _first_rows(config: ModelConfig, prompt_len: int, shared: int = 0) -> list[int]:
    """[L]: the first row that each layer finishes, beyond those that all runs share."""
    return [shared] * (config.num_hidden_layers - 1) + [prompt_len - 1]


def _layer_work(
    config: ModelConfig, rows: Rows, layer: int, start: int, first: int, end: int
) -> Work:
    """Keys and values of the rows start..end, queries and all else of the rows first..end."""
    projected = (end - start) * _kv_flops(config) + (end - first) * _q_flops(config)
    return _total(Work(float(projected), 0.0), _finish_work(config, rows, layer, first, end))


def _finish_work(config: ModelConfig, rows: Rows, layer: int, first: int, end: int) -> Work:
    """Attention, its projection and the MLP of the rows first..end."""
    pairs = _attended(rows, layer, end)[first:].sum()
    return Work(float((end - first) * _rest_flops(config)), float(pairs * _key_flops(config)))


def _total(*parts: Work) -> Work:
    return Work(*map(sum, zip(*parts, strict=True)))


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


def _q_flops(config: ModelConfig) -> int:
    return 2 * config.hidden_size * config.num_attention_heads * config.head_dim


def _kv_flops(config: ModelConfig) -> int:
    return 4 * config.hidden_size * config.num_key_value_heads * config.head_dim


def _rest_flops(config: ModelConfig) -> int:
    """The output projection and the MLP of one row."""
    attention_out = config.num_attention_heads * config.head_dim
    return 2 * config.hidden_size * (attention_out + 3 * config.intermediate_size)


def _head_flops(config: ModelConfig) -> int:
    return 2 * config.hidden_size * config.vocab_size
