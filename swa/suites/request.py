"""What a suite is asked for, and what the suites share in making it."""

from __future__ import annotations

import os
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from swa.errors import ExampleError, SwaWarning
from swa.examples import Example
from swa.haystack import SPLITS, Split
from swa.tasks import TooShort, encode_request
from swa.tokenizer import Tokenizer


@dataclass(frozen=True)
class Request:
    """What examples are wanted. What is None is for the suite to choose. Raises ExampleError."""

    tokenizer: Tokenizer
    files: tuple[Path, ...] = ()
    tasks: tuple[str, ...] | None = None
    lengths: tuple[int, ...] | None = None
    """In tokens, of prompt and reply together; where prompts come from files, the longest."""
    depths: tuple[float, ...] | None = None
    """Of a needle, from 0 (where the text begins) to 1."""
    examples_per_task: int | None = None
    """At each length; None: one, or all there are in a file. What is left out does not count."""
    seed: int = 0
    split: Split = "heldout"
    """What is generated for one split shares neither text nor needles with the other's."""
    haystack: str | os.PathLike[str] | None = None
    """As in `swa.examples.synthetic`."""
    chat: bool | None = None
    """Ask in the user's turn of the chat template; None: if there is one."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ExampleError(f"there is no split {self.split!r}: choose from {', '.join(SPLITS)}")
        for length in self.lengths or ():
            if type(length) is not int or length < 1:
                raise ExampleError(f"a length is an integer of tokens, at least 1, not {length!r}")
        for depth in self.depths or ():
            if not 0 <= depth <= 1:
                raise ExampleError(f"a depth is from 0 to 1, not {depth!r}")
        for name in ("tasks", "lengths", "depths"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) != len(values)):
                raise ExampleError(f"{name} must be different ones, at least one: {list(values)}")
        if len({path.resolve() for path in self.files}) != len(self.files):
            raise ExampleError(f"files must be different ones: {[*map(str, self.files)]}")
        if self.examples_per_task is not None and self.examples_per_task < 1:
            raise ExampleError(
                f"examples_per_task is {self.examples_per_task}: at least 1 is needed"
            )

    @property
    def use_chat(self) -> bool:
        """Whether to ask in a chat."""
        return self.tokenizer.has_chat_template if self.chat is None else self.chat

    def choose_tasks(self, default: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
        """The tasks asked for, or the default. Raises ExampleError: one is not known."""
        for task in self.tasks or ():
            if task not in known:
                raise ExampleError(f"there is no task {task!r}: choose from {', '.join(known)}")
        return self.tasks or tuple(default)

    def required_files(self, suite: str) -> tuple[Path, ...]:
        """The files. Raises ExampleError: none."""
        if not self.files:
            raise ExampleError(f"{suite} is read from its published files: give their paths")
        return self.files

    def refuse(self, suite: str, *names: str) -> None:
        """Raise ExampleError for what the suite would not use."""
        for name in names:
            if getattr(self, name):
                raise ExampleError(f"{suite} does not use {name}: leave it out")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that asks, up to where the reply begins."""
        return encode_request(self.tokenizer, text, self.use_chat)


class Made(NamedTuple):
    """An example before it is one."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    references: tuple[str, ...]
    question: str


def keep_short_enough(
    entries: Iterable[tuple[Hashable, Callable[[], Example]]], request: Request
) -> list[Example]:
    """The examples whose prompt and longest reply have at most the largest length's tokens.

    Args:
        entries: what an example is counted with, and a function that makes it. It is not called
            once there are `examples_per_task` of these, as that may take long.

    Warns SwaWarning: some were left out. Raises ExampleError: all were.
    """
    longest = None if request.lengths is None else max(request.lengths)
    kept: list[Example] = []
    left_out: list[int] = []
    counts: Counter[Hashable] = Counter()
    for group, make in entries:
        if counts[group] == request.examples_per_task:
            continue
        example = make()
        n_tokens = example.prompt_len + _reply_len(example)
        if longest is not None and n_tokens > longest:
            left_out.append(n_tokens)
        else:
            counts[group] += 1
            kept.append(example)
    if left_out and not kept:
        raise ExampleError(
            f"no entry has at most {longest} tokens with its reply: the shortest has"
            f" {min(left_out)}"
        )
    if left_out:
        warnings.warn(
            f"{len(left_out)} of {len(left_out) + len(kept)} entries left out: longer than"
            f" {longest} tokens",
            SwaWarning,
            stacklevel=2,
        )
    return kept


def _reply_len(example: Example) -> int:
    new_tokens = example.grading.max_new_tokens if example.grading else 0
    return max(new_tokens, example.answer_len)


@contextmanager
def room_for(task: str, length: int, new_tokens: int) -> Iterator[int]:
    """Gives the tokens that a reply leaves for the prompt; a task too long names the length.

    Raises ExampleError: too short a length.
    """
    if length <= new_tokens:
        raise ExampleError(
            f"length {length} is too short: a reply to task {task!r} may have {new_tokens} tokens"
        )
    try:
        yield length - new_tokens
    except TooShort as error:
        raise ExampleError(
            f"length {length} is too short: task {task!r} needs at least {error.least} tokens and"
            f" {new_tokens} for its reply, with this tokenizer"
        ) from error


def fit(
    encode: Callable[[int], list[int]],
    prompt_tokens: int,
    n_lead: int,
    least: int,
    most: int,
    *,
    task: str,
) -> list[int]:
    """The encoding of the most units that leaves room for `n_lead` tokens in the prompt.

    Args:
        encode: makes token ids of a number of units; more units should make more tokens.
        prompt_tokens: of encoding and lead together.
        n_lead: tokens of what begins the reply.
        least, most: bounds of the number of units.
        task: for the error.

    Raises:
        TooShort: too many tokens even with `least`.
    """
    budget = prompt_tokens - n_lead
    units = range(least, most + 1)
    n = bisect_right(units, budget, key=lambda count: len(encode(count))) + least - 1
    for count in range(n, least - 1, -1):  # should a unit more have made fewer tokens
        ids = encode(count)
        if len(ids) <= budget:
            return ids
    raise TooShort(task, prompt_tokens, len(encode(least)) + n_lead)
