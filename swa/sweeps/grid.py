"""The grid of a sweep: which policies, strategies and budgets are crossed, in which order."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from swa.budget import Budget
from swa.errors import InputError
from swa.policy import AttentionPolicy
from swa.strategies import Strategy, resolve
from swa.strategies.base import Plain
from swa.strategies.rankings import TopK

T = TypeVar("T")


@dataclass(frozen=True)
class NamedStrategy:
    """A strategy, and what a table and a journal call it."""

    strategy: Strategy | Plain = field(compare=False)
    name: str
    """As it was given."""
    identity: str
    """With its settings: equal for equal strategies, in every process."""

    @classmethod
    def of(cls, given: Any) -> NamedStrategy:
        """From a name, a strategy or a function. Raises InputError: none of these."""
        strategy = resolve(given)
        identity = repr(strategy)
        if not hasattr(strategy, "propose") and hasattr(strategy, "__qualname__"):
            identity = f"{strategy.__module__}.{strategy.__qualname__}"
        if " at 0x" in identity or "<lambda>" in identity or "<locals>" in identity:
            raise InputError(
                f"the strategy {identity} cannot be told from others in a journal, nor sent to a"
                " worker: make it a function of a module, or a dataclass"
            )
        return cls(strategy, given if isinstance(given, str) else identity, identity)

    @property
    def takes_scores(self) -> bool:
        """Whether it chooses by the exact sweep alone, which is then cut into its examples."""
        return isinstance(self.strategy, TopK)


@dataclass(frozen=True)
class Grid:
    """The axes that every model of a sweep goes through.

    Args:
        windows, sinks, tails: of the policies, in tokens. A tail or sinks are crossed with windows
            under full decode only: a consumer has neither.
        consumers: None for the full semantics, or a name for `AttentionPolicy.for_consumer`.
        strategies: as `swa.select` takes them.
        budgets: a share of the layers (float), a number of layers (int), or a Budget.

    Raises:
        InputError: an axis is empty, or has a value that it cannot have.
        PolicyError: as AttentionPolicy.
    """

    windows: tuple[int, ...]
    sinks: tuple[int, ...]
    tails: tuple[int, ...]
    consumers: tuple[str | None, ...]
    strategies: tuple[NamedStrategy, ...]
    budgets: tuple[Budget, ...]

    @classmethod
    def of(
        cls,
        *,
        windows: Iterable[int],
        sinks: Iterable[int] = (0,),
        tails: Iterable[int] = (0,),
        consumers: Iterable[str | None] = (None,),
        strategies: Iterable[Any] = ("topk",),
        budgets: Iterable[Any] = (0.25,),
    ) -> Grid:
        """A grid of any iterables, values that repeat taken once."""
        return cls(
            windows=_axis("windows", windows, partial(_integer, name="windows")),
            sinks=_axis("sinks", sinks, partial(_integer, name="sinks")),
            tails=_axis("tails", tails, partial(_integer, name="tails")),
            consumers=_axis("consumers", consumers, lambda consumer: consumer),
            strategies=_axis("strategies", strategies, NamedStrategy.of),
            budgets=_axis("budgets", budgets, _budget),
        )

    def policies(self) -> list[AttentionPolicy]:
        """Every policy of the grid once, in order, without layers."""
        made: dict[AttentionPolicy, None] = {}
        for consumer, window in itertools.product(self.consumers, self.windows):
            if consumer is not None:
                made[AttentionPolicy.for_consumer(consumer, sliding_window=window)] = None  # type: ignore[arg-type]
                continue
            for sinks, tail in itertools.product(self.sinks, self.tails):
                made[AttentionPolicy(window, num_sink_tokens=sinks, num_tail_tokens=tail)] = None
        return list(made)


def _axis(name: str, values: Iterable[Any], read: Callable[[Any], T]) -> tuple[T, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f"{name} must be a list of values, not {values!r}")
    axis = tuple(dict.fromkeys(map(read, values)))  # as read: 1 layer is not 1.0 of the layers
    if not axis:
        raise InputError(f"{name} is empty: give at least one value")
    return axis


def _integer(value: Any, name: str) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise InputError(f"{name} takes integers, not {value!r}")


def _budget(value: Any) -> Budget:
    if isinstance(value, Budget):
        return value
    if isinstance(value, float):
        return Budget(fraction=value)
    return Budget(full_attention_layers=_integer(value, "budgets"))


def as_sequence(models: Any) -> Sequence[Any]:
    """One path, or several, as a sequence."""
    return [models] if isinstance(models, str) or hasattr(models, "__fspath__") else list(models)
