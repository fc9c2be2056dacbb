"""Resampling: coverage of its intervals, pairing, strata; what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa.errors import InputError
from swa.resampling import resampled_means, standard_errors, strata_of, student_tail
from swa.statistics import gap_closed_bootstrap, paired_bootstrap

# ---- intervals


def coverage(draw: Any, truth: float, *, tasks: Any = None, runs: int = 400) -> tuple[float, float]:
    """How often the 95% interval holds the truth, and how often the plain percentile one does."""
    hits = np.zeros(2)
    for seed in range(runs):
        values = draw(np.random.default_rng(seed))
        found = paired_bootstrap(
            values, np.zeros(len(values)), tasks=tasks, n_bootstrap=500, seed=seed
        )
        picks = np.random.default_rng(seed).integers(0, len(values), (500, len(values)))
        plain = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
        hits += [low <= truth <= high for low, high in (found.interval, plain)]
    return tuple(hits / runs)


def test_sums_that_cancel_are_no_evidence() -> None:
    """Of answers right or wrong, resamples often differ by just 0: exactly, as in integers."""
    rng = np.random.default_rng(0)
    tasks = [f"t{i}" for i in range(11) for _ in range(8)]
    strata, on_zero = strata_of(tasks), 0
    for _ in range(40):
        differences = rng.choice([-1.0, 0.0, 1.0], size=88, p=[0.02, 0.90, 0.08])
        found = paired_bootstrap(
            differences, np.zeros(88), tasks=tasks, higher_is_better=True, n_bootstrap=500
        )
        whole = np.rint(
            88 * 7 / 8 * resampled_means(differences[:, None], strata, n_bootstrap=500, seed=0)
        )
        assert found.probability == (whole > 0).mean() + (whole == 0).mean() / 2
        assert found.interval is not None
        on_zero += found.interval[0] == 0
        assert found.interval[0] <= 0 or found.interval[0] > 1e-4
    assert on_zero > 2


def test_intervals_of_few_examples_cover_as_often_as_they_say() -> None:
    """The reason for not taking the textbook's percentiles."""
    ours, plain = coverage(lambda rng: rng.normal(0.3, 1, 8), 0.3)
    assert ours > 0.92 > 0.90 > plain
    ours, plain = coverage(lambda rng: rng.exponential(1, 12), 1.0)
    assert ours > plain + 0.02


def test_intervals_within_tasks_cover_and_are_narrower() -> None:
    tasks = ("a", "b", "c") * 6

    def draw(rng: Any) -> Any:
        return rng.normal(np.tile([0.0, 3.0, -3.0], 6), np.tile([0.1, 0.2, 1.0], 6))

    ours, _ = coverage(draw, 0.0, tasks=tasks)
    assert 0.91 < ours < 0.99
    values = draw(np.random.default_rng(0))
    (low, high), (wide_low, wide_high) = (
        paired_bootstrap(values, np.zeros(18), tasks=given).interval or (0, 0)
        for given in (tasks, None)
    )
    assert high - low < (wide_high - wide_low) / 3


@pytest.mark.parametrize(
    ("freedom", "point"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (7, 2.36462), (30, 2.04227)]
)
def test_tails_are_at_the_published_points_of_student(freedom: int, point: float) -> None:
    """Published: two-sided 5% points of Student's t."""
    expected = math.erfc(point / math.sqrt(2)) / 2
    assert student_tail(0.025, freedom) == pytest.approx(expected, rel=2e-4)


def test_many_degrees_of_freedom_are_normal() -> None:
    assert student_tail(0.025, 10**9) == pytest.approx(0.025, rel=0.02)


# ---- resampling


def test_the_spread_of_resampled_means_is_the_standard_error() -> None:
    values = np.random.default_rng(1).normal(0, [1, 5], (9, 2))
    strata = strata_of(("a", "b", "b") * 3)
    means = resampled_means(values, strata, n_bootstrap=40_000, seed=0)
    np.testing.assert_allclose(means.std(axis=0), standard_errors(values, strata), rtol=0.02)
    np.testing.assert_allclose(means.mean(axis=0), values.mean(axis=0), atol=0.05)


@pytest.mark.parametrize(
    ("tasks", "strata"),
    [
        (("a", "a", "a"), {(0, 1, 2)}),
        (("a", "b", "a", "b"), {(0, 2), (1, 3)}),
        (("a", "b", "c"), {(0, 1, 2)}),
        (("a", "b", "c", "c"), {(0, 1), (2, 3)}),
        (("a", "b", "b", "c", "c", "c"), {(0, 1, 2), (3, 4, 5)}),
        (("a",), {(0,)}),
    ],
)
def test_tasks_of_one_example_are_taken_together(tasks: Any, strata: Any) -> None:
    assert set(strata_of(tasks)) == strata


@given(st.lists(st.sampled_from("abcde"), min_size=2))
def test_strata_hold_every_example_once_and_never_one_alone(tasks: list[str]) -> None:
    strata = strata_of(tasks)
    assert sorted(i for members in strata for i in members) == list(range(len(tasks)))
    assert all(len(members) > 1 for members in strata)


# ---- two strategies


def test_pairs_cancel_what_examples_share() -> None:
    """Two strategies 0.1 apart on examples that differ by far more."""
    rng = np.random.default_rng(0)
    shared = rng.normal(2, 3, 16)
    result = paired_bootstrap(shared - 0.1 + rng.normal(0, 0.02, 16), shared)
    assert result.difference == pytest.approx(-0.1, abs=0.02)
    assert result.excludes_zero and result.probability == 1
    low, high = result.interval or (0, 0)
    assert low < result.difference < high < -0.05


def test_sides_and_directions_mirror() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(0, 1, (2, 12))
    one, other = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert one.difference == -other.difference
    assert one.probability == pytest.approx(1 - (other.probability or 0))
    scores = paired_bootstrap(a, b, higher_is_better=True)
    assert scores.interval == one.interval
    assert scores.probability == pytest.approx(1 - (one.probability or 0))


def test_equal_strategies_are_a_coin_toss() -> None:
    result = paired_bootstrap([1.0, 2.0, 5.0, 3.0, 4.0], [1.0, 2.0, 5.0, 3.0, 4.0])
    assert result.interval == (0, 0) and result.probability == 0.5
    assert not result.excludes_zero


def test_few_examples_are_not_trusted() -> None:
    few = paired_bootstrap([1.0, 1.1, 0.9, 1.0], [2.0] * 4)
    assert not few.is_trusted and not few.excludes_zero and "too few" in repr(few)
    tasks = ("x",) * 3 + ("y",) * 4
    wild = paired_bootstrap([1.0] * 3 + [1.0, 2.0, -5.0, 9.0], [2.0] * 7, tasks=tasks)
    assert wild.freedom == 3 and not wild.is_trusted
    enough = paired_bootstrap([1.0, 1.1, 0.9, 1.0, 1.0], [2.0] * 5)
    assert enough.is_trusted and enough.excludes_zero and "too few" not in repr(enough)
    one = paired_bootstrap([1.0], [2.0])
    assert one.interval is one.probability is None and "no interval" in repr(one)
    assert one.to_dict()["excludes_zero"] is False


def test_a_wider_confidence_is_a_wider_interval_and_a_seed_repeats() -> None:
    a = np.random.default_rng(0).normal(0, 1, 20)
    b = np.zeros(20)
    narrow, wide = (paired_bootstrap(a, b, confidence=c).interval or (0, 0) for c in (0.8, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    assert paired_bootstrap(a, b, seed=1) == paired_bootstrap(a, b, seed=1)
    assert paired_bootstrap(a, b, seed=1) != paired_bootstrap(a, b, seed=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": [1.0]}, "there are 3 examples, but b has 1"),
        ({"tasks": ["x"]}, "but tasks has 1"),
        ({"a": []}, "a must be one finite number"),
        ({"a": [[1.0]] * 3}, "a must be one finite number"),
        ({"a": [1.0, math.nan, 2.0]}, "a must be one finite number"),
        ({"a": ["x", "y", "z"]}, "a must be one number"),
        ({"n_bootstrap": 0}, "n_bootstrap must be"),
        ({"n_bootstrap": 10**9}, "n_bootstrap must be"),
        ({"seed": -1}, "seed must be"),
        ({"confidence": 1.0}, "confidence must be"),
        ({"confidence": 95}, "confidence must be"),
        ({"confidence": math.nan}, "confidence must be"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"a": [1.0, 2.0, 3.0], "b": [1.0, 1.0, 1.0]} | change
    with pytest.raises(InputError, match=message):
        paired_bootstrap(**arguments)


# ---- shares of a gap


def test_the_share_of_a_gap_and_its_interval() -> None:
    rng = np.random.default_rng(0)
    full = rng.normal(1, 0.3, 40)
    sliding = full + rng.normal(2, 0.2, 40)
    nll = sliding - 0.7 * (sliding - full) + rng.normal(0, 0.1, 40)
    found = gap_closed_bootstrap(nll, full=full, sliding=sliding)
    assert found.share == pytest.approx((sliding - nll).mean() / (sliding - full).mean())
    low, high = found.interval or (0, 0)
    assert low < 0.7 < high and high - low == pytest.approx(4 * 0.1 / 2 / 40**0.5, rel=0.3)


def test_a_share_covers_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        gap = rng.normal(2, 0.5, 10)
        nll = 5 - gap * 0.6 + rng.normal(0, 0.4, 10)
        found = gap_closed_bootstrap(
            nll, full=5 - gap, sliding=np.full(10, 5.0), n_bootstrap=500, seed=seed
        )
        low, high = found.interval or (0, 0)
        hits += low <= 0.6 <= high
    assert 0.9 < hits / 200 < 0.99


def test_no_gap_and_few_examples_have_no_interval() -> None:
    none = gap_closed_bootstrap([1.0] * 6, full=[1.0] * 6, sliding=[1.0] * 6)
    assert none.share is none.interval is None and "no gap" in repr(none)
    few = gap_closed_bootstrap([1.0, 2.0], full=[1.0, 1.0], sliding=[3.0, 3.0])
    assert few.share == 0.75 and few.interval is None
    one = gap_closed_bootstrap([1.0], full=[1.0], sliding=[3.0])
    assert one.share == 1 and one.interval is None
    shaky = gap_closed_bootstrap(
        [0.0] * 6, full=[0.0] * 6, sliding=[-1.0, 9.0, -1.0, -1.0, 0.0, 0.0]
    )
    assert shaky.share is not None and shaky.interval is None
    with pytest.raises(InputError, match="but sliding has 2"):
        gap_closed_bootstrap([1.0], full=[1.0], sliding=[3.0, 2.0])
