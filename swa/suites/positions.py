"""Perplexity by position: what each token of a long text costs, the further in the text it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from swa.errors import ExampleError, InputError, ScoresError
from swa.evaluation import Evaluation
from swa.examples import Example, content_hash
from swa.haystack import read_haystack
from swa.policy import AttentionPolicy
from swa.suites.request import Request
from swa.tasks import Draw

if TYPE_CHECKING:
    from swa.model import Model

DEFAULT_LENGTHS = (4096,)
N_BUCKETS = 8
TASKS = ("text",)

_BUCKET = re.compile(r"tokens (?P<first>\d+)-(?P<last>\d+)")


def bucket(first: int, last: int) -> str:
    """The task of the tokens at these positions; `buckets` reads it back."""
    return f"tokens {first}-{last}"


def examples(request: Request) -> list[Example]:
    """Pieces of text of one length, one or `examples_per_task`, that follow each other.

    A piece begins with what the tokenizer puts before a text, or with its own first token: that is
    the prompt, and the rest the answer. Without files it is the haystack of the split, from a
    sentence on that the seed decides; with files, each file's text from its beginning.

    Raises:
        ExampleError: several lengths, or options of other suites; a text too short.
        OSError: a file cannot be read.
    """
    request.choose_tasks(TASKS, TASKS)
    request.refuse("perplexity", "depths")
    lengths = request.lengths or DEFAULT_LENGTHS
    if len(lengths) != 1:
        raise ExampleError(f"perplexity by position is of texts of one length, not {list(lengths)}")
    made: list[Example] = []
    for name, text in _texts(request, lengths[0]):
        made += _pieces(name, text, lengths[0], request)
    return made


def evaluate(
    model: Model,
    examples: Sequence[Example],
    *,
    policy: AttentionPolicy | None = None,
    edges: Sequence[int] | None = None,
    progress: bool = False,
) -> Evaluation:
    """NLL by position, as a prompt is prefilled: every row slides where the policy says so.

    There is no answer here, so neither a tail of the prompt nor rows of an answer are exempt: the
    run takes the policy with `num_tail_tokens=0` and `decode="window"`. The result names the policy
    as it was given.

    Args:
        model: as loaded (full attention) or patched.
        examples: of this suite: texts of one length.
        policy: evaluate `model.patch(policy)` instead.
        edges: positions at which buckets begin, ascending; the last one ends with the text. None:
            eight of one width (but for what the prompt takes of the first), so that the mean over
            buckets is that over tokens.
        progress: show a bar on stderr.

    Returns:
        an entry for each text and bucket, text by text: the mean NLL of the bucket's tokens, in
        nats. Tasks are the buckets, `units` the texts.

    Raises:
        ExampleError: no examples, or of different lengths.
        InputError: edges that are not ascending, or outside of the text.
        ScoresError: an NLL is not finite.
        PolicyError, InputError, MemoryError: as `Model.patch` and `Model.nll`.
    """
    spans = {(example.prompt_len, example.prompt_len + example.answer_len) for example in examples}
    if len(spans) != 1:
        raise ExampleError("perplexity by position needs texts of one length, at least one")
    ((first, end),) = spans
    bounds = _bounds(first, end, edges)
    subject = model if policy is None else model.patch(policy)
    applied = subject.policy
    every_row = applied and replace(applied, num_tail_tokens=0, decode="window")
    shown: Iterable[Example] = examples
    if progress:
        from tqdm import tqdm

        shown = tqdm(examples, desc="evaluating", unit="text")
    nll: list[float] = []
    is_greedy: list[bool] = []
    for index, example in enumerate(shown):
        result = subject.nll_example(example, every_row)
        if not np.isfinite(result.per_token).all():
            raise ScoresError(
                f"the NLL of text {index} is not finite: the checkpoint's weights overflow or are"
                ' not numbers (if dtype is "bfloat16", try "float32")'
            )
        for low, high in pairwise(bounds):
            nll.append(float(result.per_token[low - first : high - first].mean()))
            is_greedy.append(bool(result.is_greedy[low - first : high - first].all()))
    tasks = [bucket(low, high - 1) for low, high in pairwise(bounds)]
    return Evaluation(
        nll_per_example=tuple(nll),
        greedy_match_per_example=tuple(is_greedy),
        tasks=tuple(tasks * len(examples)),
        policy=applied,
        model_name=model.name,
        model_fingerprint=model.fingerprint,
        dtype=model.dtype,
        examples_hash=content_hash(examples),
        units=tuple(index for index in range(len(examples)) for _ in tasks),
    )


def buckets(evaluation: Evaluation) -> list[tuple[int, int]]:
    """First and last position of each of its tasks. Raises InputError: it is of another suite."""
    found = [_BUCKET.fullmatch(task) for task in evaluation.by_task]
    spans = [(int(match["first"]), int(match["last"])) for match in found if match]
    if len(spans) != len(found):
        raise InputError("the evaluation is not one of perplexity by position")
    return spans


def _bounds(first: int, end: int, edges: Sequence[int] | None) -> list[int]:
    """Where buckets begin, and the end of the last one."""
    if edges is None:
        inner = {end * i // N_BUCKETS for i in range(1, N_BUCKETS)}  # fewer, if the text is short
        return [first, *sorted(edge for edge in inner if edge > first), end]
    bounds = [*edges, end]
    if bounds[0] < first or any(low >= high for low, high in pairwise(bounds)):
        raise InputError(
            f"edges must ascend, from {first} (the first token that is predicted) to below {end}:"
            f" not {list(edges)}"
        )
    return bounds


def _texts(request: Request, length: int) -> Iterator[tuple[str, str]]:
    """Texts with a name for errors."""
    for path in request.files:
        try:
            yield str(path), path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ExampleError(f"{path}: not UTF-8 text: {error}") from error
    if not request.files:
        haystack = read_haystack(request.split, request.haystack)
        draw = Draw(f"perplexity {request.seed} {request.split}")
        # A word is a token at least. Not more words than there are: what repeats is too easy.
        n_words = min(len(haystack.words), length * (request.examples_per_task or 1))
        passage = haystack.passage(draw.below(len(haystack.sentence_starts)), n_words)
        yield f"the haystack's {request.split} part", "".join(passage.words).lstrip()


def _pieces(name: str, text: str, length: int, request: Request) -> Iterator[Example]:
    body = request.tokenizer.encode(text)
    whole = request.tokenizer.encode(text, add_special_tokens=True)
    before = whole[: len(whole) - len(body)]
    n_pieces, size = request.examples_per_task or 1, length - len(before)
    if size < 2:
        raise ExampleError(f"length {length} is too short: there is nothing to predict")
    if len(body) < n_pieces * size:
        raise ExampleError(
            f"{name} has {len(body)} tokens, too few for {n_pieces} pieces of {size}: lower"
            " examples_per_task or the length"
        )
    n_prompt = max(len(before), 1)
    for start in range(0, n_pieces * size, size):
        ids = (*before, *body[start : start + size])
        yield Example(ids[:n_prompt], ids[n_prompt:], TASKS[0])
