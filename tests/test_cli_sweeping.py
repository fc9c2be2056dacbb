"""`swa sweep`: tables and journals, what it refuses, and going on where it stopped."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
from processes import interrupt

import swa
from swa.cli import main

GRID = [*("--sliding-window", "16,24", "--sink-tokens", "2", "--strategy", "topk")]
GRID += ["--strategy", "random:seed=3", "--budget", "1,0.5", "--dtype", "float32"]
LAYERS = 4


@pytest.fixture(scope="module")
def checkpoint(tiny) -> str:
    return str(tiny(tokenizer=True, chat_template=True, max_position_embeddings=4096))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("examples")
    for name in ("calibration", "heldout"):
        made = [swa.Example(tuple(range(5, 70 + i)), (7, 8 + i), task=name) for i in range(3)]
        swa.examples.write_jsonl(folder / name, made)
    return [
        *("--calibration", str(folder / "calibration")),
        *("--heldout", str(folder / "heldout")),
    ]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_table(
    here: Path, checkpoint: str, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", checkpoint, *GRID, *data, "--per-example", "each.csv", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["unfinished"] == 0 and printed["failures"] == {}
    written = rows(here / "sweep.csv")
    assert len(written) == len(printed["rows"]) == len(printed["timings"]) == 2 * (2 + 4)
    assert {row["strategy"] for row in written} >= {"topk", "random:seed=3"}
    assert [float(row["nll"]) for row in written] == [row["nll"] for row in printed["rows"]]
    assert [row["full_attention_layers"] for row in written[:4]] == ["4", "0", "1", "2"]
    assert len(rows(here / "each.csv")) == 3 * len(written)
    assert not (here / "sweep.csv.journal").exists()


def test_time_that_is_up_and_going_on(
    here: Path, checkpoint: str, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", checkpoint, *GRID, *data, "--out", "t.parquet"]
    assert main([*command, "--minutes", "0"]) == 0
    assert "12 points are not done" in capsys.readouterr().out
    assert (here / "t.parquet.journal").exists()
    assert main(command) == 0
    assert not (here / "t.parquet.journal").exists()
    assert main(command) == 2
    assert "t.parquet exists" in capsys.readouterr().err
    assert main([*command, "--force", "--journal", "kept"]) == 0
    assert (here / "kept").exists()


def test_no_file_is_replaced_unless_this_run_goes_on(
    here: Path, checkpoint: str, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The default journal says so; one that was named may be of any other run."""
    command = ["sweep", checkpoint, *GRID, *data, "--minutes", "0"]
    (here / "old.csv").write_text("old")
    assert main([*command, "--per-example", "old.csv"]) == 2
    assert "old.csv exists: --force replaces it, --per-example" in capsys.readouterr().err
    assert main([*command, "--journal", "kept"]) == 0  # nothing is there yet
    assert "repeat the command with --force to go on from kept" in capsys.readouterr().err
    for outputs in (["--out", "old.csv"], ["--out", "new.csv", "--per-example", "old.csv"]):
        assert main([*command, "--journal", "kept", *outputs]) == 2
        assert "old.csv exists" in capsys.readouterr().err
    assert (here / "old.csv").read_text() == "old"
    assert main([*command, "--journal", "kept", "--out", "new.csv"]) == 0
    assert main([*command, "--journal", "kept", "--out", "new.csv", "--force"]) == 0


def test_interrupted_and_resumed(here: Path, checkpoint: str, data: list[str]) -> None:
    """Ctrl-C once the journal holds something; the same command ends in the same table."""
    long = ["--sliding-window", ",".join(str(w) for w in range(8, 20)), "--threads", "1"]
    command = ["sweep", checkpoint, *GRID, *data, *long]
    journal = here / "sweep.csv.journal"
    errors = interrupt(command, journal, 5)
    assert "repeat the command to go on" in errors.splitlines()[-1]
    assert not (here / "sweep.csv").exists()
    before = journal.stat().st_size
    assert main([*command, "--journal", str(journal)]) == 0
    assert journal.stat().st_size > before
    assert len(rows(here / "sweep.csv")) == 12 * 6


def test_the_built_in_mix_on_two_processes(
    here: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--prompt-tokens", "800", "--heldout-per-task", "2"]
    grid = ["--sliding-window", "16", "--consumer", "full,vllm", "--strategy", "first"]
    assert main(["sweep", checkpoint, *grid, *sizes, "--workers", "2"]) == 0
    found = rows(here / "sweep.csv")
    assert [row["consumer"] for row in found] == [""] * 3 + ["vllm"] * 3
    assert {row["n_calibration"] for row in found} == {"", "4"}
    assert {row["n_heldout"] for row in found} == {"8"}
    assert "SweepTable: 6 points" in capsys.readouterr().out


def test_what_it_takes(
    here: Path,
    checkpoint: str,
    data: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("swa.estimate.PROBE_SECONDS", 0.01)
    command = ["sweep", checkpoint, *GRID, *data, "--workers", "2", "--estimate"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"][0]["n_points"] == 12 and found["workers"] == 2
    assert found["seconds"] == pytest.approx(found["models"][0]["seconds"] / 2)
    assert main(command) == 0
    assert "GiB a worker" in capsys.readouterr().out
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--out", "t.txt"], "csv or .parquet"),
        (["--per-example", "t.txt"], "csv or .parquet"),
        (["--out", os.path.join("no", "t.csv")], "directory does not exist"),
        (["--budget", "a"], "--budget takes"),
        (["--budget", "9"], "9 full-attention layers"),
        (["--budget", "-1"], "full_attention_layers must be"),
        (["--strategy", "best"], "no strategy"),
        (["--consumer", "tgi"], "consumer"),
        (["--dtype", "int4"], "dtype must be"),
        (["--sliding-window", "wide"], "--sliding-window takes integers"),
        (["--sliding-window", "900"], "no policy of the grid"),
        (["--scheduler", "tcp://localhost:1"], "--scheduler needs --threads"),
        (["--scheduler", "foo://x", "--threads", "1"], "--scheduler foo://x: unknown address"),
        (["--per-example", "sweep.csv"], "two outputs"),
        (["--heldout-per-task", "64"], "--heldout-per-task shapes the built-in mix"),
        (["--examples-per-task", "64"], "--examples-per-task shapes the built-in mix"),
        (["--prompt-tokens", "64"], "--prompt-tokens shapes the built-in mix"),
        (["--consumer", "vllm"], "leave out --sink-tokens and --tail-tokens"),
        (["--consumer", "vllm,transformers", "--sink-tokens", "0", "--tail-tokens", "8"], "to it"),
    ],
)
def test_what_it_refuses(
    here: Path,
    checkpoint: str,
    data: list[str],
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    says: str,
) -> None:
    assert main(["sweep", checkpoint, *GRID, *data, *change]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and says in captured.err.splitlines()[-1]
    assert not list(here.glob("*.csv"))


@pytest.mark.parametrize(
    ("sides", "refused"),
    [
        (["--heldout"], "--heldout-per-task"),
        (["--calibration", "--examples-per-task", "3"], "--examples-per-task"),
    ],
)
def test_what_shapes_no_side_is_refused(
    here: Path,
    checkpoint: str,
    data: list[str],
    capsys: pytest.CaptureFixture[str],
    sides: list[str],
    refused: str,
) -> None:
    """A number of examples for the side that a file replaces."""
    sides.insert(1, data[data.index(sides[0]) + 1])
    run = ["sweep", checkpoint, "--sliding-window", "16", *sides, "--heldout-per-task", "2"]
    assert main(run) == 2
    assert f"{refused} shapes the built-in mix" in capsys.readouterr().err


def test_what_shapes_one_side_beside_a_file(here: Path, checkpoint: str, data: list[str]) -> None:
    calibration, heldout = data[:2], data[2:]
    run = ["sweep", checkpoint, "--sliding-window", "16", "--strategy", "first", "--force"]
    sizes = ["--examples-per-task", "2", "--prompt-tokens", "800"]
    for file, column, count in ((calibration, "n_heldout", "8"), (heldout, "n_calibration", "8")):
        assert main([*run, *file, *sizes]) == 0
        assert rows(here / "sweep.csv")[-1][column] == count


def test_one_layer_is_not_all_of_them(here: Path, checkpoint: str, data: list[str]) -> None:
    run = ["sweep", checkpoint, *data, "--sliding-window", "16", "--strategy", "first"]
    assert main([*run, "--budget", "1,1.0,1"]) == 0
    found = [(row["budget"], row["full_attention_layers"]) for row in rows(here / "sweep.csv")]
    assert found[2:] == [("1 layers", "1"), ("1 of the layers", "4")]


def test_a_failed_strategy_is_an_exit_code(
    here: Path, checkpoint: str, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Periodic offsets depend on the number of layers: one that is out of range fails alone."""
    assert main(["sweep", checkpoint, *GRID, *data, "--strategy", "periodic:offset=3"]) == 1
    assert "points have no row" in capsys.readouterr().err
    assert {row["strategy"] for row in rows(here / "sweep.csv")} >= {"topk"}
