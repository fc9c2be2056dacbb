"""RULER's tasks (arXiv 2404.06654), generated at any length: needles, variables, words, documents.

What is asked, how often and how it is scored follows RULER; the wording and the haystacks are ours,
so figures are close to published ones, not equal to them.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from swa.errors import ExampleError
from swa.examples import Example
from swa.grading import Grading
from swa.haystack import Haystack, Split, read_haystack
from swa.suites import documents, word_lists
from swa.suites.request import Made, Request, room_for
from swa.suites.word_lists import coded_words
from swa.tasks import Draw, Retrieval, draw_keys, hide

DEFAULT_LENGTHS = (4096,)
ANYWHERE = (0.0, 1.0)  # depths; the end is not left out
N_HOPS = 4
# A few sentences over and over: a text that is easy to tell from what is hidden in it.
_NOISE_SENTENCES = (
    "The rain is cold.",
    "The road is long.",
    "The hill is steep.",
    "We walk on.",
    "They come and they go.",
)
_NOISE = Haystack.from_text(" ".join(_NOISE_SENTENCES))
_CHAIN_INTRODUCTION = "Keep track of the variables that are assigned in the two texts below."


@dataclass(frozen=True)
class Needles:
    """What a task of the needle family hides, and in what."""

    haystack: Literal["noise", "text", "needles"]
    """The noise above, a novel, or needles that nobody asks for."""
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    n_keys: int = 1
    n_values: int = 1
    """Of each key."""
    n_queries: int = 1
    """Keys asked for."""


NEEDLES = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("text"),
    "niah_single_3": Needles("text", values="uuids"),
    "niah_multikey_1": Needles("text", n_keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", keys="uuids", values="uuids"),
    "niah_multivalue": Needles("text", n_values=4),
    "niah_multiquery": Needles("text", n_keys=4, n_queries=4),
}
# Longest reply of each task, in tokens: it counts towards the length, as in RULER.
NEW_TOKENS = {
    **dict.fromkeys(NEEDLES, 128),
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
    "qa_1": 32,
    "qa_2": 32,
}
FROM_FILES = {"qa_1": "SQuAD", "qa_2": "HotpotQA"}
TASKS = tuple(NEW_TOKENS)
SYNTHETIC = tuple(task for task in TASKS if task not in FROM_FILES)


def examples(request: Request) -> list[Example]:
    """The examples of a request; a length is of prompt and longest reply together.

    Without files: the eleven synthetic tasks. With a SQuAD 2.0 or HotpotQA file: the task made from
    it, too.

    Raises:
        ExampleError: a length too short for a task; a task without its file; a malformed file.
        OSError: a file cannot be read.
    """
    request.refuse("RULER", "depths")
    request.choose_tasks(SYNTHETIC, TASKS)  # refuses unknown ones before files are read
    sources: dict[str, documents.Source] = {}
    for source in map(documents.read, request.files):
        if source.task in sources:
            raise ExampleError(
                f"{sources[source.task].path} and {source.path} are both for {source.task}: give"
                " one of them"
            )
        sources[source.task] = source
    tasks = request.tasks or (*SYNTHETIC, *sources)
    for task in tasks:
        if task in FROM_FILES and task not in sources:
            raise ExampleError(f"task {task!r} is made from a {FROM_FILES[task]} file: give one")
    return [
        _example(request, task, length, index, sources)
        for length in request.lengths or DEFAULT_LENGTHS
        for task in tasks
        for index in range(request.examples_per_task or 1)
    ]


def _example(
    request: Request, task: str, length: int, index: int, sources: Mapping[str, documents.Source]
) -> Example:
    draw = Draw(f"ruler {request.seed} {request.split} {task} {length} {index}")
    scorer = "contains_any" if task in sources else "contains_all"
    with room_for(task, length, NEW_TOKENS[task]) as prompt_tokens:
        if task in sources:
            made = documents.ask(sources[task], request, prompt_tokens, index, draw)
        elif task == "cwe":
            made = word_lists.common_words(request, length, prompt_tokens, draw)
        elif task == "fwe":
            made = word_lists.frequent_words(request, length, prompt_tokens, draw)
        elif task == "vt":
            made = _variables(request, prompt_tokens, draw)
        else:
            made = _needles(request, task, prompt_tokens, draw)
    grading = Grading(made.references, scorer, NEW_TOKENS[task], made.question)
    # At every length the same questions are asked about a source.
    unit = f"{task} {index}" if task in sources else None
    return Example(made.prompt_ids, made.answer_ids, f"{task} {length}", grading, unit)


def _needles(request: Request, task: str, prompt_tokens: int, draw: Draw) -> Made:
    """Keys with values, in a text; the values of some keys are asked for."""
    kind = NEEDLES[task]
    values = [[_value(kind.values, draw) for _ in range(kind.n_values)] for _ in range(kind.n_keys)]
    if kind.keys == "words":
        keys = draw_keys(draw, request.split, kind.n_keys)
    else:
        keys = [_value("uuids", draw) for _ in range(kind.n_keys)]
    needles = [
        _needle(kind.values, key, value)
        for key, of_key in zip(keys, values, strict=True)
        for value in of_key
    ]
    asked = draw.sample(range(kind.n_keys), kind.n_queries)
    answers = [value for i in asked for value in values[i]]
    which = _listed([keys[i] for i in asked])
    one = len(answers) == 1
    what = kind.values.removesuffix("s") if one else kind.values
    retrieval = Retrieval(
        tuple(draw.sample(needles, len(needles))),
        f"What {'is' if one else 'are all'} the special magic {what} for {which} mentioned in the"
        " text above?",
        f"The special magic {what} for {which} mentioned in the text {'is' if one else 'are'}:",
        f" {', '.join(answers)}",
    )
    if kind.haystack == "noise":
        haystack = _NOISE
    elif kind.haystack == "text":
        haystack = read_haystack(request.split, request.haystack)
    else:
        haystack = _other_needles(request, kind, prompt_tokens, keys, draw)
    prompt, answer = hide(
        retrieval,
        request.tokenizer,
        haystack,
        prompt_tokens,
        request.use_chat,
        draw,
        task=task,
        introduction=f"Some special magic {kind.values} are hidden in the text below. Remember"
        " them: you will be asked about them.",
        depth=ANYWHERE,
    )
    return Made(prompt, answer, tuple(answers), retrieval.question)


def _needle(values: str, key: str, value: str) -> str:
    return f"One of the special magic {values} for {key} is: {value}."


def _value(kind: str, draw: Draw) -> str:
    if kind == "numbers":
        return str(1_000_000 + draw.below(9_000_000))
    bits = sum(draw.below(2**32) << shift for shift in (0, 32, 64, 96))
    return str(uuid.UUID(int=bits, version=4))


def _other_needles(
    request: Request, kind: Needles, prompt_tokens: int, asked: Sequence[str], draw: Draw
) -> Haystack:
    """Needles for other keys than those asked for; each has ten tokens at least."""
    sentences: list[str] = []
    while len(sentences) * 10 < prompt_tokens + 10:
        if kind.keys == "uuids":
            key = _value("uuids", draw)
        else:
            (key,) = draw_keys(draw, request.split, 1)
        if key not in asked:
            sentences.append(_needle(kind.values, key, _value(kind.values, draw)))
    return Haystack.from_text(" ".join(sentences))


def _variables(request: Request, prompt_tokens: int, draw: Draw) -> Made:
    """A chain of variables that have one value, in noise; a short one with its answer before it."""
    example_names, example_value = _names(request.split, draw), str(10_000 + draw.below(90_000))
    names, value = _names(request.split, draw), str(10_000 + draw.below(90_000))
    example_question, example_lead = _ask_variables(example_value)
    question, lead = _ask_variables(value)
    example = " ".join(
        f"{assignment} {noise}"
        for assignment, noise in zip(
            _chain(example_names, example_value), _NOISE_SENTENCES, strict=True
        )
    )
    retrieval = Retrieval(_chain(names, value), question, lead, f" {' '.join(names)}")
    prompt, answer = hide(
        retrieval,
        request.tokenizer,
        _NOISE,
        prompt_tokens,
        request.use_chat,
        draw,
        task="vt",
        introduction=f"{_CHAIN_INTRODUCTION}\n\n{example}\n\n{example_question}\n{example_lead}"
        f" {' '.join(example_names)}",
        depth=ANYWHERE,
    )
    return Made(prompt, answer, names, question)


def _chain(names: Sequence[str], value: str) -> tuple[str, ...]:
    hops = (f"VAR {name} = VAR {before}." for before, name in pairwise(names))
    return (f"VAR {names[0]} = {value}.", *hops)


def _ask_variables(value: str) -> tuple[str, str]:
    return (
        f"Which variables have the value {value} in the text above, be it by way of others?",
        f"These {N_HOPS + 1} variables have the value {value}:",
    )


def _names(split: Split, draw: Draw) -> tuple[str, ...]:
    return tuple(name.upper() for name in coded_words(split, draw, N_HOPS + 1, 5))


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"
