"""BABILong (arXiv 2406.10149): facts spread over the text of books, from its published files."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from swa.errors import ExampleError
from swa.examples import Example
from swa.grading import Grading
from swa.suites.records import Entry, read_entries
from swa.suites.request import Request, keep_short_enough
from swa.tasks import split_reply

NEW_TOKENS = 20

_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_YES_NO = ("no", "yes")
_OPPOSITE = ({"n", "s"}, {"e", "w"})  # no way leads there and back
# What can be answered, by task: scoring looks for all of these.
CHOICES: dict[str, tuple[str, ...]] = {
    "qa1": _PLACES,
    "qa2": _PLACES,
    "qa3": _PLACES,
    "qa4": _PLACES,
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
    "qa6": _YES_NO,
    "qa7": ("none", "one", "two", "three"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa9": _YES_NO,
    "qa10": ("maybe", *_YES_NO),
    "qa11": _PLACES,
    "qa12": _PLACES,
    "qa13": _PLACES,
    "qa14": ("bedroom", "cinema", "kitchen", "office", "park", "school"),
    "qa15": ("cat", "mouse", "sheep", "wolf"),
    "qa16": ("gray", "green", "white", "yellow"),
    "qa17": _YES_NO,
    "qa18": _YES_NO,
    "qa19": tuple(f"{a},{b}" for a in "nesw" for b in "nesw" if {a, b} not in _OPPOSITE),
    "qa20": ("bedroom", "garden", "kitchen", "bored", "hungry", "thirsty", "tired"),
}
TASKS = tuple(CHOICES)
_SEVERAL = "qa8"  # answers of several things, separated by commas

_TASK = re.compile(r"(?<![a-z0-9])qa([1-9]|1[0-9]|20)(?![0-9])", re.IGNORECASE)
_LENGTH = re.compile(r"(?<![A-Za-z0-9])\d+[kM](?![A-Za-z0-9])")
_INSTRUCTION = (
    "A few facts are spread over the text below, which otherwise has nothing to do with them."
    " Answer the question from these facts alone."
)
_LEAD = "Answer:"


def examples(request: Request) -> list[Example]:
    """Examples from JSON, JSON lines or parquet files whose entries are input, question, target.

    Which task a file is of ("qa1" to "qa20") stands in its name or its folder's, as published; if
    not, give it as the request's only task. `lengths` leaves out entries whose prompt and reply
    have more tokens than the largest of them; `examples_per_task` is of those that are left of a
    file. The instruction is ours; scoring is as published: the first sentence of the reply must
    name the target and no other possible answer (but "none" does not name "one").

    Warns:
        SwaWarning: entries were left out, since they are too long.

    Raises:
        ExampleError: no files, or of no task; an entry that is malformed; all of them left out.
        OSError: a file cannot be read.
    """
    request.refuse("BABILong", "depths")
    wanted = request.choose_tasks(TASKS, TASKS)
    of_task = {path: _task(path, request) for path in request.required_files("BABILong")}
    used = {path: task for path, task in of_task.items() if task in wanted}
    missing = [task for task in request.tasks or () if task not in used.values()]
    if missing or not used:
        raise ExampleError(f"none of the files is of {', '.join(missing or wanted)}")
    entries = (
        (path, partial(_example, entry, task, _label(path), index, request))
        for path, task in used.items()
        for index, entry in enumerate(read_entries(path))
    )
    return keep_short_enough(entries, request)


def _example(entry: Entry, task: str, label: str, index: int, request: Request) -> Example:
    question, target = entry.text("question").strip(), entry.text_or_number("target").strip()
    instruction = f"{_INSTRUCTION} The answer is one of: {', '.join(CHOICES[task])}."
    if task == _SEVERAL:
        instruction += " Several of them are separated by commas, without spaces."
    text = (
        f"{instruction}\n\n<context>\n{entry.text('input').strip()}\n</context>\n\n"
        f"Question: {question}"
    )
    lead, answer = split_reply(request.tokenizer, _LEAD, f" {target}")
    references = tuple(target.split(",")) if task == _SEVERAL else (target,)
    grading = Grading(references, "only_choice", NEW_TOKENS, question, CHOICES[task])
    # As published, a task's files of all lengths ask the same questions, in the same order.
    unit = f"{task} {index}: {question}"
    return Example((*request.encode(text), *lead), tuple(answer), f"{task}{label}", grading, unit)


def _task(path: Path, request: Request) -> str:
    """The task a file is of."""
    for name in (path.name, path.absolute().parent.name):
        if found := _TASK.search(name):
            return found[0].lower()
    if request.tasks is not None and len(request.tasks) == 1:
        return request.tasks[0]
    raise ExampleError(
        f"{path}: which task is it of? Give the one task, or a name that says it (qa1/4k.json)"
    )


def _label(path: Path) -> str:
    """The length that the name of a file or folder says, after a space; empty if none does."""
    for name in (path.name, path.absolute().parent.name):
        if found := _LENGTH.search(name):
            return f" {found[0]}"
    return ""
