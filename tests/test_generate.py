"""Generation: sampling and text streaming alone, then whole runs against transformers."""

from __future__ import annotations

import gc
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa.errors import InputError
from swa.generation import Generation, Sampler, TextStream


class ByteTokenizer:
    """Token i is the byte i; 256 is a special token."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class WordTokenizer:
    """Pieces as sentencepiece has them: "_" is a space, dropped where a text begins."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.pieces[i] for i in ids).replace("_", " ").removeprefix(" ")


def stream(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    text = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            break
    return [*pieces, text.finish()], text.stopped


def test_a_character_of_several_tokens_comes_whole() -> None:
    pieces, _ = stream(ByteTokenizer(), list("a\N{EURO SIGN}\N{ROCKET}z".encode()))
    assert pieces == ["a", "", "", "\N{EURO SIGN}", "", "", "", "\N{ROCKET}", "z", ""]


def test_special_tokens_are_not_text_and_unfinished_ones_are_shown_last() -> None:
    pieces, _ = stream(ByteTokenizer(), [104, 256, 105, 0xE2, 0x82])
    assert pieces == ["h", "", "i", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_a_space_that_starts_a_piece_is_kept() -> None:
    tokenizer = WordTokenizer(["_Hello", "_", "_world", "!"])
    assert stream(tokenizer, [0, 2, 3, 1, 2])[0] == ["Hello", " world", "!", " ", " world", ""]


@given(text=st.text(max_size=12))
def test_pieces_add_up_to_the_text(text: str) -> None:
    assert "".join(stream(ByteTokenizer(), list(text.encode()))[0]) == text


@given(text=st.text("abc", max_size=12), stop=st.lists(st.text("abc", min_size=1, max_size=4)))
def test_text_ends_before_the_first_stop(text: str, stop: list[str]) -> None:
    pieces, stopped = stream(ByteTokenizer(), list(text.encode()), tuple(stop))
    # The first stop is the one whose last character comes first; of those, the longest.
    ends = [at + len(s) for s in stop for at in [text.find(s)] if at >= 0]
    assert stopped == bool(ends)
    if not ends:
        assert "".join(pieces) == text
        return
    seen = text[: min(ends)]
    assert "".join(pieces) == seen[: min(seen.find(s) for s in stop if s in seen)]


def logits_of(probabilities: list[float]) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities)).astype(np.float32)


def draws(sampler: Sampler, logits: np.ndarray, n: int) -> list[int]:
    generator = sampler.generator()
    return [sampler.pick(logits, generator) for _ in range(n)]


def test_greedy_takes_the_first_maximum() -> None:
    assert draws(Sampler(), np.array([0, 3, -1, 3], np.float32), 3) == [1, 1, 1]


def test_samples_follow_the_distribution() -> None:
    probabilities = [0.1, 0.0, 0.6, 0.3]
    counts = np.bincount(draws(Sampler(True, seed=1), logits_of(probabilities), 20_000))
    assert counts[1] == 0
    # Four standard deviations of a share at 20,000 draws are 0.014.
    assert np.abs(counts / 20_000 - probabilities).max() < 0.014


def test_temperature() -> None:
    counts = np.bincount(draws(Sampler(True, 0.5, seed=1), logits_of([0.2, 0.8]), 20_000))
    assert abs(counts[0] / 20_000 - 1 / 17) < 0.01
    assert set(draws(Sampler(True, 1e-300, seed=1), logits_of([0.4, 0.6]), 50)) == {1}


@pytest.mark.parametrize(
    ("top_p", "allowed"),
    [(1e-9, {2}), (0.59, {2}), (0.61, {2, 3}), (0.89, {2, 3}), (0.91, {0, 2, 3}), (1, {0, 2, 3})],
)
def test_top_p_keeps_the_token_that_crosses(top_p: float, allowed: set[int]) -> None:
    sampler = Sampler(True, top_p=top_p, seed=3)
    assert set(draws(sampler, logits_of([0.1, 0.0, 0.6, 0.3]), 500)) == allowed


def test_seeds() -> None:
    logits = np.zeros(1000, np.float32)
    assert draws(Sampler(True, seed=7), logits, 20) == draws(Sampler(True, seed=7), logits, 20)
    assert draws(Sampler(True, seed=7), logits, 20) != draws(Sampler(True, seed=8), logits, 20)
    assert draws(Sampler(True), logits, 20) != draws(Sampler(True), logits, 20)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("do_sample", [False, True])
def test_damaged_logits_are_refused(bad: float, do_sample: bool) -> None:
    with pytest.raises(InputError, match="largest logit is"):
        draws(Sampler(do_sample), np.array([0, bad, 1], np.float32), 1)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"do_sample": True, "temperature": 0.0}, "temperature must be"),
        ({"do_sample": True, "temperature": -1.0}, "temperature must be"),
        ({"do_sample": True, "temperature": np.nan}, "temperature must be"),
        ({"do_sample": True, "temperature": np.inf}, "temperature must be"),
        ({"do_sample": True, "top_p": 0.0}, "top_p must be"),
        ({"do_sample": True, "top_p": 1.1}, "top_p must be"),
        ({"do_sample": True, "top_p": np.nan}, "top_p must be"),
        ({"do_sample": True, "seed": -1}, "seed must be"),
        ({"do_sample": True, "seed": 1.5}, "seed must be"),
        ({"temperature": 0.7}, "without do_sample=True"),
        ({"top_p": 0.7}, "without do_sample=True"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Sampler(**settings)


def test_generation_shows_its_text() -> None:
    result = Generation("hi there", (3, 4), "length", 10, 3 * 2**20)
    assert str(result) == "hi there"
    assert repr(result) == (
        "Generation('hi there', 2 tokens after 10, finish_reason='length', kv_cache=3.0 MiB)"
    )
