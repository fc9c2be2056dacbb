"""The commands about how far scores can be trusted, and the options of `swa score` beside them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import swa
import swa.noise
from swa import cost
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
        for i in range(10)
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
    assert scores.adaptive.is_decided and len(scores.tasks) == 8
    assert "8 of 10 examples were enough for the top 1 layers" in capsys.readouterr().out
    assert main([*shlex.split(scores.command)[1:], "--out", "again.json"]) == 0
    assert Path("again.json").read_bytes() == Path("scores.json").read_bytes()
    for wrong in (stop[2:], stop[:2], ["--stop-at-confidence", "95", "--layers", "1"]):
        assert main(["score", checkpoint, *SCORE, *wrong, "--out", "x.json"]) == 2


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ([], 10),  # of the narrowest layer, with its sinks
        (["--base", "0"], 42),  # which is not flipped
        (["--stop-at-confidence", "0.9", "--layers", "1", "--tolerance", "30"], 42),
    ],
)
def test_the_memory_of_several_windows(
    here, checkpoint, examples, capsys, monkeypatch, options, rows
):
    """A rule may settle the narrow layer, and the others then share more rows."""

    def of_rows(self, n_tokens, kind="nll", policy=None, flips=None):
        return (cost.shared_rows(policy, 4, flips, n_tokens) if kind == "sweep" else 1) << 20

    monkeypatch.setattr(swa.Model, "memory_required", of_rows)
    windows = ["--sliding-window", "8,40,40,40", "--sink-tokens", "2", "--threads", "1"]
    assert main(["score", checkpoint, "--examples", examples, *windows, *options]) == 0
    assert f" {rows} MiB of memory" in capsys.readouterr().err


def test_two_scores_files_compared(here, checkpoint, examples, capsys):
    for out, window in (("a.json", "16"), ("b.json", "24")):
        command = ["score", checkpoint, "--examples", examples, "--threads", "1", "--out", out]
        assert main([*command, "--sliding-window", window]) == 0
    capsys.readouterr()
    budget = swa.Budget(full_attention_layers=2)
    loaded = [swa.LayerScores.load(name) for name in ("a.json", "b.json")]
    expected = swa.rank_agreement(*loaded, budget)
    assert main(["agree", "a.json", "b.json", "--layers", "2"]) == 0
    assert capsys.readouterr().out == f"{expected!r}\n"
    assert main(["agree", "a.json", "b.json", "--layers", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["spearman"] == expected.spearman
    assert main(["agree", "a.json", "missing.json", "--layers", "2"]) == 2


BUILT_IN = ["--sliding-window", "100", "--layers", "1", "--threads", "1", "--prompt-tokens", "800"]


def test_the_length_control(here, checkpoint, capsys):
    command = ["control", checkpoint, *BUILT_IN, "--scales"]
    assert main([*command, "0.8", "--plot", "c.png"]) == 0
    out, _ = capsys.readouterr()
    assert re.findall(r"^  (in proportion|kept) +(\d+) +(\d+) ", out, re.M) == [
        ("in proportion", "640", "80"),
        ("kept", "640", "100"),
    ]
    assert Path("c.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "0.9,x"]) == 2
    assert main([*command, "1.5"]) == 2


def test_the_transfer_matrix(here, checkpoint, examples, capsys):
    assert main(["transfer", checkpoint, *BUILT_IN, "--plot", "t.png"]) == 0
    out, _ = capsys.readouterr()
    rows = [line.split()[0] for line in out.splitlines()[2:]]
    assert rows == ["num", "num4", "words", "copy", "all"]
    assert Path("t.png").read_bytes().startswith(b"\x89PNG")
    command = ["transfer", checkpoint, *SCORE, "--layers", "1"]
    Path("heldout.jsonl").write_text(Path(examples).read_text().replace("box", "chest"))
    domain = ["--domain", f"boxes={examples},heldout.jsonl"]
    assert main([*command, *domain, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["layers"]) == ["boxes"]
    assert len(found["layers"]["boxes"]) == 1
    assert main([*command, "--domain", f"boxes={examples}"]) == 2
    assert main([*command, *domain, "--prompt-tokens", "300"]) == 2
    capsys.readouterr()
    assert main([*command, "--domain", f"boxes={examples},{examples}"]) == 2
    assert "10 held-out examples of the domain 'boxes'" in capsys.readouterr().err
    assert main([*command, *domain, "--domain", "boxes=a,b"]) == 2
    assert "the name 'boxes' is given twice" in capsys.readouterr().err
