"""save_pretrained: what it writes and refuses, what a kill or a full disk leaves behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import transformers
from builders import tiny_checkpoint

import swa
from swa.errors import CheckpointError, InputError
from swa.model import Model, load, plan
from swa.policy import AttentionPolicy

POLICY = AttentionPolicy(8, num_sink_tokens=2, num_tail_tokens=3).with_full_layers([1], 4)
PROMPT, ANSWER = "The needle is hidden here: 4711. " * 3, "It is 4711."
WRITTEN_BY_US = {"swa.json", "README.md"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tiny_checkpoint(tmp_path / "source", dtype="BF16", tokenizer=True, chat_template=True)
    (folder / "generation_config.json").write_text('{"eos_token_id": [257]}')
    return folder


@pytest.fixture
def model(source: Path) -> Model:
    return load(source, num_threads=1).patch(POLICY)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_patched_model_comes_back(model: Model, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    model.save_pretrained(out)
    again = load(out, num_threads=1)
    assert again.policy == model.policy
    assert again.fingerprint == model.fingerprint
    expected = model.nll(PROMPT, ANSWER).per_token
    assert (again.nll(PROMPT, ANSWER).per_token == expected).all()
    assert (load(source, num_threads=1).nll(PROMPT, ANSWER).per_token != expected).any()
    assert names(out.parent) == {"out"}


def test_every_file_of_the_source_is_there_byte_for_byte(
    model: Model, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    model.save_pretrained(str(out))
    assert names(out) == names(source) | WRITTEN_BY_US
    for name in names(source):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    record = json.loads((out / "swa.json").read_text())
    assert AttentionPolicy.from_dict(record["policy"]) == POLICY
    assert record["swa_version"] == swa.__version__


def test_the_readme_warns_and_stock_transformers_runs_full_attention(
    model: Model, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    model.save_pretrained(out)
    text = (out / "README.md").read_text()
    assert "they run full attention" in text
    assert repr(POLICY) in text
    stock = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    original = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert (stock(ids).logits == original(ids).logits).all()


def test_shards_and_their_index(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", shards=3, tokenizer=True)
    model = load(source, dtype="float32", num_threads=1).patch(POLICY)
    model.save_pretrained(tmp_path / "out")
    assert names(tmp_path / "out") == names(source) | WRITTEN_BY_US
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
    again = load(tmp_path / "out", dtype="float32", num_threads=1)
    expected = model.nll(PROMPT, ANSWER).per_token
    assert (again.nll(PROMPT, ANSWER).per_token == expected).all()


def test_links_become_files(source: Path, tmp_path: Path) -> None:
    """As in the hub's cache, whose snapshots are links into a store of blobs."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in source.iterdir():
        (snapshot / path.name).symlink_to(path)
    load(snapshot, num_threads=1).patch(POLICY).save_pretrained(tmp_path / "out")
    assert names(tmp_path / "out") == names(source) | WRITTEN_BY_US
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert load(tmp_path / "out", num_threads=1).policy == POLICY


def test_an_unpatched_model_and_an_export_of_an_export(source: Path, tmp_path: Path) -> None:
    load(source, num_threads=1).save_pretrained(tmp_path / "plain")
    plain = load(tmp_path / "plain", num_threads=1)
    assert plain.policy is None
    plain.patch(POLICY).save_pretrained(tmp_path / "patched")
    assert load(tmp_path / "patched", num_threads=1).policy == POLICY
    assert names(tmp_path / "patched") == names(source) | WRITTEN_BY_US


def test_a_tokenizer_that_was_given_is_saved(source: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, bare)
    model = load(bare, num_threads=1, tokenizer=source).patch(POLICY)
    model.save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out", num_threads=1)
    assert again.tokenizer.encode_prompt(PROMPT) == model.tokenizer.encode_prompt(PROMPT)


def test_the_source_is_never_written(model: Model, source: Path) -> None:
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    for target in (source, source / ".", source.parent / "x" / ".." / "source"):
        with pytest.raises(InputError, match="the folder that the model was loaded from"):
            model.save_pretrained(target)
    link = source.parent / "link"
    link.symlink_to(source)
    with pytest.raises(InputError, match="the folder that the model was loaded from"):
        model.save_pretrained(link)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_only_an_absent_or_empty_folder_is_written(model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for name in ("file", "full"):
        with pytest.raises(InputError, match="nothing is ever overwritten"):
            model.save_pretrained(tmp_path / name)
    assert (tmp_path / "full" / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    assert load(tmp_path / "empty", num_threads=1).policy == POLICY
    with pytest.raises(InputError, match="nothing is ever overwritten"):
        model.save_pretrained(tmp_path / "empty")


def test_a_source_that_changed_is_refused(model: Model, source: Path, tmp_path: Path) -> None:
    weights = source / "model.safetensors"
    with open(weights, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    os.utime(weights, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        model.save_pretrained(tmp_path / "out")
    assert names(tmp_path) == {"source"}


def test_a_source_that_changes_while_it_is_copied_is_refused(
    model: Model, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile

    def touch_after(path: Path, target: Path) -> None:
        copy(path, target)
        os.utime(source / "model.safetensors", ns=(1, 1))

    monkeypatch.setattr(shutil, "copyfile", touch_after)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        model.save_pretrained(tmp_path / "out")
    assert names(tmp_path) == {"source"}


def test_a_full_disk_leaves_nothing(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, target: Path) -> None:
        data = Path(path).read_bytes()
        Path(target).write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", half)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path / "out")
    assert names(tmp_path) == {"source"}


def test_a_kill_at_any_flush_leaves_all_or_nothing(model: Model, tmp_path: Path) -> None:
    """A child is killed at its 1st, 2nd, ... flush to the disk, until one save runs through."""
    finished = False
    kills = 0
    while not finished:
        out = tmp_path / f"out-{kills}"
        child = os.fork()
        if child == 0:
            _save_and_die(model, out, flushes=kills)
        _, status = os.waitpid(child, 0)
        finished = status == 0
        assert finished or os.WTERMSIG(status) == signal.SIGKILL
        if out.exists():
            assert load(out, num_threads=1).policy == POLICY
            assert (out / "README.md").exists()
        else:
            assert not finished
            model.save_pretrained(out)  # a leftover does not stand in the way
        kills += not finished
    assert kills > 5
    leftovers = names(tmp_path) - {"source"} - {f"out-{i}" for i in range(kills + 1)}
    assert all(name.startswith(".out-") and name.endswith(".tmp") for name in leftovers)


def _save_and_die(model: Model, out: Path, flushes: int) -> None:
    flush = os.fsync
    left = flushes

    def die_at_last(descriptor: int) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        flush(descriptor)

    os.fsync = die_at_last
    try:
        model.save_pretrained(out)
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_modes_follow_the_umask(model: Model, source: Path, tmp_path: Path, umask: int) -> None:
    for path in source.iterdir():
        path.chmod(0o400)
    old = os.umask(umask)
    try:
        model.save_pretrained(tmp_path / "out")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path.name


def test_a_plan_is_of_the_patched_model(model: Model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "out")
    again = plan(tmp_path / "out", num_threads=1, with_tokenizer=True)
    assert again.policy == model.policy
    assert again.fingerprint == model.fingerprint
    assert again.stop_ids == model.stop_ids
    assert again.tokenizer.encode_prompt(PROMPT) == model.tokenizer.encode_prompt(PROMPT)


@pytest.mark.parametrize("opening", [load, plan])
def test_weights_under_another_policy_are_refused(
    model: Model, tmp_path: Path, opening: Any
) -> None:
    out = tmp_path / "out"
    model.save_pretrained(out)
    other = tiny_checkpoint(tmp_path / "other", dtype="BF16", seed=1)
    shutil.copy(other / "model.safetensors", out)
    with pytest.raises(CheckpointError, match="not those that the policy was saved with"):
        opening(out, num_threads=1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "swa.export/2"}, "schema must be 'swa.export/1'"),
        ({"fingerprint": None}, "fingerprint must be a string"),
        ({"gguf": "../model.gguf"}, "plain name of a .gguf file"),
        ({"gguf": "/etc/passwd"}, "plain name of a .gguf file"),
        ({"gguf": ".."}, "plain name of a .gguf file"),
        ({"gguf": 3}, "plain name of a .gguf file"),
        ({"policy": {"schema": "swa.policy/1"}}, "no sliding_window"),
        ({"policy": 3}, "a policy is a JSON object"),
    ],
)
def test_a_malformed_record(
    model: Model, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    out = tmp_path / "out"
    model.save_pretrained(out)
    record = json.loads((out / "swa.json").read_text())
    (out / "swa.json").write_text(json.dumps(record | change))
    for opening in (load, plan):
        with pytest.raises(CheckpointError, match=rf"swa\.json: .*{says}"):
            opening(out, num_threads=1)
