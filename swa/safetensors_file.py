"""The header of a safetensors file, checked before a byte of its data is used.

At least as strict as the reference implementation; beyond it a repeated name, a key that the format
does not have, white space before the header and a header above 16 MiB are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeAlias, cast

from swa import jsonio
from swa.errors import CheckpointError, UnsupportedModelError
from swa.fields import brief
from swa.weight_files import MAX_JSON_BYTES, OpenFile

Dtype: TypeAlias = Literal["F32", "F16", "BF16"]
ITEM_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}

_LENGTH_BYTES = 8  # of the header, as an unsigned little-endian integer
_LIMIT = 2**64  # sizes and offsets are 64-bit in the format
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in its file: row-major, little-endian, perhaps misaligned."""

    dtype: Dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    n_bytes: int


def read_header(file: OpenFile) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name, in the order of their data.

    Raises:
        CheckpointError: the header is malformed; `rule` says in which way.
        UnsupportedModelError: a tensor is neither F32, F16 nor BF16.
    """
    path, size = file.stamp.path, file.stamp.size
    if size < _LENGTH_BYTES:
        raise CheckpointError(
            f"a safetensors file has at least {_LENGTH_BYTES} bytes, this one {size}",
            file=path,
            rule="file-size",
        )
    length = int.from_bytes(file.read(0, _LENGTH_BYTES), "little")
    start = _LENGTH_BYTES + length
    if length > MAX_JSON_BYTES or start > size:
        raise CheckpointError(
            f"a header of {length} bytes does not fit: the file has {size}, and swa reads headers"
            f" of at most {MAX_JSON_BYTES}",
            file=path,
            rule="header-length",
        )
    header = _parse(file.read(_LENGTH_BYTES, length), path)
    _check_metadata(header.pop("__metadata__", {}), path)
    entries = {name: _entry(name, value, start, path) for name, value in header.items()}
    end = start
    in_order = sorted(entries.items(), key=lambda item: (item[1].offset, item[1].n_bytes))
    for name, entry in in_order:
        if entry.offset != end:
            what = "overlaps what is before it" if entry.offset < end else "follows a hole"
            raise CheckpointError(
                f"its data {what}: it begins at byte {entry.offset}, not {end}",
                file=path,
                tensor=name,
                rule="contiguous",
            )
        end += entry.n_bytes
    if end != size:
        what = "is truncated" if end > size else "has bytes that no tensor names"
        raise CheckpointError(
            f"the file {what}: its data ends at byte {end}, the file at {size}",
            file=path,
            rule="file-end",
        )
    return dict(in_order)


def _parse(raw: bytes, path: object) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise CheckpointError("the header does not begin with {", file=path, rule="header-json")
    try:
        header: dict[str, Any] = jsonio.loads(raw, parse_int=_unsigned)
        for name in header:
            name.encode()  # Python lets half a surrogate pair pass
    except ValueError as error:
        raise CheckpointError(
            f"the header is not valid JSON: {error}", file=path, rule="header-json"
        ) from error
    return header


def _unsigned(text: str) -> int:
    """All integers of the format are 64-bit and unsigned, and -0 is not one of them."""
    if text.startswith("-") or len(text) > 20:
        raise ValueError(f"{text[:24]} is not an unsigned 64-bit integer")
    return int(text)


def _check_metadata(metadata: object, path: object) -> None:
    try:
        if isinstance(metadata, dict):
            for key, value in metadata.items():
                (key + value).encode()
            return
    except (TypeError, ValueError):
        pass
    raise CheckpointError("__metadata__ must map text to text", file=path, rule="metadata")


def _entry(name: str, value: object, start: int, path: object) -> TensorEntry:
    def fail(message: str, rule: str) -> NoReturn:
        raise CheckpointError(message, file=path, tensor=name, rule=rule)

    if not isinstance(value, dict) or value.keys() != _ENTRY_KEYS:
        fail(f"its entry must have exactly the keys {sorted(_ENTRY_KEYS)}", "entry")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str):
        fail("dtype must be text", "entry")
    if dtype not in ITEM_BYTES:
        raise UnsupportedModelError(
            f"dtype {brief(dtype)} is not supported: swa reads {', '.join(ITEM_BYTES)}",
            key="dtype",
            value=dtype,
            file=path,
            tensor=name,
            rule="dtype",
        )
    if not _are_sizes(shape):
        fail("shape must be a list of unsigned 64-bit integers", "shape")
    if not _are_sizes(offsets) or len(offsets) != 2:
        fail("data_offsets must be two unsigned 64-bit integers", "data-offsets")
    n_bytes = ITEM_BYTES[dtype]
    for size in (1, *shape):
        n_bytes *= size
        if n_bytes >= _LIMIT:  # refused even if a later zero would make the product fit
            fail(f"the size of shape {brief(shape)} overflows", "shape-overflow")
    begin, end = offsets
    if end - begin != n_bytes:
        fail(f"{dtype} {brief(shape)} takes {n_bytes} bytes, not {end - begin}", "byte-size")
    return TensorEntry(cast(Dtype, dtype), tuple(shape), start + begin, n_bytes)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and v < _LIMIT for v in value)
