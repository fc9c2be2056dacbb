"""Calibration without answers: prompts from files, and the answers that the full model writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import swa
from swa.errors import ExampleError, InputError, SwaWarning
from swa.examples import Example, Prompt, from_jsonl, prompts_from_jsonl, self_answered


@pytest.fixture(scope="module")
def model(tiny) -> swa.Model:
    folder = tiny(tokenizer=True, chat_template=True, max_position_embeddings=4096)
    return swa.load(folder, dtype="float32", num_threads=1)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return np.random.default_rng(3).integers(0, 256, (3, 70)).tolist()


def test_the_answers_are_the_full_models_greedy_ones(model, prompts):
    examples = self_answered(model, prompts, max_new_tokens=6)
    assert [list(e.prompt_ids) for e in examples] == prompts
    for example in examples:
        assert 1 <= example.answer_len <= 6
        assert model.nll_example(example).is_greedy.all()
    sliding = model.patch(swa.AttentionPolicy(4))
    assert any(not sliding.nll_example(example).is_greedy.all() for example in examples)
    assert self_answered(sliding, prompts, max_new_tokens=6) == examples


def test_prompts_of_any_kind(model):
    message = [{"role": "user", "content": "Where?"}]
    asked = ["Where?", message, [1, 2, 3], Prompt((1, 2, 3), "ids"), Example((1,), (2,), "old")]
    examples = self_answered(model, asked, max_new_tokens=2)
    encode = model.tokenizer.encode_prompt
    expected = [tuple(encode("Where?")), tuple(encode(message)), (1, 2, 3), (1, 2, 3), (1,)]
    assert [e.prompt_ids for e in examples] == expected
    assert [e.task for e in examples] == ["default", "default", "default", "ids", "old"]


def test_an_answer_ends_before_the_token_that_ends_it(model, prompts):
    whole = self_answered(model, prompts[:1], max_new_tokens=6)[0].answer_ids
    end = next(i for i in range(1, 6) if whole[i] not in whole[:i])
    ending = replace(model, stop_ids=frozenset({whole[end]}))
    assert self_answered(ending, prompts[:1], max_new_tokens=6)[0].answer_ids == whole[:end]


def test_prompts_answered_with_nothing_are_left_out(model, prompts):
    first = self_answered(model, prompts[:1], max_new_tokens=1)[0].answer_ids[0]
    silent = replace(model, stop_ids=frozenset({first}))
    with pytest.warns(SwaWarning, match="prompts 0$"):
        left = self_answered(silent, prompts, max_new_tokens=1)
    assert [list(e.prompt_ids) for e in left] == prompts[1:]
    with pytest.raises(ExampleError, match="at once, to every prompt"):
        self_answered(silent, prompts[:1], max_new_tokens=1)


def test_what_cannot_be_answered_is_refused_before_the_first_answer(model, prompts):
    with pytest.raises(ExampleError, match="no prompts"):
        self_answered(model, [])
    with pytest.raises(InputError, match="prompt 1 has 4090 tokens.*exceeds the model's 4096"):
        self_answered(model, [prompts[0], [1] * 4090], max_new_tokens=7)
    with pytest.raises(ExampleError, match="integers"):
        self_answered(model, [[1.5]])
    with pytest.raises(ExampleError, match="empty"):
        self_answered(model, [[]])


def test_files_may_lack_answers(tmp_path: Path, model):
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "Where?", "task": "t"},
        {"prompt_ids": [1, 2], "answer": 3},
        {"prompt": [{"role": "user", "content": "Where?"}], "answer_ids": [7]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = prompts_from_jsonl(path, model.tokenizer)
    encode = model.tokenizer.encode_prompt
    chat = tuple(encode([{"role": "user", "content": "Where?"}]))
    assert found == [Prompt(tuple(encode("Where?")), "t"), Prompt((1, 2)), Prompt(chat)]
    assert repr(found[1]) == "Prompt(default: 2 tokens)"
    with pytest.raises(ExampleError, match=":1: give either 'answer' or 'answer_ids'"):
        from_jsonl(path, model.tokenizer)
    path.write_text(json.dumps({"prompt_ids": [1], "task": 3}))
    with pytest.raises(ExampleError, match=":1: task"):
        prompts_from_jsonl(path)
