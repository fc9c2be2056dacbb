"""RULER's two tasks of counting: which words of a long list are the most frequent ones."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import count, pairwise

from swa.errors import ExampleError
from swa.haystack import SPLITS, Split, read_haystack
from swa.suites.request import Made, Request, fit
from swa.tasks import ADJECTIVES, NOUNS, Draw, split_reply

N_COMMON = 10
N_FREQUENT = 3
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"

_LIST_INTRODUCTION = "In the numbered list below, some words come more often than others."
_LIST_QUESTION = "Which are the 10 most common words in the list above?"
_LIST_LEAD = "The 10 most common words in the list above are:"
_CODE_INTRODUCTION = (
    "The text below is in code. Count how often each coded word comes. Dots are not words."
)
_CODE_QUESTION = "Which are the three most frequent coded words in the text above?"
_CODE_LEAD = "The three most frequent coded words in the text above are:"
_DOTS = "..."  # in the place of the most frequent word
_LEAST_NATURAL = 500  # different words that a text should have to be drawn from

Placed = list[tuple[float, str]]
"""Words with a place each; sorted, they are in random order, and more of them keep it."""


def common_words(request: Request, length: int, prompt_tokens: int, draw: Draw) -> Made:
    """A numbered list in which ten words come ten times as often as others (six, if it is short).

    A short list with its answer stands before it.
    """
    shown, shown_repeats, repeats = (
        (40, (10, 3), (30, 3)) if length >= 4096 else (20, (3, 1), (6, 1))
    )
    # An entry has three tokens at least: number, full stop, word.
    most = prompt_tokens // (3 * repeats[1])
    words = _different_words(request, draw, shown + N_COMMON + most)
    example, others = words[:shown], words[shown:]
    example_list = _numbered(_listed(example, shown_repeats, draw))
    placed = _listed(others, repeats, draw)
    fixed = N_COMMON * repeats[0]
    lead, answer = split_reply(request.tokenizer, _LIST_LEAD, f" {_enumerated(others)}")

    def encode(n_uncommon: int) -> list[int]:
        entries = _numbered(placed[: fixed + n_uncommon * repeats[1]])
        return request.encode(
            f"{_LIST_INTRODUCTION}\n\n{example_list}\n\n{_LIST_QUESTION}\n{_LIST_LEAD}"
            f" {_enumerated(example)}\n\n{entries}\n\n{_LIST_QUESTION}"
        )

    prompt = fit(encode, prompt_tokens, len(lead), 1, most, task="cwe")
    return Made((*prompt, *lead), tuple(answer), tuple(others[:N_COMMON]), _LIST_QUESTION)


def frequent_words(request: Request, length: int, prompt_tokens: int, draw: Draw) -> Made:
    """Made-up words whose frequency falls with the square of their rank; dots are the first."""
    n_ranks = max(length // 50, N_FREQUENT + 2)
    vocabulary = coded_words(request.split, draw, n_ranks - 1, 6)
    # So few words that ranks share a frequency would leave the answer open.
    least = next(n for n in count(1) if _tells_ranks(_counts(n, N_FREQUENT + 2)))
    most = max(least, prompt_tokens)  # a word is a token at least
    placed = [
        [(draw.fraction(), word) for _ in range(times)]
        for word, times in zip([_DOTS, *vocabulary], _counts(most, n_ranks), strict=True)
    ]
    frequent = vocabulary[:N_FREQUENT]
    lead, answer = split_reply(request.tokenizer, _CODE_LEAD, f" {', '.join(frequent)}")

    def encode(n_words: int) -> list[int]:
        counts = _counts(n_words, n_ranks)
        chosen = [item for of_word, n in zip(placed, counts, strict=True) for item in of_word[:n]]
        coded = " ".join(word for _, word in sorted(chosen))
        return request.encode(f"{_CODE_INTRODUCTION}\n\n{coded}\n\n{_CODE_QUESTION}")

    prompt = fit(encode, prompt_tokens, len(lead), least, most, task="fwe")
    return Made((*prompt, *lead), tuple(answer), tuple(frequent), _CODE_QUESTION)


def _counts(n_words: int, n_ranks: int) -> list[int]:
    """How often each rank comes among so many words (Zipf's law with exponent 2), rounded down."""
    zeta = math.pi**2 / 6
    return [int(n_words / (rank**2 * zeta)) for rank in range(1, n_ranks + 1)]


def _tells_ranks(counts: Sequence[int]) -> bool:
    return all(a > b for a, b in pairwise(counts))


def _listed(words: Sequence[str], repeats: tuple[int, int], draw: Draw) -> Placed:
    """The first ten words and then the others, each as often as `repeats` says, with its place."""
    common, uncommon = words[:N_COMMON], words[N_COMMON:]
    return [
        (draw.fraction(), word)
        for group, times in zip((common, uncommon), repeats, strict=True)
        for word in group
        for _ in range(times)
    ]


def _numbered(placed: Placed) -> str:
    return " ".join(f"{i}. {word}" for i, (_, word) in enumerate(sorted(placed), start=1))


def _enumerated(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words[:N_COMMON], start=1))


def _different_words(request: Request, draw: Draw, n: int) -> list[str]:
    """`n` different words, of the split's own half of the haystack's; pairs once they run out.

    Raises ExampleError: these run out, too.
    """
    source = request.haystack
    own = _shipped_words(request.split) if source is None else _words(request.split, source)
    if n > len(own) ** 2:  # single ones, and ordered pairs of different ones
        raise ExampleError(
            f"task 'cwe' takes {n} different words at this length, and the {len(own)} of the"
            f" haystack's {request.split} part make {len(own) ** 2} with their pairs: give a"
            " haystack of more words (of 4 to 10 letters each), or a shorter length"
        )
    words = draw.sample(own, len(own))[:n]
    known = set(words)
    while len(words) < n:
        pair = "-".join(draw.sample(own, 2))
        if pair not in known:
            known.add(pair)
            words.append(pair)
    return words


@lru_cache
def _shipped_words(split: Split) -> Sequence[str]:
    return _words(split, None)


def _words(split: Split, source: str | os.PathLike[str] | None) -> Sequence[str]:
    """Every other word of the whole haystack, so that the splits have none in common."""
    found: set[str] = set()
    for half in SPLITS:
        stripped = (word.strip().casefold() for word in read_haystack(half, source).words)
        found.update(word for word in stripped if word.isalpha() and 4 <= len(word) <= 10)
    if len(found) < _LEAST_NATURAL:
        found.update(ADJECTIVES.split(), NOUNS.split())
    return sorted(found)[SPLITS.index(split) :: 2]


def coded_words(split: Split, draw: Draw, n: int, n_letters: int) -> list[str]:
    """`n` different words of so many random letters, the first of which tells the split."""
    half = len(_ALPHABET) // 2
    first = _ALPHABET[:half] if split == SPLITS[0] else _ALPHABET[half:]
    words: dict[str, None] = {}
    while len(words) < n:
        rest = (_ALPHABET[draw.below(len(_ALPHABET))] for _ in range(n_letters - 1))
        words[first[draw.below(half)] + "".join(rest)] = None
    return list(words)
