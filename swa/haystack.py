"""The text that synthetic tasks hide things in: what ships with the package, or the user's."""

from __future__ import annotations

import gzip
import os
import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

from swa.errors import ExampleError

Split = Literal["calibration", "heldout"]
SPLITS: tuple[Split, Split] = ("calibration", "heldout")
"""Of two halves, of a text or a list of words, the first and the second one's name."""

_DATA = Path(__file__).parent / "data"
_SENTENCE_END = re.compile(r"""[.!?]["'”’)\]]*$""")
_OPENING = "\"'“‘(["
_ABBREVIATIONS = frozenset({"Dr.", "Esq.", "Jr.", "Mr.", "Mrs.", "Ms.", "No.", "St.", "Vol."})


@dataclass(frozen=True)
class Haystack:
    """Words of a text, each with the space or paragraph break before it."""

    words: tuple[str, ...]
    sentence_starts: tuple[int, ...]
    """Indices into `words`, ascending."""

    @classmethod
    def from_text(cls, text: str) -> Haystack:
        """Empty lines part paragraphs; all other space counts as one blank."""
        words: list[str] = []
        starts: list[int] = []
        for paragraph in re.split(r"\n\s*\n", text):
            sentence_ended = True
            for i, word in enumerate(paragraph.split()):
                if sentence_ended:
                    starts.append(len(words))
                words.append((" " if i else "\n\n") + word)
                abbreviated = word.lstrip(_OPENING) in _ABBREVIATIONS
                sentence_ended = bool(_SENTENCE_END.search(word)) and not abbreviated
        return cls(tuple(words), tuple(starts))

    def halves(self) -> tuple[Haystack, Haystack]:
        """Cut at the sentence start next after the middle. Raises ExampleError: one sentence."""
        if len(self.sentence_starts) < 2:
            raise ExampleError(
                "the haystack needs at least two sentences, so that calibration and held-out"
                " examples share none: give a longer text, or a file's name as a pathlib.Path"
            )
        middle = bisect_right(self.sentence_starts, len(self.words) // 2)
        at = min(middle, len(self.sentence_starts) - 1)
        cut = self.sentence_starts[at]
        return (
            Haystack(self.words[:cut], self.sentence_starts[:at]),
            Haystack(self.words[cut:], tuple(s - cut for s in self.sentence_starts[at:])),
        )

    def passage(self, first_sentence: int, n_words: int) -> Haystack:
        """`n_words` words from that sentence on; the text starts over where it ends."""
        offset, total = self.sentence_starts[first_sentence], len(self.words)
        words = tuple(islice(cycle(self.words[offset:] + self.words[:offset]), n_words))
        laps = range(0, offset + n_words, total)
        starts = (lap + s - offset for lap in laps for s in self.sentence_starts)
        return Haystack(words, tuple(s for s in starts if 0 <= s < n_words))


def read_haystack(split: Split, source: str | os.PathLike[str] | None = None) -> Haystack:
    """The part of a text that belongs to a split; the two parts share no sentence.

    Args:
        split: "calibration" takes the first half, "heldout" the second. The shipped text has a
            novel for each, of some 80,000 tokens.
        source: a text (str) or a UTF-8 file of one (a path object); None: the shipped text.

    Raises:
        ExampleError: an unknown split; a text too short, or not UTF-8.
        OSError: the file cannot be read.
    """
    if split not in SPLITS:
        raise ExampleError(f"there is no split {split!r}: choose from {', '.join(SPLITS)}")
    if source is None:
        return _shipped(split)
    try:
        text = source if isinstance(source, str) else Path(source).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ExampleError(f"{source}: not UTF-8 text: {error}") from error
    return Haystack.from_text(text).halves()[SPLITS.index(split)]


@lru_cache
def _shipped(split: Split) -> Haystack:
    packed = (_DATA / f"{split}.txt.gz").read_bytes()
    return Haystack.from_text(gzip.decompress(packed).decode("utf-8"))
