"""Files are whole or absent: atomic replacement, modes, links, failures at any step."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from swa.files import replacing, temporary_sibling, write_text


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    write_text(tmp_path / "f", "größer\nzwei\r\n🙂")
    assert (tmp_path / "f").read_bytes() == "größer\nzwei\r\n🙂".encode()


def test_the_old_file_is_replaced_and_nothing_else_left(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("a longer text than the new one")
    write_text(str(path), "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_the_mode_honours_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "f", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o666 & ~mask


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "deep" / "target", tmp_path / "link"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(Path("deep") / "target")
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert os.listdir(target.parent) == ["target"]


def test_a_link_to_nothing_yet_makes_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, failure: BaseException
) -> None:
    (tmp_path / "f").write_text("old")

    def fail(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(failure)):
        write_text(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_text_that_utf8_cannot_write_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "f", "good " * 10_000 + "\ud800")
    assert (tmp_path / "f").read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_the_text_is_on_the_disk_before_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        kind = "directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        steps.append(f"fsync {kind}")
        fsync(descriptor)

    def record_replace(source: Any, target: Any) -> None:
        assert Path(source).read_text() == "new"
        steps.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_text(tmp_path / "f", "new")
    assert steps == ["fsync file", "replace", "fsync directory"]


def test_a_directory_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_text(tmp_path / "d", "x")
    assert caught.value.filename == str(tmp_path / "d")
    assert os.listdir(tmp_path) == ["d"]


def test_a_missing_directory_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_text(tmp_path / "none" / "f", "x")
    assert caught.value.filename == str(tmp_path / "none" / "f")


def test_an_error_names_the_file_and_not_the_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Any, target: Any) -> None:
        raise PermissionError(13, "Permission denied", str(source), None, str(target))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError) as caught:
        write_text(tmp_path / "f", "x")
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "f"), None)


def test_a_pipe_is_written_into_and_stays_one(tmp_path: Path) -> None:
    path, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(path)
    link.symlink_to("pipe")
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(link, "größer\n")
        assert os.read(reader, 100) == "größer\n".encode()
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_standard_output_can_be_written_into() -> None:
    code = "from swa.files import write_text; write_text('/dev/stdout', 'text')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("text", "", 0)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "there")
    before = (tmp_path / "there").stat()
    with (
        pytest.raises(FileExistsError, match="no regular file") as caught,
        replacing(tmp_path / "there"),
    ):
        raise AssertionError("nothing is begun")
    assert caught.value.filename == str(tmp_path / "there")
    assert (tmp_path / "there").stat().st_ino == before.st_ino
    assert os.listdir(tmp_path) == ["there"]


def test_readers_see_the_old_text_or_the_new(tmp_path: Path) -> None:
    path, texts = tmp_path / "f", ["a" * 50_000, "b" * 50_000]
    write_text(path, texts[0])
    done = threading.Event()
    seen: set[str] = set()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(40):
        write_text(path, texts[i % 2])
    done.set()
    reader.join()
    assert seen
    assert seen <= set(texts)


def test_temporary_names_are_new_and_hidden_beside_the_file(tmp_path: Path) -> None:
    names = {temporary_sibling(tmp_path / "f") for _ in range(100)}
    assert len(names) == 100
    assert all(name.parent == tmp_path and name.name.startswith(".f.") for name in names)
