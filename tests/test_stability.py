"""Stability, rank agreement and the noise floor: against counting, and where the truth is known."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, make_examples
from matplotlib.figure import Figure

from swa.budget import Budget
from swa.errors import InputError
from swa.layer_scores import LayerScores
from swa.noise import measure_noise_floor
from swa.policy import AttentionPolicy
from swa.score import score_layers
from swa.stability import (
    rank_agreement,
    reliability,
    selection_stability,
    spearman,
)

POLICY = AttentionPolicy(sliding_window=8)
TOP2 = Budget(full_attention_layers=2)


@cache
def some_scores(num_layers: int) -> LayerScores:
    return score_layers(FakeModel(num_layers), make_examples(1), POLICY)


def with_table(table: Any) -> LayerScores:
    """Scores of these deltas, [N][L], all of one task."""
    rows = tuple(tuple(map(float, row)) for row in table)
    nll = (1.0,) * len(rows)
    return dataclasses.replace(
        some_scores(len(rows[0])),
        delta_per_example=rows,
        tasks=("one",) * len(rows),
        nll_base=nll,
        nll_full=nll,
        nll_swa=nll,
    )


def noisy(deltas: list[float], spread: float, count: int, seed: int = 0) -> LayerScores:
    table = np.random.default_rng(seed).normal(deltas, spread, (count, len(deltas)))
    return with_table(table)


# ---- selection under resampling


def test_frequencies_are_those_of_a_bootstrap_written_apart() -> None:
    scores = noisy([0.3, 0.2, 0.19, 0.0, 0.18], 0.1, 12)
    found = selection_stability(scores, TOP2, n_bootstrap=20_000)
    table = np.array(scores.delta_per_example, dtype=float)
    generator = np.random.default_rng(9)
    counts = np.zeros(5)
    for _ in range(20_000):
        means = table[generator.integers(0, 12, 11)].mean(axis=0)
        counts[np.argsort(-means)[:2]] += 1
    np.testing.assert_allclose(np.array(found.frequency, float), counts / 20_000, atol=0.015)
    assert sum(share or 0 for share in found.frequency) == pytest.approx(2)
    assert found.overlap == pytest.approx(sum(found.frequency[i] or 0 for i in found.layers))


def test_clear_scores_are_stable_and_equal_ones_are_not() -> None:
    clear = selection_stability(noisy([5.0, 0.0, 4.0, 1.0], 0.01, 8), TOP2)
    assert clear.frequency == (1, 0, 1, 0) and clear.overlap == 2 and clear.doubtful == ()
    assert clear.spearman == (1, 1, 1)
    equal = selection_stability(noisy([0.0] * 12, 1.0, 8), TOP2)
    assert equal.overlap < 1.7 and len(equal.doubtful) > 3
    assert "next in line" in repr(equal) and "next in line" not in repr(clear)


def test_layers_of_the_base_stay_and_others_have_no_frequency() -> None:
    scores = score_layers(FakeModel(native=(1,)), make_examples(6), POLICY, base=[3])
    found = selection_stability(scores, TOP2)
    assert found.frequency[3] == 1 and found.frequency[1] is None
    assert 3 in found.layers
    assert json.loads(json.dumps(found.to_dict()))["frequency"] == list(found.frequency)


def test_ties_are_broken_as_select_does() -> None:
    found = selection_stability(with_table([[1.0, 1.0, 1.0]] * 4), TOP2)
    assert found.layers == (0, 1) and found.frequency == (1, 1, 0)
    assert found.spearman is None


def test_stability_needs_two_examples_and_a_budget_that_fits() -> None:
    with pytest.raises(InputError, match="one example"):
        selection_stability(with_table([[1.0, 2.0, 3.0]]), TOP2)
    with pytest.raises(InputError, match="4 full-attention layers"):
        selection_stability(noisy([1.0, 2.0, 3.0], 1, 5), Budget(full_attention_layers=4))


def test_stability_is_seeded_and_drawn() -> None:
    scores = noisy([0.3, 0.2, 0.19, 0.0, 0.18], 0.1, 12)
    first, again, other = (selection_stability(scores, TOP2, seed=s) for s in (1, 1, 2))
    assert first == again != other
    axes = first.plot(Figure().add_subplot())
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([100 * (share or 0) for share in first.frequency])


# ---- ranks


def test_spearman_by_hand() -> None:
    assert spearman([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 99.0]) == 1
    assert spearman([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]) == -1
    # Ranks 0, 1.5, 1.5, 3 against 0, 2, 1, 3: covariance 4.5, variances 4.5 and 5.
    assert spearman([1.0, 2.0, 2.0, 3.0], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(
        4.5 / (4.5 * 5) ** 0.5
    )
    assert spearman([1.0, 1.0], [1.0, 2.0]) is None


def test_one_thing_measured_twice_agrees_but_for_chance() -> None:
    deltas = [i / 10 for i in range(20)]
    found = [
        rank_agreement(noisy(deltas, 1.0, 16, seed), noisy(deltas, 1.0, 16, 100 + seed), TOP2)
        for seed in range(12)
    ]
    correlations = np.mean([f.spearman or 0 for f in found])
    assert 0.75 < correlations < 0.95
    assert np.mean([f.corrected or 0 for f in found]) > 0.95


def test_chance_that_both_share_does_not_count() -> None:
    """The same examples under two conditions that rank the layers differently."""
    rng = np.random.default_rng(0)
    one, other = rng.permutation(20) / 10.0, rng.permutation(20) / 10.0
    truth, found = spearman(one, other), []
    for _ in range(12):
        noise = rng.normal(size=(16, 20)) * 2
        pair = (with_table((deltas + noise).tolist()) for deltas in (one, other))
        found.append(rank_agreement(*pair, TOP2))
    assert truth is not None
    assert np.mean([f.spearman or 0 for f in found]) > truth + 0.15
    assert np.mean([f.corrected or 0 for f in found]) == pytest.approx(truth, abs=0.1)
    same = with_table((one + rng.normal(size=(16, 20))).tolist())
    agreement = rank_agreement(same, same, TOP2)
    assert agreement.spearman == 1
    assert agreement.corrected == pytest.approx(1, abs=0.1)


def test_agreement_counts_what_is_shared() -> None:
    first = with_table([[0.4, 0.3, 0.2, 0.1]] * 2)
    second = with_table([[0.2, 0.8, 0.6, 0.4]] * 2)
    found = rank_agreement(first, second, TOP2)
    assert (found.overlap, found.size, found.ratio) == (1, 2, pytest.approx(2.0))
    assert found.spearman == pytest.approx(spearman([4, 3, 2, 1], [1, 4, 3, 2]))
    assert found.corrected is None  # two examples have no halves
    assert "1 of 2 top layers" in repr(found)


def test_the_correction_is_of_the_layers_compared() -> None:
    """Clear layers that only one of the two scores say nothing about the others."""
    deltas = [3.0, 2.0, 1.0, *(0.0,) * 9]
    first, other = noisy(deltas, 1.0, 24), noisy(deltas, 1.0, 24, 1)
    rows = tuple((None, None, None, *row[3:]) for row in other.delta_per_example)
    second = dataclasses.replace(other, base=(0, 1, 2), delta_per_example=rows)
    found = rank_agreement(first, second, Budget(full_attention_layers=6))
    assert (found.corrected or 0) < 0.3 < 0.6 < (rank_agreement(first, other, TOP2).corrected or 0)
    with pytest.raises(InputError, match="seed must be"):
        rank_agreement(first, second, TOP2, seed=-1)


def test_nothing_to_compare_is_refused() -> None:
    four, five = with_table([[1.0] * 4] * 2), with_table([[1.0] * 5] * 2)
    with pytest.raises(InputError, match="4 and 5 layers"):
        rank_agreement(four, five, TOP2)
    low = score_layers(FakeModel(), make_examples(2), POLICY, direction="ablate", base=[0, 1])
    high = score_layers(FakeModel(), make_examples(2), POLICY, base=[0, 1])
    with pytest.raises(InputError, match="no layer in common"):
        rank_agreement(low, high, TOP2)


def test_noise_has_no_reliability() -> None:
    assert reliability(noisy([float(i) for i in range(9)], 0.1, 8)) == pytest.approx(1, abs=0.02)
    assert (reliability(noisy([0.0] * 30, 1.0, 8)) or 0) < 0.5
    assert reliability(noisy([0.0, 1.0], 1.0, 3)) is None
    assert reliability(with_table([[1.0, 1.0]] * 6)) is None


# ---- the noise floor


class RoundedModel(FakeModel):
    """Errors of 0.01 in the runs that have layer 2 full alone."""

    def per_token(self, example: Any, full_layers: Any) -> Any:
        nll = super().per_token(example, full_layers)
        return nll + 0.01 if set(full_layers) == {2} else nll


def float32() -> FakeModel:
    model = FakeModel()
    model.dtype = "float32"
    return model


def test_the_floor_is_the_rms_of_what_rounding_did() -> None:
    examples = make_examples(9)
    scores = score_layers(RoundedModel(), examples, POLICY)
    reference = float32()
    floor = measure_noise_floor(scores, examples, reference, n_examples=4)
    assert floor == pytest.approx(0.01 / 5**0.5 / 9**0.5)
    assert reference.sweeps == [examples[i] for i in (0, 2, 4, 6)]
    everything = measure_noise_floor(scores, examples, float32(), n_examples=99, progress=True)
    assert everything == pytest.approx(floor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, "with a model in bfloat16"),
        ({"fingerprint": "0" * 64}, "has other weights"),
        ({"examples": make_examples(3)[::-1]}, "not the examples that were scored"),
        ({"n_examples": 0}, "n_examples must be"),
    ],
)
def test_a_floor_of_other_things_is_refused(change: dict[str, Any], message: str) -> None:
    scores, reference = score_layers(FakeModel(), make_examples(3), POLICY), float32()
    for name in ("dtype", "fingerprint"):
        setattr(reference, name, change.pop(name, getattr(reference, name)))
    with pytest.raises(InputError, match=message):
        measure_noise_floor(
            scores, **({"examples": make_examples(3), "reference": reference} | change)
        )
    assert reference.sweeps == []


def test_layers_within_rounding_are_marked_everywhere() -> None:
    scores = with_table([[0.5, 0.019, -0.019, 0.021]] * 5)
    assert scores.below_noise == () and scores.noise_band is None and "~" not in repr(scores)
    known = dataclasses.replace(scores, noise_floor=0.01)
    assert known.below_noise == (1, 2)
    assert "marked ~): layers 1, 2" in repr(known)
    assert [line for line in repr(known).splitlines() if "~+0.01900" in line]
    axes = known.plot(Figure().add_subplot())
    filled = [bar.get_facecolor()[3] > 0 for bar in axes.containers[0]]
    assert filled == [True, False, False, True]
    assert len(axes.patches) == 4 + 1  # and the band
