"""What a strategy is, and what it returns."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np

from swa.errors import InputError
from swa.layer_scores import checked_integer
from swa.policy import format_layers
from swa.problem import Problem
from swa.runs import F64, NOTHING, Cost


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(map(operator.index, self.layers)))
        for name in ("estimate", "loss"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))

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


@runtime_checkable
class Strategy(Protocol):
    """A way to choose layers. Anything with this method will do."""

    def propose(self, problem: Problem, size: int) -> Proposal:
        """At most `size` layers of `problem.selectable`. Its cost is filled in by `propose`."""


Plain: TypeAlias = Callable[[Problem, int], "Proposal | Iterable[int]"]
"""A strategy that is a function; a Proposal, or the layers alone."""


def propose(strategy: Strategy | Plain, problem: Problem, size: int) -> Proposal:
    """What `strategy` proposes, checked, and with its cost, as if nothing had been known before.

    Raises:
        InputError: `size` is not in 0..the number of selectable layers; or the proposal is not at
            most `size` different selectable layers.
    """
    problem = problem.fresh()
    made = ask(strategy, problem, size)
    return replace(made, cost=problem.cost)


def ask(strategy: Strategy | Plain, problem: Problem, size: int) -> Proposal:
    """As `propose`, but on the problem's own account: for strategies that ask others."""
    if not 0 <= size <= len(problem.selectable):
        raise InputError(
            f"cannot keep {size} layers full: {len(problem.selectable)} of this model's"
            f" {problem.num_layers} can be chosen"
        )
    asked = strategy.propose if isinstance(strategy, Strategy) else strategy
    answer = asked(problem, size)
    made = answer if isinstance(answer, Proposal) else Proposal(tuple(answer))
    try:
        layers = tuple(sorted(map(operator.index, made.layers)))  # of NumPy, too
    except TypeError as error:
        raise InputError(
            f"the strategy {strategy!r} proposed {list(made.layers)}: not numbers of layers"
            f" ({error})"
        ) from None
    if len(set(layers)) != len(layers) or not set(layers) <= set(problem.selectable):
        raise InputError(
            f"the strategy {strategy!r} proposed {list(made.layers)}: not different layers of"
            f" [{format_layers(problem.selectable)}]"
        )
    if len(layers) > size:
        raise InputError(f"the strategy {strategy!r} proposed {len(layers)} layers, not {size}")
    return replace(made, layers=layers)


def best(benefit: F64, candidates: Iterable[int], size: int) -> tuple[int, ...]:
    """The `size` candidates of largest benefit [L], ascending; ties to the lower index."""
    ranked = sorted(candidates, key=lambda layer: (-benefit[layer], layer))
    return tuple(sorted(ranked[:size]))


def helps(new: F64, old: F64) -> bool:
    """Whether losses [N] are better than others of the same examples.

    The mean must fall, and not by a few examples alone, which others would not repeat: it must fall
    in at least as many as it rises in.
    """
    return bool(new.mean() < old.mean() and (new < old).sum() >= (new > old).sum())


def gates(num_layers: int, layers: Sequence[int], weight: float = 1.0) -> F64:
    """float64 [L]: `weight` in these layers, 0 elsewhere."""
    alpha = np.zeros(num_layers)
    alpha[list(layers)] = weight
    return alpha


class Batches:
    """Takes turns over the examples, so that each, and each task, is used as often as others.

    Args:
        tasks: [N], the task of each example.
        size: of a batch; None: all examples.
        seed: of the order within a task.
    """

    def __init__(self, tasks: Sequence[str], size: int | None, seed: int) -> None:
        self.size = len(tasks) if size is None else min(size, len(tasks))
        groups: dict[str, list[int]] = {}
        # Raw bits, since NumPy keeps that stream for all time.
        keys = np.random.PCG64(seed).random_raw(len(tasks))
        for index in np.argsort(keys, kind="stable").tolist():
            groups.setdefault(tasks[index], []).append(index)
        rounds = zip_longest(*(groups[task] for task in sorted(groups)))
        self._order = [index for members in rounds for index in members if index is not None]
        self._used = 0

    def next(self) -> list[int]:
        """The next examples, ascending."""
        n = len(self._order)
        taken = [self._order[(self._used + i) % n] for i in range(self.size)]
        self._used += self.size
        return sorted(taken)


def check_count(value: int | None, name: str, least: int = 1) -> None:
    """Raises InputError: a setting of a strategy is no integer, or less than it may be."""
    if value is not None:
        checked_integer(value, name, least)
