"""Rotary position embeddings: the frequencies of each scaling recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from swa.fields import Fields

F32: TypeAlias = npt.NDArray[np.float32]

# Far beyond every model; within them no recipe can overflow or divide by zero.
MAX_THETA, MAX_PARAMETER = 1e20, 1e9


@dataclass(frozen=True)
class Rope:
    """Position p turns pair i of a head by the angle p * inv_freq[i]."""

    rope_type: str
    """"default", "linear", "llama3" or "yarn"."""
    theta: float
    inv_freq: tuple[float, ...]
    """float32 values [head_dim / 2], radians per position."""
    attention_factor: float
    """Multiplies cosines and sines."""
    parameters: Mapping[str, Any]
    """What the recipe was computed from."""

    def divided_by(self, factors: F32) -> Rope:
        """The frequencies divided by `factors` float32 [head_dim / 2], as llama.cpp has them."""
        inv_freq = np.array(self.inv_freq, np.float32) / factors
        return replace(
            self,
            inv_freq=tuple(inv_freq.tolist()),
            parameters={**self.parameters, "frequency_factors": factors.tolist()},
        )


def read_rope(fields: Fields, theta: float, head_dim: int, original_length: int) -> Rope:
    """The recipe of a `rope_parameters` object.

    Computed in float32 in the order of transformers' `modeling_rope_utils` (version 5), so that
    the frequencies are the same bits, given a correctly rounded power.

    Args:
        theta: base of the frequencies where the object has none.
        original_length: tokens of context before scaling, where the object does not say.

    Raises:
        CheckpointError: a parameter is missing or malformed.
        UnsupportedModelError: another recipe, or a key that its recipe does not have.
    """
    rope_type = fields.text("rope_type", fields.text("type", "default"))
    fields.require("type", [rope_type])
    if rope_type not in _RECIPES:
        key = "rope_type" if "rope_type" in fields else "type"
        fields.unsupported(key, f"swa supports {', '.join(_RECIPES)}")
    theta = fields.number("rope_theta", theta, above=1.0)
    if theta > MAX_THETA:
        fields.unsupported("rope_theta", f"it must be at most {MAX_THETA:g}")
    fields.require("partial_rotary_factor", [1])
    recipe = _Recipe(fields, theta, head_dim, original_length)
    inv_freq, attention_factor = _RECIPES[rope_type](recipe)
    fields.refuse_unread(())
    parameters = {"rope_type": rope_type, "rope_theta": theta, **recipe.used}
    return Rope(rope_type, theta, tuple(inv_freq.tolist()), attention_factor, parameters)


class _Recipe:
    """What the recipes share: the parameters, noted down as they are read, and the wavelengths."""

    def __init__(self, fields: Fields, theta: float, head_dim: int, original_length: int) -> None:
        self.fields, self.theta, self.head_dim = fields, theta, head_dim
        self._original_length = original_length
        self.used: dict[str, Any] = {}

    def number(self, key: str, default: float | None = None) -> float:
        value = self.fields.number(key, default)
        if not 1 / MAX_PARAMETER <= value <= MAX_PARAMETER:
            self.fields.malformed(key, f"must be from {1 / MAX_PARAMETER:g} to {MAX_PARAMETER:g}")
        self.used[key] = value
        return value

    def original_length(self) -> int:
        key = "original_max_position_embeddings"
        self.used[key] = length = self.fields.integer(key, self._original_length)
        return length

    def wavelengths(self) -> F32:
        """float32 [head_dim / 2]: theta^(2 i / head_dim), correctly rounded on every machine."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        base = float(np.float32(self.theta))
        wavelengths: F32 = (base ** exponents.astype(np.float64)).astype(np.float32)
        return wavelengths


def _default(recipe: _Recipe) -> tuple[F32, float]:
    return 1.0 / recipe.wavelengths(), 1.0


def _linear(recipe: _Recipe) -> tuple[F32, float]:
    return 1.0 / recipe.wavelengths() / recipe.number("factor"), 1.0


def _llama3(recipe: _Recipe) -> tuple[F32, float]:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    factor, length = recipe.number("factor"), recipe.original_length()
    low, high = recipe.number("low_freq_factor"), recipe.number("high_freq_factor")
    if high <= low:
        recipe.fields.malformed("high_freq_factor", "must be above low_freq_factor")
    inv_freq = 1.0 / recipe.wavelengths()
    # Positions per turn; torch divides a number by a tensor as number * (1 / tensor).
    period = 1.0 / inv_freq * (2 * math.pi)
    stretched = np.where(period > length / low, inv_freq / factor, inv_freq)
    share = (1.0 / period * length - low) / (high - low)
    blended = (1 - share) * stretched / factor + share * stretched
    between = (period >= length / high) & (period <= length / low)
    return np.where(between, blended, stretched), 1.0


def _yarn(recipe: _Recipe) -> tuple[F32, float]:
    """YaRN (arXiv 2309.00071): a ramp from kept to stretched frequencies, sharper attention."""
    length, fields = recipe.original_length(), recipe.fields
    factor = recipe.number("factor")
    attention_factor = _yarn_attention_factor(recipe, factor)
    fast, slow = recipe.number("beta_fast", 32.0), recipe.number("beta_slow", 1.0)
    truncate = recipe.used["truncate"] = fields.boolean("truncate", True)
    ends = []
    for turns in (fast, slow):  # the pair that turns this often over the original context
        ratio = length / (turns * 2 * math.pi)
        ends.append(recipe.head_dim * math.log(ratio) / (2 * math.log(recipe.theta)))
    first, last = ends
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, recipe.head_dim - 1)
    width = (last - first) or (last + 0.001 - first)
    pairs = np.arange(recipe.head_dim // 2, dtype=np.float32)
    keep = 1 - np.clip((pairs - first) / width, 0, 1)
    wavelengths = recipe.wavelengths()
    return 1.0 / (factor * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep, attention_factor


def _yarn_attention_factor(recipe: _Recipe, factor: float) -> float:
    fields = recipe.fields
    scales = [recipe.number(k) if k in fields else None for k in ("mscale", "mscale_all_dim")]
    if "attention_factor" in fields:
        return recipe.number("attention_factor")

    def sharpness(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    mscale, mscale_all_dim = scales
    if mscale is not None and mscale_all_dim is not None:
        return sharpness(mscale) / sharpness(mscale_all_dim)
    return sharpness(1.0)


_RECIPES: dict[str, Callable[[_Recipe], tuple[F32, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
