"""The command line: the steps end to end, what goes to stdout, exit codes, interruption."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import swa
from swa.cli import main

LAYERS = 4
SCORE = ["--sliding-window", "16", "--sink-tokens", "2", "--dtype", "float32", "--threads", "1"]
RUN = ["--dtype", "float32", "--threads", "1"]


@pytest.fixture(scope="session")
def checkpoint(tiny) -> str:
    return str(tiny(tokenizer=True, chat_template=True, max_position_embeddings=4096))


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("examples") / "examples.jsonl"
    lines = [
        {
            "prompt": f"The key of box {i} is {i * 37}. " + "Grass is green. " * 8,
            "answer": f"{i * 37}",
        }
        for i in range(3)
    ]
    path.write_text("".join(json.dumps(line | {"task": "keys"}) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def scored(here: Path, checkpoint: str, examples: str, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["score", checkpoint, "--examples", examples, *SCORE]) == 0
    capsys.readouterr()
    return here / "scores.json"


def swa_process(*arguments: str, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "swa.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line on stderr of a command that must fail without saying anything else."""
    capsys.readouterr()
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines
    assert lines[-1].startswith("swa: error: ")
    assert len([line for line in lines if "error" in line]) == 1
    assert "Traceback" not in captured.err
    return lines[-1]


def test_the_steps_end_to_end(here, checkpoint, examples, capsys):
    score = ["score", checkpoint, "--examples", examples, "--out", "s.json", *SCORE]
    assert main(score) == 0
    scores = swa.LayerScores.load("s.json")
    out, err = capsys.readouterr()
    assert out == f"{scores!r}\n"
    assert "MiB of memory" in err
    assert sorted(path.name for path in here.iterdir()) == ["s.json"]  # the journal is gone
    assert scores.policy == swa.AttentionPolicy(16, num_sink_tokens=2)
    assert scores.tasks == ("keys",) * 3

    assert main(["select", "s.json", "--layers", "2", "--out", "p.json"]) == 0
    chosen = swa.select(scores, swa.Budget(full_attention_layers=2))
    assert capsys.readouterr().out == f"{chosen!r}\n"
    assert swa.AttentionPolicy.load("p.json") == chosen.policy

    evaluate = ["eval", checkpoint, "--policy", "p.json", "--examples", examples, *RUN, "--json"]
    assert main(evaluate) == 0
    out, err = capsys.readouterr()
    (here / "chosen.json").write_text(out)
    assert "warning" not in err
    model = swa.load(checkpoint, dtype="float32", num_threads=1)
    used = swa.examples.from_jsonl(examples, model.tokenizer)
    expected = swa.evaluate(model, used, policy=chosen.policy).to_dict()
    assert json.loads(out) == expected
    assert {"nll", "nll_per_example", "greedy_match"} <= expected.keys()

    report = ["report", "s.json", "--policy", "p.json", "--evaluation", "chosen two=chosen.json"]
    assert main([*report, "--out", "r.html"]) == 0
    page = (here / "r.html").read_text()
    assert f"{expected['nll']:.3f}" in page
    assert "chosen two" in page
    recorded = re.search(r"<pre>(.*)", page)[1].replace("&#39;", "'")
    assert shlex.split(recorded)[:5] == ["swa", "score", checkpoint, "--examples", examples]


def test_the_recorded_command_gives_the_same_scores(scored, capsys):
    scores = swa.LayerScores.load(scored)
    assert main([*shlex.split(scores.command)[1:], "--out", "again.json"]) == 0
    assert Path("again.json").read_bytes() == scored.read_bytes()


def test_json_is_all_of_stdout(here, checkpoint, examples, capsys):
    assert main(["score", checkpoint, "--examples", examples, *SCORE, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(Path("scores.json").read_text())
    wanted = {"delta", "delta_per_example", "nll_base", "nll_full", "nll_swa", "direction", "base"}
    wanted |= {"sliding_window", "num_sink_tokens", "num_tail_tokens", "decode"}
    assert wanted <= printed.keys()
    assert main(["select", "scores.json", "--fraction", "0.5", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 2
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == swa.__version__
    assert main(["generate", checkpoint, "hello", *RUN, "--max-new-tokens", "3", "--json"]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert reply.keys() == {"text", "ids", "finish_reason"}
    assert len(reply["ids"]) <= 3


def test_without_examples_the_built_in_mix_is_used_and_said(here, checkpoint, capsys):
    built_in = ["--examples-per-task", "1", "--prompt-tokens", "900", "--seed", "3"]
    assert main(["score", checkpoint, *SCORE, *built_in]) == 0
    assert (
        "built-in retrieval tasks (num, num4, words, copy; calibration" in capsys.readouterr().err
    )
    scores = swa.LayerScores.load("scores.json")
    assert scores.tasks == ("num", "num4", "words", "copy")
    assert shlex.join(built_in[:4]) in scores.command
    assert scores.seed == 3
    assert main(["eval", checkpoint, *RUN, *built_in, "--json"]) == 0
    captured = capsys.readouterr()
    assert "heldout" in captured.err
    assert json.loads(captured.out)["examples_hash"] != scores.examples_hash


def test_directions_bases_and_consumers(here, checkpoint, examples, capsys):
    run = ["score", checkpoint, "--examples", examples, *RUN, "--sliding-window", "16"]
    assert main([*run, "--base", "1,3", "--out", "a.json"]) == 0
    restored = swa.LayerScores.load("a.json")
    assert restored.base == (1, 3)
    assert "--base 1,3" in restored.command
    assert main(["select", "a.json", "--layers", "3"]) == 0
    assert {1, 3} <= set(swa.AttentionPolicy.load("policy.json").full_attention_layers)
    assert main([*run, "--direction", "ablate", "--out", "b.json"]) == 0
    assert swa.LayerScores.load("b.json").base == tuple(range(LAYERS))
    assert main([*run, "--consumer", "vllm", "--out", "c.json"]) == 0
    stock = swa.LayerScores.load("c.json").policy
    assert stock == swa.AttentionPolicy.for_consumer("vllm", sliding_window=16)
    run[-1] = "16,8,16,8"
    assert main([*run, "--out", "d.json"]) == 0
    assert swa.LayerScores.load("d.json").policy.sliding_window == (16, 8, 16, 8)


def test_eval_warns_when_the_policy_applied_was_not_the_one_scored(
    scored, checkpoint, examples, capsys
):
    assert main(["select", "scores.json", "--layers", "1"]) == 0
    capsys.readouterr()
    run = ["eval", checkpoint, "--examples", examples, "--policy", "policy.json", *RUN, "--json"]
    assert main([*run, "--tail-tokens", "8"]) == 0
    out, err = capsys.readouterr()
    assert "num_tail_tokens 8 against 0" in err
    chosen = swa.AttentionPolicy.load("policy.json")
    applied = swa.AttentionPolicy.from_dict(json.loads(out)["policy"])
    assert applied == swa.AttentionPolicy(16, 2, 8, layer_types=chosen.layer_types)
    assert main([*run, "--consumer", "vllm"]) == 0
    applied = swa.AttentionPolicy.from_dict(json.loads(capsys.readouterr().out)["policy"])
    assert applied.consumer == "vllm"
    assert applied.sliding_window == 16
    assert applied.layer_types == chosen.layer_types


def test_eval_without_a_file_takes_a_policy_from_the_options(here, checkpoint, examples, capsys):
    run = ["eval", checkpoint, "--examples", examples, *RUN, "--json"]
    assert main(run) == 0
    assert json.loads(capsys.readouterr().out)["policy"] is None
    assert main([*run, "--sliding-window", "16"]) == 0
    applied = swa.AttentionPolicy.from_dict(json.loads(capsys.readouterr().out)["policy"])
    assert applied.full_attention_layers in (None, ())
    assert "--sliding-window" in fails([*run, "--sink-tokens", "4"], capsys)


def test_generate_streams_and_reads_stdin(here, checkpoint, capsys, monkeypatch):
    import io

    run = ["generate", checkpoint, *RUN, "--max-new-tokens", "5"]
    model = swa.load(checkpoint, dtype="float32", num_threads=1)
    message = [{"role": "user", "content": "hello"}]
    assert main([*run, "hello"]) == 0
    assert capsys.readouterr().out == model.generate(message, max_new_tokens=5).text + "\n"
    assert main([*run, "hello", "--raw"]) == 0
    assert capsys.readouterr().out == model.generate("hello", max_new_tokens=5).text + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert main([*run, "-", "--temperature", "0.8", "--seed", "4"]) == 0
    sampled = model.generate(message, max_new_tokens=5, do_sample=True, temperature=0.8, seed=4)
    assert capsys.readouterr().out == sampled.text + "\n"


def test_generate_under_a_policy(scored, checkpoint, capsys):
    assert main(["select", "scores.json", "--layers", "0"]) == 0
    run = ["generate", checkpoint, *RUN, "--max-new-tokens", "8", "--raw", "--json"]
    prompt = "a long enough prompt for the window to matter " * 3
    capsys.readouterr()
    assert main([*run, "--policy", "policy.json", prompt]) == 0
    patched = json.loads(capsys.readouterr().out)["ids"]
    model = swa.load(checkpoint, dtype="float32", num_threads=1)
    policy = swa.AttentionPolicy.load("policy.json")
    assert patched == list(model.patch(policy).generate(prompt, max_new_tokens=8).ids)
    assert patched != list(model.generate(prompt, max_new_tokens=8).ids)


def test_info_names_version_threads_and_tier(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert swa.__version__ in out
    for name in ("tiers_built", "tiers_supported", "tier", "num_threads", "compiler", "flags"):
        assert re.search(rf"^{name}\s", out, re.MULTILINE)


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"swa {swa.__version__}\n"
    for arguments in ([], ["--help"], ["score", "-h"]):
        assert main(arguments) == 0
        assert "Usage: swa" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["frobnicate"], "frobnicate"),
        (["score"], "MODEL"),
        (["score", "m"], "--sliding-window"),
        (["score", "m", "--sliding-window", "16", "--dtype", "int8"], "--dtype"),
        (["score", "m", "--sliding-window", "x"], "integers separated by commas, not 'x'"),
        (["score", "m", "--sliding-window", "0"], "sliding_window"),
        (["score", "m", "--sliding-window", "16", "--base", "1;2"], "--base"),
        (["score", "m", "--sliding-window", "16", "--consumer", "x"], "consumer"),
        (
            ["score", "m", "--sliding-window", "9", "--consumer", "vllm", "--sink-tokens", "4"],
            "stock",
        ),
        (
            ["score", "m", "--sliding-window", "9", "--decode", "window", "--tail-tokens", "1"],
            "tail",
        ),
        (["score", "./missing", "--sliding-window", "16"], "missing"),
        (["select", "missing.json", "--layers", "1"], "missing.json"),
        (["select", "missing.json"], "--layers"),
        (["report", "missing.json"], "missing.json"),
        (["eval", "./missing", "--policy", "missing.json"], "missing.json"),
        (["generate", "./missing", "hi"], "missing"),
        (["demo", "--model", "./missing"], "missing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, says, here, capsys):
    assert says in fails(arguments, capsys)


def test_bad_files_are_named(scored, checkpoint, examples, capsys):
    Path("broken.json").write_text("{")
    Path("list.json").write_text("[]")
    for name in ("broken.json", "list.json"):
        assert name in fails(["select", name, "--layers", "1"], capsys)
        assert name in fails(["report", "scores.json", "--policy", name], capsys)
        assert name in fails(["report", "scores.json", "--evaluation", f"x={name}"], capsys)
        assert name in fails(["eval", checkpoint, "--policy", name], capsys)
    assert "NAME=FILE" in fails(["report", "scores.json", "--evaluation", "x"], capsys)
    assert "has 4" in fails(["select", "scores.json", "--layers", "9"], capsys)
    both = ["--policy", "policy.json", "--layers", "1"]
    assert "leave out --layers" in fails(["report", "scores.json", *both], capsys)
    Path("bad.jsonl").write_text('{"prompt": "x"}\n')
    assert "bad.jsonl" in fails(["eval", checkpoint, "--examples", "bad.jsonl", *RUN], capsys)
    mixed = ["eval", checkpoint, "--examples", examples, "--prompt-tokens", "9", *RUN]
    assert "built-in mix" in fails(mixed, capsys)
    long = ["eval", checkpoint, *RUN, "--prompt-tokens", "99999999"]
    assert "do not fit this model's" in fails(long, capsys)


OUTPUTS = {  # the options of every command that name a file to write
    ("score", "./m", "--sliding-window", "9"): ["--out", "--journal"],
    ("gates", "./m", "--sliding-window", "9"): ["--out", "--plot"],
    ("stability", "s.json", "--layers", "1"): ["--plot"],
    ("control", "./m", "--sliding-window", "9", "--layers", "1"): ["--plot"],
    ("transfer", "./m", "--sliding-window", "9", "--layers", "1"): ["--plot"],
    ("select", "s.json", "--layers", "1"): ["--out", "--journal"],
    ("pareto", "./m", "--sliding-window", "9"): ["--plot", "--journal"],
    ("answer", "./m", "--prompts", "p"): ["--out"],
    ("eval", "./m", "--suite", "needle"): ["--plot", "--journal"],
    ("compare", "./m", "--suite", "needle"): ["--plot", "--report", "--journal"],
    ("sweep", "./m", "--sliding-window", "9"): ["--out", "--per-example", "--journal"],
    ("report", "s.json"): ["--out"],
    ("demo", "--model", "./m"): ["--out"],
}


@pytest.mark.parametrize(
    ("command", "option"),
    [(list(c), option) for c, options in OUTPUTS.items() for option in options],
)
def test_outputs_are_checked_before_anything_runs(command, option, here, capsys):
    (here / "d.csv").mkdir()
    for path in ("", ".", "/", "d.csv"):
        assert "is a directory" in fails([*command, option, path], capsys)
    assert "none/f.png: its dir" in fails([*command, option, "none/f.png"], capsys)
    if option == "--plot":
        for name in ("chart", "chart.docx"):
            assert f"{name}: a chart is written as .png, .svg or .pdf" in fails(
                [*command, option, name], capsys
            )
    assert os.listdir(here) == ["d.csv"]


def test_a_chart_needs_matplotlib_before_anything_runs(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command = ["gates", "./m", "--sliding-window", "9", "--plot", "chart.png"]
    assert "pip install 'swa[plot]'" in fails(command, capsys, code=1)


def test_two_outputs_need_two_files(here, capsys):
    (here / "link").symlink_to(here)
    command = ["gates", "./m", "--sliding-window", "9", "--out", "f.png"]
    assert "two outputs" in fails([*command, "--plot", "link/f.png"], capsys)


def test_what_was_measured_is_shown_even_if_it_cannot_be_written(
    here, checkpoint, examples, capsys, monkeypatch
):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("swa.layer_scores.LayerScores.save", fail)
    monkeypatch.setattr("swa.gate_scores.GateScores.save", fail)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    run = [checkpoint, "--examples", examples, "--sliding-window", "16", *RUN, "--json"]
    suite = [checkpoint, "--suite", "needle", "--lengths", "700", *RUN, "--json"]
    for command, schema in (
        (["score", *run, "--out", "s.json"], "swa.scores/"),
        (["gates", *run, "--out", "g.json"], "swa.gate-scores/"),
        (["gates", *run, "--plot", "g.png"], "swa.gate-scores/"),
        (["pareto", *run, "--strategy", "first", "--sizes", "1", "--plot", "p.png"], "swa.pareto"),
        (["eval", *suite, "--depths", "0", "--plot", "e.png"], "swa.evaluation"),
    ):
        assert main(command) == 1
        captured = capsys.readouterr()
        assert json.loads(captured.out)["schema"].startswith(schema)
        assert "No space left" in captured.err.splitlines()[-1]


def test_a_demo_is_told_even_if_its_page_cannot_be_written(here, checkpoint, capsys, monkeypatch):
    class Result:
        scores = selection = None

        def evaluations(self):
            return {}

        def to_dict(self):
            return {"schema": "shown"}

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("swa.demo.run", lambda *_, **__: Result())
    monkeypatch.setattr("swa.reporting.report", fail)
    assert main(["demo", "--model", checkpoint, *RUN, "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"schema": "shown"}


def test_a_device_is_written_into_without_a_journal_beside_it(here, checkpoint, examples):
    os.mkfifo(here / "pipe")
    reader = os.open(here / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        run = ["score", checkpoint, "--examples", examples, *SCORE, "--out", "pipe"]
        assert main(run) == 0
        assert json.loads(os.read(reader, 1 << 16))["schema"].startswith("swa.scores")
    finally:
        os.close(reader)
    assert os.listdir(here) == ["pipe"]


def test_an_error_of_the_disk_names_the_file_that_was_asked_for(scored, capsys, monkeypatch):
    def refuse(source, target):
        raise PermissionError(13, "Permission denied", str(source), None, str(target))

    monkeypatch.setattr(os, "replace", refuse)
    line = fails(["select", "scores.json", "--layers", "1", "--out", "p.json"], capsys)
    assert line == "swa: error: p.json: Permission denied"
    monkeypatch.setattr("swa.selection.Selection.save", lambda self, out: refuse(".tmp", out))
    line = fails(["select", "scores.json", "--layers", "1", "--out", "p.json"], capsys)
    assert line == "swa: error: p.json: Permission denied"


def test_debug_shows_the_traceback_anywhere_on_the_line(here, capsys):
    for arguments in (["--debug", "select", "no.json"], ["select", "no.json", "--debug"]):
        with pytest.raises(swa.errors.InputError):
            main([*arguments])
    process = swa_process("select", "no.json", "--layers", "1", "--debug")
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" in err


def test_scores_are_not_replaced_unless_forced(scored, checkpoint, examples, capsys):
    before = scored.read_bytes()
    run = ["score", checkpoint, "--examples", examples, *SCORE]
    assert "--force" in fails(run, capsys)
    assert scored.read_bytes() == before
    assert main([*run, "--tail-tokens", "1", "--force"]) == 0
    assert scored.read_bytes() != before


def test_a_failing_write_leaves_nothing(here, checkpoint, examples, capsys):
    run = ["score", checkpoint, "--examples", examples, *SCORE]
    assert "absent" in fails([*run, "--out", "absent/scores.json"], capsys)
    assert list(here.iterdir()) == []


def test_ctrl_c_says_how_to_resume_and_the_resumed_run_ends_the_same(
    here, checkpoint, tmp_path_factory
):
    """Interrupts a real process after its first example, then resumes it."""
    path = tmp_path_factory.mktemp("many") / "many.jsonl"
    line = {"prompt_ids": [7 * i % 256 for i in range(2000)], "answer_ids": [1, 2, 3]}
    path.write_text("".join(json.dumps(line | {"task": str(i)}) + "\n" for i in range(40)))
    run = ["score", checkpoint, "--examples", str(path), *SCORE]
    process = swa_process(*run, cwd=here)
    journal = here / "scores.json.journal"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - sent < 2
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("swa: interrupted")
    assert "scores.json.journal" in last
    assert "--resume" in last
    assert not (here / "scores.json").exists()

    done = journal.read_bytes()
    refused = swa_process(*run, cwd=here)
    assert "--resume" in refused.communicate(timeout=60)[1]
    assert refused.returncode == 2
    assert journal.read_bytes() == done

    resumed = swa_process(*run, "--resume", cwd=here)
    assert resumed.communicate(timeout=120)[0]
    assert resumed.returncode == 0
    assert not journal.exists()
    whole = swa_process(*run, "--out", "whole.json", "--journal", "kept.jsonl", cwd=here)
    whole.communicate(timeout=120)
    assert (here / "kept.jsonl").read_bytes().startswith(done[: done.index(b"\n") + 1])
    assert (here / "whole.json").read_bytes() == (here / "scores.json").read_bytes()


def test_a_broken_pipe_is_silent(scored):
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [sys.executable, "-m", "swa.cli", "select", "scores.json", "--layers", "1", "--json"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert "rror" not in err


def test_warnings_are_one_line(here, checkpoint, capsys):
    lines = [
        {"prompt_ids": [1, 2, 3], "answer_ids": [4]},
        {"prompt_ids": list(range(100)), "answer_ids": [4]},
    ]
    Path("short.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["score", checkpoint, "--examples", "short.jsonl", *SCORE]) == 0
    err = capsys.readouterr().err
    assert len(re.findall(r"^swa: warning: ", err, re.MULTILINE)) == 1
    assert "SwaWarning" not in err


def test_commands_import_only_what_they_need():
    code = "import sys, swa.cli; swa.cli.main(['--version']); print(*sorted(sys.modules))"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(process.stdout.split())
    assert not loaded & {"torch", "transformers", "matplotlib", "huggingface_hub", "jinja2", "gguf"}
