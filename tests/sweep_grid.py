"""A small grid on a planted checkpoint, for tests of sweeps."""

from __future__ import annotations

from typing import Any

from planted import Planted

import swa

GRID: dict[str, Any] = {
    "windows": [16],
    "sinks": [4],
    "strategies": ["topk", "first"],
    "budgets": [1, 0.3],
    "dtypes": ["float32"],
}


def examples(planted: Planted, seeds: range) -> list[swa.Example]:
    made = [planted.example(120, near=40, seed=seed) for seed in seeds]
    return [
        swa.Example(tuple(e.prompt_ids), tuple(e.answer_ids), f"t{len(e.answer)}") for e in made
    ]
