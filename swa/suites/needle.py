"""A needle in a haystack: one number, at every depth of texts of every length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from swa.errors import InputError
from swa.evaluation import Evaluation, Measure
from swa.examples import Example
from swa.grading import Grading
from swa.haystack import read_haystack
from swa.suites.request import Request, room_for
from swa.tasks import TASKS as RETRIEVAL
from swa.tasks import Draw, hide

DEFAULT_LENGTHS = (1024, 2048, 4096)
DEFAULT_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEW_TOKENS = 24
TASKS = ("needle",)

_CELL = re.compile(r"needle (?P<length>\d+) at (?P<depth>[0-9.e-]+)")


def cell(length: int, depth: float) -> str:
    """The task of one cell of the grid; `grid` reads it back."""
    return f"needle {length} at {depth:g}"


def examples(request: Request) -> list[Example]:
    """One example, or `examples_per_task`, for each cell, the lengths one after the other.

    A length is of prompt and longest reply together. The examples of a length hide the same needles
    in the same texts at each depth, so that depths compare. At depth 1 the needle lies before the
    text's last sentence.

    Raises:
        ExampleError: a length too short; files, or tasks of other names, are given.
    """
    request.choose_tasks(TASKS, TASKS)
    request.refuse("the needle grid", "files")
    haystack = read_haystack(request.split, request.haystack)
    made = []
    for length in request.lengths or DEFAULT_LENGTHS:
        for depth in request.depths or DEFAULT_DEPTHS:
            for index in range(request.examples_per_task or 1):
                draw = Draw(f"needle {request.seed} {request.split} {length} {index}")
                hidden = RETRIEVAL["num"](draw, request.split)
                with room_for("needle", length, NEW_TOKENS) as prompt_tokens:
                    prompt, answer = hide(
                        hidden,
                        request.tokenizer,
                        haystack,
                        prompt_tokens,
                        request.use_chat,
                        draw,
                        task="needle",
                        depth=(depth, depth),
                    )
                grading = Grading(
                    (hidden.answer.strip(),), max_new_tokens=NEW_TOKENS, question=hidden.question
                )
                unit = f"{length} tokens, needle {index}"
                made.append(Example(prompt, answer, cell(length, depth), grading, unit))
    return made


@dataclass(frozen=True, eq=False)
class Grid:
    """One measure in every cell."""

    lengths: tuple[int, ...]
    """Ascending, in tokens."""
    depths: tuple[float, ...]
    """Ascending, from 0 to 1."""
    values: npt.NDArray[np.float64]
    """float64 [depths, lengths]: mean over the examples of a cell; NaN where there is none."""


def grid(evaluation: Evaluation, measure: Measure = "nll") -> Grid:
    """An evaluation of this suite's examples as a grid.

    Raises:
        InputError: it is of other examples, or has no replies and "score" is asked for.
    """
    by_task: dict[str, float] | None = {
        "nll": evaluation.by_task,
        "greedy_match": evaluation.greedy_match_by_task,
        "score": evaluation.score_by_task,
    }[measure]
    if by_task is None:
        raise InputError("the evaluation has no replies, so no scores: evaluate with generate=True")
    cells: dict[tuple[float, int], float] = {}
    for task, value in by_task.items():
        found = _CELL.fullmatch(task)
        if found is None:
            raise InputError(f"task {task!r} is not of the needle grid")
        cells[float(found["depth"]), int(found["length"])] = value
    depths: Sequence[float] = sorted({depth for depth, _ in cells})
    lengths: Sequence[int] = sorted({length for _, length in cells})
    values = [[cells.get((depth, length), np.nan) for length in lengths] for depth in depths]
    return Grid(tuple(lengths), tuple(depths), np.array(values))
