"""What all reference implementations share: the masks, answer NLLs, the sweep as L+1 runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NO_FLIP = -1


class Rows(NamedTuple):
    """The attention of each layer: window 0 is full attention, rows t >= full_from are exempt."""

    window: tuple[int, ...]
    sinks: tuple[int, ...]
    full_from: tuple[int, ...]

    @classmethod
    def of(
        cls,
        num_layers: int,
        full_layers: Sequence[int],
        prompt_len: int,
        n_tokens: int,
        *,
        window: int,
        sinks: int = 0,
        tail: int = 0,
        decode: str = "full",
    ) -> Rows:
        """One window for all layers that are not full."""
        first_exempt = prompt_len - tail if decode == "full" else n_tokens
        sliding = [i not in full_layers for i in range(num_layers)]
        return cls(
            tuple(window if s else 0 for s in sliding),
            tuple(sinks if s else 0 for s in sliding),
            tuple(first_exempt if s else 0 for s in sliding),
        )

    @property
    def per_layer(self) -> list[tuple[int, int, int]]:
        """(window, sinks, full_from) of each layer."""
        return list(zip(*self, strict=True))

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 [L] each, as the engine takes them."""
        window, sinks, full_from = (np.array(x, dtype=np.int64) for x in self)
        return window, sinks, full_from

    def flipped(self, layer: int, window: int) -> Rows:
        return self._replace(window=(*self.window[:layer], window, *self.window[layer + 1 :]))


class Choices(NamedTuple):
    """Several windows a layer, with one weight each; they share the sinks and the exempt rows."""

    window: tuple[tuple[int, ...], ...]
    sinks: tuple[int, ...]
    full_from: tuple[int, ...]

    @classmethod
    def of(cls, rows: Rows, *windows: Sequence[int]) -> Choices:
        """Choice 0 has the windows of `rows`, each later one those given: one a layer."""
        return cls(tuple(zip(rows.window, *windows, strict=True)), rows.sinks, rows.full_from)

    @property
    def per_layer(self) -> list[tuple[tuple[int, ...], int, int]]:
        """(windows, sinks, full_from) of each layer."""
        return list(zip(*self, strict=True))

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 [L, C], [L] and [L], as the engine takes them."""
        window, sinks, full_from = (np.array(x, dtype=np.int64) for x in self)
        return window, sinks, full_from

    def taken(self, choice: Sequence[int]) -> Rows:
        """The policy in which layer l has its choice[l]."""
        window = tuple(w[c] for w, c in zip(self.window, choice, strict=True))
        return Rows(window, self.sinks, self.full_from)


def visible(n_tokens: int, window: int, sinks: int, full_from: int) -> np.ndarray:
    """bool [T, T]: row t sees key j <= t if the row is exempt, or j > t - window, or j < sinks."""
    t, j = np.arange(n_tokens)[:, None], np.arange(n_tokens)[None, :]
    exempt = (t >= full_from) | (window == 0)
    return (j <= t) & (exempt | (j > t - window) | (j < sinks))


class Sweep(NamedTuple):
    """As the engine's sweep: float64 [A], float64 [L, A] with NaN rows, bool [A], bool [L, A]."""

    base_nll: np.ndarray
    run_nll: np.ndarray
    base_greedy: np.ndarray
    run_greedy: np.ndarray


class Gated(NamedTuple):
    """As the engine's gates: float64 [A], bool [A], float64 [L, C, G]."""

    nll: np.ndarray
    greedy: np.ndarray
    gradient: np.ndarray

    @property
    def loss(self) -> float:
        return float(self.nll.mean())


class Reference(ABC):
    """A decoder whose logits are known for any attention of its layers."""

    @abstractmethod
    def logits(self, ids: Sequence[int], rows: Rows, first_row: int = 0) -> np.ndarray:
        """[T - first_row, V]."""

    def nll(self, ids: Sequence[int], prompt_len: int, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """float64 [A] NLL of the answer tokens in nats, bool [A] whether each is the greedy one."""
        logits = self.logits(ids, rows, first_row=prompt_len - 1)[:-1].astype(np.float64)
        answer = np.asarray(ids[prompt_len:])
        top = logits.max(axis=1)
        log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        return log_sum - logits[np.arange(len(answer)), answer], logits.argmax(axis=1) == answer

    def sweep(
        self, ids: Sequence[int], prompt_len: int, rows: Rows, flip_window: Sequence[int]
    ) -> Sweep:
        """One run of the base and one per flipped layer."""
        base_nll, base_greedy = self.nll(ids, prompt_len, rows)
        run_nll = np.full((len(flip_window), len(base_nll)), np.nan)
        run_greedy = np.zeros(run_nll.shape, dtype=bool)
        for layer, window in enumerate(flip_window):
            if window != NO_FLIP:
                flipped = rows.flipped(layer, window)
                run_nll[layer], run_greedy[layer] = self.nll(ids, prompt_len, flipped)
        return Sweep(base_nll, run_nll, base_greedy, run_greedy)
