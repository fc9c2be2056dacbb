"""`swa answer` and `swa eval`: replies, and examples that the model answers itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import swa
from swa.cli import main

RUN = ["--dtype", "float32", "--threads", "1"]


@pytest.fixture(scope="session")
def checkpoint(tiny) -> str:
    return str(tiny(tokenizer=True, chat_template=True, max_position_embeddings=4096))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The last line on stderr of a command that must fail and print nothing."""
    capsys.readouterr()
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("swa: error: ")
    return captured.err.splitlines()[-1]


def test_answers_become_examples_that_can_be_scored(here, checkpoint, capsys):
    lines = [{"prompt": f"What is {i} plus {i}?", "task": "sum"} for i in range(3)]
    Path("prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = ["answer", checkpoint, "--prompts", "prompts.jsonl", *RUN, "--max-new-tokens", "5"]
    assert main([*run, "--out", "made.jsonl"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("3 of 3 prompts answered")
    assert "made.jsonl" in captured.err
    model = swa.load(checkpoint, dtype="float32", num_threads=1)
    asked = swa.examples.prompts_from_jsonl("prompts.jsonl", model.tokenizer)
    made = swa.examples.from_jsonl("made.jsonl")
    assert made == swa.examples.self_answered(model, asked, max_new_tokens=5)
    assert {example.task for example in made} == {"sum"}
    assert main(["eval", checkpoint, "--examples", "made.jsonl", *RUN, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["greedy_match"] == 1.0
    assert "--force" in fails([*run, "--out", "made.jsonl"], capsys)
    assert main([*run, "--out", "made.jsonl", "--force", "--json"]) == 0
    tokens = sum(example.answer_len for example in made)
    expected = {"examples": 3, "left_out": 0, "answer_tokens": tokens, "out": "made.jsonl"}
    assert json.loads(capsys.readouterr().out) == expected
    assert "absent" in fails([*run, "--out", "absent/made.jsonl"], capsys)


def test_replies_on_request(here, checkpoint, capsys):
    line = {"prompt": "one two three", "answer": "four", "grading": {"references": ["e"]}}
    Path("examples.jsonl").write_text(json.dumps(line))
    run = ["eval", checkpoint, "--examples", "examples.jsonl", *RUN, "--json"]
    assert main(run) == 0
    assert "replies" not in json.loads(capsys.readouterr().out)
    assert main([*run, "--generate"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = swa.load(checkpoint, dtype="float32", num_threads=1)
    reply = model.generate("one two three", max_new_tokens=128).text
    assert found["replies"] == [reply]
    assert found["score"] == float("e" in reply.lower())
