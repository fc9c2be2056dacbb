"""Gradings: what each scorer says of a reply, judges, and the JSON form."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa.errors import ExampleError, InputError
from swa.grading import JUDGED, SCORERS, Grading, score_reply

PLACES = ("garden", "kitchen", "office")


@pytest.mark.parametrize(
    ("scorer", "references", "reply", "score"),
    [
        ("contains_all", ("123", "Oak"), "oak, 123 and more", 1.0),
        ("contains_all", ("123", "456"), "it is 456", 0.5),
        ("contains_all", ("Straße",), "in der STRASSE", 1.0),
        ("contains_all", ("123",), "", 0.0),
        ("contains_any", ("123", "456"), "it is 456", 1.0),
        ("contains_any", ("123", "456"), "it is 4 56", 0.0),
        ("exact", ("a b", "c"), "  A\n b ", 1.0),
        ("exact", ("a b", "c"), "a b.", 0.0),
        ("regex", (r"\b1[0-9]\b",), "about 17 days", 1.0),
        ("regex", (r"\b1[0-9]\b",), "about 170 days", 0.0),
        ("only_choice", ("kitchen",), "She is in the Kitchen. Not in the office.", 1.0),
        ("only_choice", ("kitchen",), "The kitchen or the office.", 0.0),
        ("only_choice", ("kitchen",), "The office.", 0.0),
        ("only_choice", ("kitchen",), "Before the garden it was the kitchen", 1.0),
        ("only_choice", ("kitchen",), "kitchen<example> office", 1.0),
        ("only_choice", ("kitchen", "office"), "office,kitchen", 1.0),
        ("only_choice", ("kitchen", "office"), "office", 0.0),
    ],
)
def test_scores(scorer, references, reply, score):
    question = "Where was she before the garden?"
    grading = Grading(references, scorer, question=question, choices=PLACES)
    assert score_reply(grading, reply) == score


def test_every_scorer_tells_right_from_wrong():
    for scorer in SCORERS:
        grading = Grading(("kitchen",), scorer, choices=PLACES)
        assert score_reply(grading, "kitchen") == 1.0
        assert score_reply(grading, "office") == 0.0


@pytest.mark.parametrize(("verdict", "score"), [(True, 1.0), (False, 0.0), (0.25, 0.25), (1, 1.0)])
def test_a_judge_sees_grading_and_reply(verdict, score):
    grading = Grading(("a",), JUDGED, question="why?")
    seen = []

    def judge(*given):
        seen.append(given)
        return verdict

    assert score_reply(grading, "reply", judge) == score
    assert seen == [(grading, "reply")]


@pytest.mark.parametrize("verdict", [None, "yes", 1.5, -0.1, math.nan])
def test_a_verdict_that_is_no_score_is_refused(verdict):
    with pytest.raises(InputError, match="judge returns"):
        score_reply(Grading(("a",), JUDGED), "reply", lambda grading, reply: verdict)


def test_without_a_judge_nothing_is_judged():
    with pytest.raises(InputError, match="give a judge, or another scorer"):
        score_reply(Grading(("a",), JUDGED), "reply")


texts = st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=3).map(tuple)


@given(texts, st.sampled_from([*sorted(SCORERS.keys() - {"regex"}), JUDGED]), st.integers(1, 10**6))
def test_json_round_trip(references, scorer, max_new_tokens):
    grading = Grading(references, scorer, max_new_tokens, "q", references, "c")
    assert Grading.from_dict(json.loads(json.dumps(grading.to_dict()))) == grading


def test_defaults_are_left_out_of_json():
    assert Grading(("a",)).to_dict() == {"references": ["a"]}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "JSON object"),
        ({}, "no references"),
        ({"references": []}, "at least one reference"),
        ({"references": "a"}, "list of texts"),
        ({"references": ["a", 3]}, "not 3"),
        ({"references": [" "]}, "not empty"),
        ({"references": ["\ud800"]}, "Unicode"),
        ({"references": ["a"], "scorer": "bleu"}, "'bleu': choose from contains_all"),
        ({"references": ["a"], "max_new_tokens": 0}, "max_new_tokens"),
        ({"references": ["a"], "max_new_tokens": True}, "max_new_tokens"),
        ({"references": ["a"], "question": 3}, "question"),
        ({"references": ["a"], "choices": [None]}, "choices"),
        ({"references": ["("], "scorer": "regex"}, "regular expression"),
        ({"references": ["a"], "reference": "b"}, "unknown grading keys"),
    ],
)
def test_bad_gradings_are_refused(data, says):
    with pytest.raises(ExampleError, match=says):
        Grading.from_dict(data)
