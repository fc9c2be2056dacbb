"""LongMemEval (arXiv 2410.10813): questions about long histories of chats, from published files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial

from swa.errors import ExampleError
from swa.examples import Example
from swa.grading import JUDGED, Grading
from swa.suites.records import Entry, read_entries
from swa.suites.request import Request, keep_short_enough

NEW_TOKENS = 500
ABSTENTION = "abstention"

_SAME = (
    "Right is a reply that gives the reference answer, in whatever words, or all the steps to it."
    " A part of it is not enough."
)
# What counts as right, by type of question, after the published judge's rules.
CRITERIA = {
    "single-session-user": _SAME,
    "single-session-assistant": _SAME,
    "multi-session": _SAME,
    "temporal-reasoning": f"{_SAME} A number of days, weeks or months may be off by one.",
    "knowledge-update": (
        "Right is a reply that gives the reference answer as what holds now; what held before may"
        " be named beside it."
    ),
    "single-session-preference": (
        "The reference says what a reply made for this user would take up. Right is a reply that"
        " recalls and uses what the user told of themselves; it need not have every point."
    ),
    ABSTENTION: (
        "The question cannot be answered from the chats, and the reference says why. Right is a"
        " reply that sees this: that says the information is missing, or that only something else"
        " is known."
    ),
}
TASKS = tuple(CRITERIA)

_INSTRUCTION = "Below are chats that you had with a user. Answer the user's question from them."


def examples(request: Request) -> list[Example]:
    """Examples from the published JSON, or from parquet files with a finished `prompt`.

    The prompt has the published parts: the sessions by date, each with its turns as JSON (role and
    content alone: the marks of what has the answer stay out), then date and question. Tasks are the
    types of questions; those that cannot be answered are the task "abstention", whatever their
    type. Replies are for a judge. `lengths` leaves out entries whose prompt and reply have more
    tokens than the largest of them; `examples_per_task` is of those that are left.

    Warns:
        SwaWarning: entries were left out, since they are too long.

    Raises:
        ExampleError: no files; an entry that is malformed; no entry of a task; all left out.
        OSError: a file cannot be read.
    """
    request.refuse("LongMemEval", "depths")
    return keep_short_enough(_entries(request), request)


def _entries(request: Request) -> Iterator[tuple[str, Callable[[], Example]]]:
    """The task of each entry, and what makes its example."""
    found = set()
    for path in request.required_files("LongMemEval"):
        for entry in read_entries(path):
            task = _task(entry)
            if request.tasks is None or task in request.tasks:
                found.add(task)
                yield task, partial(_example, entry, task, request)
    for task in request.tasks or ():
        if task not in found:
            raise ExampleError(f"the files have no entry of task {task!r}")


def _task(entry: Entry) -> str:
    if "question_id" in entry and entry.text_or_number("question_id").endswith("_abs"):
        return ABSTENTION
    return entry.text_or_number("question_type")


def _example(entry: Entry, task: str, request: Request) -> Example:
    text = entry.text("prompt") if "prompt" in entry else _prompt(entry)
    question, answer = entry.text("question"), entry.text_or_number("answer").strip()
    tokenizer = request.tokenizer
    if request.use_chat:
        prompt, reply = request.encode(text), answer
    else:  # the text ends with "Answer:", so that the answer follows on the line
        prompt, reply = tokenizer.encode_prompt(text), f" {answer}"
    grading = Grading((answer,), JUDGED, NEW_TOKENS, question, criterion=CRITERIA.get(task, _SAME))
    return Example(tuple(prompt), tuple(tokenizer.encode_answer(reply)), task, grading)


def _prompt(entry: Entry) -> str:
    dates, sessions = entry.values("haystack_dates", str), entry.values("haystack_sessions", list)
    if len(dates) != len(sessions):
        entry.refuse(f"haystack_dates has {len(dates)} dates for {len(sessions)} sessions")
    by_date = sorted(range(len(dates)), key=dates.__getitem__)
    shown = [
        f"\n### Session {number}:\nSession Date: {dates[i]}\nSession Content:\n\n"
        f"{_turns(sessions[i], f'{entry.where}, haystack_sessions[{i}]')}\n"
        for number, i in enumerate(by_date, start=1)
    ]
    return (
        f"{_INSTRUCTION}\n\n\nHistory Chats:\n\n{''.join(shown)}\n\n"
        f"Current Date: {entry.text('question_date')}\nQuestion: {entry.text('question')}\nAnswer:"
    )


def _turns(session: list[object], where: str) -> str:
    turns = [Entry(turn, f"{where}[{i}]") for i, turn in enumerate(session)]
    return json.dumps(
        [
            {"role": turn.text("role"), "content": turn.text("content", may_be_blank=True)}
            for turn in turns
        ]
    )
