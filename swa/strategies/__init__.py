"""Strategies: ways to choose the layers that keep full attention.

Each is a small frozen dataclass whose fields are its settings, with one method, `propose`. A
strategy of your own need not be registered: `swa.select(..., strategy=yours)` takes any object with
that method, or a function of a problem and a size.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from swa.errors import InputError
from swa.strategies.base import Move, Plain, Proposal, Strategy, propose
from swa.strategies.frank_wolfe import FrankWolfe
from swa.strategies.greedy import Backward, Forward
from swa.strategies.joint import Joint
from swa.strategies.patterns import First, Last, Periodic, Random
from swa.strategies.rankings import FirstOrder, LightTransfer, Path, TopK
from swa.strategies.refine import Refine

__all__ = [
    "STRATEGIES",
    "Move",
    "Plain",
    "Proposal",
    "Strategy",
    "describe",
    "propose",
    "resolve",
    "settings",
    "summary",
]

STRATEGIES: dict[str, type[Strategy]] = {
    "joint": Joint,
    "topk": TopK,
    "first_order": FirstOrder,
    "path": Path,
    "frank_wolfe": FrankWolfe,
    "forward": Forward,
    "backward": Backward,
    "refine": Refine,
    "lighttransfer": LightTransfer,
    "periodic": Periodic,
    "first": First,
    "last": Last,
    "random": Random,
}


def resolve(strategy: str | Strategy | Plain, seed: int = 0) -> Strategy | Plain:
    """A strategy by its name, with settings after a colon if it has any: "random:seed=3".

    `seed` is for strategies that draw, if their settings do not say another.

    Raises:
        InputError: an unknown name or setting, or something that is no strategy.
    """
    if not isinstance(strategy, str):
        if isinstance(strategy, type) or not (isinstance(strategy, Strategy) or callable(strategy)):
            raise InputError(
                f"strategy must be a name, an object with propose(problem, size), or a function:"
                f" {strategy!r}"
            )
        return strategy
    name, _, given = strategy.partition(":")
    if name not in STRATEGIES:
        raise InputError(f"there is no strategy {name!r}: there are {', '.join(STRATEGIES)}")
    made: Any = STRATEGIES[name]
    known = settings(name)
    values: dict[str, float] = {"seed": seed} if "seed" in known else {}
    for setting in given.split(",") if given else ():
        key, _, value = setting.partition("=")
        if key not in known:
            raise InputError(f"{name} has no setting {key!r}: it has {sorted(known) or 'none'}")
        try:
            values[key] = float(value) if isinstance(known[key], float) else int(value)
        except ValueError:
            raise InputError(f"{name}: {key} must be a number, not {value!r}") from None
    strategy_: Strategy = made(**values)
    return strategy_


def settings(name: str) -> dict[str, Any]:
    """The settings that can be given with a strategy's name, which are numbers: their defaults."""
    made: Any = STRATEGIES[name]
    numbers = ("int", "float", "int | None", "float | None")
    return {field.name: field.default for field in fields(made) if field.type in numbers}


def describe(strategy: str | Strategy | Plain, seed: int = 0) -> str:
    """What a file or a table calls a strategy: its name, or what stands for it in code.

    With the seed that `resolve` was given, unless it is 0: the name alone makes it again.
    """
    if isinstance(strategy, str):
        name, _, given = strategy.partition(":")
        if seed == 0 or "seed" not in settings(name) or "seed=" in given:
            return strategy
        return f"{strategy}{',' if given else ':'}seed={seed}"
    if is_dataclass(strategy):
        return repr(strategy)
    code: str = getattr(strategy, "__qualname__", type(strategy).__qualname__)
    return code


def summary(name: str) -> str:
    """One line about a strategy."""
    return (STRATEGIES[name].__doc__ or "").split("\n")[0]
