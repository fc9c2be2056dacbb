"""The planted model: scores, selection and patching have one right answer, known in nats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from planted import Planted, planted_checkpoint

import swa

WINDOW, SINKS, PROMPT_TOKENS = 32, 4, 220


@pytest.fixture(scope="module", params=["F32", "BF16"])
def planted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return planted_checkpoint(tmp_path_factory.mktemp("planted"), dtype=request.param)


@pytest.fixture(params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, planted: Planted) -> swa.Model:
    return swa.load(planted.folder, dtype=request.param, num_threads=1)


def examples(planted: Planted, seeds: range = range(3)) -> list[swa.Example]:
    made = [planted.example(PROMPT_TOKENS, near=2 * WINDOW, seed=seed) for seed in seeds]
    return [swa.Example(tuple(e.prompt_ids), tuple(e.answer_ids)) for e in made]


def policy(decode: Any = "full") -> swa.AttentionPolicy:
    return swa.AttentionPolicy(sliding_window=WINDOW, num_sink_tokens=SINKS, decode=decode)


@pytest.mark.parametrize("decode", ["full", "window"])
@pytest.mark.parametrize("direction", ["restore", "ablate"])
def test_deltas_are_the_truth(
    planted: Planted, model: swa.Model, direction: Any, decode: Any
) -> None:
    scores = swa.score_layers(model, examples(planted), policy(decode), direction=direction)
    np.testing.assert_allclose(np.array(scores.delta, float), planted.deltas, atol=1e-4)
    for i in range(len(planted.n_values) + 1):
        chosen = swa.select(scores, swa.Budget(full_attention_layers=i))
        assert sorted(chosen.layers) == sorted(planted.ranked_layers[:i])


def test_restored_from_a_base(planted: Planted, model: swa.Model) -> None:
    best, *others = planted.ranked_layers
    scores = swa.score_layers(model, examples(planted), policy(), base=[best])
    assert scores.delta[best] is None
    for layer in others:
        assert scores.delta[layer] == pytest.approx(planted.deltas[layer], abs=1e-4)
    chosen = swa.select(scores, swa.Budget(full_attention_layers=2))
    assert sorted(chosen.layers) == sorted([best, others[0]])


def test_the_patched_model_answers(planted: Planted, model: swa.Model) -> None:
    """The planted layers alone do what full attention does; without them the answer is a guess."""
    scores = swa.score_layers(model, examples(planted), policy("window"))
    budget = swa.Budget(full_attention_layers=len(planted.n_values))
    hybrid = model.patch(swa.select(scores, budget))
    sliding = model.patch(policy("window"))
    for one in (planted.example(PROMPT_TOKENS, near=2 * WINDOW, seed=s) for s in (11, 12)):
        assert hybrid.nll(one.prompt, one.answer_ids).mean < 1e-3
        assert hybrid.generate(one.prompt).ids[0] == one.answer_ids[0]
        guess = sliding.nll(one.prompt, one.answer_ids).mean
        assert guess == pytest.approx(planted.deltas.sum(), abs=1e-3)


def test_lookups_in_the_tail_need_no_layer(planted: Planted, model: swa.Model) -> None:
    """With the question in a full-attention tail every layer's delta is exactly nothing."""
    tail = swa.AttentionPolicy(sliding_window=WINDOW, num_sink_tokens=SINKS, num_tail_tokens=2)
    scores = swa.score_layers(model, examples(planted), tail)
    assert max(scores.nll_base) < 1e-3
    np.testing.assert_allclose(np.array(scores.delta, float), 0, atol=1e-4)
