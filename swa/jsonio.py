"""JSON as this package writes it: no NaN, no repeated key, one row of numbers per line."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any


def dumps_line(value: Any) -> str:
    """One line, floats at full precision. Raises ValueError on NaN and infinity."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


def digest(value: Any) -> str:
    """SHA-256 (hex) of that line. Raises as `dumps_line`."""
    return hashlib.sha256(dumps_line(value).encode()).hexdigest()


def dumps_document(value: dict[str, Any]) -> str:
    """Objects spread over lines, lists of lists row by row, all else compact: fit for diffs."""
    return _spread(value, "") + "\n"


def loads(text: str | bytes, parse_int: Callable[[str], Any] = int) -> Any:
    """Parse JSON, refusing what the standard forbids and Python lets pass.

    `parse_int` makes a value of the text of an integer.

    Raises:
        ValueError: not UTF-8, not JSON, NaN or an infinity, a key given twice, nested too deep.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")  # or Python would take UTF-16 as well
    try:
        return json.loads(
            text,
            parse_int=parse_int,
            parse_float=_finite,
            parse_constant=_refuse,
            object_pairs_hook=_unique,
        )
    except RecursionError:
        raise ValueError("nested too deep") from None


def _spread(value: Any, indent: str) -> str:
    inner = indent + "  "
    if isinstance(value, dict) and value:
        rows = [f"{inner}{dumps_line(str(k))}: {_spread(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(value, (list, tuple)) and any(isinstance(v, (list, tuple)) for v in value):
        return "[\n" + ",\n".join(inner + dumps_line(v) for v in value) + f"\n{indent}]"
    return dumps_line(value)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is beyond the range of numbers")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise ValueError(f"the key {key!r} is given twice")
        data[key] = value
    return data
