"""Evaluation: the means it reports, the policy it applies, and its JSON form."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from builders import tiny_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from planted import planted_checkpoint

import swa
from swa.evaluation import Evaluation, evaluate
from swa.examples import Example
from swa.grading import Grading

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


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[swa.Model, list[Example], swa.AttentionPolicy]:
    """A model that answers with certainty where its three planted layers see everything."""
    made = planted_checkpoint(tmp_path_factory.mktemp("planted"))
    model = swa.load(made.folder, dtype="float32", num_threads=1)
    given = [made.example(160, near=80, seed=seed) for seed in range(4)]
    examples = [Example(tuple(e.prompt_ids), tuple(e.answer_ids), "ask") for e in given]
    return model, examples, swa.AttentionPolicy(32)


def test_replies_are_generated_under_the_policy_and_scored(planted):
    model, examples, policy = planted
    full = evaluate(model, examples, generate=True)
    sliding = evaluate(model, examples, policy=policy, generate=True)
    answers = [model.tokenizer.decode(e.answer_ids, skip_special_tokens=True) for e in examples]
    assert list(full.replies) == answers
    assert full.score_per_example == (1.0,) * 4
    assert full.score_by_task == {"ask": 1.0}
    assert "score=1.000" in repr(full)
    hybrid = model.patch(policy)
    assert sliding.replies == tuple(
        hybrid.generate(e.prompt_ids, max_new_tokens=e.answer_len + 16).text for e in examples
    )
    assert sliding.score < 1
    assert sliding.nll_per_example == evaluate(hybrid, examples).nll_per_example
    assert evaluate(model, examples).replies is None


def test_a_grading_says_what_is_looked_for_and_how_long(planted):
    model, examples, _ = planted
    answer = model.tokenizer.decode(examples[0].answer_ids[:1])
    graded = [
        Example(examples[0].prompt_ids, examples[0].answer_ids, "ask", grading)
        for grading in (
            Grading((answer, "never"), max_new_tokens=1),
            Grading((answer, "never"), "contains_any", max_new_tokens=1),
            Grading((answer[0], answer[-1]), "exact", max_new_tokens=1),
        )
    ]
    result = evaluate(model, graded, generate=True)
    assert result.replies == (answer,) * 3
    assert result.score_per_example == (0.5, 1.0, 0.0)
    assert evaluate(model, graded, generate=True, scorer="contains_any").score == 1.0


def test_judges(planted):
    model, examples, _ = planted

    class Strict:
        name = "strict, 2026"

        def __call__(self, grading: Grading, reply: str) -> bool:
            return grading.references[0] == reply and reply == replies[0]

    replies = evaluate(model, examples, generate=True).replies
    judged = evaluate(model, examples, generate=True, scorer="judge", judge=Strict())
    assert judged.score_per_example == tuple(float(reply == replies[0]) for reply in replies)
    assert judged.judge == "strict, 2026"
    assert evaluate(model, examples, generate=True, judge=Strict()).judge is None  # not asked
    with pytest.raises(swa.errors.InputError, match="give a judge"):
        evaluate(model, examples, generate=True, scorer="judge")


class Liking:
    """A judge that depends on what it likes."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, grading: Grading, reply: str) -> bool:
        return self.what in reply

    judge = __call__

    @staticmethod
    def always(grading: Grading, reply: str) -> bool:
        return True


def likes_nothing(grading: Grading, reply: str, fondness: float = 0.0) -> float:
    return fondness


def test_a_journal_tells_judges_apart(planted, tmp_path):
    model, examples, _ = planted
    given = {"generate": True, "scorer": "judge", "journal": tmp_path / "j"}
    for judge, score in ((likes_nothing, 0.0), (Liking.always, 1.0)):
        for _ in range(2):
            found = evaluate(model, examples[:1], judge=judge, **given)
            assert (found.score, found.judge) == (score, f"{__name__}.{judge.__qualname__}")
    lines = (tmp_path / "j").read_bytes()
    nameless = [
        lambda grading, reply: True,
        partial(likes_nothing, fondness=1.0),
        Liking("a"),
        Liking("a").judge,
    ]
    for judge in nameless:
        with pytest.raises(swa.errors.InputError, match="give it an attribute name"):
            evaluate(model, examples[:1], judge=judge, **given)
        assert evaluate(model, examples[:1], judge=judge, **(given | {"journal": None})).judge
        evaluate(model, examples[:1], judge=judge, journal=tmp_path / "j")  # nothing to judge
    named = partial(likes_nothing, fondness=0.5)
    named.name = "fond"
    found = evaluate(model, examples[:1], judge=named, **given)
    assert (found.score, found.judge) == (0.5, "fond")
    assert (tmp_path / "j").read_bytes().startswith(lines)


def test_a_stopped_evaluation_goes_on(planted, tmp_path):
    """Also under other policies, and with another judge only what that judge must see."""
    model, examples, policy = planted
    journal, asked = tmp_path / "j", []

    class Judge:
        def __init__(self, name: str, last: int) -> None:
            self.name, self.last = name, last

        def __call__(self, grading: Grading, reply: str) -> bool:
            asked.append(reply)
            if len(asked) == self.last:
                raise swa.errors.JudgeError("cannot be reached")
            return "a" in reply

    given = {"generate": True, "scorer": "judge", "journal": journal}
    with pytest.raises(swa.errors.JudgeError):
        evaluate(model, examples, judge=Judge("one", 3), **given)
    result = evaluate(model, examples, judge=Judge("one", 99), **given)
    assert len(asked) == 3 + 2
    straight = evaluate(model, examples, **(given | {"journal": None}), judge=Judge("one", 99))
    assert result == straight
    evaluate(model, examples, judge=Judge("another", 99), **given)
    assert len(asked) == 5 + 4 + 4
    sliding = evaluate(model, examples, policy=policy, journal=journal)
    assert sliding == evaluate(model, examples, policy=policy)
    engine, lines = model.engine, journal.read_bytes().count(b"\n")
    idle = replace(model, engine=SimpleNamespace(tier=engine.tier, dtype=engine.dtype))
    assert evaluate(idle, examples[::-1], policy=policy, journal=journal).nll == sliding.nll
    assert evaluate(idle, examples, judge=Judge("one", 99), **given) == result
    assert lines == 1 + 3 * len(examples)
    both = {"full": None, "sliding": policy}
    compared = swa.compare(model, both, examples, ends=False, journal=journal)
    assert compared.evaluations["sliding"] == sliding
    journal.write_text(journal.read_text().replace('"score": null', '"score": "x"'))
    with pytest.raises(swa.errors.ScoresError, match="line 10 is not the record of an example"):
        evaluate(model, examples, journal=journal)
    with pytest.raises(swa.errors.InputError, match="'perplexity' keeps no journal"):
        swa.suites.evaluate("perplexity", model, examples, journal=journal)


def test_what_leaves_no_room_for_a_reply_is_refused_before_anything_runs(planted, tiny):
    model, examples, _ = planted
    narrow = swa.load(
        model.source,
        dtype="float32",
        num_threads=1,
        max_position_embeddings=examples[0].prompt_len,
    )
    with pytest.raises(swa.errors.InputError, match="example 0 has 160 tokens.*no room"):
        evaluate(narrow, examples, generate=True)
    without = swa.load(tiny(), dtype="float32", num_threads=1)
    with pytest.raises(swa.errors.TokenizerError, match="no tokenizer"):
        evaluate(without, [Example((1,), (2,))], generate=True)
    with pytest.raises(swa.errors.ExampleError, match="answer of example 0 has no text"):
        evaluate(model, [Example((1,), examples[0].answer_ids[-1:])], generate=True)


def test_units_are_numbered(model, examples):
    from_text = [replace(e, unit=unit) for e, unit in zip(examples, "xyx", strict=True)]
    assert evaluate(model, from_text).units == (0, 1, 0)
    assert evaluate(model, [from_text[0], examples[1], from_text[2]]).units == (0, 1, 0)
    assert evaluate(model, examples).units is None


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
    replied = replace(
        evaluation,
        replies=tasks,
        score_per_example=(0.5,) * len(nll),
        judge=name or None,
        units=tuple(range(len(nll))),
    )
    assert Evaluation.from_dict(json.loads(json.dumps(replied.to_dict()))) == replied


def test_files_of_the_first_schema_are_read():
    old = {key: value for key, value in valid().items() if key != "units"}
    assert Evaluation.from_dict(old | {"schema": "swa.evaluation/1"}).to_dict() == valid()


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
        ({"replies": ["a", "b"]}, "replies and scores"),
        ({"replies": ["a", "b"], "score_per_example": [1.0]}, "one entry"),
        ({"units": [0]}, "one entry"),
        ({"units": ["x", "y"]}, "not a valid evaluation"),
    ],
)
def test_damaged_evaluations_are_refused(change, says):
    with pytest.raises(swa.errors.ScoresError, match=says):
        Evaluation.from_dict(valid() | change)


@pytest.mark.parametrize("key", ["nll_per_example", "policy", "model_name", "tasks"])
def test_a_missing_key_is_named(key):
    with pytest.raises(swa.errors.ScoresError, match=key):
        Evaluation.from_dict({k: v for k, v in valid().items() if k != key})
