"""A stand-in for Model whose NLLs are written down, for tests of what is built on top of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from swa.examples import Example
from swa.model import GatesResult, NllResult, SweepResult
from swa.policy import AttentionPolicy


class FakeModel:
    """Each full layer lowers every answer token's NLL by its own amount; pairs of them add more."""

    def __init__(
        self,
        num_layers: int = 5,
        *,
        native: Collection[int] = (),
        seconds: float = 0.0,
        nan_with: frozenset[int] | None = None,
    ) -> None:
        self.config: Any = SimpleNamespace(
            num_hidden_layers=num_layers,
            native_sliding_window=tuple(8 if i in native else None for i in range(num_layers)),
            hidden_size=16,
            intermediate_size=24,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            vocab_size=50,
        )
        self.selectable_layers = tuple(i for i in range(num_layers) if i not in native)
        self.name, self.fingerprint, self.dtype = "fake", "f" * 64, "bfloat16"
        self.engine = SimpleNamespace(tier="portable")
        self.precision_note: str | None = None
        self.sweeps: list[Example] = []
        self._seconds, self._nan_with = seconds, nan_with

    def check_examples(self, examples: Sequence[Example]) -> None:
        """It runs any."""

    def per_token(self, example: Example, full_layers: Collection[int]) -> np.ndarray:
        """float64 [A]."""
        gains, full = self._gains(example), sorted(full_layers)
        together = sum(0.01 * gains[a] * gains[b] for a in full for b in full if a < b)
        nll: np.ndarray = 5.0 - gains[full].sum(axis=0) - together
        return np.full_like(nll, np.nan) if frozenset(full) == self._nan_with else nll

    def _gains(self, example: Example) -> np.ndarray:
        """float64 [L, A]: what each layer is worth to each answer token."""
        seed = sum(example.prompt_ids) + 1000 * len(example.answer_ids)
        shape = self.config.num_hidden_layers, example.answer_len
        return np.random.RandomState(seed).uniform(-0.1, 0.4, shape)

    def nll_example(
        self,
        example: Example,
        policy: AttentionPolicy | None = None,
        full_layers: Collection[int] | None = None,
    ) -> NllResult:
        nll = self.per_token(example, full_layers or ())
        return NllResult(nll, np.zeros(len(nll), dtype=bool))

    def gates_example(
        self,
        example: Example,
        policy: AttentionPolicy,
        weights: np.ndarray,
        windows: Sequence[int] = (0,),
        *,
        reference: np.ndarray | None = None,
        progress: Callable[[float, float], None] | None = None,
    ) -> GatesResult:
        assert reference is None and tuple(windows) == (0,)
        alpha, gains = weights[:, 1], self._gains(example)
        if np.isin(alpha, (0, 1)).all():
            loss = self.per_token(example, np.flatnonzero(alpha).tolist())
        else:
            given = alpha[:, None] * gains
            together = given.sum(axis=0) ** 2 - (given**2).sum(axis=0)
            loss = 5.0 - given.sum(axis=0) - 0.01 * together / 2
        others = (alpha[:, None] * gains).sum(axis=0) - alpha[:, None] * gains
        gradient = np.zeros((len(alpha), 2, 1))
        slope = -(gains + 0.01 * gains * others).mean(axis=1)
        for layer in self.selectable_layers:
            gradient[layer, 1] = slope[layer]
        return GatesResult(loss, np.zeros(len(loss), dtype=bool), gradient)

    def attention_mass(
        self, ids: Sequence[int], *, near_window: int, near_sinks: int, num_last_tokens: int
    ) -> np.ndarray:
        """float64 [L, 1]: the less, the more a layer gains."""
        assert near_window >= 1 and near_sinks >= 0 and 1 <= num_last_tokens <= len(ids)
        return 1 / (1 + self._gains(Example(tuple(ids), (0,))))

    def sweep_example(
        self,
        example: Example,
        policy: AttentionPolicy,
        base_full: Collection[int],
        flips: Sequence[int],
        to_full: bool,
        progress: Callable[[float, float], None] | None = None,
    ) -> SweepResult:
        self.sweeps.append(example)
        runs = np.full((self.config.num_hidden_layers, example.answer_len), np.nan)
        for i, layer in enumerate(flips):
            time.sleep(self._seconds / len(flips))
            assert (layer in base_full) != to_full
            runs[layer] = self.per_token(example, set(base_full) ^ {layer})
            if progress is not None:
                progress(7.0 * (i + 1), 7.0 * len(flips))
        base = self.per_token(example, base_full)
        greedy = np.zeros(runs.shape, dtype=bool)
        return SweepResult(base, runs, greedy[0], greedy)


def make_examples(count: int, prompt_len: int = 40, answer_len: int = 3) -> list[Example]:
    """Examples of different token ids, of two tasks in turn."""
    return [
        Example(
            tuple(range(i, i + prompt_len)), tuple(range(answer_len)), task=("num", "copy")[i % 2]
        )
        for i in range(count)
    ]
