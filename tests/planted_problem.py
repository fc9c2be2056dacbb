"""A problem whose best selection is known by construction, in place of a model."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from swa.problem import Cost

SLIDING_PASS, GRADIENT = 0.7, 4.0  # prefills


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


@dataclass
class PlantedProblem:
    """loss(alpha) = top - the terms' values, or softplus of that; examples weigh terms apart.

    `rounding`: the size of the errors of each gradient, as a low precision would leave.
    """

    num_layers: int
    terms: Sequence[Term]
    top: float
    saturates: bool = False
    rounding: float = 0.0
    n_examples: int = 8
    unselectable: tuple[int, ...] = ()
    cost: Cost = field(default_factory=Cost)
    known_deltas: np.ndarray | None = None
    spread: float = 0.2
    n_gradients: int = 0

    def __post_init__(self) -> None:
        self.selectable = tuple(i for i in range(self.num_layers) if i not in self.unselectable)
        rng = np.random.default_rng(7)
        shape = self.n_examples, len(self.terms)
        self._scale = 1 + self.spread * rng.uniform(-1, 1, shape)  # [N, terms]
        self._kept: dict[tuple[bytes, int], tuple[float, np.ndarray]] = {}
        self._losses: dict[tuple[bytes, int], float] = {}

    def deltas(self) -> np.ndarray:
        alone = [self.loss([layer]) for layer in self.selectable]
        deltas = np.zeros((self.n_examples, self.num_layers))
        deltas[:, list(self.selectable)] = self.loss([])[:, None] - np.array(alone).T
        self.known_deltas = deltas
        return deltas

    def loss(self, full_layers: Iterable[int]) -> np.ndarray:
        alpha = np.zeros(self.num_layers)
        alpha[list(full_layers)] = 1
        return np.array([self._loss(alpha, index) for index in range(self.n_examples)])

    def mean(self, full_layers: Iterable[int]) -> float:
        return float(self.loss(full_layers).mean())

    def gradient(
        self, alpha: np.ndarray, examples: Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        assert alpha.shape == (self.num_layers,) and (alpha >= 0).all() and (alpha <= 1).all()
        assert not alpha[list(self.unselectable)].any()
        used = range(self.n_examples) if examples is None else examples
        pairs = [self._gradient(alpha, index) for index in used]
        return np.array([loss for loss, _ in pairs]), np.array([slope for _, slope in pairs])

    def _loss(self, alpha: np.ndarray, index: int) -> float:
        key = alpha.tobytes(), index
        if key not in self._losses:
            self._pay(SLIDING_PASS + (1 - SLIDING_PASS) * alpha.mean())
            self._losses[key] = self._link(self._margin(alpha, index))[0]
        return self._losses[key]

    def _gradient(self, alpha: np.ndarray, index: int) -> tuple[float, np.ndarray]:
        key = alpha.tobytes(), index
        if key not in self._kept:
            self._pay(GRADIENT)
            self.n_gradients += 1
            loss, outer = self._link(self._margin(alpha, index))
            slopes = [term.slope(alpha) for term in self.terms]
            slope = -outer * sum(map(np.multiply, slopes, self._scale[index]))
            noise = np.random.default_rng([zlib.crc32(key[0]), index]).uniform(
                -1, 1, self.num_layers
            )
            slope = slope + self.rounding * noise
            slope[list(self.unselectable)] = 0
            self._kept[key] = loss, slope
            if np.isin(alpha, (0, 1)).all():
                self._losses[key] = loss
        return self._kept[key]

    def _margin(self, alpha: np.ndarray, index: int) -> float:
        values = [term.value(alpha) for term in self.terms]
        return self.top - float(np.dot(values, self._scale[index]))

    def _link(self, margin: float) -> tuple[float, float]:
        """The loss, and its slope over the margin."""
        if not self.saturates:
            return margin, 1.0
        return float(np.logaddexp(0, margin)), 1 / (1 + math.exp(-margin))

    def _pay(self, prefills: float) -> None:
        self.cost += Cost(prefills / self.n_examples, 0.0)
