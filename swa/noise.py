"""The numeric noise floor: what bfloat16 alone does to deltas, measured against float32."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from swa.errors import InputError
from swa.examples import Example, content_hash
from swa.layer_scores import LayerScores, checked_integer, mean
from swa.score import sweep_tasks

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
        examples: those that `score_layers` was given, in the same order.
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
    if scores.adaptive is not None:
        tasks = [tasks[index] for index in scores.adaptive.examples if index < len(tasks)]
    if content_hash(task.example for task in tasks) != scores.examples_hash:
        raise InputError("these are not the examples that were scored, in the same order")
    count = min(n_examples, len(tasks))
    picked: Iterable[int] = [i * len(tasks) // count for i in range(count)]
    if progress:
        from tqdm import tqdm

        picked = tqdm(picked, desc="float32", unit="example")
    squares = []
    for i in picked:
        ours = scores.delta_per_example[i]
        only = tuple(layer for layer, value in enumerate(ours) if value is not None)
        theirs = replace(tasks[i], only=only).run(reference).delta
        squares += [
            (a - b) ** 2
            for a, b in zip(ours, theirs, strict=True)
            if a is not None and b is not None
        ]
    return math.sqrt(mean(squares) / len(tasks))
