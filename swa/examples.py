"""Examples: a prompt and the answer to predict, as token ids; from files, or made on the spot."""

from __future__ import annotations

import codecs
import hashlib
import json
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from swa import jsonio
from swa.errors import ExampleError, InputError, SwaWarning, TokenizerError
from swa.files import write_text
from swa.haystack import Split, read_haystack
from swa.tasks import TASKS, Draw, build
from swa.tokenizer import Tokenizer, is_chat


@dataclass(frozen=True, repr=False)
class Example:
    """Token ids of a prompt and of its answer, any integers; neither is empty.

    Whether the model has such tokens is for the model to check. Raises ExampleError.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    task: str = "default"
    """Groups examples in reports."""

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "answer_ids"):
            object.__setattr__(self, name, _token_ids(getattr(self, name), name))
        if not isinstance(self.task, str) or not self.task or not self.task.isprintable():
            raise ExampleError(f"task must be printable text that is not empty, not {self.task!r}")

    @property
    def prompt_len(self) -> int:
        """P, in tokens."""
        return len(self.prompt_ids)

    @property
    def answer_len(self) -> int:
        """A, in tokens."""
        return len(self.answer_ids)

    def __repr__(self) -> str:
        return f"Example({self.task}: {self.prompt_len} prompt + {self.answer_len} answer tokens)"


def from_jsonl(path: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> list[Example]:
    """Read examples, one JSON object a line; blank lines and a byte order mark do not count.

    A line has `prompt` (text, or chat messages) or `prompt_ids`, and `answer` (text) or
    `answer_ids`; `task` if it likes. Null counts as absent, other keys are left alone. A text
    prompt gets the special tokens that belong before it once, messages get the chat template,
    answers get nothing.

    Args:
        path: a UTF-8 file.
        tokenizer: the model's; without it only token ids can be read.

    Warns:
        SwaWarning: some lines repeat others; they count as often as they stand there.

    Raises:
        ExampleError: what is wrong in which line and field, or that there are no examples.
        OSError: the file cannot be read.
    """
    first_line: dict[Example, int] = {}
    repeats: list[str] = []
    examples: list[Example] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                example = _from_line(line, tokenizer)
            except ExampleError as error:
                raise ExampleError(f"{os.fspath(path)}:{number}: {error}") from error
            if first_line.setdefault(example, number) != number:
                repeats.append(f"{number} (as {first_line[example]})")
            examples.append(example)
    if not examples:
        raise ExampleError(f"{os.fspath(path)}: no examples in this file")
    if repeats:
        shown = ", ".join(repeats[:5]) + (", ..." if len(repeats) > 5 else "")
        warnings.warn(
            f"{os.fspath(path)}: lines repeat others and count again: {shown}",
            SwaWarning,
            stacklevel=2,
        )
    return examples


def write_jsonl(path: str | os.PathLike[str], examples: Iterable[Example]) -> None:
    """Write token ids and task, one example a line, atomically. Raises OSError."""
    lines = (
        {"prompt_ids": e.prompt_ids, "answer_ids": e.answer_ids, "task": e.task} for e in examples
    )
    write_text(path, "".join(jsonio.dumps_line(line) + "\n" for line in lines))


def content_hash(examples: Iterable[Example]) -> str:
    """SHA-256 (hex) over token ids: a line `[[prompt ids],[answer ids]]` per example, in order."""
    digest = hashlib.sha256()
    for example in examples:
        ids = (example.prompt_ids, example.answer_ids)
        digest.update(json.dumps(ids, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def synthetic(
    tokenizer: Tokenizer,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    examples_per_task: int = 1,
    prompt_tokens: int = 3072,
    seed: int = 0,
    split: Split = "calibration",
    haystack: str | os.PathLike[str] | None = None,
    chat: bool | None = None,
) -> list[Example]:
    """Long-range retrieval: what is asked at the end of a prompt stands far above, in other text.

    The needle's sentence follows RULER (arXiv 2404.06654). An example depends on its task, its
    number, seed, split, prompt_tokens, haystack and tokenizer alone: asking for more examples or
    other tasks changes none. Calibration and heldout share neither text nor needles.

    Args:
        tokenizer: the model's.
        tasks: of "num" (a 7-digit number), "num4" (four such, one is asked for), "words" (a
            password of three words), "copy" (32 tokens of the text, after a cue of 24).
        examples_per_task: at least 1; examples of one task stand together.
        prompt_tokens: P, met exactly where the tokenizer allows it, never exceeded.
        seed: of all that is drawn.
        split: which half of haystack and words to draw from.
        haystack: a text (str), or a UTF-8 file of one (a path object); default: novels that ship
            with the package. A text shorter than a prompt is repeated.
        chat: ask in the user's turn of the chat template; None: if there is one.

    Raises:
        ExampleError: an unknown task, too few tokens for a task, a haystack too short.
        TokenizerError: `chat` without a chat template, or the template fails.
    """
    if examples_per_task < 1:
        raise ExampleError(f"examples_per_task is {examples_per_task}: at least 1 is needed")
    text = read_haystack(split, haystack)
    use_chat = tokenizer.has_chat_template if chat is None else chat
    return [
        Example(*build(task, tokenizer, text, prompt_tokens, split, use_chat, draw), task)
        for task in tasks
        for draw in (Draw(f"{seed} {split} {task} {i}") for i in range(examples_per_task))
    ]


needle = partial(synthetic, tasks=("num",))
"""`synthetic` with one needle in the text, a number."""
multi_needle = partial(synthetic, tasks=("num4",))
"""`synthetic` with four needles in the text, one of which is asked for."""
words = partial(synthetic, tasks=("words",))
"""`synthetic` with a password of three words in the text."""
copy = partial(synthetic, tasks=("copy",))
"""`synthetic` with a passage of the text to be recalled."""


def _token_ids(ids: Iterable[Any], name: str) -> tuple[int, ...]:
    try:
        given = tuple(ids)
        plain = tuple(map(operator.index, given))
    except TypeError:
        raise ExampleError(f"{name} must be integers") from None
    if any(isinstance(i, bool) for i in given):  # a mask, most likely
        raise ExampleError(f"{name} must be integers, not booleans")
    if not plain:
        raise ExampleError(f"{name} is empty: at least one token is needed")
    return plain


def _from_line(line: bytes, tokenizer: Tokenizer | None) -> Example:
    try:
        fields = jsonio.loads(line)
    except ValueError as error:
        raise ExampleError(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ExampleError("must be a JSON object")
    prompt = _side(fields, "prompt", tokenizer.encode_prompt if tokenizer else None)
    answer = _side(fields, "answer", tokenizer.encode_answer if tokenizer else None)
    task = fields.get("task")
    return Example(prompt, answer, "default" if task is None else task)


def _side(
    fields: dict[str, Any], name: str, encode: Callable[[Any], list[int]] | None
) -> tuple[int, ...]:
    """Token ids of `prompt` or `answer`, from the field of that name or from NAME_ids."""
    given = [key for key in (name, f"{name}_ids") if fields.get(key) is not None]
    if len(given) != 1:
        raise ExampleError(
            f"give either {name!r} or '{name}_ids', not {'both' if given else 'none'}"
        )
    key, value = given[0], fields[given[0]]
    if key != name:
        if not isinstance(value, list) or any(type(i) is not int or i < 0 for i in value):
            raise ExampleError(f"{key} must be a list of integers from 0 on")
        ids = value
    elif not isinstance(value, str) and not (name == "prompt" and is_chat(value)):
        kinds = "text or a list of chat messages" if name == "prompt" else "text"
        raise ExampleError(f"{key} must be {kinds}; token ids go into {name}_ids")
    elif encode is None:
        raise ExampleError(f"{key} is text, but the model has no tokenizer: give {name}_ids")
    else:
        try:
            ids = encode(value)
        except (InputError, TokenizerError) as error:
            raise ExampleError(f"{key}: {error}") from error
    if not ids:
        raise ExampleError(f"{key} is empty: at least one token is needed")
    return tuple(ids)
