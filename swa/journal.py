"""The journal of a long run: append-only JSON lines, from which a killed run resumes.

The first line names the format and everything the results depend on; each later line is one
finished piece of work, on the disk before the next piece starts.
"""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from swa import __version__, jsonio
from swa.errors import ScoresError
from swa.files import flush_directory

if TYPE_CHECKING:
    from swa.model import Model

SCHEMA = "swa.journal/1"
T = TypeVar("T")


def open_journal(
    path: str | os.PathLike[str] | None, model: Model, what: str
) -> AbstractContextManager[Journal | None]:
    """The journal of what a model was run for; None where there is no path.

    Raises ScoresError (it is another model's, damaged or in use) and OSError, once it is entered.
    """
    if path is None:
        return nullcontext()
    inputs = {
        "what": what,
        "version": __version__,
        "model_fingerprint": model.fingerprint,
        "dtype": model.dtype,
        "tier": model.engine.tier,  # whose kernels' last bits the results have
    }
    return Journal(path, inputs)


class JournalInUse(ScoresError):
    """Another process has the journal open."""


class Journal:
    """An open journal: `records` holds what earlier runs finished, `append` adds to it.

    The file is locked while open, by the process that opened it: in a child that it forks the
    journal is closed. A last line that a crash cut short is dropped: its work is simply done again.

    Args:
        path: created if absent; its directory must exist.
        inputs: all that the records depend on (JSON values); a journal of other inputs is refused.

    Raises:
        JournalInUse: another process has the journal open.
        ScoresError: it belongs to other inputs, it is damaged
            before its last line, or the file is no journal at all (it is never overwritten).
        OSError: the file cannot be opened, read or written.
    """

    def __init__(self, path: str | os.PathLike[str], inputs: Mapping[str, Any]) -> None:
        self.path = os.fspath(path)
        self.records: list[dict[str, Any]] = []
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        _opened.add(self)
        try:
            self._lock()
            # Through JSON, so that tuples compare equal to the lists read back.
            header = jsonio.dumps_line({"schema": SCHEMA, "inputs": dict(inputs)})
            self._restore(jsonio.loads(header))
        except BaseException:
            self.close()
            raise

    def read(self, what: str, parse: Callable[[dict[str, Any]], T]) -> list[T]:
        """Every record as `parse` makes it out, in order.

        Raises ScoresError: one is not the record of `what`, for which `parse` raised a KeyError,
        TypeError or ValueError.
        """
        parsed = []
        for number, record in enumerate(self.records, start=2):
            try:
                parsed.append(parse(record))
            except (KeyError, TypeError, ValueError) as error:
                raise ScoresError(
                    f"{self.path}: line {number} is not the record of {what} ({error!r}): delete"
                    " this file to start anew"
                ) from error
        return parsed

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record; it is on the disk when this returns. Raises OSError."""
        self._write(dict(record))

    def close(self) -> None:
        """Close the file and release its lock; closing twice is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise JournalInUse(
                f"{self.path}: another run is writing this journal: wait for it to end, or give"
                " this run a journal of its own"
            ) from None

    def _restore(self, header: dict[str, Any]) -> None:
        """Read the records back, or write `header` to a journal that has none yet."""
        content = self._read()
        if (jsonio.dumps_line(header) + "\n").encode().startswith(content):
            # Empty, or cut short within its very first line (a whole one changes nothing).
            os.ftruncate(self._descriptor, 0)
            self._write(header)
            flush_directory(Path(self.path).resolve().parent)
            return
        lines = content.split(b"\n")
        self._check_header(lines[0], header)
        whole = len(lines[0]) + 1
        for number, line in enumerate(lines[1:-1], start=2):
            try:
                record = jsonio.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("not a JSON object")
            except ValueError as error:
                if whole + len(line) + 1 == len(content):
                    break  # the last line: a crash may leave any bytes there
                raise ScoresError(
                    f"{self.path}: line {number} is damaged ({error}): delete this file to"
                    " start anew"
                ) from error
            self.records.append(record)
            whole += len(line) + 1
        os.ftruncate(self._descriptor, whole)

    def _check_header(self, line: bytes, header: dict[str, Any]) -> None:
        try:
            found = jsonio.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            raise ScoresError(
                f"{self.path}: this is not a journal ({SCHEMA}) and is left as it is: give another"
                " path, or delete the file"
            )
        theirs, ours = found.get("inputs"), header["inputs"]
        theirs = theirs if isinstance(theirs, dict) else {}
        changed = [
            f"{key} was {_shown(theirs.get(key))}, is {_shown(ours.get(key))}"
            for key in (ours | theirs)
            if theirs.get(key) != ours.get(key)
        ]
        if changed:
            raise ScoresError(
                f"{self.path}: this journal belongs to another run: {'; '.join(changed)}. Repeat"
                " that run's inputs to resume it, or give another path"
            )

    def _read(self) -> bytes:
        with open(self._descriptor, "rb", closefd=False) as file:
            return file.read()

    def _write(self, value: dict[str, Any]) -> None:
        rest = memoryview((jsonio.dumps_line(value) + "\n").encode())
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        os.fsync(self._descriptor)


_opened = weakref.WeakSet[Journal]()


def _close_in_child() -> None:
    """Or a child that outlives this process would keep its journals locked."""
    for journal in list(_opened):
        journal.close()


os.register_at_fork(after_in_child=_close_in_child)


def _shown(value: Any) -> str:
    text = jsonio.dumps_line(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
