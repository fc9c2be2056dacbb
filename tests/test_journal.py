"""The journal: what it keeps, what it refuses, and a sweep killed in its middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_model import FakeModel, make_examples

from swa.errors import ScoresError
from swa.journal import Journal
from swa.policy import AttentionPolicy
from swa.score import score_layers

INPUTS = {"model": "m", "base": (1, 2), "examples": "a" * 64}
RECORDS = [{"example": i, "delta": [0.1 + 0.2 * i, None]} for i in range(3)]
POLICY = AttentionPolicy(sliding_window=8)


def write(path: Path, records: list[dict[str, Any]] = RECORDS) -> bytes:
    with Journal(path, INPUTS) as journal:
        for record in records:
            journal.append(record)
    return path.read_bytes()


def read(path: Path) -> list[dict[str, Any]]:
    with Journal(path, INPUTS) as journal:
        return journal.records


# ---- what it keeps


def test_records_come_back(tmp_path: Path) -> None:
    content = write(tmp_path / "j")
    assert read(tmp_path / "j") == RECORDS
    assert (tmp_path / "j").read_bytes() == content
    assert len(content.splitlines()) == 4


def test_a_torn_file_keeps_every_whole_record(tmp_path: Path) -> None:
    """Cut at every byte: all whole lines survive, and what is appended next is readable."""
    whole, path = write(tmp_path / "whole"), tmp_path / "torn"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        kept = max(0, whole[:size].count(b"\n") - 1)
        assert read(path) == RECORDS[:kept]
        assert write(path, RECORDS[kept:]) == whole


@pytest.mark.parametrize(
    "garbage", [b"\0" * 40, b"\0" * 40 + b"\n", b'{"a": 1\n', b"\xff\n", b"3\n"]
)
def test_a_last_line_of_any_bytes_is_dropped(tmp_path: Path, garbage: bytes) -> None:
    content = write(tmp_path / "j")
    (tmp_path / "j").write_bytes(content + garbage)
    assert read(tmp_path / "j") == RECORDS
    assert (tmp_path / "j").read_bytes() == content


def test_every_record_is_flushed_before_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.fstat(fd).st_size))
    with Journal(tmp_path / "j", INPUTS) as journal:
        for record in RECORDS:
            journal.append(record)
            assert flushed[-1] == (tmp_path / "j").stat().st_size


# ---- what it refuses


def test_other_inputs_are_refused_with_what_differs(tmp_path: Path) -> None:
    content = write(tmp_path / "j")
    with pytest.raises(ScoresError) as error:
        Journal(tmp_path / "j", {"model": "m", "base": [1], "seed": 0})
    message = str(error.value)
    assert "base was [1, 2], is [1]" in message
    assert "seed was null, is 0" in message and "examples was" in message
    assert "model was" not in message
    assert (tmp_path / "j").read_bytes() == content


@pytest.mark.parametrize("content", [b"precious", b"precious\n", b"{}\n", b'{"schema": "x"}\n{}\n'])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(ScoresError, match="not a journal"):
        Journal(tmp_path / "j", INPUTS)
    assert (tmp_path / "j").read_bytes() == content


def test_damage_before_the_last_line_is_refused(tmp_path: Path) -> None:
    lines = write(tmp_path / "j").split(b"\n")
    lines[2] = lines[2][:-3]
    (tmp_path / "j").write_bytes(b"\n".join(lines))
    with pytest.raises(ScoresError, match="line 3 is damaged"):
        Journal(tmp_path / "j", INPUTS)


def test_a_value_that_is_no_number_is_never_written(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", INPUTS) as journal, pytest.raises(ValueError):
        journal.append({"nll": float("nan")})
    assert read(tmp_path / "j") == []


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    opening = f"from swa.journal import Journal; Journal({str(tmp_path / 'j')!r}, {INPUTS!r})"
    with Journal(tmp_path / "j", INPUTS) as journal:
        with pytest.raises(ScoresError, match="another run is writing"):
            Journal(tmp_path / "j", INPUTS)
        other = subprocess.run([sys.executable, "-c", opening], capture_output=True, text=True)
        assert other.returncode == 1 and "another run is writing" in other.stderr
        journal.append(RECORDS[0])
    assert read(tmp_path / "j") == RECORDS[:1]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_keep_it_locked(tmp_path: Path) -> None:
    """It may outlive its parent; which has the journal to itself for as long as it lives."""
    forked, end = os.pipe()
    with Journal(tmp_path / "j", INPUTS) as journal:
        child = os.fork()
        if child == 0:
            os.write(end, b"-")
            time.sleep(60)
            os._exit(0)
        try:
            assert os.read(forked, 1) == b"-"
            with pytest.raises(ScoresError, match="another run is writing"):
                Journal(tmp_path / "j", INPUTS)
            journal.append(RECORDS[0])
            journal.close()
            assert read(tmp_path / "j") == RECORDS[:1]
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(forked)
            os.close(end)


# ---- under a sweep


def sweep(journal: Path | None, model: FakeModel | None = None, **arguments: Any) -> Any:
    return score_layers(
        model or FakeModel(),
        make_examples(6),
        POLICY,
        journal=journal,
        **arguments,
    )


def test_a_sweep_killed_resumes_to_the_identical_file(tmp_path: Path) -> None:
    journal, script = tmp_path / "j", tmp_path / "sweep.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import test_journal
            test_journal.sweep({str(journal)!r}, test_journal.FakeModel(seconds=0.3))
            """
        )
    )
    folders = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    killed = subprocess.Popen([sys.executable, script], env=os.environ | {"PYTHONPATH": folders})
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    done = journal.read_bytes().count(b"\n") - 1
    assert 2 <= done < 6

    model = FakeModel()
    sweep(journal, model).save(tmp_path / "resumed.json")
    sweep(None).save(tmp_path / "straight.json")
    assert (tmp_path / "resumed.json").read_bytes() == (tmp_path / "straight.json").read_bytes()
    assert model.sweeps == make_examples(6)[done:]


def test_a_finished_journal_needs_no_model_run(tmp_path: Path) -> None:
    first, model = sweep(tmp_path / "j"), FakeModel()
    assert sweep(tmp_path / "j", model) == first
    assert model.sweeps == []


def test_timings_are_in_the_journal_alone(tmp_path: Path) -> None:
    scores = sweep(tmp_path / "j", FakeModel(seconds=0.05))
    records = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()[1:]]
    assert all(record["seconds"] >= 0.05 for record in records)
    assert "seconds" not in json.dumps(scores.to_dict())


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"direction": "ablate"}, "direction"),
        ({"base": [2]}, "base"),
        ({"policy": AttentionPolicy(sliding_window=9)}, "policy"),
        ({"examples": make_examples(5)}, "examples_hash"),
        ({"dtype": "float32"}, "dtype"),
        ({"fingerprint": "0" * 64}, "model_fingerprint"),
        ({"engine": SimpleNamespace(tier="avx2")}, "tier"),
    ],
)
def test_a_sweep_of_other_inputs_does_not_resume(
    tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    sweep(tmp_path / "j")
    model = FakeModel()
    for name in ("dtype", "fingerprint", "engine"):
        setattr(model, name, change.pop(name, getattr(model, name)))
    inputs: dict[str, Any] = {"examples": make_examples(6), "policy": POLICY} | change
    with pytest.raises(ScoresError, match=f"another run: .*{key} was"):
        score_layers(model, journal=tmp_path / "j", **inputs)
    assert model.sweeps == []


def test_resampling_differently_does_resume(tmp_path: Path) -> None:
    sweep(tmp_path / "j")
    model = FakeModel()
    assert sweep(tmp_path / "j", model, n_bootstrap=50, seed=3).n_bootstrap == 50
    assert model.sweeps == []


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"example": 6, "nll_base": 1.0, "nll_full": 1.0, "nll_swa": 1.0, "delta": [0.0] * 5},
        {"example": 5, "nll_base": "1", "nll_full": 1.0, "nll_swa": 1.0, "delta": [0.0] * 5},
        {"example": 5, "nll_base": 1.0, "nll_full": 1.0, "nll_swa": 1.0, "delta": 0.0},
        {"example": 0, "nll_base": 1.0, "nll_full": 1.0, "nll_swa": 1.0, "delta": [0.0] * 5},
    ],
)
def test_records_of_another_shape_are_refused(tmp_path: Path, record: dict[str, Any]) -> None:
    sweep(tmp_path / "j")
    lines = (tmp_path / "j").read_text().splitlines()[:-1]
    (tmp_path / "j").write_text("\n".join([*lines, json.dumps(record)]) + "\n")
    with pytest.raises(ScoresError, match="line 7 is not the record of an example"):
        sweep(tmp_path / "j")
