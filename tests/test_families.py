"""Every family, RoPE recipe and head layout: the oracle and the engine against transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import ARCHITECTURES, ROPE_SCALING
from engines import logits, open_engine
from hf_reference import Transformers
from oracle import Decoder, bf16
from reference import Rows

import swa

FLOAT32_TOLERANCE = 1e-4  # of the largest logit
PROMPT_LEN, N_TOKENS = 140, 152  # beyond the original context of the scaling recipes
ROWS = Rows((0, 13, 7, 20), (0, 3, 2, 0), (0, PROMPT_LEN, PROMPT_LEN - 5, N_TOKENS))
VARIANTS: tuple[dict[str, Any], ...] = (
    {"tied": True, "dtype": "BF16"},
    {"num_key_value_heads": 1, "dtype": "F16", "spelling": "v4"},
    {  # wider than the blocks in which products are taken
        "attention_bias": True,
        "mlp_bias": True,
        "shards": 3,
        "hidden_size": 400,
        "intermediate_size": 1030,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "head_dim": 64,
    },
    {
        "hidden_size": 90,
        "intermediate_size": 77,
        "num_attention_heads": 6,
        "head_dim": 24,
        "vocab_size": 301,
        "spelling": "v4",
    },
)


def case(family: str, rope: str, variant: int) -> Any:
    settings = {"rope": rope, "seed": variant, **VARIANTS[variant]}
    return pytest.param(family, settings, id=f"{family}-{rope}-{variant}")


# Each family meets every recipe and every variant; the pairing moves on from family to family.
CASES = [
    case(family, rope, (i + j) % len(VARIANTS))
    for i, family in enumerate(ARCHITECTURES)
    for j, rope in enumerate(ROPE_SCALING)
]
families = pytest.mark.parametrize("family, settings", CASES)


def ids(vocab_size: int = 258) -> list[int]:
    return np.random.default_rng(5).integers(0, vocab_size, N_TOKENS).tolist()


@functools.cache
def transformers_logits(folder: Path) -> np.ndarray:
    return Transformers(folder).logits(ids(), ROWS)


@functools.cache
def exact_logits(folder: Path) -> np.ndarray:
    return Decoder(folder).logits(ids(), ROWS)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest error in units of the largest logit."""
    return float(abs(actual - expected).max() / abs(expected).max())


@families
def test_the_oracle_is_right(tiny: Callable[..., Path], family: str, settings: Any) -> None:
    """Two implementations that share nothing but the mask: the truth of all other tests."""
    folder = tiny(family, **settings)
    assert relative_error(transformers_logits(folder), exact_logits(folder)) < 3e-5


@families
def test_float32(tiny: Callable[..., Path], family: str, settings: Any, tier: str) -> None:
    folder = tiny(family, **settings)
    actual = logits(open_engine(folder, tier=tier), ids(), ROWS)
    assert actual.dtype == np.float32
    assert relative_error(actual, transformers_logits(folder)) <= FLOAT32_TOLERANCE


@families
def test_bfloat16(tiny: Callable[..., Path], family: str, settings: Any, tier: str) -> None:
    """Within twice the error of a naive bf16 implementation, at its worst and on the whole."""
    folder = tiny(family, **settings)
    exact = exact_logits(folder)
    naive = Decoder(folder, bf16).logits(ids(), ROWS) - exact
    error = logits(open_engine(folder, dtype="bfloat16", tier=tier), ids(), ROWS) - exact
    assert abs(error).max() <= 2 * abs(naive).max()
    assert (error**2).mean() <= 4 * (naive**2).mean()


NATIVE = {
    "mistral": {"sliding_window": 9},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    "qwen3": {
        "use_sliding_window": True,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}


@pytest.mark.parametrize("family", NATIVE)
def test_windows_of_the_checkpoint(tiny: Callable[..., Path], family: str) -> None:
    """W keys, the query's own included: transformers' own masks decide, not ours."""
    folder = tiny(family, overrides=NATIVE[family])
    expected = Transformers(folder).own_logits(ids())
    if family == "mistral":  # no layer is left to choose: an error that says so
        with pytest.raises(swa.CheckpointError, match="sliding"):
            swa.load(folder, dtype="float32")
        rows = Rows.of(4, [], N_TOKENS, N_TOKENS, window=9)
        assert relative_error(Decoder(folder).logits(ids(), rows), expected) < 3e-5
        return
    model = swa.load(folder, dtype="float32", num_threads=1)
    actual = model.logits(ids())
    assert relative_error(actual, expected) <= FLOAT32_TOLERANCE
