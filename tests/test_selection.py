"""Budgets, the choice by score, selections on disk, and the fixed patterns."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fake_model import FakeModel, make_examples
from hypothesis import given
from hypothesis import strategies as st

from swa.budget import Budget
from swa.errors import InputError, ScoresError
from swa.layer_scores import LayerScores
from swa.patterns import first, last, periodic, periodic_choices
from swa.policy import AttentionPolicy
from swa.score import score_layers
from swa.selection import Selection, select

POLICY = AttentionPolicy(sliding_window=8, num_sink_tokens=2)


def with_deltas(
    deltas: list[float | None], *, base: tuple[int, ...] = (), native: tuple[int, ...] = ()
) -> LayerScores:
    """Scores of one example, restored from `base`."""
    model = FakeModel(len(deltas), native=native)
    scores = score_layers(model, make_examples(1), POLICY, base=base)
    return dataclasses.replace(scores, delta_per_example=(tuple(deltas),))


# ---- the choice


def test_the_largest_deltas_are_chosen() -> None:
    chosen = select(with_deltas([0.1, -0.5, 0.3, 0.2, 0.0]), Budget(full_attention_layers=2))
    assert chosen.layers == (2, 3)
    assert chosen.policy == POLICY.with_full_layers([2, 3], 5)


def test_means_decide_not_single_examples() -> None:
    scores = dataclasses.replace(
        score_layers(FakeModel(3), make_examples(2), POLICY),
        delta_per_example=((9.0, 1.0, 5.0), (-9.0, 1.0, 0.0)),
    )
    assert select(scores, Budget(full_attention_layers=2)).layers == (1, 2)


def test_ties_go_to_the_lower_index() -> None:
    scores = with_deltas([0.1, 0.2, 0.2, 0.2, 0.2])
    assert select(scores, Budget(full_attention_layers=2)).layers == (1, 2)


def test_harmful_layers_fill_the_budget_all_the_same() -> None:
    scores = with_deltas([-0.1, -0.3, -0.2])
    assert select(scores, Budget(full_attention_layers=2)).layers == (0, 2)


def test_base_layers_stay_and_count() -> None:
    scores = with_deltas([0.1, None, 0.3, 0.2, None], base=(1, 4))
    assert select(scores, Budget(full_attention_layers=3)).layers == (1, 2, 4)
    assert select(scores, Budget(full_attention_layers=2)).layers == (1, 4)
    with pytest.raises(InputError, match="1 full-attention layers, these scores can give 2 to 5"):
        select(scores, Budget(full_attention_layers=1))


def test_natively_sliding_layers_are_never_chosen() -> None:
    scores = with_deltas([0.1, None, 0.3], native=(1,))
    assert select(scores, Budget(full_attention_layers=2)).layers == (0, 2)
    with pytest.raises(InputError, match="can give 0 to 2"):
        select(scores, Budget(full_attention_layers=3))


def test_ablation_chooses_among_the_base() -> None:
    scores = score_layers(
        FakeModel(),
        make_examples(2),
        POLICY,
        direction="ablate",
        base=[0, 3, 4],
    )
    assert set(select(scores, Budget(full_attention_layers=2)).layers) < {0, 3, 4}
    with pytest.raises(InputError, match="can give 0 to 3"):
        select(scores, Budget(full_attention_layers=4))


@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=12).flatmap(
        lambda deltas: st.tuples(st.just(deltas), st.integers(0, len(deltas)))
    )
)
def test_exactly_k_and_none_left_out_is_better(case: tuple[list[float], int]) -> None:
    deltas, size = case
    chosen = select(with_deltas(list(deltas)), Budget(full_attention_layers=size)).layers
    assert len(set(chosen)) == size
    left = [deltas[i] for i in range(len(deltas)) if i not in chosen]
    assert max(left, default=-2) <= min((deltas[i] for i in chosen), default=2)


@pytest.mark.parametrize("layers", [(2, 1), (1, 1), (1,), (0, 5), (0, 1, 2)])
def test_a_selection_is_checked(layers: tuple[int, ...]) -> None:
    with pytest.raises(ScoresError, match="2 ascending layers"):
        Selection(layers, Budget(full_attention_layers=2), with_deltas([0.0] * 5))


def test_repr_shows_the_layers() -> None:
    chosen = select(with_deltas([0.3, 0.2, 0.1, 0.0, 0.9]), Budget(fraction=0.8))
    assert repr(chosen) == "Selection: full attention in 4 of 5 layers: [0-2, 4]"


# ---- files


@pytest.mark.parametrize("budget", [Budget(fraction=1 / 3), Budget(full_attention_layers=0)])
def test_a_file_is_a_selection_and_a_policy(tmp_path: Path, budget: Budget) -> None:
    chosen = select(with_deltas([0.1, None, 0.3], native=(1,)), budget)
    chosen.save(tmp_path / "policy.json")
    assert Selection.load(tmp_path / "policy.json") == chosen
    assert AttentionPolicy.load(tmp_path / "policy.json") == chosen.policy


def test_a_plain_policy_is_no_selection(tmp_path: Path) -> None:
    POLICY.with_full_layers([1], 5).save(tmp_path / "policy.json")
    with pytest.raises(ScoresError, match=r"policy\.json: there is no .selection."):
        Selection.load(tmp_path / "policy.json")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("num_sink_tokens",), 3, "not the one that was scored"),
        (("sliding_window",), -1, "sliding_window must be"),
        (("layer_types",), None, "2 ascending layers"),
        (("layer_types", 0), "full_attention", "2 ascending layers"),
        (("selection", "schema"), "swa.selection/0", "no .selection."),
        (("selection", "budget"), 2, "budget is not valid"),
        (("selection", "budget", "flops"), 2, "budget is not valid"),
        (("selection", "budget", "fraction"), 0.5, "give one"),
        (("selection", "scores", "delta"), [], "delta does not follow"),
        (("selection", "scores"), 3, "scores are a JSON object"),
        (("selection", "scores"), None, "has scores, a search, or both"),
    ],
)
def test_edited_files_are_refused(
    tmp_path: Path, path: tuple[Any, ...], value: Any, message: str
) -> None:
    data = select(with_deltas([0.1, 0.2, 0.3]), Budget(full_attention_layers=2)).to_dict()
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "policy.json").write_text(json.dumps(data))
    with pytest.raises(ScoresError, match=message) as error:
        Selection.load(tmp_path / "policy.json")
    assert "policy.json: " in str(error.value)


# ---- patterns


def test_known_patterns() -> None:
    assert periodic(36, 9, 1) == tuple(range(1, 36, 4))
    assert periodic(36, 18, 1) == tuple(range(1, 36, 2))
    assert periodic(30, 8) == (0, 3, 7, 11, 15, 18, 22, 26)
    assert len(periodic_choices(30, 8)) == 4
    assert first(30, 3) == (0, 1, 2) and last(30, 3) == (27, 28, 29)
    assert first(30, 0) == last(30, 0) == ()


@given(st.integers(1, 100).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_every_periodic_choice_is_even_and_in_range(case: tuple[int, int]) -> None:
    num_layers, size = case
    choices = periodic_choices(num_layers, size)
    assert len(set(choices)) == len(choices)
    assert {layer for layers in choices for layer in layers} == set(range(num_layers))
    for layers in choices:
        assert len(layers) == size and set(layers) <= set(range(num_layers))
        gaps = {b - a for a, b in pairwise(layers)}
        assert gaps <= {num_layers // size, -(-num_layers // size)}


@pytest.mark.parametrize("arguments", [(30, 0), (30, 31), (30, 8, 4), (30, 8, -1)])
def test_patterns_that_do_not_exist(arguments: tuple[int, ...]) -> None:
    with pytest.raises(InputError):
        periodic(*arguments)
    with pytest.raises(InputError):
        first(3, 4)
    with pytest.raises(InputError):
        last(3, -1)
