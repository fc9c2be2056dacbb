"""The parser of safetensors headers against the reference library: stricter, never laxer."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import measure_peak

from swa.errors import CheckpointError, UnsupportedModelError
from swa.safetensors_file import TensorEntry, read_header
from swa.weight_files import MAX_JSON_BYTES, open_regular

Tensors = dict[str, tuple[str, list[int], bytes]]
"""name: dtype, shape, data."""


def pack(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(
    shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32", **more: Any
) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], Tensors]:
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    path.touch()

    def read(content: bytes) -> Tensors:
        with open(path, "r+b") as file:  # emptying it first would flush it to the disk each time
            file.write(content)
            file.truncate()
        with open_regular(path) as file:
            entries = read_header(file)
        return {
            name: (e.dtype, list(e.shape), content[e.offset : e.offset + e.n_bytes])
            for name, e in entries.items()
        }

    return read


def reference(content: bytes) -> Tensors | None:
    """None: the library rejects it."""
    try:
        tensors = safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return None
    return {name: (t["dtype"], list(t["shape"]), bytes(t["data"])) for name, t in tensors}


EIGHT = bytes(range(8))
ACCEPTED: dict[str, bytes] = {
    "no tensors": pack({}),
    "one": pack({"a": entry()}, EIGHT),
    "F16": pack({"a": entry([2, 2], dtype="F16")}, EIGHT),
    "BF16": pack({"a": entry([4, 1], dtype="BF16")}, EIGHT),
    "a scalar": pack({"a": entry([], (0, 4))}, b"\0\0\x80\x3f"),
    "an empty tensor": pack({"a": entry([3, 0], (0, 0))}),
    "empty ones between": pack(
        {"b": entry([0], (4, 4)), "a": entry([1], (0, 4)), "c": entry([1], (4, 8))}, EIGHT
    ),
    "names out of order": pack({"b": entry([1], (4, 8)), "a": entry([1], (0, 4))}, EIGHT),
    "metadata": pack({"__metadata__": {"format": "pt", "": ""}, "a": entry()}, EIGHT),
    "metadata alone": pack({"__metadata__": {}}),
    "padded with blanks": pack(json.dumps({"a": entry()}).encode() + b" " * 13, EIGHT),
    "white space inside": pack(json.dumps({"a": entry()}, indent=3).encode() + b"\n\t\r", EIGHT),
    "keys in another order": pack(b'{"a":{"data_offsets":[0,8],"shape":[2],"dtype":"F32"}}', EIGHT),
    "a name in Unicode": pack({"ä\U0001f600": entry()}, EIGHT),
    "an escaped name": pack(b'{"\\u0061\\ud83d\\ude00":%s}' % json.dumps(entry()).encode(), EIGHT),
    "an empty name": pack({"": entry()}, EIGHT),
}


def raw_entry(text: str, data: bytes = EIGHT) -> bytes:
    return pack(f'{{"a":{{{text}}}}}'.encode(), data)


def shape(text: str, data: bytes = EIGHT) -> bytes:
    return raw_entry(f'"dtype":"F32","shape":{text},"data_offsets":[0,{len(data)}]', data)


def offsets(text: str, data: bytes = EIGHT) -> bytes:
    return raw_entry(f'"dtype":"F32","shape":[2],"data_offsets":{text}', data)


VALID = json.dumps({"a": entry()}).encode()
# What breaks which rule. A star: the library accepts it, and we do not.
REJECTED: list[tuple[str, str, bytes]] = [
    ("empty file", "file-size", b""),
    ("seven bytes", "file-size", b"\2\0\0\0\0\0\0"),
    ("header beyond the file", "header-length", pack(VALID, length=len(VALID) + 1)),
    ("header length of all ones", "header-length", pack(VALID, length=2**64 - 1)),
    ("header length that wraps", "header-length", pack(VALID, length=2**64 - 8)),
    ("header length of 2^63", "header-length", pack(VALID, length=2**63)),
    ("no header", "header-json", pack(b"")),
    ("header cut short", "header-json", pack(VALID, EIGHT, length=len(VALID) - 1)),
    ("not UTF-8", "header-json", pack(VALID.replace(b'"a"', b'"\xff"'), EIGHT)),
    ("overlong UTF-8", "header-json", pack(VALID.replace(b'"a"', b'"\xc0\x80"'), EIGHT)),
    ("a surrogate in UTF-8", "header-json", pack(VALID.replace(b'"a"', b'"\xed\xa0\x80"'), EIGHT)),
    ("UTF-16", "header-json", pack(VALID.decode().encode("utf-16-le"), EIGHT)),
    ("byte order mark", "header-json", pack(b"\xef\xbb\xbf" + VALID, EIGHT)),
    ("* white space first", "header-json", pack(b" " + VALID, EIGHT)),
    ("a list", "header-json", pack(b"[]")),
    ("a string", "header-json", pack(b'"a"')),
    ("not JSON", "header-json", pack(b"{a:1}")),
    ("garbage behind", "header-json", pack(VALID + b"x", EIGHT)),
    ("zeros behind", "header-json", pack(VALID + b"\0", EIGHT)),
    ("a trailing comma", "header-json", pack(VALID[:-1] + b",}", EIGHT)),
    ("a comment", "header-json", pack(VALID + b"//", EIGHT)),
    ("a control character", "header-json", pack(VALID.replace(b'"a"', b'"\x01"'), EIGHT)),
    ("half a surrogate pair", "header-json", pack(VALID.replace(b'"a"', b'"\\ud800"'), EIGHT)),
    ("NaN", "header-json", shape("[NaN]")),
    ("nested deep", "header-json", shape("[" * 100_000 + "]" * 100_000)),
    ("* name given twice", "header-json", pack(VALID[:-1] + b"," + VALID[1:], EIGHT)),
    (
        "metadata given twice",
        "header-json",
        pack(b'{"__metadata__":{},"__metadata__":{}}'),
    ),
    ("metadata of numbers", "metadata", pack({"__metadata__": {"a": 1}})),
    ("metadata of null", "metadata", pack({"__metadata__": {"a": None}})),
    ("metadata is a list", "metadata", pack({"__metadata__": ["a"]})),
    ("metadata is text", "metadata", pack({"__metadata__": "a"})),
    ("* metadata is null", "metadata", pack({"__metadata__": None})),
    ("half a pair in metadata", "metadata", pack(b'{"__metadata__":{"a":"\\udc00"}}')),
    ("entry is a number", "entry", pack({"a": 1})),
    ("entry is null", "entry", pack({"a": None})),
    ("* entry is a list", "entry", pack({"a": ["F32", [2], [0, 8]]}, EIGHT)),
    ("no dtype", "entry", raw_entry('"shape":[2],"data_offsets":[0,8]')),
    ("no shape", "entry", raw_entry('"dtype":"F32","data_offsets":[0,8]')),
    ("no offsets", "entry", raw_entry('"dtype":"F32","shape":[2]')),
    ("* a key too many", "entry", pack({"a": entry(scale=2)}, EIGHT)),
    (
        "a key given twice",
        "header-json",
        raw_entry('"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]'),
    ),
    ("dtype is a number", "entry", pack({"a": entry(dtype=1)}, EIGHT)),
    ("dtype is null", "entry", pack({"a": entry(dtype=None)}, EIGHT)),
    ("unknown dtype", "dtype", pack({"a": entry(dtype="F31")}, EIGHT)),
    ("dtype in lower case", "dtype", pack({"a": entry(dtype="f32")}, EIGHT)),
    ("* a dtype we do not read", "dtype", pack({"a": entry([1], dtype="I64")}, EIGHT)),
    ("* eight bits", "dtype", pack({"a": entry([8], dtype="F8_E4M3")}, EIGHT)),
    ("shape is a number", "shape", shape("2")),
    ("shape is null", "shape", shape("null")),
    ("shape is an object", "shape", shape("{}")),
    ("a dimension of text", "shape", shape('["2"]')),
    ("a fraction", "shape", shape("[2.0]")),
    ("an exponent", "shape", shape("[2e0]")),
    ("true", "shape", shape("[true, 2]")),
    ("a negative dimension", "header-json", shape("[-2]")),
    ("two negative dimensions", "header-json", shape("[-1, -2]")),
    ("minus zero", "header-json", shape("[-0]", b"")),
    ("2^64 with a zero", "shape", shape(f"[0, {2**64}]", b"")),
    ("a dimension that wraps", "shape", shape(f"[{2**64 + 2}]")),
    ("a product that wraps", "shape-overflow", shape(f"[2, {2**64 - 2}]")),
    ("a product of 2^64", "shape-overflow", shape(f"[{2**32}, {2**32}]", b"")),
    ("bytes that wrap", "shape-overflow", shape(f"[{2**62 + 2}]")),
    ("a product that wraps before a zero", "shape-overflow", shape(f"[{2**63}, 4, 0]", b"")),
    ("a number of 5,000 digits", "header-json", shape("[" + "9" * 5000 + "]")),
    ("one offset", "data-offsets", offsets("[0]")),
    ("three offsets", "data-offsets", offsets("[0, 8, 8]")),
    ("offsets of text", "data-offsets", offsets('["0", "8"]')),
    ("offsets are a number", "data-offsets", offsets("8")),
    ("a fractional offset", "data-offsets", offsets("[0, 8.0]")),
    ("a negative offset", "header-json", offsets("[-8, 0]")),
    ("a huge offset", "data-offsets", offsets(f"[0, {2**64 + 8}]")),
    ("backwards", "byte-size", offsets("[8, 0]")),
    ("fewer bytes than the shape", "byte-size", offsets("[0, 4]")),
    ("more bytes than the shape", "byte-size", offsets("[0, 12]", bytes(12))),
    ("a hole at the start", "contiguous", pack({"a": entry(offsets=(4, 12))}, bytes(12))),
    (
        "a hole between",
        "contiguous",
        pack({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    ),
    ("an overlap", "contiguous", pack({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12))),
    ("the same bytes twice", "contiguous", pack({"a": entry(), "b": entry()}, EIGHT)),
    ("an empty one in a hole", "contiguous", pack({"a": entry([0], (4, 4))}, bytes(4))),
    ("an empty one inside", "contiguous", pack({"a": entry(), "b": entry([0], (4, 4))}, EIGHT)),
    ("one byte behind", "file-end", pack({"a": entry()}, EIGHT + b"\0")),
    ("one byte short", "file-end", pack({"a": entry()}, EIGHT[:-1])),
    ("no data at all", "file-end", pack({"a": entry()})),
    ("data without tensors", "file-end", pack({}, EIGHT)),
    ("far beyond the file", "file-end", pack({"a": entry([2**40], (0, 2**42))}, EIGHT)),
]


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(ours: Callable[[bytes], Tensors], name: str) -> None:
    expected = reference(ACCEPTED[name])
    assert expected is not None
    assert ours(ACCEPTED[name]) == expected


@pytest.mark.parametrize(("name", "rule", "content"), REJECTED, ids=[r[0] for r in REJECTED])
def test_rejected(ours: Callable[[bytes], Tensors], name: str, rule: str, content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors: .*\[rule: ") as caught:
        ours(content)
    assert caught.value.rule == rule
    assert len(str(caught.value)) < 1000
    tensor_rules = ("entry", "dtype", "shape", "shape-overflow", "data-offsets", "byte-size")
    if rule in tensor_rules:
        assert caught.value.tensor == "a"
    assert (reference(content) is not None) == name.startswith("*")


def test_the_order_of_the_data(ours: Callable[[bytes], Tensors]) -> None:
    assert list(ours(ACCEPTED["names out of order"])) == ["a", "b"]


def test_where_a_tensor_lies(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = json.dumps({"a": entry([1, 2], (0, 8)), "b": entry([2], (8, 12), "BF16")}).encode()
    path.write_bytes(pack(header + b" ", bytes(12)))
    with open_regular(path) as file:
        found = read_header(file)
    start = 8 + len(header) + 1
    assert found == {
        "a": TensorEntry("F32", (1, 2), start, 8),
        "b": TensorEntry("BF16", (2,), start + 8, 4),
    }


def test_an_unsupported_dtype_is_named(ours: Callable[[bytes], Tensors]) -> None:
    with pytest.raises(UnsupportedModelError, match="dtype 'I64' is not supported") as caught:
        ours(pack({"a": entry([1], dtype="I64")}, EIGHT))
    assert (caught.value.key, caught.value.value, caught.value.tensor) == ("dtype", "I64", "a")


# ---- what a header may cost --------------------------------------------------------------------


@pytest.mark.parametrize("length", [MAX_JSON_BYTES + 1, 100_000_000, 2**40])
def test_a_long_header_is_not_read(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little"))
    with open(path, "r+b") as file:
        file.truncate(8 + length)  # a sparse file
    started = time.perf_counter()
    with open_regular(path) as file, pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert caught.value.rule == "header-length"
    assert time.perf_counter() - started < 1.0


HOSTILE = {
    "objects": ('{"a":[', "{},", "{}]}"),
    "strings": ('{"a":[', '"\u0100",', "0]}"),
    "lists": ('{"a":[', "[],", "0]}"),
    "nesting": ('{"a":', "[", ""),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_time_and_memory_of_the_longest_header(tmp_path: Path, kind: str) -> None:
    begin, middle, end = HOSTILE[kind]
    room = MAX_JSON_BYTES - len(begin) - len(end)
    text = (begin + middle * (room // len(middle.encode())) + end).encode()
    assert MAX_JSON_BYTES - 8 < len(text) <= MAX_JSON_BYTES
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack(text))
    setup = """
        from pathlib import Path
        from swa.errors import CheckpointError
        from swa.safetensors_file import read_header
        from swa.weight_files import open_regular
    """
    task = f"""
        try:
            with open_regular(Path({str(path)!r})) as file:
                read_header(file)
        except CheckpointError:
            refused = True
        assert refused
    """
    assert measure_peak(setup, task) < 1 << 30


def test_a_repeated_name_among_many_is_found_fast(ours: Callable[[bytes], Tensors]) -> None:
    names = [f'"{i}":0' for i in range(300_000)]
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="the key '299999' is given twice"):
        ours(pack(("{" + ",".join([*names, names[-1]]) + "}").encode()))
    assert time.perf_counter() - started < 10.0


# ---- fuzzing -----------------------------------------------------------------------------------

SPLICES = [
    *(b"0", b"-1", b"-0", b"1e0", b"0.0", b"8", b"18446744073709551615", b"18446744073709551616"),
    *(b"9223372036854775808", b"4294967296", b"null", b"true", b'""', b"[]", b"{}", b"NaN", b" "),
    *(b'"', b"\\u0000", b"\\ud800", b"\xff", b"\xf0\x9f\x98\x80", b"\0", b",", b":", b"[", b"}"),
    *(b'"a":', b'"__metadata__":', b'"dtype":"F64"', b'"shape":[]', b"//", b"\xef\xbb\xbf"),
]


def mutate(rng: random.Random, content: bytes) -> bytes:
    """One file with its header, its length or its data changed at a few places."""
    length = int.from_bytes(content[:8], "little")
    header, data = bytearray(content[8 : 8 + length]), content[8 + length :]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(header) + 1)
        match rng.randrange(7):
            case 0:  # flip a bit
                if at < len(header):
                    header[at] ^= 1 << rng.randrange(8)
            case 1:  # splice something in
                header[at:at] = rng.choice(SPLICES)
            case 2:  # ... or over something
                header[at : at + rng.randrange(1, 9)] = rng.choice(SPLICES)
            case 3:  # cut
                del header[at : at + rng.randrange(1, 6)]
            case 4:  # another number in place of one
                digits = [i for i, byte in enumerate(header) if 48 <= byte <= 57]
                if digits:
                    header[(i := rng.choice(digits)) : i + 1] = rng.choice(SPLICES[:12])
            case 5:  # repeat a piece
                header[at:at] = header[at : at + rng.randrange(1, 60)]
            case 6:
                data = rng.choice((data[:-1], data + b"\0", data[: len(data) // 2], b""))
    wrong = rng.choice((0,) * 12 + (1, -1, 8, 2**63, -len(header)))
    return pack(bytes(header), data, length=(len(header) + wrong) % 2**64)


def test_mutated_files(ours: Callable[[bytes], Tensors]) -> None:
    """Only CheckpointError comes out, and what we accept the library reads just the same."""
    rng = random.Random(20240726)
    hostile = [content for _, _, content in REJECTED if len(content) < 1000]
    accepted = rejected = 0
    for _ in range(40_000):
        seed = rng.choice(hostile if rng.random() < 0.2 else list(ACCEPTED.values()))
        content = mutate(rng, seed)
        try:
            tensors = ours(content)
        except CheckpointError as error:
            assert error.file is not None and error.rule is not None
            rejected += 1
        else:
            assert tensors == reference(content), content
            accepted += 1
    assert accepted > 1000 and rejected > 20_000


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-1, 16),
        st.sampled_from([2**63, 2**64 - 1, 2**64, 2.0]),
        st.sampled_from(["F32", "F16", "BF16", "I8", "", "dtype"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
SIZES = st.lists(st.integers(0, 4), max_size=3)


@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "c", "__metadata__"]),
        st.one_of(
            st.builds(
                entry,
                st.one_of(SIZES, VALUES),
                st.one_of(st.lists(st.integers(0, 16), min_size=2, max_size=2), VALUES),
                st.one_of(st.sampled_from(["F32", "F16", "BF16"]), VALUES),
            ),
            VALUES,
        ),
        max_size=3,
    ),
    n_bytes=st.integers(0, 32),
)
@settings(max_examples=400)
def test_structured_headers(
    ours: Callable[[bytes], Tensors], header: dict[str, Any], n_bytes: int
) -> None:
    content = pack(header, bytes(n_bytes))
    try:
        tensors = ours(content)
    except CheckpointError:
        return
    assert tensors == reference(content)


@given(
    shapes=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(["F32", "F16", "BF16"]), SIZES),
        max_size=5,
    ),
    blanks=st.integers(0, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=200)
def test_every_valid_file_is_accepted(
    ours: Callable[[bytes], Tensors], shapes: dict[str, Any], blanks: int, seed: int
) -> None:
    header, data, rng = {}, b"", random.Random(seed)
    names = list(shapes)
    rng.shuffle(names)
    for name in names:
        dtype, sizes = shapes[name]
        n_bytes = 4 if dtype == "F32" else 2
        for size in sizes:
            n_bytes *= size
        header[name] = entry(sizes, [len(data), len(data) + n_bytes], dtype)
        data += rng.randbytes(n_bytes)
    items = list(header.items())
    rng.shuffle(items)
    content = pack(json.dumps(dict(items)).encode() + b" " * blanks, data)
    assert ours(content) == reference(content) is not None
