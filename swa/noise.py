"""The numeric noise floor: what bfloat16 alone does to deltas, measured against float32."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from swa.errors import InputError
from swa.examples import Example, content_hash
from swa.layer_scores import LayerScores, checked_integer, mean
from swa.score import SweepTask, sweep_tasks

if TYPE_CHECKING:
    from swa.model import Model


def measure_noise_floor(
    scores: LayerScores,
    examples: Sequence[Example],
    reference: Model,
    *,
    n_examples: int = 4,
    progress: bool = False,
) -> float:
    """Score some of the examples again in float32, and tell what rounding did to `scores.delta`.

    `dataclasses.replace(scores, noise_floor=...)` keeps the result with the scores, whose plots and
    reports then mark the layers below it.

    Args:
        scores: of a bfloat16 model.
        examples: those that were scored, in the same order.
        reference: the same model, `swa.load(..., dtype="float32")`.
        n_examples: how many to score again, spread evenly over the examples. The layers of one
            share the error of its base run: take several.
        progress: show a bar on stderr.

    Returns:
        One standard deviation, in nats per answer token: the root mean square over examples and
        layers of the difference, divided by the square root of the number of examples scored.

    Raises:
        InputError: not a float32 model, or scores that are float32 themselves.
        ScoresError, ExampleError: the model or the examples are not those of the scores.
    """
    n_examples = checked_integer(n_examples, "n_examples", 1)
    if reference.dtype != "float32" or scores.dtype == "float32":
        raise InputError(
            "a noise floor compares scores in bfloat16 with a model in float32, not scores in"
            f" {scores.dtype} with a model in {reference.dtype}"
        )
    if reference.fingerprint != scores.model_fingerprint:
        raise InputError(f"{reference.name} has other weights than the model that was scored")
    tasks, _ = sweep_tasks(reference, examples, scores.policy, scores.direction, scores.base)
    if content_hash(task.example for task in tasks) != scores.examples_hash:
        raise InputError("these are not the examples that were scored, in the same order")
    count = min(n_examples, len(tasks))
    picked: Iterable[SweepTask] = [tasks[i * len(tasks) // count] for i in range(count)]
    if progress:
        from tqdm import tqdm

        picked = tqdm(picked, desc="float32", unit="example")
    squares = [
        (ours - theirs) ** 2
        for task in picked
        for ours, theirs in zip(
            scores.delta_per_example[task.index], task.run(reference).delta, strict=True
        )
        if ours is not None and theirs is not None
    ]
    return math.sqrt(mean(squares) / len(tasks))
