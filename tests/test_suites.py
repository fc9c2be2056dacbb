"""Suites: the needle grid, published files as they are and damaged, perplexity by position."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot
from text_tokenizers import CHATML, text_tokenizer

import swa
from swa.errors import ExampleError, InputError, SwaWarning
from swa.evaluation import Evaluation
from swa.examples import Example
from swa.grading import score_reply
from swa.suites import SUITES, babilong, evaluate, examples, longmemeval, needle, plots, positions
from swa.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return text_tokenizer("bpe", CHATML)


def evaluation(tasks: list[str], nll: list[float], **more: Any) -> Evaluation:
    greedy = tuple(value < 1 for value in nll)
    return Evaluation(tuple(nll), greedy, tuple(tasks), None, "m", "f", "float32", "e", **more)


@pytest.mark.parametrize(
    "suite", sorted(SUITES.keys() - {"longmemeval"})
)  # its types are the file's
def test_unknown_tasks_are_refused(suite, tokenizer):
    with pytest.raises(ExampleError, match="no task 'no such task': choose from"):
        examples(suite, tokenizer, tasks=["no such task"], files=[__file__])


def test_an_unknown_suite(tokenizer):
    with pytest.raises(InputError, match="'x': choose from ruler, needle"):
        examples("x", tokenizer)


# ---- the needle grid


def test_a_grid_has_the_same_needles_at_every_depth(tokenizer):
    wanted = {"lengths": [600, 1500], "depths": [0.0, 0.5, 1.0], "examples_per_task": 2}
    made = examples("needle", tokenizer, **wanted)
    assert [e.task for e in made[::2]] == [
        f"needle {length} at {depth}" for length in (600, 1500) for depth in ("0", "0.5", "1")
    ]
    for example in made:
        length, depth = re.fullmatch(r"needle (\d+) at (\S+)", example.task).groups()
        assert example.prompt_len == int(length) - needle.NEW_TOKENS
        text = tokenizer.decode(example.prompt_ids, skip_special_tokens=True)
        body = text.split("\n\n", 1)[1].rsplit("\n\n", 1)[0]
        (value,) = example.grading.references
        sentence = re.search(rf"One of the special magic numbers for \S+ is: {value}\.", body)
        assert abs(sentence.start() - float(depth) * len(body)) < 800  # a sentence, at most
        if depth == "0":
            assert sentence.start() <= 1
    units = [e.unit for e in made]
    assert units[:2] == units[2:4] == units[4:6]
    assert len(set(units)) == 4
    references = [e.grading.references for e in made]
    assert references[:2] == references[2:4] == references[4:6] != references[6:8]


def test_an_evaluation_becomes_a_grid():
    tasks = ["needle 900 at 1", "needle 400 at 0.25", "needle 400 at 0.25", "needle 900 at 0.25"]
    found = needle.grid(evaluation(tasks, [1.0, 2.0, 4.0, 0.5]))
    assert (found.lengths, found.depths) == ((400, 900), (0.25, 1.0))
    np.testing.assert_array_equal(found.values, [[3.0, 0.5], [math.nan, 1.0]])
    matched = needle.grid(evaluation(tasks, [1.0, 0.0, 4.0, 0.5]), "greedy_match")
    np.testing.assert_array_equal(matched.values, [[0.5, 1.0], [math.nan, 0.0]])
    replied = evaluation(tasks[:1], [1.0], replies=("x",), score_per_example=(0.75,))
    assert needle.grid(replied, "score").values == [[0.75]]
    with pytest.raises(InputError, match="no replies"):
        needle.grid(evaluation(tasks, [1.0] * 4), "score")
    with pytest.raises(InputError, match="'vt 1024' is not of the needle grid"):
        needle.grid(evaluation(["vt 1024"], [1.0]))


@pytest.mark.parametrize("length", [1, 24, 60])
def test_a_grid_too_short(tokenizer, length):
    with pytest.raises(ExampleError, match=f"length {length} is too short"):
        examples("needle", tokenizer, lengths=[length])


@pytest.mark.parametrize("depths", [[-0.1], [1.5], [math.nan], []])
def test_depths_are_fractions(tokenizer, depths):
    with pytest.raises(ExampleError, match="depth"):
        examples("needle", tokenizer, depths=depths)


def test_charts_show_every_cell_and_every_line():
    tasks = [needle.cell(length, depth) for length in (400, 900) for depth in (0.0, 0.5, 1.0)]
    made = evaluation(tasks, [0.1, 0.2, 0.3, 0.4, 0.5, 1.6])
    figure = plots.needle_grids({"full": made, "hybrid": evaluation(tasks, [0.2] * 6)})
    grids = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in grids] == ["full", "full", "hybrid", "hybrid"]
    shown = [text.get_text() for text in grids[0].texts]
    assert shown == ["0.10", "0.40", "0.20", "0.50", "0.30", "1.60"]  # row by row: depths
    assert [text.get_text() for text in grids[1].texts] == ["100%"] * 5 + ["0%"]
    assert {grids[i].images[0].get_clim() for i in (0, 2)} == {(0.0, 1.6)}  # one scale
    spans = ["tokens 1-63", "tokens 64-99"]
    lines = {
        "full": evaluation(spans * 2, [3.0, 2.0] * 2),
        "one": evaluation(spans * 2, [3.0, 2.5, 4.0, 2.5]),
    }
    absolute, relative = plots.position_figure(lines).axes
    for ax, expected in ((absolute, [[3.0, 2.0], [3.5, 2.5]]), (relative, [[0.0] * 2, [0.5] * 2])):
        steps = [patch for patch in ax.patches if patch.get_label() in lines]
        assert [list(step.get_data().values) for step in steps] == expected
        assert list(steps[0].get_data().edges) == [1, 64, 100]
    assert relative.get_ylabel() == "difference from full"
    assert len(plots.position_figure({"full": lines["full"]}).axes) == 1
    pyplot.close("all")


# ---- BABILong


FACTS = [
    {
        "input": " Mary went to the office. The ship sailed on. Mary went to the garden. ",
        "question": "Where is Mary? ",
        "target": "garden",
    },
    {"input": "Chapter one. John took the milk.", "question": "Where is John?", "target": "office"},
]


def write(path: Path, entries: list[Any], form: str) -> Path:
    if form == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(entries), path)
    elif form == "jsonl":
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    else:
        path.write_text(json.dumps(entries, indent=1))
    return path


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet"])
def test_babilong_in_every_form(tokenizer, tmp_path, form):
    folder = tmp_path / "qa1"
    folder.mkdir()
    path = write(folder / f"4k.{form}", FACTS, form)
    first, second = examples("babilong", tokenizer, files=[path])
    text = tokenizer.decode(first.prompt_ids, skip_special_tokens=True)
    assert "<context>\nMary went to the office." in text
    assert "garden.\n</context>\n\nQuestion: Where is Mary?" in text
    assert text.endswith("Answer:")
    assert tokenizer.decode(first.answer_ids) == " garden"
    assert first.task == second.task == "qa1 4k"
    assert score_reply(first.grading, "Mary is in the garden. Not the office.") == 1
    assert score_reply(first.grading, "the office or the garden") == 0
    assert score_reply(second.grading, " Office") == 1
    assert [e.task for e in examples("babilong", tokenizer, files=[path], examples_per_task=1)] == [
        "qa1 4k"
    ]


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("qa10.json", "qa10"),
        ("0k/qa20-00000-of-00001.json", "qa20 0k"),
        ("qa2_128k.json", "qa2 128k"),
        ("qa19/1M.json", "qa19 1M"),
    ],
)
def test_what_a_file_is_of_stands_in_its_name(tokenizer, tmp_path, name, task):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (example,) = examples("babilong", tokenizer, files=[write(path, FACTS[:1], "json")])
    assert example.task == task
    assert f"one of: {', '.join(babilong.CHOICES[task.split()[0]])}." in tokenizer.decode(
        example.prompt_ids
    )


@pytest.mark.parametrize("suite", ["ruler", "babilong", "longmemeval"])
def test_depths_are_the_needle_grids_alone(tokenizer, suite):
    with pytest.raises(ExampleError, match="does not use depths"):
        examples(suite, tokenizer, depths=[0.5])


def test_a_babilong_file_whose_name_says_nothing(tokenizer, tmp_path):
    path = write(tmp_path / "data.json", FACTS, "json")
    with pytest.raises(ExampleError, match=r"data\.json: which task is it of"):
        examples("babilong", tokenizer, files=[path])
    made = examples("babilong", tokenizer, files=[path], tasks=["qa3"])
    assert {example.task for example in made} == {"qa3"}
    other = write(tmp_path / "qa1.json", FACTS, "json")
    with pytest.raises(ExampleError, match="none of the files is of qa2"):
        examples("babilong", tokenizer, files=[other], tasks=["qa2"])


def test_a_question_asked_at_several_lengths_is_one_unit(tokenizer, tmp_path):
    paths = [tmp_path / name for name in ("qa1_1k.json", "qa1_2k.json", "qa2_1k.json")]
    for path in paths:
        write(path, FACTS, "json")
    made = examples("babilong", tokenizer, files=paths)
    units = [e.unit for e in made]
    assert units[:2] == units[2:4] and len({*units}) == 4
    with pytest.raises(ExampleError, match="none of the files is of qa3, qa7"):
        examples("babilong", tokenizer, files=paths, tasks=["qa1", "qa3", "qa7"])


def test_babilong_lists(tokenizer, tmp_path):
    entry = FACTS[0] | {"question": "What is Mary carrying?", "target": "apple,milk"}
    path = write(tmp_path / "qa8.json", [entry], "json")
    (example,) = examples("babilong", tokenizer, files=[path])
    assert example.grading.references == ("apple", "milk")
    assert score_reply(example.grading, "milk,apple") == 1
    assert score_reply(example.grading, "apple") == 0


def test_babilong_none_is_not_one(tokenizer, tmp_path):
    question = "How many objects is Mary carrying?"
    entries = [FACTS[0] | {"question": question, "target": target} for target in ("none", "one")]
    path = write(tmp_path / "qa7.json", entries, "json")
    none, one = (example.grading for example in examples("babilong", tokenizer, files=[path]))
    assert score_reply(none, "None. There is one") == 1
    assert score_reply(one, "one") == 1
    for reply in ("none or one", "one, if not none", "two"):
        assert score_reply(none, reply) == score_reply(one, reply) == 0
    assert score_reply(one, "none") == score_reply(none, "one") == 0


def test_entries_too_long_are_left_out_and_counted(tokenizer, tmp_path):
    long = FACTS[0] | {"input": FACTS[0]["input"] * 50}
    path = write(tmp_path / "qa1.json", [FACTS[0], long, FACTS[1]], "json")
    with pytest.warns(SwaWarning, match="1 of 3 entries left out: longer than 300 tokens"):
        kept = examples("babilong", tokenizer, files=[path], lengths=[200, 300])
    assert [tokenizer.decode(e.answer_ids) for e in kept] == [" garden", " office"]
    shortest = min(e.prompt_len for e in kept) + 20
    with pytest.raises(ExampleError, match=f"the shortest has {shortest}"):
        examples("babilong", tokenizer, files=[path], lengths=[shortest - 1])


def test_what_is_too_long_does_not_count(tokenizer, tmp_path, monkeypatch):
    """And once there are enough, no prompt is tokenized any more."""
    long = FACTS[0] | {"input": FACTS[0]["input"] * 50}
    facts = write(tmp_path / "qa1.json", [long, *FACTS, *FACTS], "json")
    chat = {"prompt": "Who?", "question": "Who?", "question_type": "a"}
    chats = [
        chat | {"prompt": "Long story. " * 400, "answer": "Eve"},
        chat | {"answer": "Ann"},
        chat | {"answer": "Bob", "question_type": "b"},
        *[chat | {"answer": "Tom"}] * 5,
    ]
    chats = write(tmp_path / "l.json", chats, "json")
    asked = []
    encode = swa.suites.request.encode_request
    monkeypatch.setattr(
        "swa.suites.request.encode_request", lambda *a: asked.append(a) or encode(*a)
    )
    for suite, path, longest, answers in (
        ("babilong", facts, 300, [" garden"]),
        ("longmemeval", chats, 600, ["Ann", "Bob"]),
    ):
        wanted = {"files": [path], "lengths": [longest], "examples_per_task": 1}
        asked.clear()
        with pytest.warns(SwaWarning, match=f"1 of {1 + len(answers)} entries left out"):
            made = examples(suite, tokenizer, **wanted)
        assert [tokenizer.decode(e.answer_ids) for e in made] == answers
        assert len(asked) == 1 + len(answers)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no entries"),
        (b"[]", "no entries"),
        (b"[1]", "entry 0: must be an object, not 1"),
        (b'[{"input": "a"}]', "entry 0: question is missing: it must be a text"),
        (b'[{"input": "a", "question": "q", "target": ["x"]}]', "entry 0: target is"),
        (b'[{"input": " ", "question": "q", "target": "x"}]', "entry 0: input is"),
        (b'{"input": "a"}\n{"input"', ":2: not JSON"),
        (b"\xff\xfe", ":1: not JSON"),
        (b'[{"input": 1e999}]', "not JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b"PAR1 and no more", "not a parquet file that can be read"),
        (b"PAR1" + bytes(100) + b"\xff\xff\xff\x7fPAR1", "not a parquet file that can be read"),
    ],
)
def test_damaged_files_are_named_with_the_entry(tokenizer, tmp_path, content, says):
    path = tmp_path / "qa1.json"
    path.write_bytes(content)
    with pytest.raises(ExampleError, match=says) as caught:
        examples("babilong", tokenizer, files=[path])
    assert str(path) in str(caught.value)


def test_a_cut_or_changed_parquet_file_is_an_error_of_ours(tokenizer, tmp_path):
    whole = write(tmp_path / "qa1.parquet", FACTS, "parquet").read_bytes()
    path = tmp_path / "qa2.parquet"
    for cut in range(4, len(whole), 37):
        path.write_bytes(whole[:cut])
        with pytest.raises(ExampleError, match=r"qa2\.parquet"):
            examples("babilong", tokenizer, files=[path])


def test_parquet_without_pyarrow_says_what_to_install(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "qa1.parquet", FACTS, "parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ExampleError, match=r"pip install 'swa\[parquet\]'"):
        examples("babilong", tokenizer, files=[path])


# ---- LongMemEval


def memory(**changes: Any) -> dict[str, Any]:
    return {
        "question_id": "q1",
        "question_type": "multi-session",
        "question": "How many cats do I have?",
        "answer": 2,
        "question_date": "2023/05/30 (Tue) 23:40",
        "haystack_session_ids": ["s2", "s1"],
        "haystack_dates": ["2023/05/21 (Sun) 10:00", "2023/05/20 (Sat) 02:21"],
        "haystack_sessions": [
            [{"role": "user", "content": "I got a second cat — Tom.", "has_answer": True}],
            [
                {"role": "user", "content": "My cat is Kit.", "has_answer": True},
                {"role": "assistant", "content": "", "has_answer": False},
            ],
        ],
        "answer_session_ids": ["s1", "s2"],
    } | changes


def test_longmemeval_prompts_have_the_published_parts(tokenizer, tmp_path):
    path = write(tmp_path / "s.json", [memory()], "json")
    (example,) = examples("longmemeval", tokenizer, files=[path])
    text = tokenizer.decode(example.prompt_ids, skip_special_tokens=True)
    assert "has_answer" not in text
    assert "true" not in text.lower()
    expected = (
        "\n### Session 1:\nSession Date: 2023/05/20 (Sat) 02:21\nSession Content:\n\n"
        '[{"role": "user", "content": "My cat is Kit."}, {"role": "assistant", "content": ""}]\n'
        "\n### Session 2:\nSession Date: 2023/05/21 (Sun) 10:00\nSession Content:\n\n"
        '[{"role": "user", "content": "I got a second cat \\u2014 Tom."}]\n'
        "\n\nCurrent Date: 2023/05/30 (Tue) 23:40\nQuestion: How many cats do I have?\nAnswer:"
    )
    assert expected in text
    assert example.task == "multi-session"
    assert tokenizer.decode(example.answer_ids) == "2"
    assert example.grading.references == ("2",)
    assert example.grading.scorer == "judge"
    assert example.grading.question == "How many cats do I have?"
    assert example.grading.max_new_tokens == 500
    plain = text_tokenizer("bpe")
    (bare,) = examples("longmemeval", plain, files=[path])
    assert plain.decode(bare.prompt_ids).endswith("Answer:")
    assert plain.decode(bare.answer_ids) == " 2"


def test_types_abstention_and_their_criteria(tokenizer, tmp_path):
    entries = [
        memory(),
        memory(question_id="q2_abs", answer="You never spoke of dogs."),
        memory(question_type="temporal-reasoning"),
        memory(question_type="single-session-preference"),
        memory(question_type="knowledge-update"),
        memory(question_type="knowledge-update"),
    ]
    path = write(tmp_path / "s.json", entries, "json")
    made = examples("longmemeval", tokenizer, files=[path])
    assert [e.task for e in made] == [
        "multi-session",
        "abstention",
        "temporal-reasoning",
        "single-session-preference",
        "knowledge-update",
        "knowledge-update",
    ]
    criteria = [e.grading.criterion for e in made]
    assert len(set(criteria)) == 5
    assert "cannot be answered" in criteria[1]
    assert "off by one" in criteria[2]
    some = {"examples_per_task": 1, "tasks": ["knowledge-update", "abstention"]}
    picked = examples("longmemeval", tokenizer, files=[path], **some)
    assert [e.task for e in picked] == ["abstention", "knowledge-update"]
    with pytest.raises(ExampleError, match="no entry of task 'single-session-user'"):
        examples("longmemeval", tokenizer, files=[path], tasks=["single-session-user"])
    assert {"multi-session", "abstention"} <= set(longmemeval.TASKS)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_finished_prompts_are_taken_as_they_are(tokenizer, tmp_path, form):
    entry = {
        "prompt": "Long story. Who?",
        "question": "Who?",
        "answer": "Ann",
        "question_type": 3,
    }
    path = write(tmp_path / f"l.{form}", [entry], form)
    (example,) = examples("longmemeval", tokenizer, files=[path])
    assert "Long story. Who?" in tokenizer.decode(example.prompt_ids)
    assert (example.task, example.grading.references) == ("3", ("Ann",))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"answer": None}, "answer is missing"),
        ({"question_date": 3}, "question_date is 3"),
        ({"question_type": None}, "question_type is missing"),
        ({"haystack_dates": ["2023"]}, "haystack_dates has 1 dates for 2 sessions"),
        ({"haystack_dates": [1, 2]}, "haystack_dates is .* a list of texts"),
        ({"haystack_sessions": [[], "x"]}, "haystack_sessions is .* a list of lists"),
        ({"haystack_sessions": [[], ["x"]]}, r"haystack_sessions\[1\]\[0\]: must be an object"),
        (
            {"haystack_sessions": [[], [{"role": "user", "content": None}]]},
            r"haystack_sessions\[1\]\[0\]: content is missing",
        ),
    ],
)
def test_malformed_entries_are_named(tokenizer, tmp_path, changes, says):
    path = write(tmp_path / "s.json", [memory(), memory(**changes)], "json")
    with pytest.raises(ExampleError, match=f"entry 1.*{says}") as caught:
        examples("longmemeval", tokenizer, files=[path])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suite", ["babilong", "longmemeval"])
def test_suites_of_files_need_them(tokenizer, suite):
    with pytest.raises(ExampleError, match="published files"):
        examples(suite, tokenizer)


@pytest.mark.parametrize("suite", ["babilong", "longmemeval", "perplexity"])
def test_a_file_given_twice_is_refused(tokenizer, tmp_path, monkeypatch, suite):
    path = write(tmp_path / "qa1.json", FACTS, "json")
    (tmp_path / "link.json").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for again in (path, "qa1.json", "link.json"):
        with pytest.raises(ExampleError, match="files must be different ones"):
            examples(suite, tokenizer, files=[path, again])


# ---- perplexity by position


POLICY = swa.AttentionPolicy(8, num_sink_tokens=2)


@pytest.fixture(scope="module")
def model(tiny) -> swa.Model:
    folder = tiny(tokenizer=True, max_position_embeddings=4096)
    return swa.load(folder, dtype="float32", num_threads=1)


def test_pieces_of_text_follow_each_other(model, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("0123456789" * 30, encoding="utf-8")
    one, two = examples(
        "perplexity", model.tokenizer, files=[path], lengths=[101], examples_per_task=2
    )
    bos = model.tokenizer.bos_token_id
    assert one.prompt_ids == two.prompt_ids == (bos,)
    assert model.tokenizer.decode(one.answer_ids + two.answer_ids) == path.read_text()[:200]
    without = text_tokenizer("bpe")
    (piece,) = examples("perplexity", without, files=[path], lengths=[50])
    assert (piece.prompt_len, piece.answer_len) == (1, 49)
    assert without.decode((*piece.prompt_ids, *piece.answer_ids)) in path.read_text()


def test_the_haystack_is_the_text_without_files(tokenizer):
    wanted = {"lengths": [300], "examples_per_task": 2}
    made = examples("perplexity", tokenizer, **wanted)
    assert [e.prompt_len + e.answer_len for e in made] == [300, 300]
    assert made != examples("perplexity", tokenizer, seed=1, **wanted)
    assert made != examples("perplexity", tokenizer, split="calibration", **wanted)
    with pytest.raises(ExampleError, match="too few for 900 pieces of 300"):
        examples("perplexity", tokenizer, lengths=[300], examples_per_task=900)


def test_every_row_slides_whatever_the_policy_exempts(model):
    texts = examples("perplexity", model.tokenizer, lengths=[120], examples_per_task=2)
    found = positions.evaluate(model, texts, policy=POLICY, edges=[1, 20, 64])
    assert found.tasks == ("tokens 1-19", "tokens 20-63", "tokens 64-119") * 2
    assert found.units == (0, 0, 0, 1, 1, 1)
    assert positions.buckets(found) == [(1, 19), (20, 63), (64, 119)]
    # By hand: a token is predicted from the row before it, as the last of a prompt that slides.
    ids = (*texts[1].prompt_ids, *texts[1].answer_ids)
    for position in (1, 19, 20, 64, 119):
        slides = swa.AttentionPolicy(8, num_sink_tokens=2, decode="full")
        alone = Example(ids[:position], ids[position : position + 1])
        expected = model.nll_example(alone, slides, ()).per_token[0]
        (one,) = positions.evaluate(
            model, [Example(ids[:1], ids[1:])], policy=POLICY, edges=[position, *_next(position)]
        ).nll_per_example[:1]
        assert one == pytest.approx(expected, rel=1e-5)
    for exempt in (
        swa.AttentionPolicy(8, num_sink_tokens=2, num_tail_tokens=30),
        swa.AttentionPolicy(8, num_sink_tokens=2, decode="window"),
    ):
        same = positions.evaluate(model, texts, policy=exempt, edges=[1, 20, 64])
        assert same.nll_per_example == found.nll_per_example
        assert same.policy == exempt.with_full_layers((), 4)
    assert positions.evaluate(model.patch(POLICY), texts, edges=[1, 20, 64]) == found
    two_full = positions.evaluate(model, texts, policy=POLICY.with_full_layers([0, 1], 4))
    assert (
        two_full.nll_per_example != positions.evaluate(model, texts, policy=POLICY).nll_per_example
    )


def _next(position: int) -> list[int]:
    return [position + 1] if position + 1 < 120 else []


def test_full_attention_by_position(model):
    (text,) = examples("perplexity", model.tokenizer, lengths=[320])
    found = evaluate("perplexity", model, [text])
    assert positions.buckets(found) == [(max(40 * i, 1), 40 * i + 39) for i in range(8)]
    per_token = model.nll_example(text).per_token
    assert found.nll_per_example[1] == pytest.approx(per_token[39:79].mean())
    assert found.nll == pytest.approx(per_token.mean(), rel=1e-2)
    assert found.policy is None
    short = positions.evaluate(model, [Example(text.prompt_ids, text.answer_ids[:5])])
    assert positions.buckets(short) == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]
    assert short.nll_per_example == pytest.approx(model.nll_example(text).per_token[:5], rel=1e-5)


def test_what_positions_refuse(model):
    (text,) = examples("perplexity", model.tokenizer, lengths=[100])
    with pytest.raises(InputError, match="no replies to generate"):
        evaluate("perplexity", model, [text], generate=True)
    for edges in ([0], [1, 1], [5, 3], [100], [50, 200]):
        with pytest.raises(InputError, match="edges must ascend, from 1"):
            positions.evaluate(model, [text], edges=edges)
    with pytest.raises(ExampleError, match="texts of one length"):
        positions.evaluate(model, [text, Example((1,), (2, 3))])
    with pytest.raises(ExampleError, match="of one length"):
        examples("perplexity", model.tokenizer, lengths=[100, 200])
    with pytest.raises(ExampleError, match="nothing to predict"):
        examples("perplexity", model.tokenizer, lengths=[2])
    with pytest.raises(ExampleError, match="does not use depths"):
        examples("perplexity", model.tokenizer, depths=[0.5])
    with pytest.raises(InputError, match="not one of perplexity"):
        positions.buckets(evaluation(["vt"], [1.0]))


def test_the_other_suites_evaluate_as_usual(model):
    made = examples("needle", model.tokenizer, lengths=[600], depths=[0.5])
    found = evaluate("needle", model, made, policy=POLICY, generate=True)
    assert found == swa.evaluate(model, made, policy=POLICY, generate=True)
    assert len(found.replies) == 1
