"""The exceptions and the warning that swa raises; a MemoryError stays Python's own."""

from __future__ import annotations


class SwaError(Exception):
    """Base class of every error that swa raises on purpose."""


class CheckpointError(SwaError, ValueError):
    """A checkpoint is malformed, incomplete, hostile, or changed since it was opened.

    Attributes:
        message: what is wrong, and what to do about it.
        file: the file at fault, if one is.
        tensor: the tensor at fault, if one is.
        rule: the rule that the input breaks, if it has a name.
    """

    def __init__(
        self,
        message: str,
        *,
        file: object = None,
        tensor: str | None = None,
        rule: str | None = None,
    ) -> None:
        self.message = message
        self.file = None if file is None else str(file)
        self.tensor = tensor
        self.rule = rule
        super().__init__(message)

    def __str__(self) -> str:
        where = "" if self.file is None else f"{self.file}: "
        what = "" if self.tensor is None else f"tensor {self.tensor!r}: "
        rule = "" if self.rule is None else f" [rule: {self.rule}]"
        return f"{where}{what}{self.message}{rule}"


class UnsupportedModelError(CheckpointError):
    """The checkpoint asks for a computation that swa does not do; `key` and `value` say which."""

    def __init__(
        self,
        message: str,
        *,
        key: str | None = None,
        value: object = None,
        file: object = None,
        tensor: str | None = None,
        rule: str | None = None,
    ) -> None:
        super().__init__(message, file=file, tensor=tensor, rule=rule)
        self.key = key
        self.value = value


class PolicyError(SwaError, ValueError):
    """An attention policy contradicts itself or does not fit the model."""


class ExampleError(SwaError, ValueError):
    """An example, or a file of examples, cannot be used."""


class ScoresError(SwaError, ValueError):
    """A file of scores, a selection or a journal is malformed or does not fit its use."""


class TokenizerError(SwaError, ValueError):
    """A tokenizer cannot be built, or cannot do what was asked."""


class InputError(SwaError, ValueError):
    """Any other input that cannot be used: a token out of range, a prompt too long, ..."""


class JudgeError(SwaError, RuntimeError):
    """A judge of replies cannot be reached, refuses, or says nothing."""


class WorkerError(SwaError, RuntimeError):
    """Workers keep dying, or an executor does not do its duty."""


class SwaWarning(UserWarning):
    """Something that works, but that the user should know about."""
