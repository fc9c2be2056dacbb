"""Each kernel of each tier against float64, at sizes around the widths of vectors and panels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from checkpoint_files import from_bf16, round_bf16
from engines import THREADS
from oracle import rms_norm, silu

from swa import _core

EPSILON = 2.0**-24  # relative error of one float32 operation
SIZES = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def check_linear(x: np.ndarray, w: np.ndarray, dtype: str, tier: str) -> None:
    """Within the rigorous bound of a float32 sum of k products, doubled."""
    if dtype == "bfloat16":
        x, exact_w = round_bf16(x), round_bf16(w).astype(np.float64)
    else:
        exact_w = w.astype(np.float64)
    expected = x.astype(np.float64) @ exact_w.T
    bound = 2 * x.shape[1] * EPSILON * (abs(x.astype(np.float64)) @ abs(exact_w).T)
    actual = _core.linear(x, w, dtype=dtype, tier=tier)
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    assert (abs(actual - expected) <= bound).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
class TestLinear:
    def test_outputs(self, tier: str, dtype: str, size: int) -> None:
        check_linear(random(3, 40), random(size, 40, seed=1), dtype, tier)

    def test_inputs(self, tier: str, dtype: str, size: int) -> None:
        check_linear(random(3, size), random(33, size, seed=1), dtype, tier)

    def test_rows(self, tier: str, dtype: str, size: int) -> None:
        x, w = random(size, 40), random(33, 40, seed=1)
        check_linear(x, w, dtype, tier)
        together = _core.linear(x, w, dtype=dtype, tier=tier)
        alone = [_core.linear(row[None], w, dtype=dtype, tier=tier)[0] for row in x]
        assert np.array_equal(together, alone)  # a row's bits do not depend on its neighbours


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_beyond_one_block(tier: str, dtype: str) -> None:
    x, w = random(50, 1000), random(300, 1000, seed=1)
    check_linear(x, w, dtype, tier)
    expected = _core.linear(x, w, dtype=dtype, tier=tier)
    for n in THREADS:
        threaded = _core.linear(x, w, dtype=dtype, tier=tier, num_threads=n)
        assert np.array_equal(threaded, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_linear_keeps_bad_numbers_in_their_row(tier: str, dtype: str, bad: float) -> None:
    x, w = random(9, 40), random(33, 40, seed=1)
    expected = _core.linear(x, w, dtype=dtype, tier=tier)
    x[4, 17] = bad
    actual = _core.linear(x, w, dtype=dtype, tier=tier)
    clean = np.arange(9) != 4
    assert np.array_equal(actual[clean], expected[clean])
    assert not np.isfinite(actual[4]).any()


@pytest.mark.parametrize("size", [*SIZES, 576, 1023, 4096])
def test_rms_norm(tier: str, size: int) -> None:
    weight = 1 + random(size, seed=1)
    for magnitude in (1e-3, 1.0, 1e4):
        x = magnitude * random(5, size)
        expected = rms_norm(x.astype(np.float64), weight, 1e-5)
        actual = _core.rms_norm(x, weight, 1e-5, tier=tier)
        np.testing.assert_allclose(actual, expected, rtol=2e-6 if size < 1000 else 1e-5)


def test_rms_norm_of_nothing_and_of_nan(tier: str) -> None:
    x = np.zeros((3, 40), np.float32)
    x[1, 3] = np.nan
    actual = _core.rms_norm(x, np.ones(40, np.float32), 1e-5, tier=tier)
    assert (actual[[0, 2]] == 0).all() and np.isnan(actual[1]).all()


@pytest.mark.parametrize("size", SIZES)
def test_silu_mul_sizes(tier: str, size: int) -> None:
    gate, up = 5 * random(size), random(size, seed=1)
    expected = silu(gate.astype(np.float64)) * up
    np.testing.assert_allclose(_core.silu_mul(gate, up, tier=tier), expected, rtol=1e-6)


def test_silu_mul_range(tier: str) -> None:
    gate = np.concatenate([np.linspace(-80, 80, 40001), [0.0, -0.0, 1e-30, 3e38]])
    gate = gate.astype(np.float32)
    actual = _core.silu_mul(gate, np.ones_like(gate), tier=tier)
    expected = silu(gate.astype(np.float64))
    rounding = 1e-6 + 1e-7 * np.minimum(abs(gate), 100)  # float32 exponents of large arguments
    assert (abs(actual - expected) <= rounding * abs(expected) + 1e-30).all()
    wild = np.array([np.nan, np.inf, -1e30], np.float32)
    actual = _core.silu_mul(wild, np.ones_like(wild), tier=tier)
    assert np.isnan(actual[0]) and actual[1] == np.inf and abs(actual[2]) < 1e-6


def exact_nll(logits: np.ndarray, target: int) -> float:
    values = [float(x) for x in logits]
    top = max(values)
    return math.log(math.fsum(math.exp(x - top) for x in values)) + top - values[target]


VOCABULARY = 151_936  # qwen's


def vocabulary_rows() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(VOCABULARY)
    peaked = 3 * normal
    peaked[77_777] = 60
    return {
        "flat": np.zeros(VOCABULARY),
        "nearly flat": 1e-3 * normal,
        "typical": 3 * normal,
        "wide": 30 * normal,
        "peaked": peaked,
        "faint": np.where(np.arange(VOCABULARY) == 5, 0.0, -12 + 0.5 * normal),
        "shifted": 3 * normal + 1e4,
        "masked": np.where(np.arange(VOCABULARY) % 3 == 0, 2 * normal, -np.inf),
    }


@pytest.mark.parametrize("kind", list(vocabulary_rows()))
def test_log_prob(tier: str, kind: str) -> None:
    row = vocabulary_rows()[kind].astype(np.float32)
    targets = np.array([0, 5, 77_777 if kind != "masked" else 77_778, 151_935, int(row.argmax())])
    if kind == "masked":
        targets = targets // 3 * 3
    nll, greedy = _core.log_prob(np.tile(row, (len(targets), 1)), targets, tier=tier)
    assert nll.dtype == np.float64
    expected = [exact_nll(row, int(t)) for t in targets]
    np.testing.assert_allclose(nll, expected, rtol=2e-7, atol=5e-7)
    assert np.array_equal(greedy, targets == row.argmax())  # the first of equals


def test_log_prob_sizes_and_bad_logits(tier: str) -> None:
    for size in (*SIZES[1:], 1023, 1024, 1025, 2048, 2049):
        logits = 3 * random(4, size)
        targets = np.array([0, size - 1, size // 2, 1])
        nll, greedy = _core.log_prob(logits, targets, tier=tier)
        expected = [exact_nll(row, int(t)) for row, t in zip(logits, targets, strict=True)]
        np.testing.assert_allclose(nll, expected, rtol=5e-7, atol=5e-7)
        assert np.array_equal(greedy, logits.argmax(axis=1) == targets)
        logits[1, size // 3] = np.nan
        spoilt, greedy = _core.log_prob(logits, targets, tier=tier)
        assert np.isnan(spoilt[1]) and not greedy[1]
        assert np.array_equal(spoilt[[0, 2, 3]], nll[[0, 2, 3]])


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
def test_every_nan_stays_one(tier: str, bits: int) -> None:
    """Whatever else its bits hold."""
    nan = np.array([bits], np.uint32).view(np.float32)[0]
    logits = np.where(np.arange(8) == 3, nan, np.float32(0))[None]
    assert np.isnan(_core.log_prob(logits, np.array([1]), tier=tier)[0]).all()
    gate = np.array([0, nan, 0, 0], np.float32)
    expected = [False, True, False, False]
    assert np.isnan(_core.silu_mul(gate, np.ones(4, np.float32), tier=tier)).tolist() == expected
    q, v = np.ones((4, 1, 4), np.float32), np.ones((4, 1, 4), np.float32)
    k = np.where(np.arange(4)[:, None, None] == 1, nan, q).astype(np.float32)
    seen = np.isnan(_core.attention(q, k, v, 0, 0, 10, tier=tier)).all(axis=(1, 2))
    assert seen.tolist() == [False, True, True, True]


def test_bf16_round_trip() -> None:
    patterns = np.arange(65_536, dtype=np.uint16)
    back = _core.bf16_round_trip(patterns)
    nan = np.isnan(from_bf16(patterns))
    assert np.array_equal(back[~nan], patterns[~nan])
    assert np.isnan(from_bf16(back[nan])).all()
    assert np.array_equal(back[nan] & 0x8000, patterns[nan] & 0x8000)


def test_peaks(tier: str) -> None:
    assert _core.peak("f32", tier=tier, num_threads=1) > 0
    assert _core.peak("read", tier=tier, num_threads=2, n_bytes=1 << 20) > 0
    assert (_core.peak("bf16", tier=tier, num_threads=1) > 0) == ("bf16" in tier)
    with pytest.raises(ValueError, match="kind is 'f64'"):
        _core.peak("f64", tier=tier)
    with pytest.raises(ValueError, match="n_bytes"):
        _core.peak("read", tier=tier, n_bytes=0)


def test_timed_drivers_give_the_same(tier: str) -> None:
    x, w = random(300, 40), random(33, 40, seed=1)
    out, seconds = _core.linear(x, w, tier=tier, timed=True)
    assert np.array_equal(out, _core.linear(x, w, tier=tier)) and 0 < seconds < 10
    q = random(70, 2, 16)
    out, seconds = _core.attention(q, q, q, 9, 1, 70, tier=tier, timed=True)
    assert np.array_equal(out, _core.attention(q, q, q, 9, 1, 70, tier=tier)) and 0 < seconds < 10
