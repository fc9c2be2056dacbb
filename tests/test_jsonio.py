"""JSON: what is refused, and documents that come back and suit diffs."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa import jsonio

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_documents_come_back(value: dict[str, Any]) -> None:
    assert jsonio.loads(jsonio.dumps_document(value)) == value


@given(VALUES)
def test_lines_come_back_and_are_one(value: Any) -> None:
    line = jsonio.dumps_line(value)
    assert jsonio.loads(line.encode()) == value
    assert "\n" not in line


def test_documents_go_row_by_row() -> None:
    value = {"a": {"b": [1, 2], "none": {}}, "rows": [[0.1, None], [True, "ü"]], "c": [{"d": 1}]}
    assert jsonio.dumps_document(value) == (
        "{\n"
        '  "a": {\n'
        '    "b": [1, 2],\n'
        '    "none": {}\n'
        "  },\n"
        '  "rows": [\n'
        "    [0.1, null],\n"
        '    [true, "ü"]\n'
        "  ],\n"
        '  "c": [{"d": 1}]\n'
        "}\n"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_written(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        jsonio.dumps_line([value])
    with pytest.raises(ValueError, match="not JSON compliant"):
        jsonio.dumps_document({"rows": [[value]]})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Expecting value"),
        ("[1,]", "Expecting value|trailing comma"),
        ("{} {}", "Extra data"),
        ("NaN", "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not a JSON number"),
        ("[1e999]", "1e999 is beyond the range"),
        ("-1e400", "-1e400 is beyond the range"),
        ('{"a": 1, "b": 2, "a": 1}', "the key 'a' is given twice"),
        ('[{"x": {"a": 1, "\\u0061": 2}}]', "the key 'a' is given twice"),
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 100_000, "nested too deep"),
        ("1" * 5000, "digits"),
        (b'"\xff"', "can't decode byte 0xff"),
        (b'"\xed\xa0\x80"', "can't decode byte 0xed"),
        ("[1]".encode("utf-16"), "can't decode byte 0xff"),
        ("[1]".encode("utf-32-le"), "Expecting|Extra|Invalid"),
    ],
)
def test_what_is_refused(text: str | bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        jsonio.loads(text)


def test_numbers_keep_their_type_and_precision() -> None:
    assert jsonio.loads("[1, 1.0, -0.0, 1e-320, 9007199254740993]") == json.loads(
        "[1, 1.0, -0.0, 1e-320, 9007199254740993]"
    )
    assert [type(value) for value in jsonio.loads("[1, 1.0, 1e2]")] == [int, float, float]
