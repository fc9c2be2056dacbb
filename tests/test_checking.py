"""The commands about how far scores can be trusted, and the options of `swa score` beside them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import swa
import swa.noise
from swa.cli import main

SCORE = ["--sliding-window", "16", "--sink-tokens", "2", "--threads", "1"]


@pytest.fixture(scope="session")
def checkpoint(tiny) -> str:
    return str(tiny(tokenizer=True, chat_template=True, max_position_embeddings=4096))


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("examples") / "examples.jsonl"
    lines = [
        {"prompt": f"The key of box {i} is {i * 37}. " + "Grass is green. " * 8, "answer": f"{i}"}
        for i in range(6)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_stability_of_a_scores_file(here, checkpoint, examples, capsys):
    assert main(["score", checkpoint, "--examples", examples, *SCORE]) == 0
    capsys.readouterr()
    scores = swa.LayerScores.load("scores.json")
    expected = swa.selection_stability(scores, swa.Budget(full_attention_layers=2), seed=1)
    command = ["stability", "scores.json", "--layers", "2", "--seed", "1"]
    assert main([*command, "--plot", "s.png"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{expected!r}\n"
    assert "wrote s.png" in err
    assert Path("s.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frequency"] == list(expected.frequency)
    assert main(["stability", "scores.json"]) == 2
    assert main(["stability", "scores.json", "--layers", "9"]) == 2


def test_the_noise_floor_is_measured_and_kept(here, checkpoint, examples, capsys):
    command = ["score", checkpoint, "--examples", examples, *SCORE, "--noise-floor", "2"]
    assert main(command) == 0
    scores = swa.LayerScores.load("scores.json")
    used = swa.examples.from_jsonl(examples, swa.load(checkpoint).tokenizer)
    reference = swa.load(checkpoint, dtype="float32")
    assert scores.noise_floor == swa.noise.measure_noise_floor(
        scores, used, reference, n_examples=2
    )
    assert 0 < scores.noise_floor < 0.1
    assert re.search(r"--noise-floor 2\b", scores.command)
    assert "within rounding" in capsys.readouterr().out
    assert not Path("scores.json.journal").exists()
    assert main([*command, "--out", "f.json", "--dtype", "float32"]) == 2
    assert "leave out --dtype float32" in capsys.readouterr().err


def test_a_sweep_that_stops_when_it_knows(here, checkpoint, examples, capsys):
    stop = ["--stop-at-confidence", "0.9", "--layers", "1", "--tolerance", "30"]
    assert main(["score", checkpoint, "--examples", examples, *SCORE, *stop]) == 0
    scores = swa.LayerScores.load("scores.json")
    model = swa.load(checkpoint, num_threads=1)
    expected = swa.score_layers(
        model,
        swa.examples.from_jsonl(examples, model.tokenizer),
        swa.AttentionPolicy(16, num_sink_tokens=2),
        stop=swa.AdaptiveStop(swa.Budget(full_attention_layers=1), 0.9, 30.0),
    )
    assert scores.adaptive == expected.adaptive
    assert scores.adaptive.is_decided and len(scores.tasks) < 6
    assert "examples were enough to know the top 1 layers at 90%" in capsys.readouterr().out
    assert main([*shlex.split(scores.command)[1:], "--out", "again.json"]) == 0
    assert Path("again.json").read_bytes() == Path("scores.json").read_bytes()
    for wrong in (stop[2:], stop[:2], ["--stop-at-confidence", "95", "--layers", "1"]):
        assert main(["score", checkpoint, *SCORE, *wrong, "--out", "x.json"]) == 2
