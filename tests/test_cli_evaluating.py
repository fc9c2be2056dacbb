"""`swa answer` and `swa eval`: replies, and examples that the model answers itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import swa
from swa.cli import main
from swa.errors import JudgeError
from swa.suites import SUITES, examples

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


# ---- suites


def test_the_suites_are_listed(capsys):
    assert main(["eval", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SUITES)


def test_a_suite_by_task_and_length(here, checkpoint, capsys):
    run = ["eval", checkpoint, *RUN, "--suite", "ruler", "--tasks", "niah_single_1,vt"]
    run += ["--lengths", "1300,1500", "--seed", "3", "--generate", "--sliding-window", "16"]
    assert main([*run, "--json"]) == 0
    captured = capsys.readouterr()
    assert "ruler: 4 examples of up to" in captured.err
    model = swa.load(checkpoint, dtype="float32", num_threads=1)
    made = examples(
        "ruler", model.tokenizer, tasks=["niah_single_1", "vt"], lengths=[1300, 1500], seed=3
    )
    expected = swa.evaluate(model, made, policy=swa.AttentionPolicy(16), generate=True)
    assert json.loads(captured.out) == expected.to_dict()
    assert main(run) == 0
    table = capsys.readouterr().out
    for cell in ("vt 1300", "niah_single_1 1500", "score", f"{expected.nll:.3f}", "all"):
        assert cell in table


def test_a_suite_of_files(here, checkpoint, capsys):
    entry = {"input": "Ann went home. " * 4, "question": "Where is Ann?", "target": "kitchen"}
    for name in ("qa1.json", "qa2.json"):
        Path(name).write_text(json.dumps([entry, entry]))
    run = ["eval", checkpoint, *RUN, "--suite", "babilong", "--file", "qa1.json", "--json"]
    assert main([*run, "--file", "qa2.json", "--examples-per-task", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == ["qa1", "qa2"]
    Path("qa1.json").write_text(json.dumps([entry, entry | {"target": None}]))
    assert "qa1.json: entry 1: target is missing" in fails(run, capsys)


@pytest.mark.parametrize("suite", ["needle", "perplexity"])
def test_charts(here, checkpoint, suite, capsys):
    run = ["eval", checkpoint, *RUN, "--suite", suite, "--lengths", "700", "--json"]
    run += ["--depths", "0,1"] if suite == "needle" else []
    assert main([*run, "--plot", "chart.svg"]) == 0
    captured = capsys.readouterr()
    assert "wrote chart.svg" in captured.err
    found = swa.Evaluation.from_dict(json.loads(captured.out))
    expected = ["needle 700 at 0", "needle 700 at 1"] if suite == "needle" else "tokens 612-699"
    assert list(found.tasks) == expected if suite == "needle" else found.tasks[-1] == expected
    assert "<svg" in Path("chart.svg").read_text()


def test_judged_replies(here, checkpoint, capsys, monkeypatch):
    asked = []

    def judge(self, grading, reply):
        asked.append((self.url, self.model, self.key_variable, reply))
        return True

    monkeypatch.setattr("swa.judge.EndpointJudge.__call__", judge)
    monkeypatch.setenv("MY_KEY", "x")
    Path("examples.jsonl").write_text(json.dumps({"prompt": "one", "answer": "four"}))
    run = ["eval", checkpoint, *RUN, "--examples", "examples.jsonl", "--generate", "--json"]
    options = ["--scorer", "judge", "--judge-url", "https://host/v1", "--judge-model", "m"]
    assert main([*run, *options, "--judge-key-variable", "MY_KEY"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert asked == [("https://host/v1", "m", "MY_KEY", found["replies"][0])]
    assert found["score"] == 1.0
    assert found["judge"] == "m at host/v1"

    def unreachable(self, grading, reply):
        raise JudgeError("the judge m at host: cannot be reached")

    monkeypatch.setattr("swa.judge.EndpointJudge.__call__", unreachable)
    assert "cannot be reached" in fails([*run, *options], capsys, code=1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--file", "x"], "--file shapes a suite"),
        (["--lengths", "99"], "--lengths shapes a suite"),
        (["--depths", "0.5"], "--depths shapes a suite"),
        (["--suite", "ruler", "--examples", "x"], "not both"),
        (["--suite", "ruler", "--prompt-tokens", "9"], "takes --lengths"),
        (["--examples", "x", "--tasks", "num"], "not from a file"),
        (["--plot", "x.png"], "--plot draws"),
        (["--suite", "ruler", "--plot", "x.png"], "--plot draws"),
        (["--suite", "frames"], "no suite 'frames': choose from ruler, needle"),
        (["--judge-model", "m"], "needs --judge-url"),
        (["--judge-url", "https://host"], "needs --judge-model"),
        (["--judge-url", "host", "--judge-model", "m", "--generate"], "https://host/v1"),
        (["--judge-url", "https://host", "--judge-model", "m"], "give --generate"),
        (["--scorer", "exact"], "give --generate"),
    ],
)
def test_options_that_do_not_go_together(here, options, says, capsys):
    assert says in fails(["eval", "no-model", *options], capsys)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--suite", "ruler", "--lengths", "x"], "--lengths takes integers"),
        (["--suite", "needle", "--depths", "x"], "--depths takes numbers"),
        (["--suite", "ruler", "--tasks", "num"], "no task 'num'"),
        (["--tasks", "vt"], "no task 'vt'"),
        (["--suite", "longmemeval"], "published files"),
        (["--suite", "perplexity", "--lengths", "600", "--generate"], "no replies to generate"),
    ],
)
def test_bad_requests_of_a_suite(here, checkpoint, options, says, capsys):
    assert says in fails(["eval", checkpoint, *RUN, *options], capsys)


def test_tasks_of_the_built_in_mix(here, checkpoint, capsys):
    run = ["eval", checkpoint, *RUN, "--tasks", "words,num", "--prompt-tokens", "700", "--json"]
    assert main(run) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == ["words", "num"]
