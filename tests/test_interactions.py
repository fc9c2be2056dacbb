"""Layers that interact, in a real checkpoint whose truth is known: the default finds them.

Layers 3 and 10 are a chain, useful only together; 5 and 7 are copies; 8 is useful by itself. The
full model answers with certainty, so that its own gradients say nothing.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from planted import Planted, planted_checkpoint

import swa
from swa.problem import CalibrationProblem
from swa.strategies import propose, resolve

WINDOW, SINKS, PROMPT_TOKENS = 32, 4, 260
POLICY = swa.AttentionPolicy(sliding_window=WINDOW, num_sink_tokens=SINKS)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    folder = tmp_path_factory.mktemp("interacting")
    return planted_checkpoint(
        folder,
        num_hidden_layers=12,
        n_values={5: 4, 10: 8, 8: 2},
        chain=(3, 10),
        copies={7: 5},
    )


@pytest.fixture(scope="module")
def problem(planted: Planted) -> CalibrationProblem:
    model = swa.load(planted.folder, dtype="float32", num_threads=1)
    return CalibrationProblem(model, examples(planted, range(4)), POLICY)


def examples(planted: Planted, seeds: range) -> list[swa.Example]:
    made = [planted.example(PROMPT_TOKENS, near=2 * WINDOW, seed=seed) for seed in seeds]
    return [swa.Example(tuple(e.prompt_ids), tuple(e.answer_ids)) for e in made]


def test_the_checkpoint_is_what_it_claims(planted: Planted, problem: CalibrationProblem) -> None:
    np.testing.assert_allclose(problem.deltas().mean(axis=0), planted.deltas, atol=1e-4)
    four, eight, two = (math.log(n) / 2 for n in (4, 8, 2))
    for layers, expected in (
        ((), four + eight + two),
        ((3, 10), four + two),
        ((5, 7), eight + two),
        ((3, 5, 8, 10), 0),
        (range(12), 0),
    ):
        np.testing.assert_allclose(problem.loss(layers), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_default_finds_them(planted: Planted, dtype: Any) -> None:
    model = swa.load(planted.folder, dtype=dtype, num_threads=1)
    chosen = swa.select(
        model, examples(planted, range(4)), POLICY, swa.Budget(full_attention_layers=4)
    )
    assert chosen.layers in ((3, 5, 8, 10), (3, 7, 8, 10))
    assert chosen.cost is not None and chosen.cost.prefills <= 13  # a plain sweep's
    for heldout in examples(planted, range(20, 22)):
        assert model.patch(chosen).nll_example(heldout).mean < 1e-3


def test_neither_top_k_nor_backward_does(problem: CalibrationProblem) -> None:
    assert propose(resolve("topk"), problem, 4).layers == (5, 7, 8, 10)
    assert propose(resolve("first_order"), problem, 4).layers == (5, 7, 8, 10)
    removed_blindly = propose(resolve("backward:rounds=3"), problem, 4)
    assert problem.loss(removed_blindly.layers).mean() > 1
