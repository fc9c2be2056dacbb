"""swa.testing: what passes, what fails and what the failure says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from fake_model import FakeModel, make_examples

from swa import testing
from swa.budget import Budget
from swa.errors import ScoresError
from swa.layer_scores import LayerScores
from swa.policy import AttentionPolicy
from swa.score import score_layers
from swa.selection import Selection, select

POLICY = AttentionPolicy(sliding_window=8)


@pytest.fixture
def scores() -> LayerScores:
    return score_layers(FakeModel(), make_examples(2), POLICY)


@pytest.fixture(autouse=True)
def _no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(testing.UPDATE_VARIABLE, raising=False)


def moved(scores: LayerScores, shift: dict[int, float], **changes: Any) -> LayerScores:
    """The same scores with some layers' deltas shifted."""
    table = tuple(
        tuple(None if v is None else v + shift.get(i, 0.0) for i, v in enumerate(row))
        for row in scores.delta_per_example
    )
    return dataclasses.replace(scores, delta_per_example=table, **changes)


# ---- the noise floor


def test_noise_floor_is_the_rms_over_layers_and_examples(scores: LayerScores) -> None:
    noisy = moved(scores, {0: 0.03, 3: -0.04}, dtype="bfloat16")
    reference = dataclasses.replace(scores, dtype="float32")
    expected = ((0.03**2 + 0.04**2) / 5 / len(scores.tasks)) ** 0.5
    assert testing.noise_floor(noisy, reference) == pytest.approx(expected)
    assert testing.noise_floor(scores, reference) == 0


def test_noise_that_cancels_in_the_mean_is_still_noise(scores: LayerScores) -> None:
    signs = (1, -1) * (len(scores.tasks) // 2)
    table = tuple(
        tuple(None if v is None else v + sign * 0.01 for v in row)
        for sign, row in zip(signs, scores.delta_per_example, strict=True)
    )
    noisy = dataclasses.replace(scores, delta_per_example=table)
    assert noisy.delta == pytest.approx(scores.delta)
    assert testing.noise_floor(noisy, scores) == pytest.approx(0.01 / len(signs) ** 0.5)


@pytest.mark.parametrize(
    "change",
    [
        {"model_fingerprint": "0" * 64},
        {"examples_hash": "0" * 64},
        {"policy": AttentionPolicy(sliding_window=9)},
    ],
)
def test_noise_floor_needs_one_thing_run_twice(scores: LayerScores, change: dict[str, Any]) -> None:
    with pytest.raises(ScoresError, match=next(iter(change))):
        testing.noise_floor(scores, dataclasses.replace(scores, **change))


# ---- scores


def test_a_small_move_passes_and_a_large_one_fails(scores: LayerScores, tmp_path: Path) -> None:
    golden = tmp_path / "golden.json"
    testing.assert_scores_match(scores, golden, noise_floor=0.001, update=True)
    assert LayerScores.load(golden).noise_floor == 0.001
    testing.assert_scores_match(moved(scores, {2: 0.0039}), golden)
    with pytest.raises(AssertionError) as error:
        testing.assert_scores_match(moved(scores, {2: 0.0041, 4: -0.5}), golden)
    lines = str(error.value).splitlines()
    assert "4 noise floors of 0.001" in lines[0]
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in lines[2:4]}
    expected, actual, difference, allowed = map(float, rows["layer", "4"])
    assert expected == pytest.approx(scores.delta[4], abs=1e-6)
    assert actual == pytest.approx(expected - 0.5, abs=1e-5)
    assert difference == pytest.approx(-0.5) and allowed == 0.004
    assert ("layer", "2") in rows and "6 of 8 values agree" in str(error.value)
    assert "SWA_UPDATE_GOLDEN=1" in lines[-1]
    testing.assert_scores_match(moved(scores, {2: 0.0041}), golden, tolerance=5)
    testing.assert_scores_match(moved(scores, {2: 0.0041}), golden, noise_floor=0.002)


def test_a_moved_nll_fails_too(scores: LayerScores, tmp_path: Path) -> None:
    testing.assert_scores_match(scores, tmp_path / "g", noise_floor=1e-6, update=True)
    for name, shown in (("nll_base", "base"), ("nll_full", "full"), ("nll_swa", "sliding")):
        values = tuple(value + 1e-3 for value in getattr(scores, name))
        with pytest.raises(AssertionError, match=f"nll {shown} "):
            testing.assert_scores_match(
                dataclasses.replace(scores, **{name: values}), tmp_path / "g"
            )


def test_without_noise_scores_must_be_equal(scores: LayerScores, tmp_path: Path) -> None:
    scores.save(tmp_path / "g")
    with pytest.raises(ScoresError, match="no noise floor is known"):
        testing.assert_scores_match(scores, tmp_path / "g")
    testing.assert_scores_match(scores, tmp_path / "g", noise_floor=0)
    with pytest.raises(AssertionError, match="layer 1"):
        testing.assert_scores_match(moved(scores, {1: 1e-12}), tmp_path / "g", noise_floor=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": AttentionPolicy(8, 1)}, "num_sink_tokens 1 against 0"),
        ({"examples_hash": "0" * 64}, "examples_hash"),
    ],
)
def test_other_runs_fail_whatever_the_noise(
    scores: LayerScores, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    scores.save(tmp_path / "g")
    with pytest.raises(AssertionError, match=message):
        testing.assert_scores_match(
            dataclasses.replace(scores, **change), tmp_path / "g", noise_floor=100
        )


def test_other_weights_are_named_where_scores_differ(scores: LayerScores, tmp_path: Path) -> None:
    scores.save(tmp_path / "g")
    other = moved(scores, {0: 1.0}, model_fingerprint="0" * 64)
    with pytest.raises(AssertionError, match=r"model_fingerprint was f+, is 0+"):
        testing.assert_scores_match(other, tmp_path / "g", noise_floor=0.001)


def test_a_missing_golden_file_says_how_to_write_it(scores: LayerScores, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="SWA_UPDATE_GOLDEN=1"):
        testing.assert_scores_match(scores, tmp_path / "g", noise_floor=1)
    assert not (tmp_path / "g").exists()


def test_the_environment_updates(
    scores: LayerScores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(testing.UPDATE_VARIABLE, "1")
    testing.assert_scores_match(scores, tmp_path / "g", noise_floor=0.5)
    chosen = select(scores, Budget(full_attention_layers=2))
    testing.assert_selection_matches(chosen, tmp_path / "s")
    monkeypatch.delenv(testing.UPDATE_VARIABLE)
    assert LayerScores.load(tmp_path / "g").noise_floor == 0.5
    assert Selection.load(tmp_path / "s") == chosen
    monkeypatch.setenv(testing.UPDATE_VARIABLE, "1")
    with pytest.raises(AssertionError):
        testing.assert_scores_match(moved(scores, {0: 9.0}), tmp_path / "g", update=False)


# ---- selections


def chosen_from(scores: LayerScores, deltas: list[float], size: int = 2) -> Selection:
    row = tuple(deltas)
    table = dataclasses.replace(scores, delta_per_example=(row, row))
    return select(table, Budget(full_attention_layers=size))


def test_a_changed_selection_names_what_was_lost_and_gained(
    scores: LayerScores, tmp_path: Path
) -> None:
    golden = chosen_from(scores, [0.5, 0.4, 0.3, 0.2, 0.1])
    testing.assert_selection_matches(golden, tmp_path / "s", update=True)
    testing.assert_selection_matches(golden, tmp_path / "s")
    other = chosen_from(scores, [0.5, 0.4, 0.3, 0.2, 0.9])
    with pytest.raises(AssertionError) as error:
        testing.assert_selection_matches(other, tmp_path / "s", noise_floor=0.01)
    lines = [line.split() for line in str(error.value).splitlines()]
    assert ["lost", "1", "+0.400000", "+0.400000"] in lines
    assert ["gained", "4", "+0.100000", "+0.900000"] in lines


def test_layers_tied_within_the_noise_may_change_places(
    scores: LayerScores, tmp_path: Path
) -> None:
    chosen_from(scores, [0.5, 0.40, 0.39, 0.2, 0.1]).save(tmp_path / "s")
    other = chosen_from(scores, [0.5, 0.39, 0.40, 0.2, 0.1])
    with pytest.raises(AssertionError, match="gained"):
        testing.assert_selection_matches(other, tmp_path / "s")
    testing.assert_selection_matches(other, tmp_path / "s", noise_floor=0.002)
    with pytest.raises(AssertionError, match="gained"):
        testing.assert_selection_matches(other, tmp_path / "s", noise_floor=0.001)


def test_another_size_or_policy_is_never_a_tie(scores: LayerScores, tmp_path: Path) -> None:
    chosen_from(scores, [0.0] * 5).save(tmp_path / "s")
    with pytest.raises(AssertionError, match=r"gained +2 "):
        testing.assert_selection_matches(
            chosen_from(scores, [0.0] * 5, size=3), tmp_path / "s", noise_floor=1
        )
    sinks = dataclasses.replace(scores, policy=AttentionPolicy(8, 1))
    with pytest.raises(AssertionError, match="num_sink_tokens"):
        testing.assert_selection_matches(chosen_from(sinks, [0.0] * 5), tmp_path / "s")
