"""Published data files: entries as JSON, JSON lines or parquet, and what is in an entry."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from swa import jsonio
from swa.errors import ExampleError
from swa.fields import brief

PARQUET_MAGIC = b"PAR1"


class Entry:
    """One entry of a file, whose errors name both."""

    def __init__(self, values: object, where: str) -> None:
        self.where = where
        if not isinstance(values, Mapping):
            self.refuse(f"must be an object, not {brief(values)}")
        self._values = values

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def text(self, key: str, *, may_be_blank: bool = False) -> str:
        """A text, with something in it if it must."""
        value = self._values.get(key)
        if not isinstance(value, str) or not (value.strip() or may_be_blank):
            self._malformed(key, "a text" if may_be_blank else "a text that is not empty")
        return value

    def text_or_number(self, key: str) -> str:
        """A text, or the text of a number."""
        value = self._values.get(key)
        if type(value) in (int, float):
            return str(value)
        return self.text(key)

    def values(self, key: str, of: type[Any] | None = None) -> list[Any]:
        """A list, of values of one type if `of` (str or list) is given."""
        value = self._values.get(key)
        if not isinstance(value, list) or not all(of is None or isinstance(v, of) for v in value):
            kind = {None: "a list", str: "a list of texts", list: "a list of lists"}[of]
            self._malformed(key, kind)
        return value

    def entries(self, key: str) -> list[Entry]:
        """A list of objects."""
        return [
            Entry(value, f"{self.where}, {key}[{i}]") for i, value in enumerate(self.values(key))
        ]

    def refuse(self, why: str) -> NoReturn:
        """Raise ExampleError for this entry."""
        raise ExampleError(f"{self.where}: {why}")

    def _malformed(self, key: str, kind: str) -> NoReturn:
        value = self._values.get(key)
        given = "is missing" if value is None else f"is {brief(value)}"
        self.refuse(f"{key} {given}: it must be {kind}")


def read_entries(path: Path) -> list[Entry]:
    """The entries of a file: parquet, a JSON list, or JSON lines.

    Raises:
        ExampleError: malformed, without entries, or parquet without pyarrow.
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    values = _from_parquet(path) if data[:4] == PARQUET_MAGIC else _from_json(path, data)
    if not values:
        raise ExampleError(f"{path}: no entries in this file")
    return [Entry(value, f"{path}: entry {i}") for i, value in enumerate(values)]


def read_json(path: Path, data: bytes | None = None) -> Any:
    """The one JSON value in a file, or in the bytes read from it. Raises ExampleError, OSError."""
    try:
        return jsonio.loads(path.read_bytes() if data is None else data)
    except ValueError as error:
        raise ExampleError(f"{path}: not JSON: {error}") from error


def _from_json(path: Path, data: bytes) -> list[Any]:
    data = data.removeprefix(codecs.BOM_UTF8)
    if data.lstrip()[:1] == b"[":
        value = read_json(path, data)
        return value if isinstance(value, list) else []
    values = []
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            try:
                values.append(jsonio.loads(line))
            except ValueError as error:
                raise ExampleError(
                    f"{path}:{number}: not JSON: {error}; the file must be parquet, a JSON list of"
                    " entries, or an entry a line"
                ) from error
    return values


def _from_parquet(path: Path) -> list[Any]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ExampleError(
            f"{path}: parquet files need pyarrow: pip install 'swa[parquet]', or give it as JSON"
        ) from error
    try:
        rows: list[Any] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:  # what is damaged is an OSError to it, too
        raise ExampleError(f"{path}: not a parquet file that can be read: {error}") from error
    return rows
