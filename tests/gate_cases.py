"""Models and sequences on which gates are tested: every family, masks that straddle tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from reference import Choices, Rows

L = 3
# Name: family and settings of builders.tiny_checkpoint. One, two and three query heads a KV head,
# sizes that are no multiple of a vector, more than one block of the vocabulary.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {"rope": "llama3", "tied": True, "num_attention_heads": 6, "head_dim": 8},
    ),
    "llama with biases": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "vocab_size": 1100},
    ),
    "mistral": (
        "mistral",
        {"rope": "linear", "hidden_size": 50, "intermediate_size": 77},
    ),
    "qwen2": ("qwen2", {"rope": "yarn", "num_key_value_heads": 4, "hidden_size": 33}),
    "qwen3": ("qwen3", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 24}),
}
# The larger the epsilon of the norms, the smaller queries and keys. EVEN: every key that a row sees
# counts, and float32 is right to a few parts in a million, so that one key too many shows. PEAKED:
# attention as sharp as in real models, and all that comes with it.
EVEN, BETWEEN, PEAKED = ({"overrides": {"rms_norm_eps": eps}} for eps in (3.0, 1.0, 1e-5))
SIZES: dict[str, Any] = {
    "num_hidden_layers": L,
    "hidden_size": 48,
    "intermediate_size": 64,
    "vocab_size": 97,
}
SMALLEST_VOCAB = 97


class Case(NamedTuple):
    """Prompt and answer lengths, and the windows among which each layer's gates weigh."""

    prompt_len: int
    answer_len: int
    choices: Choices

    @property
    def n_tokens(self) -> int:
        return self.prompt_len + self.answer_len

    @property
    def ids(self) -> list[int]:
        return (
            np.random.default_rng(self.n_tokens).integers(0, SMALLEST_VOCAB, self.n_tokens).tolist()
        )

    @classmethod
    def sliding(cls, prompt_len: int, answer_len: int, **policy: Any) -> Case:
        """Choice 0 slides, choice 1 is full attention."""
        rows = Rows.of(L, [], prompt_len, prompt_len + answer_len, **policy)
        return cls(prompt_len, answer_len, Choices.of(rows, (0,) * L))


CASES: dict[str, Case] = {
    "one answer token": Case.sliding(69, 1, window=13),
    "a tile and one row": Case.sliding(120, 9, window=30, sinks=3),
    "a window above a tile": Case.sliding(193, 7, window=100, sinks=3, tail=40),
    "sinks above a tile": Case.sliding(190, 10, window=20, sinks=70, tail=5),
    "windowed decode": Case.sliding(321, 12, window=64, sinks=3, decode="window"),
    "a long answer": Case.sliding(20, 109, window=7, sinks=2, decode="window"),
    "three choices": Case(
        190,
        10,
        Choices(((5, 0, 90), (0, 17, 64), (33, 70, 1)), (0, 3, 65), (190, 185, 200)),
    ),
    "windows that end where tiles do": Case(
        262,  # from blocks of 48 keys to the ends of tiles of 64 queries, or to their beginnings
        8,
        Choices(((65, 0, 20), (143, 111, 18), (128, 63, 129)), (0, 0, 1), (270, 270, 128)),
    ),
    "a layer without a choice": Case(
        124, 5, Choices(((20, 0), (9, 9), (40, 0)), (3, 0, 0), (124, 129, 100))
    ),
    "one choice": Case(124, 5, Choices(((20,), (0,), (9,)), (3, 0, 1), (124, 124, 120))),
}
ALPHAS: tuple[float | None, ...] = (0.0, 1.0, 0.3, None)  # None: at random


def weights(choices: Choices, alpha: float | None, seed: int = 0) -> np.ndarray:
    """float64 [L, C]: 1 - alpha for choice 0, the rest in equal shares; or at random."""
    n_layers, n_choices = len(choices.window), len(choices.window[0])
    if n_choices == 1:
        return np.ones((n_layers, 1))
    if alpha is None:
        return np.random.default_rng(seed).dirichlet(np.ones(n_choices), n_layers)
    shares = np.full((n_layers, n_choices), alpha / (n_choices - 1))
    shares[:, 0] = 1 - alpha
    return shares


def taken(choices: Choices, choice: Sequence[int]) -> np.ndarray:
    """float64 [L, C]: weight 1 on one choice of each layer."""
    return np.eye(len(choices.window[0]))[list(choice)]
