"""Examples: a prompt and the answer to predict, as token ids; from files, or made on the spot."""

from __future__ import annotations

import codecs
import hashlib
import json
import operator
import os
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from swa import jsonio
from swa.errors import ExampleError, InputError, SwaWarning, TokenizerError
from swa.files import write_text
from swa.grading import Grading, refuse_surrogates
from swa.haystack import Split, read_haystack
from swa.tasks import TASKS, Draw, build
from swa.tokenizer import Messages, Tokenizer, is_chat

if TYPE_CHECKING:
    from swa.model import Model

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, repr=False)
class Example:
    """Token ids of a prompt and of its answer, any integers; neither is empty.

    Whether the model has such tokens is for the model to check. Raises ExampleError.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    task: str = "default"
    """Groups examples in reports."""
    grading: Grading | None = None
    """How a generated reply is scored; None: it should contain the answer's text."""
    unit: str | None = None
    """Of what it is one of several examples (questions about one text, say); None: of nothing.

    Examples of one unit are not independent: intervals of evaluations resample them together."""

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "answer_ids"):
            object.__setattr__(self, name, _token_ids(getattr(self, name), name))
        if not isinstance(self.task, str) or not self.task or not self.task.isprintable():
            raise ExampleError(f"task must be printable text that is not empty, not {self.task!r}")
        if not isinstance(self.grading, Grading | None):
            raise ExampleError(f"grading must be a Grading or None, not {self.grading!r}")
        if not isinstance(self.unit, str | None) or self.unit == "":
            raise ExampleError(f"unit must be text that is not empty, or None, not {self.unit!r}")
        refuse_surrogates(self.unit or "", "unit")

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


@dataclass(frozen=True, repr=False)
class Prompt:
    """Token ids of a prompt that has no answer yet, any integers. Raises ExampleError."""

    prompt_ids: tuple[int, ...]
    task: str = "default"

    def __post_init__(self) -> None:
        same = Example(self.prompt_ids, (0,), self.task)  # the same rules hold
        object.__setattr__(self, "prompt_ids", same.prompt_ids)

    def __repr__(self) -> str:
        return f"Prompt({self.task}: {len(self.prompt_ids)} tokens)"


def from_jsonl(path: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> list[Example]:
    """Read examples, one JSON object a line; blank lines and a byte order mark do not count.

    A line has `prompt` (text, or chat messages) or `prompt_ids`, and `answer` (text) or
    `answer_ids`; `task`, `unit` and `grading` (an object with the fields of
    `swa.grading.Grading`) if it likes. Null counts as absent, other keys are left alone. A text
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
    return _from_lines(path, lambda fields: _example(fields, tokenizer))


def prompts_from_jsonl(
    path: str | os.PathLike[str], tokenizer: Tokenizer | None = None
) -> list[Prompt]:
    """Read what `from_jsonl` reads, but for the answers: they need not be there, and are not used.

    Warns and raises as `from_jsonl`.
    """
    return _from_lines(path, lambda fields: _prompt(fields, tokenizer))


def self_answered(
    model: Model,
    prompts: Iterable[Prompt | str | Messages | Sequence[int]],
    *,
    max_new_tokens: int = 128,
    progress: bool = False,
) -> list[Example]:
    """Examples from prompts without answers: the model with full attention writes them, greedily.

    An answer ends where the model ends it (the token that does so is left out), or after
    `max_new_tokens`.

    Args:
        model: its policy, if it has one, is not used.
        prompts: text, chat messages, token ids, or what `prompts_from_jsonl` reads; an Example's
            own answer is not used either.
        max_new_tokens: longest answer; with the longest prompt it must fit the model's positions.
        progress: show a bar on stderr.

    Warns:
        SwaWarning: prompts that the model answers with nothing are left out.

    Raises:
        ExampleError: no prompts, or none that the model answers.
        InputError, TokenizerError, MemoryError: as `Model.generate`.
    """
    full = model if model.policy is None else replace(model, policy=None)
    asked = [_as_prompt(prompt, full) for prompt in prompts]
    if not asked:
        raise ExampleError("there are no prompts to answer")
    longest = max(range(len(asked)), key=lambda index: len(asked[index].prompt_ids))
    if len(asked[longest].prompt_ids) + max_new_tokens > full.max_position_embeddings:
        raise InputError(
            f"prompt {longest} has {len(asked[longest].prompt_ids)} tokens: with max_new_tokens="
            f"{max_new_tokens} it exceeds the model's {full.max_position_embeddings} positions"
        )
    full.check_examples(asked)
    shown: Iterable[Prompt] = asked
    if progress:
        from tqdm import tqdm

        shown = tqdm(asked, desc="answering", unit="prompt")
    answers = [
        full.generate(prompt.prompt_ids, max_new_tokens=max_new_tokens).ids for prompt in shown
    ]
    unanswered = [str(index) for index, answer in enumerate(answers) if not answer]
    if len(unanswered) == len(asked):
        raise ExampleError("the model ends its answer at once, to every prompt")
    if unanswered:
        warnings.warn(
            f"left out, since the model answers nothing: prompts {_brief(unanswered)}",
            SwaWarning,
            stacklevel=2,
        )
    return [
        Example(prompt.prompt_ids, answer, prompt.task)
        for prompt, answer in zip(asked, answers, strict=True)
        if answer
    ]


def write_jsonl(path: str | os.PathLike[str], examples: Iterable[Example]) -> None:
    """Write the fields that are not None, one example a line, atomically. Raises OSError."""
    lines = (
        {"prompt_ids": e.prompt_ids, "answer_ids": e.answer_ids, "task": e.task}
        | ({} if e.grading is None else {"grading": e.grading.to_dict()})
        | ({} if e.unit is None else {"unit": e.unit})
        for e in examples
    )
    write_text(path, "".join(jsonio.dumps_line(line) + "\n" for line in lines))


def content_hash(examples: Iterable[Example]) -> str:
    """SHA-256 (hex) over what is measured: a line per example, in order.

    The line is `[[prompt ids],[answer ids]]`, with the grading's JSON form third if there is one.
    """
    digest = hashlib.sha256()
    for example in examples:
        content: list[Any] = [example.prompt_ids, example.answer_ids]
        if example.grading is not None:
            content.append(example.grading.to_dict())
        digest.update(json.dumps(content, separators=(",", ":")).encode() + b"\n")
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


def _from_lines(path: str | os.PathLike[str], read: Callable[[dict[str, Any]], T]) -> list[T]:
    """What `read` makes of the object in each line; warns and raises as `from_jsonl`."""
    first_line: dict[T, int] = {}
    repeats: list[str] = []
    found: list[T] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                item = read(_fields(line))
            except ExampleError as error:
                raise ExampleError(f"{os.fspath(path)}:{number}: {error}") from error
            if first_line.setdefault(item, number) != number:
                repeats.append(f"{number} (as {first_line[item]})")
            found.append(item)
    if not found:
        raise ExampleError(f"{os.fspath(path)}: no examples in this file")
    if repeats:
        warnings.warn(
            f"{os.fspath(path)}: lines repeat others and count again: {_brief(repeats)}",
            SwaWarning,
            stacklevel=3,
        )
    return found


def _brief(items: Sequence[str]) -> str:
    return ", ".join(items[:5]) + (", ..." if len(items) > 5 else "")


def _fields(line: bytes) -> dict[str, Any]:
    try:
        fields = jsonio.loads(line)
    except ValueError as error:
        raise ExampleError(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ExampleError("must be a JSON object")
    return fields


def _example(fields: dict[str, Any], tokenizer: Tokenizer | None) -> Example:
    prompt = _prompt(fields, tokenizer)
    answer = _side(fields, "answer", tokenizer.encode_answer if tokenizer else None)
    grading = fields.get("grading")
    return Example(
        prompt.prompt_ids,
        answer,
        prompt.task,
        None if grading is None else Grading.from_dict(grading),
        fields.get("unit"),
    )


def _prompt(fields: dict[str, Any], tokenizer: Tokenizer | None) -> Prompt:
    ids = _side(fields, "prompt", tokenizer.encode_prompt if tokenizer else None)
    task = fields.get("task")
    return Prompt(ids, "default" if task is None else task)


def _as_prompt(prompt: Prompt | str | Messages | Sequence[int], model: Model) -> Prompt:
    if isinstance(prompt, (Prompt, Example)):
        return Prompt(prompt.prompt_ids, prompt.task)
    if isinstance(prompt, str) or is_chat(prompt):
        return Prompt(tuple(model.tokenizer.encode_prompt(prompt)))
    return Prompt(prompt)  # type: ignore[arg-type] # token ids, or it says that they are none


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
