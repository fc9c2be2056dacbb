"""Attention of every tier against the float64 oracle: windows, sinks, exempt rows at all edges."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from checkpoint_files import round_bf16
from engines import THREADS
from oracle import attention, bf16
from reference import visible

from swa import _core

Inputs = tuple[np.ndarray, np.ndarray, np.ndarray]
Mask = tuple[int, int, int]  # window, sinks, full_from
DTYPES = ("float32", "bfloat16")


def inputs(
    n_tokens: int, heads: int = 2, kv_heads: int = 1, head_dim: int = 16, seed: int = 0
) -> Inputs:
    """q, k, v that bfloat16 holds exactly; scores have a standard deviation of 4."""
    rng = np.random.default_rng([seed, n_tokens, heads, kv_heads, head_dim])
    shapes = [(n_tokens, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (round_bf16(rng.standard_normal(shape)) for shape in shapes)
    return 2 * q, 2 * k, v


def run(
    qkv: Inputs,
    window: int,
    sinks: int,
    full_from: int,
    tier: str,
    dtype: str = "float32",
    num_threads: int = 1,
) -> np.ndarray:
    return _core.attention(
        *qkv, window, sinks, full_from, dtype=dtype, tier=tier, num_threads=num_threads
    )


@functools.cache
def truth(shape: tuple[int, ...], mask: Mask) -> tuple[np.ndarray, float]:
    """The exact attention of `inputs(*shape)`, and the error of a naive bf16 implementation."""
    qkv, seen = inputs(*shape), visible(shape[0], *mask)
    exact = attention(*qkv, seen)
    naive = bf16(attention(*qkv, seen, bf16))
    return exact, abs(naive - exact).max()


def check(shape: tuple[int, ...], mask: Mask, tier: str) -> None:
    """float32 nearly exact; bf16 within twice the error of the naive implementation."""
    qkv, (exact, naive_error) = inputs(*shape), truth(shape, mask)
    rounding = 5e-6 * abs(qkv[2]).max()
    actual = run(qkv, *mask, tier)
    assert actual.dtype == np.float32 and actual.shape == exact.shape
    assert abs(actual - exact).max() <= rounding
    assert abs(run(qkv, *mask, tier, "bfloat16") - exact).max() <= 2 * naive_error + rounding


@pytest.mark.parametrize("n_tokens", [1, 2, 5, 63, 64, 65, 130])
def test_edges(tier: str, n_tokens: int) -> None:
    """T < W, T = W, T > W, W = 1, full; no, few, many sinks; exempt rows none, all, one, some."""
    t = n_tokens
    windows = {0, 1, 2, 7, max(1, t - 1), t, t + 1, 64}
    sinks = {0, 1, 4, t, t + 3}
    exempt = {0, 1, t // 2, t - 1, t, t + 5}
    for case in itertools.product(sorted(windows), sorted(sinks), sorted(exempt)):
        check((n_tokens,), case, tier)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 3), (4, 2), (6, 2), (9, 3), (5, 1)])
def test_grouped_queries(tier: str, heads: int, kv_heads: int) -> None:
    check((77, heads, kv_heads), (20, 3, 70), tier)


@pytest.mark.parametrize("head_dim", [2, 16, 24, 32, 40, 64, 80, 96, 128, 256])
def test_head_dims(tier: str, head_dim: int) -> None:
    check((101, 4, 2, head_dim), (33, 2, 95), tier)


@pytest.mark.parametrize("dtype", DTYPES)
class TestBitwise:
    def test_threads(self, tier: str, dtype: str) -> None:
        qkv = inputs(333, 6, 2, 32)
        expected = run(qkv, 50, 4, 320, tier, dtype)
        for n in THREADS:
            assert np.array_equal(run(qkv, 50, 4, 320, tier, dtype, num_threads=n), expected)

    def test_a_row_does_not_know_what_follows(self, tier: str, dtype: str) -> None:
        qkv = inputs(300, 4, 2, 24)
        for window, sinks, full_from in ((0, 0, 0), (50, 4, 300), (50, 4, 111)):
            whole = run(qkv, window, sinks, full_from, tier, dtype)
            for t in (1, 2, 47, 48, 49, 63, 64, 65, 111, 113, 257, 299):
                prefix = tuple(x[:t] for x in qkv)
                assert np.array_equal(run(prefix, window, sinks, full_from, tier, dtype), whole[:t])

    def test_rows_that_see_every_key_are_full(self, tier: str, dtype: str) -> None:
        qkv = inputs(300, 4, 2, 24)
        full = run(qkv, 0, 0, 0, tier, dtype)
        for window, sinks, full_from in ((50, 4, 300), (1, 64, 250), (130, 0, 131), (7, 7, 64)):
            hybrid = run(qkv, window, sinks, full_from, tier, dtype)
            same = np.arange(300) < window + sinks
            same[full_from:] = True
            assert np.array_equal(hybrid[same], full[same])
            assert not (hybrid[~same] == full[~same]).all(axis=(1, 2)).any()

    def test_inputs_are_not_modified(self, tier: str, dtype: str) -> None:
        qkv = inputs(70)
        copies = [x.copy() for x in qkv]
        run(qkv, 9, 1, 60, tier, dtype)
        assert all(np.array_equal(x, y) for x, y in zip(qkv, copies, strict=True))


MASKS = [(0, 0, 0), (10, 0, 200), (10, 0, 170), (3, 75, 170), (10, 2, 200)]
POSITIONS = (0, 1, 60, 63, 64, 70, 150, 199)  # the first key, a sink, tile edges, the last row


@functools.cache
def spoilt(which: int, at: int, value: float, mask: Mask) -> tuple[Inputs, np.ndarray]:
    """Inputs with one element of q, k or v of the last head bad at position `at`; the truth."""
    qkv = inputs(200, 4, 2)
    qkv[which][at, -1, 3] = value
    return qkv, attention(*qkv, visible(200, *mask))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS, ids=str)
class TestNotFinite:
    def check(self, which: int, value: float, mask: Mask, tier: str, dtype: str) -> None:
        untouched = run(inputs(200, 4, 2), *mask, tier, dtype)
        seen = visible(200, *mask)
        for at in POSITIONS:
            qkv, expected = spoilt(which, at, value, mask)
            actual = run(qkv, *mask, tier, dtype)
            for kind in (np.isnan, np.isposinf, np.isneginf):
                assert np.array_equal(kind(actual), kind(expected)), (at, kind)
            blind = ~seen[:, at] if which else np.arange(200) != at
            assert np.array_equal(actual[blind], untouched[blind])
            finite = np.isfinite(expected)
            np.testing.assert_allclose(actual[finite], expected[finite], atol=0.05, rtol=0)

    def test_nan_query(self, tier: str, dtype: str, mask: Mask) -> None:
        self.check(0, np.nan, mask, tier, dtype)

    def test_nan_key(self, tier: str, dtype: str, mask: Mask) -> None:
        self.check(1, np.nan, mask, tier, dtype)

    def test_nan_value(self, tier: str, dtype: str, mask: Mask) -> None:
        self.check(2, np.nan, mask, tier, dtype)

    def test_infinite_query(self, tier: str, dtype: str, mask: Mask) -> None:
        self.check(0, np.inf, mask, tier, dtype)

    def test_infinite_key(self, tier: str, dtype: str, mask: Mask) -> None:
        self.check(1, -np.inf, mask, tier, dtype)

    def test_infinite_value(self, tier: str, dtype: str, mask: Mask) -> None:
        self.check(2, np.inf, mask, tier, dtype)
        self.check(2, -np.inf, mask, tier, dtype)


@pytest.mark.parametrize("near_first", [True, False])
def test_far_faint_keys(tier: str, near_first: bool) -> None:
    """32k keys 10 to 14 below the maximum hold a quarter of the mass: none of it may get lost."""
    n_tokens, head_dim = 32_800, 16
    rng = np.random.default_rng(0)
    q = np.zeros((n_tokens, 1, head_dim), np.float32)
    k, v = np.zeros_like(q), rng.standard_normal(q.shape).astype(np.float32) + 1
    q[-1, 0, 0] = np.sqrt(head_dim)
    k[:, 0, 0] = rng.uniform(-14, -10, n_tokens)
    k[0 if near_first else -1] = 0
    v[k[:, 0, 0] == 0] = -1
    qkv = round_bf16(q), round_bf16(k), round_bf16(v)
    mask = np.ones((1, n_tokens), dtype=bool)
    last = qkv[0][-1:], qkv[1], qkv[2]
    expected = attention(*last, mask)
    assert (expected > -0.8).all()  # the faint keys matter
    actual = run(qkv, 1, 0, n_tokens - 1, tier)[-1:]
    assert abs(actual - expected).max() <= 1e-5
    naive_error = abs(bf16(attention(*last, mask, bf16)) - expected).max()
    actual = run(qkv, 1, 0, n_tokens - 1, tier, "bfloat16")[-1:]
    assert abs(actual - expected).max() <= 2 * naive_error + 1e-5


@pytest.mark.parametrize("score", [1e3, 1e5, -1e5])
def test_extreme_scores(tier: str, score: float) -> None:
    """Softmax is shifted by its maximum: nothing overflows, and one key takes all."""
    qkv = inputs(150)
    q, k, v = (x.copy() for x in qkv)
    q[:, :, 0], k[:, :, 0] = 4.0, 0.0
    k[20, :, 0] = score  # a power of 2 apart, q k / sqrt(d) = score
    actual = run((q, k, v), 0, 0, 0, tier)
    assert np.isfinite(actual).all()
    expected = attention(q, k, v, visible(150, 0, 0, 0))
    np.testing.assert_allclose(actual, expected, atol=1e-5 * max(1.0, abs(v).max()))
