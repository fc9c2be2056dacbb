"""Examples: what they accept, JSONL files line by line, their hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import BYTE_BOS
from hypothesis import given
from hypothesis import strategies as st
from text_tokenizers import CHATML, text_tokenizer

from swa.errors import ExampleError, SwaError, SwaWarning
from swa.examples import Example, content_hash, from_jsonl, write_jsonl
from swa.grading import Grading
from swa.tokenizer import Tokenizer

IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20).map(tuple)
TASKS = st.text(min_size=1).filter(str.isprintable)
GRADINGS = st.builds(Grading, st.just(("a", "b")), st.sampled_from(["exact", "judge"]))
EXAMPLES = st.builds(Example, IDS, IDS, TASKS, st.none() | GRADINGS, st.none() | TASKS)
GOOD = {"prompt_ids": [1, 2], "answer_ids": [3]}
MESSAGES = [{"role": "user", "content": "Where?"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return text_tokenizer("byte", CHATML)


def write_lines(path: Path, *lines: Any, end: str = "\n") -> Path:
    """Objects as JSON, text and bytes as they are."""
    encoded = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line))
        for line in lines
    ]
    path.write_bytes(
        b"".join((x if isinstance(x, bytes) else x.encode()) + end.encode() for x in encoded)
    )
    return path


# ---- one example


def test_lengths_and_repr() -> None:
    example = Example((1, 2, 3), (4,), "num")
    assert (example.prompt_len, example.answer_len) == (3, 1)
    assert repr(example) == "Example(num: 3 prompt + 1 answer tokens)"
    assert Example((1,), (2,)).task == "default"


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint16, np.int64])
def test_arrays_become_tuples_of_plain_integers(dtype: Any) -> None:
    example = Example(np.array([1, 2], dtype), [np.int32(3)])  # type: ignore[arg-type]
    assert example == Example((1, 2), (3,))
    assert hash(example) == hash(Example((1, 2), (3,)))
    assert {type(i) for i in (*example.prompt_ids, *example.answer_ids)} == {int}


def test_the_range_of_ids_is_the_models_to_check() -> None:
    assert Example((-1,), (2**40,)).answer_ids == (2**40,)


@pytest.mark.parametrize("ids", [None, 5, "ab", [1.0], ["1"], [None], np.array([1.5]), [[1]]])
def test_ids_that_are_no_integers_are_refused(ids: Any) -> None:
    with pytest.raises(ExampleError, match="prompt_ids must be integers"):
        Example(ids, (1,))
    with pytest.raises(ExampleError, match="answer_ids must be integers"):
        Example((1,), ids)


@pytest.mark.parametrize("ids", [[True], [1, False], [np.bool_(True)]])
def test_booleans_are_refused(ids: Any) -> None:
    with pytest.raises(ExampleError, match="answer_ids must be integers"):
        Example((1,), ids)


@pytest.mark.parametrize("ids", [(), [], np.array([], np.int64)])
def test_a_side_without_tokens_is_refused(ids: Any) -> None:
    with pytest.raises(ExampleError, match="prompt_ids is empty: at least one token is needed"):
        Example(ids, (1,))
    with pytest.raises(ExampleError, match="answer_ids is empty"):
        Example((1,), ids)


@pytest.mark.parametrize("task", ["", None, 5, ["a"], "two\nlines", "\x1b[31m", "\ud800"])
def test_a_task_is_printable_text(task: Any) -> None:
    with pytest.raises(ExampleError, match="task must be printable text"):
        Example((1,), (2,), task)


# ---- JSONL that is read


def test_text_gets_bos_once_and_answers_none(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (example,) = from_jsonl(
        write_lines(tmp_path / "f", {"prompt": "<bos>It is", "answer": " so"}), tokenizer
    )
    assert example.prompt_ids == (BYTE_BOS, *tokenizer.encode("It is"))
    assert example.answer_ids == tuple(tokenizer.encode(" so"))


def test_messages_get_the_chat_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (example,) = from_jsonl(
        write_lines(tmp_path / "f", {"prompt": MESSAGES, "answer": "there"}), tokenizer
    )
    rendered = "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    assert example.prompt_ids == tuple(tokenizer.encode(rendered))


def test_ids_need_no_tokenizer(tmp_path: Path) -> None:
    assert from_jsonl(write_lines(tmp_path / "f", GOOD)) == [Example((1, 2), (3,))]


def test_text_and_ids_may_meet_in_a_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    line = {"prompt_ids": [1, 2], "answer": "ab"}
    (example,) = from_jsonl(write_lines(tmp_path / "f", line), tokenizer)
    assert example == Example((1, 2), tuple(tokenizer.encode("ab")))


def test_tasks_are_kept_in_order(tmp_path: Path) -> None:
    lines = [GOOD | {"task": "b"}, GOOD, GOOD | {"task": "a"}]
    examples = from_jsonl(write_lines(tmp_path / "f", *lines))
    assert [example.task for example in examples] == ["b", "default", "a"]


def test_null_counts_as_absent(tmp_path: Path) -> None:
    line = GOOD | {"prompt": None, "answer": None, "task": None}
    assert from_jsonl(write_lines(tmp_path / "f", line)) == [Example((1, 2), (3,))]


def test_other_keys_are_left_alone(tmp_path: Path) -> None:
    line = GOOD | {"id": 7, "source": {"url": "x"}}
    assert from_jsonl(write_lines(tmp_path / "f", line)) == [Example((1, 2), (3,))]


def test_a_byte_order_mark_blank_lines_and_any_line_end(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    line = {"prompt": "größer\u2028\x85", "answer": "ü"}  # these end no line of JSONL
    text = json.dumps(line, ensure_ascii=False).encode()
    path = write_lines(tmp_path / "f", b"\xef\xbb\xbf" + text, "", "  \t", GOOD, end="\r\n")
    examples = from_jsonl(path, tokenizer)
    assert examples[0].prompt_ids == tuple(tokenizer.encode_prompt("größer\u2028\x85"))
    assert examples[1] == Example((1, 2), (3,))


def test_a_last_line_may_lack_its_end(tmp_path: Path) -> None:
    (tmp_path / "f").write_text(json.dumps(GOOD))
    assert len(from_jsonl(str(tmp_path / "f"))) == 1


def test_repeated_lines_warn_and_count(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "f", GOOD, "", GOOD | {"task": "other"}, GOOD, GOOD)
    with pytest.warns(SwaWarning, match=r"f: lines repeat .*: 4 \(as 1\), 5 \(as 1\)$") as caught:
        assert len(from_jsonl(path)) == 4
    assert caught[0].filename == __file__


def test_many_repeats_are_cut_short(tmp_path: Path) -> None:
    with pytest.warns(SwaWarning, match=r"6 \(as 1\), \.\.\.$"):
        from_jsonl(write_lines(tmp_path / "f", *[GOOD] * 9))


# ---- JSONL that is refused


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nonsense", "not JSON"),
        ('{"prompt_ids": [1], "answer_ids": [2]} x', "not JSON: Extra data"),
        (b'{"prompt": "\xff", "answer": "a"}', "not JSON: .* can't decode byte 0xff"),
        ('{"prompt_ids": [NaN], "answer_ids": [2]}', "NaN is not a JSON number"),
        ('{"prompt_ids": [1], "prompt_ids": [1], "answer_ids": [2]}', "given twice"),
        ("[" * 100_000, "nested too deep"),
        ("[1]", "must be a JSON object"),
        ("null", "must be a JSON object"),
        ({}, "give either 'prompt' or 'prompt_ids', not none"),
        ({"prompt": "a"}, "give either 'answer' or 'answer_ids', not none"),
        ({"prompt": None, "answer": "a"}, "give either 'prompt' or 'prompt_ids', not none"),
        (GOOD | {"prompt": "a"}, "give either 'prompt' or 'prompt_ids', not both"),
        (GOOD | {"answer": "a"}, "give either 'answer' or 'answer_ids', not both"),
        (GOOD | {"prompt_ids": "12"}, "prompt_ids must be a list of integers from 0 on"),
        (GOOD | {"prompt_ids": [1.0]}, "prompt_ids must be a list of integers from 0 on"),
        (GOOD | {"prompt_ids": [True]}, "prompt_ids must be a list of integers from 0 on"),
        (GOOD | {"answer_ids": [-1]}, "answer_ids must be a list of integers from 0 on"),
        (GOOD | {"answer_ids": {"0": 1}}, "answer_ids must be a list of integers from 0 on"),
        (GOOD | {"prompt_ids": []}, "prompt_ids is empty"),
        (GOOD | {"answer_ids": []}, "answer_ids is empty"),
        ({"prompt": "a", "answer": ""}, "answer is empty"),
        ({"prompt": 5, "answer": "a"}, "prompt must be text or a list of chat messages"),
        ({"prompt": [1, 2], "answer": "a"}, "token ids go into prompt_ids"),
        ({"prompt": [], "answer": "a"}, "prompt must be text or a list of chat messages"),
        ({"prompt": "a", "answer": [1]}, "answer must be text; token ids go into answer_ids"),
        ({"prompt": "a", "answer": MESSAGES}, "answer must be text"),
        ({"prompt": [{"role": 5}], "answer": "a"}, "prompt: message 0 must be like"),
        ({"prompt": [*MESSAGES, "x"], "answer": "a"}, "prompt: message 1 must be like"),
        ({"prompt": [{"role": "user"}], "answer": "a"}, "prompt: the chat template fails"),
        ('{"prompt": "\\ud800", "answer": "a"}', "prompt: .* valid Unicode"),
        ('{"prompt": "a", "answer": "\\udfff"}', "answer: .* valid Unicode"),
        *[
            (GOOD | {"grading": {"references": ["a"], name: "\ud800"}}, f"{name} must be valid")
            for name in ("question", "criterion")
        ],
        (GOOD | {"unit": "\udfff"}, "unit must be valid Unicode"),
        (GOOD | {"task": ""}, "task must be printable text"),
        (GOOD | {"task": 5}, "task must be printable text"),
        (GOOD | {"task": "a\nb"}, "task must be printable text"),
    ],
)
def test_a_malformed_line_is_named(
    tmp_path: Path, tokenizer: Tokenizer, line: Any, says: str
) -> None:
    path = write_lines(tmp_path / "f.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(ExampleError, match=says) as caught:
        from_jsonl(path, tokenizer)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_utf16_is_no_jsonl(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(json.dumps(GOOD).encode("utf-16"))
    with pytest.raises(ExampleError, match=r"f:1: not JSON: .* can't decode byte 0xff"):
        from_jsonl(tmp_path / "f")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"prompt": "a", "answer_ids": [1]}, "prompt is text, .* no tokenizer: give prompt_ids"),
        ({"prompt_ids": [1], "answer": "a"}, "answer is text, .* no tokenizer: give answer_ids"),
    ],
)
def test_text_without_a_tokenizer_is_refused(
    tmp_path: Path, line: dict[str, Any], says: str
) -> None:
    with pytest.raises(ExampleError, match=says):
        from_jsonl(write_lines(tmp_path / "f", line))


def test_messages_without_a_chat_template_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "f", {"prompt": MESSAGES, "answer": "a"})
    with pytest.raises(ExampleError, match="f:1: prompt: the tokenizer has no chat template"):
        from_jsonl(path, text_tokenizer("byte"))


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf\n"])
def test_a_file_without_examples_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ExampleError, match="f: no examples in this file"):
        from_jsonl(tmp_path / "f")


def test_a_missing_file_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        from_jsonl(tmp_path / "none")


@given(content=st.binary(max_size=40))
def test_any_bytes_are_examples_or_an_error_of_ours(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    with pytest.raises(SwaError):  # 40 random bytes are never an example
        from_jsonl(path)


# ---- JSONL that is written


@given(examples=st.lists(EXAMPLES, min_size=1, max_size=5, unique=True))
def test_written_examples_come_back(
    examples: list[Example], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.jsonl"
    write_jsonl(path, iter(examples))
    assert from_jsonl(path) == examples
    assert path.read_bytes().count(b"\n") == len(examples)


def test_a_written_line_by_hand(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "f", [Example((1, 2), (3,), "größer")])
    expected = '{"prompt_ids": [1, 2], "answer_ids": [3], "task": "größer"}\n'
    assert (tmp_path / "f").read_text(encoding="utf-8") == expected


# ---- the hash


def test_the_hash_is_of_the_ids_in_order() -> None:
    examples = [Example((1, 20), (3,), "a"), Example((4,), (5, 6), "b")]
    expected = hashlib.sha256(b"[[1,20],[3]]\n[[4],[5,6]]\n").hexdigest()
    assert content_hash(examples) == content_hash(iter(examples)) == expected
    assert content_hash([]) == hashlib.sha256().hexdigest()


@given(st.lists(EXAMPLES, max_size=4), st.lists(EXAMPLES, max_size=4))
def test_the_hash_tells_what_is_measured_apart_and_nothing_else(
    a: list[Example], b: list[Example]
) -> None:
    def measured(examples: list[Example]) -> list[Any]:
        return [(example.prompt_ids, example.answer_ids, example.grading) for example in examples]

    assert (content_hash(a) == content_hash(b)) == (measured(a) == measured(b))
    renamed = [Example(e.prompt_ids, e.answer_ids, "other", e.grading, "unit") for e in a]
    assert content_hash(renamed) == content_hash(a)


def test_the_hash_sees_where_the_answer_begins() -> None:
    assert content_hash([Example((1, 2), (3,))]) != content_hash([Example((1,), (2, 3))])


def test_a_grading_is_read_and_written(tmp_path: Path) -> None:
    grading = {"references": ["Oak"], "scorer": "exact"}
    path = write_lines(tmp_path / "f", GOOD | {"grading": grading}, GOOD | {"grading": None})
    graded, plain = from_jsonl(path)
    assert (graded.grading, plain.grading) == (Grading(("Oak",), "exact"), None)
    with pytest.raises(ExampleError, match=":2: there is no scorer 'x'"):
        from_jsonl(write_lines(path, GOOD, GOOD | {"grading": grading | {"scorer": "x"}}))
    with pytest.raises(ExampleError, match="grading must be"):
        Example((1,), (2,), "t", grading)  # type: ignore[arg-type]
    for unit in ("", 3):
        with pytest.raises(ExampleError, match="unit must be text"):
            from_jsonl(write_lines(path, GOOD | {"unit": unit}))


def test_the_hash_does_not_depend_on_the_type_of_ids() -> None:
    arrays = Example(np.array([1, 2]), np.array([3]))  # type: ignore[arg-type]
    assert content_hash([arrays]) == content_hash([Example((1, 2), (3,))])
