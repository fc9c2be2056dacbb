"""Files that are whole or absent: write beside, flush to the disk, rename."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def temporary_sibling(path: Path) -> Path:
    """A new name in the directory of `path`, hidden, on the same file system."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def flush_directory(path: Path) -> None:
    """Make the entries of a directory durable, where the platform can open one."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace `path` by a UTF-8 file holding `text`, atomically; the mode honours the umask.

    A reader sees the old file or the new one, never a part; an error (a full disk, say) leaves the
    old one as it was. Raises OSError.
    """
    target = Path(os.path.realpath(path))  # a link keeps pointing where it does
    temporary = temporary_sibling(target)
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_directory(target.parent)
