"""Files that are whole or absent: write beside, flush to the disk, rename; and read back."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from swa import jsonio
from swa.errors import ScoresError

T = TypeVar("T")


def temporary_sibling(path: Path) -> Path:
    """A new name in the directory of `path`, hidden, on the same file system."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def flush_file(path: Path) -> None:
    """Make the content of a file durable."""
    _flush(path, os.O_RDONLY)


def flush_directory(path: Path) -> None:
    """Make the entries of a directory durable, where the platform can open one."""
    if hasattr(os, "O_DIRECTORY"):
        _flush(path, os.O_RDONLY | os.O_DIRECTORY)


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether a directory, a device or a pipe is there, whose place no file may take."""
    return os.path.exists(path) and not os.path.isfile(path)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new name beside `path`: what is written there takes its place, whole, if all goes well.

    A reader sees the old file or the new one, never a part; an error leaves the old one as it was.
    Raises OSError, which names `path`; at once, if that is no regular file.
    """
    if is_special(path):
        raise FileExistsError(
            errno.EEXIST, "this is no regular file and is not replaced", os.fspath(path)
        )
    target = Path(os.path.realpath(path))  # a link keeps pointing where it does
    temporary = temporary_sibling(target)
    try:
        yield temporary
        flush_file(temporary)
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and str(error.filename) == str(temporary):
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise
    flush_directory(target.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace `path` by a UTF-8 file holding `text`, atomically; the mode honours the umask.

    As `replacing`, but a device or a pipe is written into. Raises OSError.
    """
    if is_special(path):
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        return
    with (
        replacing(path) as temporary,
        open(temporary, "x", encoding="utf-8", newline="\n") as file,
    ):
        file.write(text)


def read_document(path: str | os.PathLike[str], read: Callable[[Any], T]) -> T:
    """What `read` makes of the JSON in a file. Raises OSError, or a ScoresError that names it."""
    try:
        return read(jsonio.loads(Path(path).read_bytes()))
    except ValueError as error:
        raise ScoresError(f"{os.fspath(path)}: {error}") from error
