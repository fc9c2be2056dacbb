"""What a model scores does not depend on the machine: bfloat16 in every tier against float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from engines import TIERS, open_engine, sweep
from oracle import Decoder, bf16
from reference import Rows, Sweep

L, PROMPT_LEN, N_TOKENS = 4, 96, 120
ROWS = Rows.of(L, (), PROMPT_LEN, N_TOKENS, window=12, sinks=3)

Scores = dict[str, np.ndarray]


def ids() -> list[int]:
    return np.random.default_rng(3).integers(0, 258, N_TOKENS).tolist()


def scores(of: Sweep) -> Scores:
    """float64 in nats: NLLs [1 + L, A] of all runs, and what each layer restored takes [L, A]."""
    return {"nll": np.vstack([of.base_nll, of.run_nll]), "delta": of.base_nll - of.run_nll}


@functools.cache
def exact(folder: Path) -> Scores:
    return scores(Decoder(folder).sweep(ids(), PROMPT_LEN, ROWS, [0] * L))


@functools.cache
def naive(folder: Path) -> Scores:
    return scores(Decoder(folder, bf16).sweep(ids(), PROMPT_LEN, ROWS, [0] * L))


@functools.cache
def engine(folder: Path, tier: str) -> Scores:
    of = open_engine(folder, dtype="bfloat16", tier=tier)
    return scores(sweep(of, ids(), PROMPT_LEN, ROWS, [0] * L))


@pytest.fixture(params=["llama", "qwen3"])
def folder(request: pytest.FixtureRequest, tiny: Callable[..., Path]) -> Path:
    return tiny(request.param, num_hidden_layers=L)


def check(actual: Scores, expected: Scores, folder: Path) -> None:
    """Within twice the error of a naive bf16 implementation, at its worst and on the whole."""
    for what in ("nll", "delta"):
        allowed = naive(folder)[what] - exact(folder)[what]
        error = actual[what] - expected[what]
        assert abs(error).max() <= 2 * abs(allowed).max(), what
        assert (error**2).mean() <= 4 * (allowed**2).mean(), what
        # The bound can tell scores from none: it is far below them.
        assert (allowed**2).mean() < 0.01 * (expected[what] ** 2).mean(), what


def test_scores_are_right(folder: Path, tier: str) -> None:
    check(engine(folder, tier), exact(folder), folder)


@pytest.mark.parametrize("one, other", [*combinations(TIERS, 2)])
def test_tiers_agree(folder: Path, one: str, other: str) -> None:
    check(engine(folder, one), engine(folder, other), folder)
