"""Which layers keep full attention: budgets, the choice by score, and the usual fixed patterns."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

from swa import jsonio
from swa.errors import InputError, ScoresError
from swa.files import write_text
from swa.layer_scores import LayerScores, checked_integer
from swa.policy import AttentionPolicy, format_layers

SCHEMA = "swa.selection/1"
# Far below a float's resolution, so that 1/12 and 0.35 come back from their floats as themselves.
LARGEST_DENOMINATOR = 10**9


@dataclass(frozen=True)
class Budget:
    """How many layers keep full attention: exactly one of a number and a share.

    Args:
        full_attention_layers: a number of layers, >= 0.
        fraction: a share of all layers of the model, in 0..1, rounded half up:
            a quarter of 30 layers is 8.

    Raises:
        InputError: none or both are given, or a value is out of range.
    """

    full_attention_layers: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        count: object = self.full_attention_layers
        share: object = self.fraction
        if (count is None) == (share is None):
            raise InputError("a budget is either full_attention_layers= or fraction=: give one")
        # The dataclass is frozen for its users; normalising its own fields is the one exception.
        if count is not None:
            count = checked_integer(count, "full_attention_layers", 0)
            object.__setattr__(self, "full_attention_layers", count)
        elif not isinstance(share, bool) and isinstance(share, Real) and 0 <= float(share) <= 1:
            object.__setattr__(self, "fraction", float(share))
        else:
            raise InputError(f"fraction must be a number in 0..1, not {share!r}")

    def resolve(self, num_hidden_layers: int) -> int:
        """The number of full-attention layers in a model of so many layers.

        Raises:
            InputError: the budget is more than the model has.
        """
        if self.full_attention_layers is None:
            share = Fraction(self.fraction or 0).limit_denominator(LARGEST_DENOMINATOR)
            return math.floor(share * num_hidden_layers + Fraction(1, 2))
        if self.full_attention_layers > num_hidden_layers:
            raise InputError(
                f"the budget is {self.full_attention_layers} full-attention layers, the model has"
                f" {num_hidden_layers}"
            )
        return self.full_attention_layers


@dataclass(frozen=True, repr=False)
class Selection:
    """The layers that keep full attention, with the budget and the scores that chose them.

    Raises:
        ScoresError: the layers are not ascending, not among those that the scores allow, without
            those that the scores take for granted, or not as many as the budget says.
    """

    layers: tuple[int, ...]
    budget: Budget
    scores: LayerScores

    def __post_init__(self) -> None:
        allowed = {*self.scores.scored_layers, *self.scores.fixed_layers}
        required = {*self.scores.fixed_layers}
        size = self.budget.resolve(self.scores.num_hidden_layers)
        if (
            list(self.layers) != sorted(set(self.layers))
            or not required <= set(self.layers) <= allowed
            or len(self.layers) != size
        ):
            raise ScoresError(
                f"a selection from these scores is {size} ascending layers of {sorted(allowed)},"
                f" {sorted(required)} among them, not {list(self.layers)}"
            )

    @cached_property
    def policy(self) -> AttentionPolicy:
        """The policy that was scored, with the chosen layers full."""
        return self.scores.policy.with_full_layers(self.layers, self.scores.num_hidden_layers)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: that of the policy, and under "selection" the budget and the scores."""
        origin = {
            "schema": SCHEMA,
            "budget": asdict(self.budget),
            "scores": self.scores.to_dict(),
        }
        return self.policy.to_dict() | {"selection": origin}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Selection:
        """The selection that `to_dict` gave.

        Raises:
            ScoresError: no "selection" in it, another schema, scores or a budget that are not
                valid, or a policy that is not the one scored with these layers.
        """
        policy = AttentionPolicy.from_dict(data)
        origin = data.get("selection")
        if not isinstance(origin, Mapping) or origin.get("schema") != SCHEMA:
            raise ScoresError(
                f'there is no "selection" of schema {SCHEMA!r} in it: a plain policy is read by'
                " AttentionPolicy.load"
            )
        budget, scores = origin.get("budget"), LayerScores.from_dict(origin.get("scores", {}))
        if not isinstance(budget, Mapping) or budget.keys() - {"full_attention_layers", "fraction"}:
            raise ScoresError(f"the selection's budget is not valid: {budget!r}")
        selection = cls(policy.full_attention_layers or (), Budget(**budget), scores)
        if selection.policy != policy:
            raise ScoresError("the policy is not the one that was scored")
        return selection

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write, atomically, a file that `AttentionPolicy.load` reads too. Raises OSError."""
        write_text(path, jsonio.dumps_document(self.to_dict()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Selection:
        """Read what `save` wrote. Raises OSError, or a ScoresError that names the file."""
        try:
            return cls.from_dict(jsonio.loads(Path(path).read_bytes()))
        except ValueError as error:
            raise ScoresError(f"{os.fspath(path)}: {error}") from error

    def __repr__(self) -> str:
        return (
            f"Selection: full attention in {len(self.layers)} of {self.scores.num_hidden_layers}"
            f" layers: [{format_layers(self.layers)}]"
        )


def select(scores: LayerScores, budget: Budget) -> Selection:
    """Keep the layers that score highest, as many as the budget says.

    Layers that were full already when the others were restored are kept, and count.

    Raises:
        InputError: the budget is more than can be selected, or less than is kept already.
    """
    size = budget.resolve(scores.num_hidden_layers)
    return Selection(top_layers(scores, size), budget, scores)


def top_layers(scores: LayerScores, size: int) -> tuple[int, ...]:
    """The top-k of arXiv 2606.27791: by mean delta, each layer on its own, ties to the lower index.

    Raises:
        InputError: as `select`.
    """
    fixed, candidates = scores.fixed_layers, scores.ranking
    if not len(fixed) <= size <= len(fixed) + len(candidates):
        raise InputError(
            f"the budget is {size} full-attention layers, these scores can give"
            f" {len(fixed)} to {len(fixed) + len(candidates)}: {len(fixed)} were full in the base,"
            f" {len(candidates)} have a score"
        )
    return tuple(sorted((*fixed, *candidates[: size - len(fixed)])))


def periodic(num_layers: int, size: int, offset: int = 0) -> tuple[int, ...]:
    """Every (num_layers / size)-th layer: floor(i * num_layers / size) + offset, i = 0..size-1.

    Where the period is not an integer, gaps of its floor and its ceiling take turns. There are
    ceil(num_layers / size) offsets, from 0: with each of them all layers are distinct and in range.

    Raises:
        InputError: size is not in 1..num_layers, or there is no such offset.
    """
    _check_size(num_layers, size, 1)
    if not 0 <= offset < -(-num_layers // size):
        raise InputError(
            f"offset must be in 0..{-(-num_layers // size) - 1} for {size} of {num_layers} layers,"
            f" not {offset}"
        )
    return tuple(i * num_layers // size + offset for i in range(size))


def periodic_choices(num_layers: int, size: int) -> tuple[tuple[int, ...], ...]:
    """`periodic` at every offset. Raises InputError: size is not in 1..num_layers."""
    _check_size(num_layers, size, 1)
    return tuple(periodic(num_layers, size, i) for i in range(-(-num_layers // size)))


def first(num_layers: int, size: int) -> tuple[int, ...]:
    """The lowest layers. Raises InputError: size is not in 0..num_layers."""
    _check_size(num_layers, size, 0)
    return tuple(range(size))


def last(num_layers: int, size: int) -> tuple[int, ...]:
    """The highest layers. Raises InputError: size is not in 0..num_layers."""
    _check_size(num_layers, size, 0)
    return tuple(range(num_layers - size, num_layers))


def _check_size(num_layers: int, size: int, smallest: int) -> None:
    if not smallest <= size <= num_layers:
        raise InputError(f"cannot choose {size} of {num_layers} layers")
