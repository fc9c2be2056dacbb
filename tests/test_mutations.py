"""The reference, wrong on purpose: each mistake must break the tolerance that the engine meets.

A tolerance that also accepts a wrong window, grouping or rotation would prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engines import logits, open_engine
from oracle import Decoder
from reference import Rows, visible
from test_families import FLOAT32_TOLERANCE, relative_error

L, PROMPT_LEN, N_TOKENS = 4, 120, 128
WINDOW, SINKS, TAIL = 10, 3, 6


class WiderWindow(Decoder):
    def visible(self, n_tokens: int, window: int, sinks: int, full_from: int) -> np.ndarray:
        return visible(n_tokens, window + 1 if window else 0, sinks, full_from)


class NarrowerWindow(Decoder):
    def visible(self, n_tokens: int, window: int, sinks: int, full_from: int) -> np.ndarray:
        return visible(n_tokens, window - 1 if window else 0, sinks, full_from)


class AnotherSink(Decoder):
    def visible(self, n_tokens: int, window: int, sinks: int, full_from: int) -> np.ndarray:
        return visible(n_tokens, window, sinks + 1, full_from)


class OneSinkLess(Decoder):
    def visible(self, n_tokens: int, window: int, sinks: int, full_from: int) -> np.ndarray:
        return visible(n_tokens, window, sinks - 1, full_from)


class ExemptARowTooEarly(Decoder):
    """Without a tail: the first answer row is off by one; with a tail: the tail is."""

    def visible(self, n_tokens: int, window: int, sinks: int, full_from: int) -> np.ndarray:
        return visible(n_tokens, window, sinks, full_from - 1)


class ExemptARowTooLate(Decoder):
    def visible(self, n_tokens: int, window: int, sinks: int, full_from: int) -> np.ndarray:
        return visible(n_tokens, window, sinks, full_from + 1)


class LaterQueries(Decoder):
    def query_positions(self, positions: np.ndarray) -> np.ndarray:
        return positions + 1


class InterleavedGroups(Decoder):
    def grouped(self, x: np.ndarray, n_heads: int) -> np.ndarray:
        return np.tile(x, (1, n_heads // x.shape[1], 1))


class InterleavedRotation(Decoder):
    """Q and K in the order of GGUF files: element i turns with its neighbour."""

    def rotate(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        *rest, d = x.shape
        halves = np.swapaxes(x.reshape(*rest, d // 2, 2), -1, -2).reshape(x.shape)
        return super().rotate(halves, positions)


MUTATIONS = [
    WiderWindow,
    NarrowerWindow,
    AnotherSink,
    OneSinkLess,
    ExemptARowTooEarly,
    ExemptARowTooLate,
    LaterQueries,
    InterleavedGroups,
    InterleavedRotation,
]


@pytest.fixture(params=[0, TAIL], ids=["no tail", "tail"])
def rows(request: pytest.FixtureRequest) -> Rows:
    return Rows.of(L, [1], PROMPT_LEN, N_TOKENS, window=WINDOW, sinks=SINKS, tail=request.param)


def error(folder: Path, reference: type[Decoder], rows: Rows) -> float:
    ids = np.random.default_rng(1).integers(0, 258, N_TOKENS).tolist()
    actual = logits(open_engine(folder), ids, rows)
    return relative_error(actual, reference(folder).logits(ids, rows))


def test_the_right_reference_is_met(tiny: Callable[..., Path], rows: Rows) -> None:
    assert error(tiny("llama"), Decoder, rows) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_one_is_not(tiny: Callable[..., Path], rows: Rows, mutation: type[Decoder]) -> None:
    assert error(tiny("llama"), mutation, rows) > 30 * FLOAT32_TOLERANCE
