"""What `open_checkpoint` takes for a path, what for a hub id, and what it asks the hub for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from opened import collect, edit_json

from swa.checkpoint import open_checkpoint
from swa.errors import CheckpointError, UnsupportedModelError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL = {"num_hidden_layers": 2, "vocab_size": 40}


@pytest.fixture
def folder(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny("llama", **SMALL), tmp_path / "llama")


@pytest.fixture
def sharded(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny("llama", shards=3, **SMALL), tmp_path / "sharded")


class Hub:
    """Stands in for `huggingface_hub.snapshot_download`: copies what is asked for to a cache."""

    def __init__(self, repositories: Mapping[str, Path], cache: Path) -> None:
        self.repositories, self.cache = repositories, cache
        self.calls: list[dict[str, Any]] = []
        self.error: Exception | None = None

    def __call__(self, repo_id: str, *, allow_patterns: list[str], **options: Any) -> str:
        self.calls.append({"repo_id": repo_id, **options})
        if self.error is not None:
            raise self.error
        snapshot = self.cache / repo_id.replace("/", "--")
        snapshot.mkdir(exist_ok=True)
        for path in self.repositories[repo_id].iterdir():
            if path.name in allow_patterns:
                shutil.copy2(path, snapshot)
        return str(snapshot)

    def downloaded(self, repo_id: str) -> set[str]:
        return {path.name for path in (self.cache / repo_id.replace("/", "--")).iterdir()}


@pytest.fixture
def hub(folder: Path, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    for source in (folder, sharded):
        (source / "tokenizer.json").write_text("{}")
        (source / "README.md").write_text("a card")
        (source / "pytorch_model.bin").write_bytes(b"a pickle")
        (source / "consolidated.safetensors").write_bytes(b"the same again")
    (tmp_path / "cache").mkdir()
    fake = Hub({"owner/one": folder, "owner/many": sharded, "bare": folder}, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    monkeypatch.chdir(tmp_path)
    return fake


def test_a_model_on_the_hub(hub: Hub, folder: Path, sharded: Path) -> None:
    one = open_checkpoint("owner/one", revision="v2", token="secret", local_files_only=True)
    options = {"revision": "v2", "token": "secret", "local_files_only": True}
    assert hub.calls == [{"repo_id": "owner/one", **options}] * 2
    assert collect(one) == collect(open_checkpoint(folder))
    assert one.source == "owner/one"
    assert one.folder == hub.cache / "owner--one"
    assert hub.downloaded("owner/one") == {"config.json", "tokenizer.json", WEIGHTS}
    many = open_checkpoint("owner/many")
    assert hub.calls[-1] == {
        "repo_id": "owner/many",
        "revision": None,
        "token": None,
        "local_files_only": False,
    }
    assert collect(many) == collect(open_checkpoint(sharded))
    shards = {path.name for path in sharded.glob("model-*.safetensors")}
    assert len(shards) == 3
    assert hub.downloaded("owner/many") == {"config.json", "tokenizer.json", INDEX, *shards}
    assert open_checkpoint("bare").fingerprint == one.fingerprint


def test_weights_of_an_unsupported_model_are_not_downloaded(hub: Hub, folder: Path) -> None:
    edit_json(folder / "config.json", model_type="gpt2")
    with pytest.raises(UnsupportedModelError, match="model_type is 'gpt2'"):
        open_checkpoint("owner/one")
    assert hub.downloaded("owner/one") == {"config.json", "tokenizer.json"}


def test_pickles_are_not_downloaded(hub: Hub, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        open_checkpoint("owner/one")
    assert hub.downloaded("owner/one") == {"config.json", "tokenizer.json"}


def hub_errors() -> list[tuple[Exception, dict[str, Any], str]]:
    from huggingface_hub import errors

    def make(kind: type[Exception], text: str = "404 Client Error\nmore lines") -> Exception:
        error = kind.__new__(kind)  # they want a response of the server
        error.args = (text,)
        return error

    offline = {"local_files_only": True}
    return [
        (make(errors.RepositoryNotFoundError), {}, "check the spelling of the path or id"),
        (make(errors.GatedRepoError), {}, "accept the model's conditions"),
        (make(errors.RevisionNotFoundError), {}, "check revision="),
        (make(errors.HFValidationError), {}, "not a valid hub id"),
        (make(errors.OfflineModeIsEnabled), {}, "HF_HUB_OFFLINE is set"),
        (make(errors.LocalEntryNotFoundError), offline, "load it once without local_files_only"),
        (make(errors.LocalEntryNotFoundError), {}, "the network, or give a local folder"),
        (ConnectionError("refused"), {}, "the network, or give a local folder"),
        (RuntimeError(""), {}, "(RuntimeError)"),
        (OSError(28, "No space left on device"), {}, "No space left on device"),
    ]


@pytest.mark.parametrize(("error", "options", "says"), hub_errors())
def test_failures_of_the_hub(
    hub: Hub, error: Exception, options: dict[str, Any], says: str
) -> None:
    hub.error = error
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("owner/one", **options)
    message = str(caught.value)
    assert message.startswith("owner/one: no such file or folder here, and") and says in message
    assert "\n" not in message
    assert caught.value.rule == "hub" and caught.value.__cause__ is error


def test_ctrl_c_is_not_taken_for_a_failure(hub: Hub) -> None:
    hub.error = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        open_checkpoint("owner/one")


def test_really_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client itself, with an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="load it once without local_files_only"):
        open_checkpoint("owner/no-such-model", local_files_only=True)


@pytest.mark.parametrize(
    "path",
    [
        *("./no/such", "/no/such/folder", "../x", "a/b/c", "owner/one/", ".hidden", "a b"),
        *("~/models/x", "owner\\one", "no\0such", "ünïcode/x", Path("owner/one")),
    ],
)
def test_mistyped_paths_do_not_ask_the_hub(hub: Hub, path: str | Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder, and not a hub id"):
        open_checkpoint(path)
    assert hub.calls == []


def test_a_file_in_place_of_its_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="give the folder that holds this file"):
        open_checkpoint(folder / WEIGHTS)


def test_a_path_wins_over_a_hub_id(hub: Hub, folder: Path) -> None:
    shutil.copytree(folder, "owner/one")
    checkpoint = open_checkpoint("owner/one")
    assert checkpoint.folder == Path("owner/one").absolute()
    assert hub.calls == []
    os.chdir("/")  # a relative path keeps its meaning
    checkpoint.check_unchanged()
    assert sum(len(chunk.data) for chunk in checkpoint.parameters()) == checkpoint.n_bytes


def test_strange_names_of_folders(folder: Path, tmp_path: Path) -> None:
    for name in ("with blanks", "ünïcode", "owner--x", "x.safetensors", os.fsdecode(b"\xff")):
        copy = shutil.copytree(folder, tmp_path / name)
        assert open_checkpoint(copy).fingerprint == open_checkpoint(folder).fingerprint
