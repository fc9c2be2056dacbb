"""The header of a GGUF file, checked before a byte of its data is used.

Read here and not by the `gguf` package, whose reader maps the file and trusts its counts. As strict
as llama.cpp: names are unique, tensors lie one after another in the order of the header.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from swa.errors import CheckpointError, UnsupportedModelError
from swa.weight_files import OpenFile

MAX_HEADER_BYTES = 64 << 20  # four times the largest vocabulary; parsing takes < 1 GiB
MAX_KEYS, MAX_TENSORS, MAX_DIMENSIONS = 1 << 16, 1 << 17, 4
DEFAULT_ALIGNMENT = 32

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_BLOCK_BYTES = 1 << 20  # read ahead
_STRING, _ARRAY, _BOOL = 8, 9, 7
# Value types: little-endian format of one, for struct and array alike.
_SCALARS: Mapping[int, str] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    _BOOL: "B",
    10: "Q",
    11: "q",
    12: "d",
}


class NumberType(NamedTuple):
    """How numbers are stored: in blocks along a row."""

    name: str
    """"F32", "Q4_1", ... as in gguf.GGMLQuantizationType."""
    block_items: int
    block_bytes: int


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies in its file."""

    kind: NumberType
    shape: tuple[int, ...]
    """Row-major: the last dimension is contiguous."""
    offset: int
    """Bytes from the start of the file."""
    n_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself."""

    metadata: Mapping[str, Any]
    """int, float, bool, str; lists as list[str] or array.array."""
    tensors: Mapping[str, GgufTensor]
    """In the order of their data."""


def read_header(file: OpenFile) -> GgufHeader:
    """Parse and check all of the header.

    Raises:
        CheckpointError: it is malformed or does not fit the file; `rule` says in which way.
        UnsupportedModelError: another version or byte order, or a type of numbers not known.
    """
    cursor = _Cursor(file)
    if cursor.take(4) != _MAGIC:
        cursor.fail("it does not begin with GGUF", "magic")
    version = cursor.number("I")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "big-endian" if swapped in _VERSIONS else f"of version {version}"
        raise UnsupportedModelError(
            f"the file is {what}: swa reads little-endian GGUF of version 2 or 3",
            key="version",
            value=version,
            file=file.stamp.path,
            rule="version",
        )
    n_tensors = cursor.count("Q", MAX_TENSORS, "tensors")
    n_keys = cursor.count("Q", MAX_KEYS, "keys")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.string()
        if key in metadata:
            cursor.fail(f"the key {key!r} is given twice", "unique-keys")
        metadata[key] = cursor.value(cursor.number("I"))
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(n_tensors):
        name = cursor.string()
        if name in entries:
            cursor.fail("it is there twice", "unique-tensors", name)
        entries[name] = cursor.tensor()
    return GgufHeader(metadata, _place(entries, _alignment(metadata, cursor), cursor))


class _Cursor:
    """Reads a header from front to back."""

    def __init__(self, file: OpenFile) -> None:
        self.file = file
        self._end = min(file.stamp.size, MAX_HEADER_BYTES)
        self._block, self._at, self._next = b"", 0, 0

    @property
    def position(self) -> int:
        """Bytes of the file that were taken."""
        return self._next - len(self._block) + self._at

    def fail(self, message: str, rule: str, tensor: str | None = None) -> NoReturn:
        raise CheckpointError(message, file=self.file.stamp.path, tensor=tensor, rule=rule)

    def take(self, n_bytes: int) -> bytes:
        """The next bytes; refused before anything is allocated if the header has no room."""
        if n_bytes > self._end - self.position:
            self.fail(
                f"the header goes on for {n_bytes} bytes at byte {self.position}, but the file has"
                f" {self.file.stamp.size}, and swa reads headers of at most {MAX_HEADER_BYTES}",
                "header-length",
            )
        start, self._at = self._at, self._at + n_bytes
        if self._at > len(self._block):
            missing = self._at - len(self._block)
            more = min(max(missing, _BLOCK_BYTES), self._end - self._next)
            self._block = self._block[start:] + self.file.read(self._next, more)
            self._next += more
            start, self._at = 0, n_bytes
        return self._block[start : self._at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, code: str, limit: int, what: str) -> int:
        value: int = self.number(code)
        if value > limit:
            self.fail(f"{value} {what} are more than the {limit} that swa reads", "counts")
        return value

    def string(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.fail(f"the text {raw[:40]!r} is not UTF-8: {error.reason}", "utf-8")

    def value(self, type_id: int) -> Any:
        """One value of a key."""
        if type_id == _ARRAY:
            return self._array(self.number("I"), self.number("Q"))
        if type_id == _STRING:
            return self.string()
        if type_id == _BOOL:
            return self.count("B", 1, "in a boolean") == 1
        return self.number(self._code(type_id))

    def tensor(self) -> tuple[tuple[int, ...], int, int]:
        """Shape, type and offset within the data."""
        n_dimensions = self.count("I", MAX_DIMENSIONS, "dimensions")
        shape = tuple(self.number("Q") for _ in range(n_dimensions))[::-1]
        return shape, self.number("I"), self.number("Q")

    def _array(self, type_id: int, n_items: int) -> list[str] | array[Any]:
        if type_id == _STRING:
            return [self.string() for _ in range(n_items)]
        items = array(self._code(type_id))
        items.frombytes(self.take(n_items * items.itemsize))
        return items

    def _code(self, type_id: int) -> str:
        if type_id not in _SCALARS:
            self.fail(f"a value at byte {self.position} is of unknown type {type_id}", "value-type")
        return _SCALARS[type_id]


def _alignment(metadata: Mapping[str, Any], cursor: _Cursor) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or value < 1 or value & (value - 1):
        cursor.fail(f"general.alignment is {value!r}: it must be a power of two", "alignment")
    return value


def _place(
    entries: Mapping[str, tuple[tuple[int, ...], int, int]], alignment: int, cursor: _Cursor
) -> dict[str, GgufTensor]:
    """Each tensor's place, after the checks that it lies in the file and overlaps no other."""

    def padded(n_bytes: int) -> int:
        return -(-n_bytes // alignment) * alignment

    kinds = _number_types()
    size = cursor.file.stamp.size
    data_start = padded(cursor.position)
    end = offset = 0
    tensors: dict[str, GgufTensor] = {}
    for name, (shape, type_id, given_offset) in entries.items():
        kind = kinds.get(type_id) or _refuse_type(name, type_id, cursor)
        if not shape or 0 in shape or shape[-1] % kind.block_items:
            cursor.fail(
                f"its shape {list(shape)} is empty, or its rows are no whole {kind.name} blocks",
                "shape",
                name,
            )
        if given_offset != offset:
            what = "overlaps what is before it" if given_offset < offset else "follows a hole"
            cursor.fail(
                f"its data {what}: it begins at byte {given_offset}, not {offset}",
                "contiguous",
                name,
            )
        n_bytes = math.prod(shape) // kind.block_items * kind.block_bytes
        end = offset + n_bytes
        if data_start + end > size:
            cursor.fail(
                f"its data ends at byte {data_start + end}, the file at {size}", "file-end", name
            )
        tensors[name] = GgufTensor(kind, shape, data_start + offset, n_bytes)
        offset = padded(end)
    if size > data_start + offset:
        cursor.fail(
            f"the file has bytes that no tensor names: it ends at byte {size}, its data at"
            f" {data_start + end}",
            "file-end",
        )
    return tensors


def _refuse_type(name: str, type_id: int, cursor: _Cursor) -> NoReturn:
    raise UnsupportedModelError(
        f"the gguf package does not know numbers of type {type_id}: a newer one may",
        key="type",
        value=type_id,
        file=cursor.file.stamp.path,
        tensor=name,
        rule="dtype",
    )


def _number_types() -> dict[int, NumberType]:
    """What the gguf package knows, by the number that files have for it."""
    from gguf import GGML_QUANT_SIZES

    return {int(kind): NumberType(kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
