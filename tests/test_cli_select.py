"""`swa select` on the command line: from scores, and from a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import interrupt

import swa
from swa.cli import main
from swa.strategies import STRATEGIES

POLICY = ["--sliding-window", "16", "--sink-tokens", "2"]
RUN = [*POLICY, "--dtype", "float32", "--threads", "1"]


@pytest.fixture(scope="module")
def checkpoint(tiny) -> str:
    return str(tiny(tokenizer=True, max_position_embeddings=4096))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lines = [
        {"prompt_ids": [(i * k) % 40 for k in range(64)], "answer_ids": [3, i]} for i in range(1, 4)
    ]
    Path("e.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_list_names_every_strategy(capsys):
    assert main(["select", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(STRATEGIES)
    assert all(len(line.split()) > 3 for line in lines)


def test_a_model_is_searched(checkpoint, capsys):
    command = ["select", checkpoint, "--examples", "e.jsonl", *RUN, "--layers", "2"]
    assert main([*command, "--out", "joint.json"]) == 0
    captured = capsys.readouterr()
    assert "strategy joint, budget 2 layers" in captured.out
    assert "first-order top-k" in captured.out and "prefills an example" in captured.out
    assert "wrote joint.json" in captured.err

    model = swa.load(checkpoint, dtype="float32", num_threads=1)
    policy = swa.AttentionPolicy(sliding_window=16, num_sink_tokens=2)
    examples = swa.examples.from_jsonl("e.jsonl")
    expected = swa.select(model, examples, policy, swa.Budget(full_attention_layers=2))
    found = swa.Selection.load("joint.json")
    assert found == expected
    patched = model.patch(found)
    assert found.search is not None
    nll = swa.evaluate(patched, examples).nll_per_example
    assert list(nll) == list(found.search.loss_chosen)  # bit for bit


def test_interrupted_and_resumed(here, checkpoint):
    """Ctrl-C once the journal holds something; the same command ends in the same file."""
    long = [{"prompt_ids": [k * i % 40 for k in range(3000)], "answer_ids": [i]} for i in range(30)]
    Path("long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in long))
    command = ["select", checkpoint, "--examples", "long.jsonl", *RUN, "--layers", "2"]
    journal = here / "policy.json.journal"
    last = interrupt(command, journal, 4).splitlines()[-1]
    assert "policy.json.journal" in last and "repeat the command to go on" in last
    assert not (here / "policy.json").exists()
    before = journal.read_bytes()
    assert main([*command, "--out", "kept.json", "--journal", str(journal)]) == 0
    assert journal.read_bytes().startswith(before)
    assert main(command) == 0
    assert not journal.exists()  # it was by default
    assert swa.Selection.load("policy.json") == swa.Selection.load("kept.json")


def test_strategies_objectives_and_budgets(checkpoint, capsys):
    command = ["select", checkpoint, "--examples", "e.jsonl", *RUN, "--json"]
    for options, budget in (
        (["--fraction", "0.5", "--strategy", "periodic:offset=1"], {"fraction": 0.5}),
        (["--nll-increase", "1"], {"nll_increase": 1.0}),
        (
            ["--layers", "1", "--objective", "kl", "--tail-tokens", "4"],
            {"full_attention_layers": 1},
        ),
        (
            ["--prefill-flops", "0.99", "--at-tokens", "500", "--strategy", "first"],
            {"prefill_flops": 0.99, "prompt_tokens": 500},
        ),
    ):
        assert main([*command, *options]) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["budget"] == budget
        assert data["policy"] == swa.AttentionPolicy.load("policy.json").to_dict()
        assert data["search"]["objective"] == ("kl" if "kl" in options else "nll")
    assert main([*command, "--layers", "9"]) == 2
    assert "the model has 4" in capsys.readouterr().err


def test_kv_bytes_need_windowed_decode(checkpoint, capsys):
    command = ["select", checkpoint, "--examples", "e.jsonl", "--sliding-window", "16"]
    command += ["--kv-bytes", "1000000", "--at-tokens", "2000", "--strategy", "last"]
    assert main(command) == 2
    assert "nothing is saved" in capsys.readouterr().err
    assert main([*command, "--consumer", "vllm"]) == 0


def test_scores_of_the_model_are_taken_into_account(checkpoint, capsys):
    score = ["score", checkpoint, "--examples", "e.jsonl", *RUN]
    assert main(score) == 0
    select = ["select", checkpoint, "--examples", "e.jsonl", *RUN, "--layers", "2"]
    assert main([*select, "--scores", "scores.json"]) == 0
    assert "exact top-k" in capsys.readouterr().out
    assert main(["select", "scores.json", "--layers", "2", "--strategy", "last"]) == 0
    assert "[2, 3] (last)" in capsys.readouterr().out
    other = [*select, "--tail-tokens", "3", "--scores", "scores.json"]
    assert main(other) == 2
    assert "another policy: num_tail_tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give a MODEL, or a SCORES file"),
        (["./model", "--layers", "1"], "give --sliding-window"),
        (["scores.json", "--layers", "1", "--sliding-window", "8"], "has its policy"),
        (["scores.json", "--layers", "1", "--fraction", "0.5"], "give one budget"),
        (["./model", *POLICY, "--kv-bytes", "5"], "kv_bytes holds at a length"),
        (["./model", *POLICY, "--kv-bytes", "5", "--at-tokens", "9" * 20], "prompt_tokens must be"),
        (["./model", *POLICY, "--layers", "1", "--at-tokens", "5"], "says nothing beside"),
        (["./model", *POLICY, "--layers", "1", "--objective", "bleu"], "--objective"),
        (["scores.json", "--layers", "1", "--journal", "j"], "--journal"),
        (["scores.json", "--layers", "1", "--objective", "kl"], "leave out --objective, "),
        (["scores.json", "--layers", "1", "--prompt-tokens", "9"], "leave out --prompt-tokens, "),
        (["scores.json", "--layers", "1", "--tokenizer", "t"], "leave out --tokenizer, "),
        (["scores.json", "--layers", "1", "--sink-tokens", "0"], "leave out --sink-tokens, "),
        (["./model", *POLICY, "--layers", "1", "--out", "absent/p.json"], "does not exist"),
    ],
)
def test_bad_input_is_one_line(arguments, says, capsys):
    assert main(["select", *arguments]) == 2
    err = capsys.readouterr().err
    assert says in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--consumer", "vllm", "--tail-tokens", "4,64"], "leave out --sink-tokens, --tail-tokens"),
        (["--decode", "window", "--tail-tokens", "0,64"], "num_tail_tokens=64 cannot be had"),
        (["--tail-tokens", "4,x"], "--tail-tokens takes integers"),
    ],
)
def test_tails_that_a_frontier_cannot_have(options, says, capsys):
    assert main(["pareto", "./model", "--sliding-window", "8", *options]) == 2
    err = capsys.readouterr().err
    assert says in err and len(err.splitlines()) == 1
