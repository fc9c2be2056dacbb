"""Typed access to an untrusted mapping, such as config.json; every error names file and key."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from swa.errors import CheckpointError, UnsupportedModelError

MAX_SIZE = 2**31 - 1
MAX_NUMBER = (2 - 2**-23) * 2.0**127  # of float32


class Fields:
    """Reads keys of `values` and remembers which, so that `refuse_unread` can find the others.

    Every getter raises CheckpointError if a value has the wrong type or is out of range, or if a
    key without default is absent. An explicit null counts as absent, but in `optional_integer`.
    """

    def __init__(self, values: Mapping[str, Any], *, file: object, prefix: str = "") -> None:
        self._values, self._file, self._prefix = values, file, prefix
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def raw(self, key: str) -> Any:
        """The value as it is; None if absent."""
        self._read.add(key)
        return self._values.get(key)

    def integer(
        self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_SIZE
    ) -> int:
        value = self._get(key, default)
        if type(value) is not int or not low <= value <= high:
            self.malformed(key, f"must be an integer from {low} to {high}")
        return value

    def optional_integer(self, key: str, absent: int | None = None, *, low: int = 1) -> int | None:
        """As `integer`, but null is a value of its own; `absent` stands for a missing key."""
        if key not in self._values:
            return absent
        return None if self.raw(key) is None else self.integer(key, low=low)

    def number(self, key: str, default: float | None = None, *, above: float = 0.0) -> float:
        """A number beyond `above` that is finite in float32, in which the engine computes."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not above < value <= MAX_NUMBER:
            self.malformed(key, f"must be a number above {above:g}, finite in float32")
        return float(value)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            self.malformed(key, "must be true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            self.malformed(key, "must be a string")
        return value

    def require(self, key: str, supported: Collection[Any]) -> None:
        """Refuse a value that is neither absent, null nor in `supported` (true is not 1)."""
        value = self.raw(key)
        if value is not None and not any(
            value == v and isinstance(value, bool) == isinstance(v, bool) for v in supported
        ):
            choice = " or ".join(repr(v) for v in supported)
            self.unsupported(key, f"swa supports {choice}" if choice else "swa does not support it")

    def refuse_unread(self, harmless: Collection[str]) -> None:
        """Refuse keys that nothing read: what they would change cannot be known."""
        for key, value in self._values.items():
            if value is not None and key not in self._read and key not in harmless:
                self.unsupported(
                    key, "swa does not know this key; remove it if it does not change the results"
                )

    def unsupported(self, key: str, why: str) -> NoReturn:
        """Raise UnsupportedModelError for `key`."""
        value = self._values.get(key)
        name = self._prefix + key
        raise UnsupportedModelError(
            f"{name} is {brief(value)}: {why}", key=name, value=value, file=self._file
        )

    def malformed(self, key: str, why: str) -> NoReturn:
        """Raise CheckpointError for `key`."""
        name, value = self._prefix + key, self._values.get(key)
        what = f"{name} is missing: it" if value is None else f"{name} is {brief(value)}: it"
        raise CheckpointError(f"{what} {why}", file=self._file)

    def _get(self, key: str, default: Any) -> Any:
        value = self.raw(key)
        return default if value is None else value


def brief(value: object) -> str:
    """The repr of a value, cut short: hostile input may be long."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
