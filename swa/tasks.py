"""The synthetic tasks: what each hides, what it asks, and prompts of an exact length around it."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from swa.errors import ExampleError
from swa.haystack import SPLITS, Haystack, Split
from swa.tokenizer import Tokenizer

CUE_TOKENS, COPY_TOKENS = 24, 32
"""Of the task "copy": what of the passage is given, and what is asked for."""
DEPTH = (0.05, 0.7)
"""Where needles lie, as fractions of the text: the end is left out, since a window sees it."""

INTRODUCTION = "Read the following text carefully. At its end you will be asked about it."
_COPY_QUESTION = "Continue the passage of the text above that begins as follows, word for word."

# Every split has its own half of each list (by turns), hence no needle in common.
ADJECTIVES = """
amber ancient bitter bright broken bronze calm clever copper coral crimson crooked curious distant
dusty early eager empty faded fierce frozen gentle gilded golden grand hidden hollow humble idle
jagged jolly keen lively lonely lucky marble mellow misty modest narrow noble pale patient plain
polished proud quiet rapid restless rusty scarlet silent silver simple sleepy smooth solemn
spotted steady sturdy subtle sunny tidy velvet wandering weary wild winding wooden
"""
NOUNS = """
anchor arch bakery balcony barn basket beacon bell bridge canal candle canyon castle cavern chapel
clock compass cottage desert drum falcon farm feather ferry forest fountain garden gate glacier
harbor hammer hill island kettle kitchen ladder lantern library lighthouse market meadow mill mirror
monument mountain museum orchard palace parade pasture pepper pillow planet pond prairie
quarry railway ribbon river sailor school shadow shelter spring stable station studio summit temple
theater tower trumpet tunnel valley village violin wagon walnut whistle window
"""

T = TypeVar("T")


class Draw:
    """Random choices that a text decides, the same on every platform and version of Python."""

    def __init__(self, seed: str) -> None:
        # Of `random`, only random() after seeding is promised not to change between versions.
        self._random = random.Random(seed).random

    def fraction(self) -> float:
        """Uniform in [0, 1)."""
        return self._random()

    def below(self, n: int) -> int:
        """Uniform in 0, ..., n - 1."""
        return int(self._random() * n)

    def sample(self, items: Sequence[T], k: int) -> list[T]:
        """`k` different ones, in random order."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(k)]


class TooShort(ExampleError):
    """A task does not fit; `least` tokens would do."""

    def __init__(self, task: str, prompt_tokens: int, least: int) -> None:
        self.least = least
        super().__init__(
            f"prompt_tokens is {prompt_tokens}: task {task!r} needs at least {least} with this"
            " tokenizer"
        )


@dataclass(frozen=True)
class Retrieval:
    """Sentences to hide, and how the hidden answer is asked for."""

    needles: tuple[str, ...]
    """In the order of the text. None of them: a passage of the text itself is asked for."""
    question: str
    lead: str = ""
    """Begins the reply and belongs to the prompt, so that the answer is all that is open."""
    answer: str = ""


def _numbers(draw: Draw, split: Split, n_needles: int) -> Retrieval:
    """`n_needles` numbers, one of which is asked for."""
    keys = draw_keys(draw, split, n_needles)
    values = [str(1_000_000 + draw.below(9_000_000)) for _ in keys]
    asked = draw.below(n_needles)
    return Retrieval(
        tuple(
            f"One of the special magic numbers for {key} is: {value}."
            for key, value in zip(keys, values, strict=True)
        ),
        f"What is the special magic number for {keys[asked]} mentioned in the text above?",
        f"The special magic number for {keys[asked]} mentioned in the text is:",
        f" {values[asked]}",
    )


def _password(draw: Draw, split: Split) -> Retrieval:
    """Three words."""
    (key,) = draw_keys(draw, split, 1)
    value = " ".join(draw.sample([*own_half(ADJECTIVES, split), *own_half(NOUNS, split)], 3))
    return Retrieval(
        (f'The secret password for {key} is "{value}".',),
        f"What is the secret password for {key} mentioned in the text above?",
        f'The secret password for {key} mentioned in the text is "',
        value,
    )


TASKS: dict[str, Callable[[Draw, Split], Retrieval]] = {
    "num": lambda draw, split: _numbers(draw, split, 1),
    "num4": lambda draw, split: _numbers(draw, split, 4),
    "words": _password,
    "copy": lambda draw, split: Retrieval((), _COPY_QUESTION),
}


def build(
    task: str,
    tokenizer: Tokenizer,
    haystack: Haystack,
    prompt_tokens: int,
    split: Split,
    chat: bool,
    draw: Draw,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a prompt of one of the TASKS and of its answer: see `hide`.

    Args:
        task: of TASKS.
        split: whose words the needles use.

    Raises:
        ExampleError: an unknown task; too few tokens for it.
    """
    if task not in TASKS:
        raise ExampleError(f"there is no task {task!r}: choose from {', '.join(TASKS)}")
    hidden = TASKS[task](draw, split)
    return hide(hidden, tokenizer, haystack, prompt_tokens, chat, draw, task=task)


def hide(
    hidden: Retrieval,
    tokenizer: Tokenizer,
    haystack: Haystack,
    prompt_tokens: int,
    chat: bool,
    draw: Draw,
    *,
    task: str,
    introduction: str = INTRODUCTION,
    depth: tuple[float, float] = DEPTH,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a prompt that hides something, and of its answer.

    The prompt is an introduction, a piece of the haystack with the needles between its sentences,
    a question, and the beginning of the reply. The piece starts with a sentence and ends where the
    tokens do, within a word if need be.

    Args:
        hidden: the needles and the question.
        tokenizer: the model's.
        haystack: words to take a piece from.
        prompt_tokens: length of the prompt, met exactly or, failing that, as nearly as can be.
        chat: put the question into the user's turn of the chat template.
        draw: decides which piece, and the places.
        task: for the error's text.
        introduction: what the prompt begins with.
        depth: where the needles lie, as fractions of the piece: between these two.

    Raises:
        TooShort: too few tokens.
    """
    first = draw.below(len(haystack.sentence_starts))
    passage = haystack.passage(first, max(prompt_tokens, CUE_TOKENS + COPY_TOKENS))
    n_depths = max(len(hidden.needles), 1)
    low, high = depth
    # One in each of as many equal parts, so that needles do not crowd.
    depths = [low + (high - low) * (i + draw.fraction()) / n_depths for i in range(n_depths)]

    def encode(n_words: int, n_characters: int = 0) -> list[int]:
        """The prompt up to the reply, with so many words and characters of the passage."""
        # A paragraph break would cost several tokens at once: what is cut goes without.
        rest = " ".join(word.strip() for word in passage.words[n_words : n_words + n_characters])
        pieces = [*passage.words[:n_words], f" {rest}"[:n_characters]]
        for i in reversed(range(len(hidden.needles))):  # from the end: places stay where they are
            pieces.insert(_place(passage, n_words, depths[i]), f" {hidden.needles[i]}")
        text = f"{introduction}\n\n{''.join(pieces).lstrip()}\n\n{hidden.question}"
        return encode_request(tokenizer, text, chat)

    def fill(n_lead: int, least_words: int) -> tuple[list[int], int]:
        found = _fill(encode, passage.words, prompt_tokens - n_lead, least_words)
        if found is None:
            raise TooShort(task, prompt_tokens, len(encode(least_words)) + n_lead)
        return found

    if hidden.needles:
        lead, answer = split_reply(tokenizer, hidden.lead, hidden.answer)
        prompt, _ = fill(len(lead), 1)
    else:
        prompt, n_words = fill(CUE_TOKENS, _recallable_words(tokenizer, passage))
        lead, answer = _recall(tokenizer, passage, n_words, depths[0])
    return (*prompt, *lead), tuple(answer)


def encode_request(tokenizer: Tokenizer, text: str, chat: bool) -> list[int]:
    """Token ids of a request, up to where the reply begins: a user's turn, or the bare text."""
    return tokenizer.encode_prompt([{"role": "user", "content": text}] if chat else f"{text}\n")


def _fill(
    encode: Callable[[int, int], list[int]], words: Sequence[str], budget: int, least_words: int
) -> tuple[list[int], int] | None:
    """The longest encoding of at most `budget` tokens, and its whole words; None: none fits."""
    n_words = bisect_right(range(len(words)), budget, key=lambda n: len(encode(n, 0))) - 1
    if n_words < least_words:
        return None
    best = encode(n_words, 0), n_words
    # A word more is too much: go on by characters, if need be from a few words before.
    for n in range(n_words, max(n_words - 4, least_words - 1), -1):
        for n_characters in range(1, 24):
            if len(best[0]) == budget:
                return best
            ids = encode(n, n_characters)
            if len(best[0]) < len(ids) <= budget:
                best = ids, n
    return best


def split_reply(tokenizer: Tokenizer, lead: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of lead and answer, as the tokenizer parts the whole reply where it can."""
    first, whole = tokenizer.encode(lead), tokenizer.encode(lead + answer)
    if whole[: len(first)] == first:
        return first, whole[len(first) :]
    return first, tokenizer.encode_answer(answer)


def _recall(
    tokenizer: Tokenizer, passage: Haystack, n_words: int, depth: float
) -> tuple[list[int], list[int]]:
    """Cue and continuation: the tokens from a sentence's start on, at the depth or before it."""
    last = _place(passage, n_words, depth)
    for place in reversed(passage.sentence_starts[: passage.sentence_starts.index(last) + 1]):
        ids = _recallable(tokenizer, passage, place, n_words)
        if len(ids) == CUE_TOKENS + COPY_TOKENS:
            break
    return ids[:CUE_TOKENS], ids[CUE_TOKENS:]


def _recallable(tokenizer: Tokenizer, passage: Haystack, place: int, end: int) -> list[int]:
    """The tokens from the word at `place` on; fewer than are recalled if the text ends before."""
    needed = CUE_TOKENS + COPY_TOKENS
    text = "".join(passage.words[place : min(place + needed, end)])
    return tokenizer.encode(text.strip())[:needed]


def _recallable_words(tokenizer: Tokenizer, passage: Haystack) -> int:
    """With how many words the passage's beginning can be recalled. Raises ExampleError: never."""
    needed = CUE_TOKENS + COPY_TOKENS
    for n_words in range(1, needed + 1):
        if len(_recallable(tokenizer, passage, 0, n_words)) == needed:
            return n_words
    raise ExampleError(
        f"the tokenizer makes fewer than {needed} tokens of {needed} words of the haystack: leave"
        " out task 'copy', or give a haystack in the model's language"
    )


def _place(passage: Haystack, n_words: int, depth: float) -> int:
    """Index of the word that starts a sentence, at the depth or before it."""
    return passage.sentence_starts[bisect_right(passage.sentence_starts, depth * n_words) - 1]


def draw_keys(draw: Draw, split: Split, n: int) -> list[str]:
    """`n` names such as "amber-anchor", no two alike."""
    adjectives, nouns = own_half(ADJECTIVES, split), own_half(NOUNS, split)
    return [
        f"{adjective}-{noun}"
        for adjective, noun in zip(draw.sample(adjectives, n), draw.sample(nouns, n), strict=True)
    ]


def own_half(words: str, split: Split) -> list[str]:
    """The split's half of a list of words."""
    return words.split()[SPLITS.index(split) :: 2]
