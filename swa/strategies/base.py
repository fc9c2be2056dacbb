"""What a strategy is, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np

from swa.errors import InputError
from swa.policy import format_layers
from swa.problem import F64, NOTHING, Cost, Problem


@dataclass(frozen=True)
class Move:
    """One line of a trace: what a strategy did, and what it thought or knew of it."""

    what: str
    """In words: "add", "swap", "gradient at 0.5", ..."""
    layers: tuple[int, ...] = ()
    """The layers that it is about."""
    estimate: float | None = None
    """Estimated change of the mean loss, nats per answer token."""
    loss: float | None = None
    """Measured mean loss afterwards, nats per answer token."""

    def __str__(self) -> str:
        parts = [self.what]
        if self.layers:
            parts.append(f"[{format_layers(self.layers)}]")
        if self.estimate is not None:
            parts.append(f"estimated {self.estimate:+.4f}")
        if self.loss is not None:
            parts.append(f"measured {self.loss:.4f}")
        return " ".join(parts)


@dataclass(frozen=True)
class Proposal:
    """The layers that a strategy would keep full, ascending, how it came to them, and its cost."""

    layers: tuple[int, ...]
    trace: tuple[Move, ...] = ()
    cost: Cost = NOTHING


class Strategy(Protocol):
    """A way to choose layers. Anything with this method will do."""

    def propose(self, problem: Problem, size: int) -> Proposal:
        """At most `size` layers of `problem.selectable`. Its cost is filled in by `propose`."""


Plain: TypeAlias = Callable[[Problem, int], "Proposal | Iterable[int]"]
"""A strategy that is a function; a Proposal, or the layers alone."""


def propose(strategy: Strategy | Plain, problem: Problem, size: int) -> Proposal:
    """What `strategy` proposes, checked, and with the cost that it added to the problem's account.

    Raises:
        InputError: `size` is not in 0..the number of selectable layers; or the proposal is not at
            most `size` different selectable layers.
    """
    if not 0 <= size <= len(problem.selectable):
        raise InputError(
            f"cannot keep {size} layers full: {len(problem.selectable)} of this model's"
            f" {problem.num_layers} can be chosen"
        )
    before = problem.cost
    made = strategy.propose(problem, size) if hasattr(strategy, "propose") else None
    if made is None:
        assert callable(strategy)
        answer = strategy(problem, size)
        made = answer if isinstance(answer, Proposal) else Proposal(tuple(answer))
    layers = tuple(sorted(made.layers))
    if len(set(layers)) != len(layers) or not set(layers) <= set(problem.selectable):
        raise InputError(
            f"the strategy {strategy!r} proposed {list(made.layers)}: not different layers of"
            f" [{format_layers(problem.selectable)}]"
        )
    if len(layers) > size:
        raise InputError(f"the strategy {strategy!r} proposed {len(layers)} layers, not {size}")
    return Proposal(layers, made.trace, problem.cost - before)


def best(benefit: F64, candidates: Iterable[int], size: int) -> tuple[int, ...]:
    """The `size` candidates of largest benefit [L], ascending; ties to the lower index."""
    ranked = sorted(candidates, key=lambda layer: (-benefit[layer], layer))
    return tuple(sorted(ranked[:size]))


def gates(num_layers: int, layers: Sequence[int], weight: float = 1.0) -> F64:
    """float64 [L]: `weight` in these layers, 0 elsewhere."""
    alpha = np.zeros(num_layers)
    alpha[list(layers)] = weight
    return alpha


class Batches:
    """Takes turns over the examples in a seeded order, so that each is used as often as others."""

    def __init__(self, n_examples: int, size: int | None, seed: int) -> None:
        self.size = n_examples if size is None else min(size, n_examples)
        self._order = np.random.default_rng(seed).permutation(n_examples).tolist()
        self._used = 0

    def next(self) -> list[int]:
        """The next examples, ascending."""
        n = len(self._order)
        taken = [self._order[(self._used + i) % n] for i in range(self.size)]
        self._used += self.size
        return sorted(taken)


def check_count(value: int | None, name: str) -> None:
    """Raises InputError: a setting of a strategy that must be a positive integer is not."""
    if value is not None and (isinstance(value, bool) or int(value) != value or value < 1):
        raise InputError(f"{name} must be an integer >= 1, not {value!r}")
