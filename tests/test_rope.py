"""RoPE frequencies against transformers' own recipes, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from swa.errors import CheckpointError, UnsupportedModelError
from swa.fields import Fields
from swa.rope import Rope, read_rope

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "explicit": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear-int": {"type": "linear", "factor": 3},
    "llama3": LLAMA3,
    "llama3.2": {**LLAMA3, "factor": 32.0, "rope_theta": 500000.0},
    "llama3-without-original": {**LLAMA3, "original_max_position_embeddings": None},
    "yarn": YARN,
    "yarn-v4": {"type": "yarn", **{k: v for k, v in YARN.items() if k != "rope_type"}},
    "yarn-untruncated": {**YARN, "truncate": False},
    "yarn-betas": {**YARN, "beta_fast": 16, "beta_slow": 2.0},
    "yarn-equal-betas": {**YARN, "beta_fast": 4, "beta_slow": 4, "truncate": False},
    "yarn-attention-factor": {**YARN, "attention_factor": 1.25},
    "yarn-mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.1},
    "yarn-one-mscale": {**YARN, "mscale": 0.707},
    "yarn-down": {**YARN, "factor": 0.5},
    "yarn-short": {**YARN, "original_max_position_embeddings": 64},
}


def read(values: dict[str, Any], head_dim: int = 64, theta: float = 10000.0) -> Rope:
    return read_rope(Fields(values, file="c.json", prefix="rope."), theta, head_dim, 4096)


def theirs(values: dict[str, Any], head_dim: int, theta: float) -> tuple[np.ndarray, float]:
    given = {key: value for key, value in values.items() if value is not None}
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"rope_theta": theta, **given},
    )
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        inv_freq, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return inv_freq.numpy(), factor


@pytest.mark.parametrize("head_dim", [2, 24, 64, 80, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e7])
@pytest.mark.parametrize("recipe", RECIPES)
def test_frequencies_of_transformers(recipe: str, theta: float, head_dim: int) -> None:
    """As float32: torch's power is not rounded correctly, so that a unit in the last place of the
    wavelengths, and what comes of it, is all the difference that there may be."""
    rope = read(RECIPES[recipe], head_dim, theta)
    expected, factor = theirs(RECIPES[recipe], head_dim, theta)
    actual = np.array(rope.inv_freq, np.float32)
    assert (actual.astype(np.float64) == rope.inv_freq).all()  # they are float32 values
    assert expected.dtype == np.float32 and actual.shape == (head_dim // 2,)
    blends = rope.rope_type in ("llama3", "yarn")  # sums of two such terms
    np.testing.assert_array_max_ulp(actual, expected, maxulp=4 if blends else 2)
    assert rope.attention_factor == factor


@pytest.mark.parametrize("recipe", RECIPES)
def test_same_bits_given_the_same_power(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's own wavelengths put in, every recipe gives transformers' bits."""
    import swa.rope

    def wavelengths(self: Any) -> np.ndarray:
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float) / self.head_dim
        powers: np.ndarray = (self.theta**exponents).numpy()
        return powers

    monkeypatch.setattr(swa.rope._Recipe, "wavelengths", wavelengths)
    for theta in (10000.0, 500000.0):
        actual = np.array(read(RECIPES[recipe], 128, theta).inv_freq, np.float32)
        expected, _ = theirs(RECIPES[recipe], 128, theta)
        assert actual.tobytes() == expected.tobytes()


@pytest.mark.parametrize("theta", [10000.0, 100000.0, 500000.0, 1e6, 1e8])
def test_wavelengths_are_correctly_rounded(theta: float) -> None:
    exponents = np.arange(0, 128, 2, dtype=np.float32) / np.float32(128)
    exact = np.longdouble(theta) ** exponents.astype(np.longdouble)
    expected = np.float32(1) / exact.astype(np.float32)
    assert (np.array(read({}, 128, theta).inv_freq, np.float32) == expected).all()


@given(
    recipe=st.sampled_from(list(RECIPES)),
    changes=st.dictionaries(
        st.sampled_from(["factor", "low_freq_factor", "high_freq_factor", "beta_fast"]),
        st.floats(1.0, 100.0),
    ),
    theta=st.floats(100.0, 1e9),
    half=st.integers(1, 64),
)
@settings(max_examples=60)
def test_any_parameters(recipe: str, changes: dict[str, float], theta: float, half: int) -> None:
    values = {k: changes.get(k, v) for k, v in RECIPES[recipe].items() if k != "rope_theta"}
    if values.get("high_freq_factor", 2.0) <= values.get("low_freq_factor", 1.0):
        return
    actual = np.array(read(values, 2 * half, theta).inv_freq, np.float32)
    np.testing.assert_allclose(actual, theirs(values, 2 * half, theta)[0], rtol=2e-6)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if "yarn" in name or "3" in name])
def test_a_scaled_recipe_is_not_the_default(recipe: str) -> None:
    assert read(RECIPES[recipe]).inv_freq != read({}).inv_freq


def test_what_a_recipe_was_computed_from() -> None:
    rope = read(LLAMA3, theta=500000.0)
    assert (rope.rope_type, rope.theta, rope.attention_factor) == ("llama3", 500000.0, 1.0)
    assert rope.parameters == {**LLAMA3, "rope_theta": 500000.0}
    without = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
    assert read(without).parameters["original_max_position_embeddings"] == 4096


def test_divided_by_factors() -> None:
    rope = read({}, head_dim=8)
    halved = rope.divided_by(np.array([1, 2, 4, 8], np.float32))
    expected = np.array(rope.inv_freq, np.float32) / np.array([1, 2, 4, 8], np.float32)
    assert np.array(halved.inv_freq, np.float32).tobytes() == expected.tobytes()
    assert halved.parameters["frequency_factors"] == [1, 2, 4, 8]
    assert rope == read({}, head_dim=8)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type"),
        ({"type": "longrope", "factor": 2.0}, "type"),
        ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, "type"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "default", "factor": 2.0}, "factor"),
        ({"rope_type": "default", "mrope_section": [16, 24, 24]}, "mrope_section"),
        ({"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}, "low_freq_factor"),
        ({**LLAMA3, "beta_fast": 32}, "beta_fast"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
        ({"rope_theta": 1e30}, "rope_theta"),
    ],
)
def test_refused(values: dict[str, Any], key: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^c.json: rope.{key} is ") as caught:
        read(values)
    assert (caught.value.key, caught.value.value) == (f"rope.{key}", values[key])


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"rope_type": 3}, "rope_type"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_theta": True}, "rope_theta"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 0.0}, "factor"),
        ({"rope_type": "linear", "factor": -2.0}, "factor"),
        ({"rope_type": "linear", "factor": float("inf")}, "factor"),
        ({"rope_type": "linear", "factor": 1e300}, "factor"),
        ({**LLAMA3, "low_freq_factor": None}, "low_freq_factor"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor"),
        ({**LLAMA3, "original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ({**LLAMA3, "original_max_position_embeddings": 8e3}, "original_max_position_embeddings"),
        ({**YARN, "factor": None}, "factor"),
        ({**YARN, "beta_slow": 1e-300}, "beta_slow"),
        ({**YARN, "truncate": 1}, "truncate"),
        ({**YARN, "attention_factor": "1"}, "attention_factor"),
        ({**YARN, "mscale": 1.0, "mscale_all_dim": -1}, "mscale_all_dim"),
    ],
)
def test_malformed(values: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^c.json: rope\.{key} is ") as caught:
        read(values)
    assert not isinstance(caught.value, UnsupportedModelError)


NUMBERS = st.one_of(
    st.none(), st.booleans(), st.text(max_size=3), st.integers(), st.floats(), st.just(10**400)
)


@given(
    recipe=st.sampled_from(list(RECIPES)),
    changes=st.dictionaries(
        st.sampled_from(sorted({k for r in RECIPES.values() for k in r} - {"rope_type"})), NUMBERS
    ),
)
@settings(max_examples=300)
@pytest.mark.filterwarnings("error")
def test_whatever_is_asked_gives_finite_frequencies_or_a_checkpoint_error(
    recipe: str, changes: dict[str, Any]
) -> None:
    try:
        rope = read({**RECIPES[recipe], **changes})
    except CheckpointError:
        return
    with np.errstate(all="ignore"):
        assert np.isfinite(rope.inv_freq).all() and np.isfinite(np.float32(rope.attention_factor))
    assert min(rope.inv_freq) > 0


@pytest.mark.parametrize("theta", [1.0000001, 2.0, 1e20])
@pytest.mark.parametrize("number", [1e-9, 1.0, 1e9])
@pytest.mark.filterwarnings("error")
def test_the_ends_of_what_is_allowed(theta: float, number: float) -> None:
    for values in (
        {"rope_type": "linear", "factor": number},
        {**LLAMA3, "factor": number},
        {**LLAMA3, "low_freq_factor": number, "high_freq_factor": 1e9, "factor": number}
        if number < 1e9
        else LLAMA3,
        {**YARN, "factor": number, "beta_fast": number, "beta_slow": 1 / number},
        {**YARN, "factor": number, "mscale": number, "mscale_all_dim": 1 / number},
    ):
        for head_dim in (2, 1024):
            rope = read(values, head_dim, theta)
            assert np.isfinite(rope.inv_freq).all() and min(rope.inv_freq) > 0
