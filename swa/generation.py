"""Generation: sampling, text that arrives in whole characters, stop tokens and stop strings."""

from __future__ import annotations

import math
from collections.abc import Collection, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from swa.errors import InputError

if TYPE_CHECKING:
    from swa._core import Session
    from swa.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, repr=False)
class Generation:
    """A generated continuation; `str()` gives its text."""

    text: str
    """Without special tokens, and without the stop string; empty if the model has no tokenizer."""
    ids: tuple[int, ...]
    """Generated tokens, without the stop token."""
    finish_reason: Literal["stop", "length"]
    """A stop token or stop string came, or `max_new_tokens` were generated."""
    n_prompt_tokens: int
    kv_bytes: int
    """Size of the KV cache at the end: what windowed decode keeps small."""

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return (
            f"Generation({self.text!r}, {len(self.ids)} tokens after {self.n_prompt_tokens},"
            f" finish_reason={self.finish_reason!r}, kv_cache={self.kv_bytes / 2**20:.1f} MiB)"
        )


@dataclass(frozen=True)
class Sampler:
    """Picks the next token: the most likely one, or a draw from the nucleus of mass `top_p`.

    Raises:
        InputError: temperature not in (0, inf), top_p not in (0, 1], a seed that NumPy refuses.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(f"temperature must be finite and > 0, not {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], not {self.top_p!r}")
        if not self.do_sample and (self.temperature, self.top_p) != (1, 1):
            raise InputError("temperature and top_p change nothing without do_sample=True")
        self.generator()

    def generator(self) -> np.random.Generator:
        """A new random generator; the same seed gives the same draws."""
        try:
            return np.random.default_rng(self.seed)
        except (TypeError, ValueError) as error:
            raise InputError(f"seed must be an integer >= 0 or None: {error}") from error

    def pick(self, logits: npt.NDArray[np.float32], random: np.random.Generator) -> int:
        """The next token's id. logits: float32 [V]. Raises InputError if they are not numbers."""
        peak = logits.max()
        if not np.isfinite(peak):
            raise InputError(f"the model's largest logit is {peak}: are its weights damaged?")
        if not self.do_sample:
            return int(logits.argmax())
        mass = np.exp((logits.astype(np.float64) - peak) / self.temperature)
        # Most likely first, ties to the lower id; the token that crosses top_p still belongs.
        order = np.argsort(-mass, kind="stable")
        cumulative = np.cumsum(mass[order])
        nucleus = int(np.searchsorted(cumulative, self.top_p * cumulative[-1])) + 1
        nucleus = min(nucleus, len(order))
        draw = random.random() * cumulative[nucleus - 1]
        return int(order[min(np.searchsorted(cumulative, draw, side="right"), nucleus - 1)])


class TextStream:
    """Turns tokens into text piece by piece, cut at the first stop string.

    A character may take several tokens, and a stop string several pieces: what could still become
    either is held back.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: tuple[str, ...] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []  # from the last boundary on; those before `_shown` are context
        self._shown = 0
        self._held = ""

    def push(self, token: int) -> str:
        """The text that `token` completes; `stopped` is set once a stop string was found."""
        self._ids.append(token)
        return self._release(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """What was held back and now stays text, an unfinished character included."""
        return "" if self.stopped else self._release(self._new_text(final=True), final=True)

    def _new_text(self, *, final: bool) -> str:
        if self._tokenizer is None:
            return ""
        # Decoded with the tokens before it: some tokenizers drop a space at the start of a text.
        context = self._tokenizer.decode(self._ids[: self._shown], skip_special_tokens=True)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if len(text) <= len(context) or (text.endswith(REPLACEMENT) and not final):
            return ""
        del self._ids[: self._shown]
        self._shown = len(self._ids)
        return text[len(context) :]

    def _release(self, text: str, *, final: bool) -> str:
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        held = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, shorter than `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)


def continue_text(
    session: Session,
    sampler: Sampler,
    text: TextStream,
    *,
    stop_ids: Collection[int],
    max_new_tokens: int,
) -> Generator[str, None, Generation]:
    """Feed tokens to a session after its prefill; yields text, returns the whole Generation."""
    random = sampler.generator()
    n_prompt_tokens = session.n_tokens
    ids: list[int] = []
    pieces: list[str] = []
    finish_reason: Literal["stop", "length"] = "length"
    logits = session.logits()
    while True:
        token = sampler.pick(logits, random)
        if token in stop_ids:
            finish_reason = "stop"
            break
        ids.append(token)
        piece = text.push(token)
        if piece:
            pieces.append(piece)
            yield piece
        if text.stopped:
            finish_reason = "stop"
            break
        if len(ids) == max_new_tokens:
            break
        logits = session.step(token)
    rest = text.finish()
    if rest:
        pieces.append(rest)
        yield rest
    return Generation("".join(pieces), tuple(ids), finish_reason, n_prompt_tokens, session.kv_bytes)
