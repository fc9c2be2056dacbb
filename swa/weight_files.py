"""Reading the files of a checkpoint: regular files only, by `pread`, watched for changes.

Nothing is mapped: a file that is truncated under a mapping kills the process.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from swa.errors import CheckpointError

MAX_JSON_BYTES = 16 << 20  # of config.json, an index or a header: parsing takes < 1 GiB
_MAX_READ = 1 << 30  # some systems refuse more at once
_WHOLE_BYTES, _N_SAMPLES, _SAMPLE_BYTES = 64 << 10, 4, 4 << 10


@dataclass(frozen=True)
class FileStamp:
    """A file as it was when it was opened."""

    path: Path
    size: int
    """Bytes."""
    mtime_ns: int
    identity: tuple[int, int]
    """Device and inode."""

    def check(self) -> None:
        """Raises CheckpointError if the file under this path is another, or was written since."""
        with self.reopened():
            pass

    @contextmanager
    def reopened(self) -> Iterator[OpenFile]:
        """Open the same file again; raises CheckpointError if it is not the same any more."""
        with open_regular(self.path) as file:
            if file.stamp != self:
                raise CheckpointError(
                    "the file has changed since it was opened: load the model again",
                    file=self.path,
                    rule="unchanged",
                )
            yield file


class OpenFile(NamedTuple):
    """A regular file, open for reading."""

    descriptor: int
    stamp: FileStamp

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Exactly `n_bytes` from `offset`; raises CheckpointError if the file ends before."""
        parts = []
        left = n_bytes
        while left:
            try:
                part = os.pread(self.descriptor, min(left, _MAX_READ), offset + n_bytes - left)
            except OSError as error:
                raise _unreadable(self.stamp.path, error) from error
            if not part:
                raise CheckpointError(
                    f"the file ends {left} bytes too early: it is truncated",
                    file=self.stamp.path,
                    rule="truncated",
                )
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def samples(self, offset: int, n_bytes: int) -> Iterator[bytes]:
        """What of a tensor goes into a fingerprint: all of a small one, pieces of a large one."""
        if n_bytes <= _WHOLE_BYTES:
            yield self.read(offset, n_bytes)
            return
        last = n_bytes - _SAMPLE_BYTES
        for i in range(_N_SAMPLES):  # the first bytes, the last ones, and evenly between
            yield self.read(offset + last * i // (_N_SAMPLES - 1), _SAMPLE_BYTES)

    def read_whole(self) -> bytes:
        """All of a small file; raises CheckpointError above MAX_JSON_BYTES."""
        if self.stamp.size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{self.stamp.size} bytes are more than the {MAX_JSON_BYTES} that swa reads",
                file=self.stamp.path,
                rule="json-size",
            )
        return self.read(0, self.stamp.size)


@contextmanager
def open_regular(path: Path) -> Iterator[OpenFile]:
    """Open a regular file, following links, without waiting on a pipe or touching a device.

    Raises:
        CheckpointError: it is missing, unreadable, or not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise _unreadable(path, error) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError("this is not a regular file", file=path, rule="regular-file")
        yield OpenFile(descriptor, _stamp(path, status))
    finally:
        os.close(descriptor)


def _stamp(path: Path, status: os.stat_result) -> FileStamp:
    return FileStamp(path, status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino))


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or str(error)
    return CheckpointError(f"the file cannot be read: {reason}", file=path, rule="readable")
