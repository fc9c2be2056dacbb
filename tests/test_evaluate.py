"""Evaluation: the means it reports, the policy it applies, and its JSON form."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from builders import tiny_checkpoint
from hypothesis import given
from hypothesis import strategies as st

import swa
from swa.evaluation import Evaluation, evaluate
from swa.examples import Example

POLICY = swa.AttentionPolicy(sliding_window=8, num_sink_tokens=2)


@pytest.fixture(scope="module")
def model(tiny) -> swa.Model:
    return swa.load(tiny(), dtype="float32", num_threads=1)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    ids = np.random.default_rng(0).integers(0, 256, (3, 60)).tolist()
    return [
        Example(tuple(row[:50]), tuple(row[50 : 50 + length]), task)
        for row, length, task in zip(ids, (1, 4, 10), ("b", "a", "b"), strict=True)
    ]


def test_means_are_per_example_then_over_examples(model, examples):
    result = evaluate(model, examples)
    single = [model.nll_example(example) for example in examples]
    assert result.nll_per_example == tuple(one.mean for one in single)
    assert result.nll == math.fsum(one.mean for one in single) / 3
    assert list(result.by_task) == ["b", "a"]
    assert result.by_task["b"] == pytest.approx((single[0].mean + single[2].mean) / 2)
    assert result.policy is None
    assert result.model_fingerprint == model.fingerprint
    assert "nll=" in repr(result)


def test_a_greedy_match_is_the_whole_answer(model, examples):
    prompt = examples[0].prompt_ids
    greedy = model.generate(prompt, max_new_tokens=4).ids
    assert len(greedy) == 4
    wrong = (*greedy[:-1], (greedy[-1] + 1) % 256)
    result = evaluate(model, [Example(prompt, greedy), Example(prompt, wrong)])
    assert result.greedy_match_per_example == (True, False)
    assert result.greedy_match == 0.5


def test_the_policy_is_applied(model, examples):
    sliding = evaluate(model, examples, policy=POLICY)
    assert sliding.nll_per_example == tuple(
        model.nll_example(example, policy=POLICY, full_layers=()).mean for example in examples
    )
    assert sliding.nll != evaluate(model, examples).nll
    assert sliding == evaluate(model.patch(POLICY), examples)
    one_full = POLICY.with_full_layers([2], 4)
    assert evaluate(model, examples, policy=one_full).nll_per_example == tuple(
        model.nll_example(example, policy=POLICY, full_layers=(2,)).mean for example in examples
    )
    all_full = evaluate(model, examples, policy=POLICY.with_full_layers(range(4), 4))
    assert all_full.nll_per_example == evaluate(model, examples).nll_per_example


def test_progress_goes_to_stderr(model, examples, capsys):
    evaluate(model, examples, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "3/3" in captured.err


def test_no_examples(model):
    with pytest.raises(swa.errors.ExampleError, match="no examples"):
        evaluate(model, [])


def test_weights_that_are_not_numbers_are_reported(tmp_path: Path, examples):
    from safetensors.numpy import load_file, save_file

    folder = tiny_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(swa.errors.ScoresError, match="example 0 is nan"):
        evaluate(swa.load(folder, dtype="float32", num_threads=1), examples)


nats = st.floats(0, 1e6)
rows = st.lists(st.tuples(nats, st.booleans(), st.text()), min_size=1, max_size=5)


@given(rows, st.sampled_from([None, POLICY, POLICY.with_full_layers([1], 3)]), st.text())
def test_json_round_trip(rows, policy, name):
    nll, greedy, tasks = zip(*rows, strict=True)
    evaluation = Evaluation(nll, greedy, tasks, policy, name, "f" * 64, "float32", "e" * 64)
    assert Evaluation.from_dict(json.loads(json.dumps(evaluation.to_dict()))) == evaluation


def valid() -> dict[str, object]:
    return Evaluation(
        (1.0, 2.0), (True, False), ("a", "b"), POLICY, "m", "f", "float32", "e"
    ).to_dict()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "swa.scores/1"}, "schema"),
        ({"nll_per_example": [1.0]}, "one entry for each example"),
        ({"nll_per_example": [], "greedy_match_per_example": [], "tasks": []}, "one entry"),
        ({"nll_per_example": [1.0, "x"]}, "not a valid evaluation"),
        ({"nll_per_example": None}, "not a valid evaluation"),
        ({"policy": {"schema": "swa.policy/1", "sliding_window": 0}}, "sliding_window"),
        ({"policy": 3}, "policy"),
    ],
)
def test_damaged_evaluations_are_refused(change, says):
    with pytest.raises(swa.errors.ScoresError, match=says):
        Evaluation.from_dict(valid() | change)


@pytest.mark.parametrize("key", ["nll_per_example", "policy", "model_name", "tasks"])
def test_a_missing_key_is_named(key):
    with pytest.raises(swa.errors.ScoresError, match=key):
        Evaluation.from_dict({k: v for k, v in valid().items() if k != key})
