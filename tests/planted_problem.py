"""A problem whose best selection is known by construction, in place of a model."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swa.problem import RecordingProblem

SLIDING_PASS, GRADIENT, INTERIOR = 0.7, 3.0, 4.0  # prefills: a pass; a gradient, at 0 and inside


@dataclass(frozen=True)
class Term:
    """What these layers are worth: all of them together (`every`), or any one of them."""

    layers: tuple[int, ...]
    worth: float
    every: bool = True

    def value(self, alpha: np.ndarray) -> float:
        own = alpha[list(self.layers)]
        return self.worth * float(own.prod() if self.every else 1 - (1 - own).prod())

    def slope(self, alpha: np.ndarray) -> np.ndarray:
        """float64 [L]: d value / d alpha."""
        slope = np.zeros(len(alpha))
        own = alpha[list(self.layers)]
        for place, layer in enumerate(self.layers):
            others = np.delete(own, place)
            slope[layer] = self.worth * (others.prod() if self.every else (1 - others).prod())
        return slope


class PlantedProblem(RecordingProblem):
    """loss(alpha) = top - the terms' values, or softplus of that; examples weigh terms apart.

    rounding: the size of the errors of each gradient, as a low precision would leave.
    spread: by how much an example's weight of a term differs from 1.
    """

    def __init__(
        self,
        num_layers: int,
        terms: Sequence[Term],
        *,
        top: float,
        saturates: bool = False,
        rounding: float = 0.0,
        n_examples: int = 8,
        unselectable: tuple[int, ...] = (),
        known_deltas: np.ndarray | None = None,
        spread: float = 0.2,
    ) -> None:
        super().__init__(
            num_layers,
            set(range(num_layers)) - set(unselectable),
            ("abcd"[i * 4 // n_examples] for i in range(n_examples)),
            known_deltas=known_deltas,
        )
        self.terms, self.top, self.saturates, self.rounding = terms, top, saturates, rounding
        rng = np.random.default_rng(7)
        self.scale = 1 + spread * rng.uniform(-1, 1, (n_examples, len(terms)))  # [N, terms]

    def mean(self, full_layers: Sequence[int] | set[int]) -> float:
        return float(self.loss(full_layers).mean())

    def run_loss(self, full_layers: frozenset[int], index: int) -> float:
        alpha = np.zeros(self.num_layers)
        alpha[list(full_layers)] = 1
        return self._link(alpha, index)[0]

    def run_gradient(self, alpha: np.ndarray, index: int) -> tuple[float, np.ndarray]:
        loss, outer = self._link(alpha, index)
        slope = -outer * self.scale[index] @ [term.slope(alpha) for term in self.terms]
        noise = np.random.default_rng([zlib.crc32(alpha.tobytes()), index])
        slope = slope + self.rounding * noise.uniform(-1, 1, self.num_layers)
        return loss, np.where(np.isin(range(self.num_layers), self.selectable), slope, 0)

    def run_sweep(self, index: int) -> tuple[float, np.ndarray]:
        alone = np.full(self.num_layers, np.nan)
        for layer in self.selectable:
            alone[layer] = self.run_loss(frozenset([layer]), index)
        return self.run_loss(frozenset(), index), alone

    def run_ratios(self, num_last_tokens: int, index: int) -> np.ndarray:
        """The more a layer is worth on its own, the farther it looks."""
        sliding, alone = self.run_sweep(index)
        return np.nan_to_num(0.5 - 0.1 * (sliding - alone) / num_last_tokens)

    def loss_work(self, full_layers: frozenset[int], index: int) -> float:
        return SLIDING_PASS + (1 - SLIDING_PASS) * len(full_layers) / len(self.selectable)

    def gradient_work(self, alpha: np.ndarray, index: int) -> float:
        return GRADIENT if np.isin(alpha, (0, 1)).all() else INTERIOR

    def sweep_work(self, index: int) -> float:
        return sum(self.loss_work(frozenset([layer]), index) for layer in self.selectable) / 2

    def _link(self, alpha: np.ndarray, index: int) -> tuple[float, float]:
        """The loss, and its slope over what the terms leave of `top`."""
        values = [term.value(alpha) for term in self.terms]
        left = self.top - float(np.dot(values, self.scale[index]))
        if not self.saturates:
            return left, 1.0
        return float(np.logaddexp(0, left)), 1 / (1 + math.exp(-left))
