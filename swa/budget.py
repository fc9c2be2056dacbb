"""Budgets: how much full attention a selection may keep, in the units that people pay."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any

from swa import cost
from swa.errors import InputError
from swa.layer_scores import checked_integer
from swa.memory import GIB
from swa.policy import selectable_layers

if TYPE_CHECKING:
    from swa.config import ModelConfig
    from swa.policy import AttentionPolicy

# Far below a float's resolution, so that 1/12 and 0.35 come back from their floats as themselves.
LARGEST_DENOMINATOR = 10**9
Price = Callable[["AttentionPolicy", Collection[int]], float]
AT_LENGTH = ("prefill_flops", "kv_bytes")
LONGEST = 2**31  # tokens: beyond any prompt, and the squares still fit


@dataclass(frozen=True)
class Budget:
    """What full attention may cost: exactly one of these, with `prompt_tokens` where it says so.

    Args:
        full_attention_layers: a number of layers, >= 0.
        fraction: a share of all layers of the model, in 0..1, rounded half up: a quarter of 30
            layers is 8.
        prefill_flops: the work of a prefill of `prompt_tokens`, as a share of full attention's, in
            0..1.
        kv_bytes: bytes of the KV cache after `prompt_tokens`, with windowed decode alone: with full
            decode nothing is saved.
        nll_increase: as few full layers as keep the measured loss on the calibration examples
            within so many nats per answer token (>= 0) of full attention.
        prompt_tokens: the length at which `prefill_flops` or `kv_bytes` holds.

    Raises:
        InputError: none or several are given, `prompt_tokens` is missing or does not belong, or a
            value is out of range.
    """

    full_attention_layers: int | None = None
    fraction: float | None = None
    prefill_flops: float | None = None
    kv_bytes: int | None = None
    nll_increase: float | None = None
    prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in asdict(self).items() if value is not None]
        kinds = [name for name in given if name != "prompt_tokens"]
        if len(kinds) != 1:
            raise InputError(
                "a budget is one of full_attention_layers=, fraction=, prefill_flops=, kv_bytes="
                f" and nll_increase=: give one, not {' and '.join(kinds) or 'none'}"
            )
        kind = kinds[0]
        if ("prompt_tokens" in given) != (kind in AT_LENGTH):
            raise InputError(
                f"{kind} holds at a length: give prompt_tokens="
                if kind in AT_LENGTH
                else f"prompt_tokens says nothing beside {kind}: leave it out"
            )
        # The dataclass is frozen for its users; normalising its own fields is the one exception.
        for name in given:
            object.__setattr__(self, name, _CHECKS[name](getattr(self, name), name))

    def resolve(self, num_hidden_layers: int) -> int:
        """The number of full-attention layers, where the number of layers is enough to tell.

        Raises:
            InputError: the budget is more than the model has, or cannot be told without the model.
        """
        if self.fraction is not None:
            share = Fraction(self.fraction).limit_denominator(LARGEST_DENOMINATOR)
            return math.floor(share * num_hidden_layers + Fraction(1, 2))
        if self.full_attention_layers is None:
            raise InputError(
                f"a number of layers cannot be told from {self}: that takes the model and its"
                " examples (swa.select(model, examples, policy, budget))"
            )
        if self.full_attention_layers > num_hidden_layers:
            raise InputError(
                f"the budget is {self.full_attention_layers} full-attention layers, the model has"
                f" {num_hidden_layers}"
            )
        return self.full_attention_layers

    def size(self, config: ModelConfig, policy: AttentionPolicy) -> int:
        """The most layers of this model that can be full under `policy`, whichever they are.

        Raises:
            InputError: as `resolve` and `priced`.
        """
        if self.prompt_tokens is None:
            return self.resolve(config.num_hidden_layers)
        price, limit = self.priced(config, policy)
        none = price(policy, ())
        each = (price(policy, (layer,)) - none for layer in selectable_layers(config))
        extra = sorted(each, reverse=True)
        size = 0
        while size < len(extra) and none + sum(extra[: size + 1]) <= limit:
            size += 1
        return size

    def priced(self, config: ModelConfig, policy: AttentionPolicy) -> tuple[Price, float]:
        """For `prefill_flops` and `kv_bytes`: what a hybrid costs, and how much it may.

        The limit holds for hybrids that differ from `policy` in their windows and layers.

        Raises:
            InputError: another budget; all layers sliding is over it already; or `kv_bytes` with
                full decode.
        """
        length = self.prompt_tokens
        if length is None:
            raise InputError(f"a budget of {self} is not one of work or memory")
        if self.kv_bytes is not None and policy.decode == "full":
            raise InputError(
                "kv_bytes is a budget for windowed decode: with full decode every layer keeps all"
                ' keys, and nothing is saved; take decode="window", or another budget'
            )

        def price(one: AttentionPolicy, full: Collection[int]) -> float:
            if self.kv_bytes is not None:
                return cost.kv_bytes(config, one, full, length)
            return cost.prefill_work(config, one, full, length).flops

        every = selectable_layers(config)
        limit = float(self.kv_bytes or (self.prefill_flops or 0) * price(policy, every))
        limit *= 1 + 1e-12  # so that 1.0 is all of it, whatever the order of the sum
        if (none := price(policy, ())) > limit:
            least = (
                f"{none / price(policy, every):.3f} of full attention's prefill"
                if self.prefill_flops is not None
                else f"{none:,.0f} bytes"
            )
            raise InputError(f"{self} cannot be met: with all layers sliding it is {least}")
        return price, limit

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: what was given."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, data: object) -> Budget:
        """What `to_dict` gave. Raises InputError: it is not that."""
        if not isinstance(data, Mapping) or data.keys() - _CHECKS.keys():
            raise InputError(f"not a budget: {data!r}")
        return cls(**data)

    def __str__(self) -> str:
        if self.full_attention_layers is not None:
            return f"{self.full_attention_layers} layers"
        if self.fraction is not None:
            return f"{self.fraction:.4g} of the layers"
        if self.prefill_flops is not None:
            return f"{self.prefill_flops:.4g} of the prefill at {self.prompt_tokens:,} tokens"
        if self.kv_bytes is not None:
            return f"{self.kv_bytes / GIB:.4g} GiB of KV cache at {self.prompt_tokens:,} tokens"
        return f"a loss within {self.nll_increase:.4g} nats of full attention"


def _natural(value: object, name: str) -> int:
    return checked_integer(value, name, 0 if name == "full_attention_layers" else 1)


def _share(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise InputError(f"{name} must be a number in 0..1, not {value!r}")
    return float(value)


def _tolerance(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise InputError(f"{name} must be a number of nats >= 0, not {value!r}")
    return float(value)


_CHECKS: dict[str, Callable[[object, str], float]] = {
    "full_attention_layers": _natural,
    "fraction": _share,
    "prefill_flops": _share,
    "kv_bytes": _natural,
    "nll_increase": _tolerance,
    "prompt_tokens": partial(checked_integer, minimum=1, maximum=LONGEST),
}
