"""The reference of the gate gradients, on its own: against exact NLLs and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import nll, open_engine
from gate_cases import CASES, MODELS, PEAKED, SIZES, L, taken, weights
from gate_reference import GatedDecoder
from oracle import Decoder
from reference import Choices

models = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def folder(tiny: Callable[..., Path], name: str) -> Path:
    family, settings = MODELS[name]
    return tiny(family, **SIZES | PEAKED | settings)


@models
@pytest.mark.parametrize("pick", [(0, 0, 0), (0, 2, 1), (2, 1, 2)])
def test_one_choice_a_layer_is_a_policy(folder: Path, pick: tuple[int, ...]) -> None:
    """Against the NumPy oracle, and against the engine."""
    prompt_len, _, choices = case = CASES["three choices"]
    gated = GatedDecoder(folder).gates(case.ids, prompt_len, choices, taken(choices, pick))
    rows = choices.taken(pick)
    exact, greedy = Decoder(folder).nll(case.ids, prompt_len, rows)
    np.testing.assert_allclose(gated.nll, exact, rtol=1e-9)
    assert np.array_equal(gated.greedy, greedy)
    np.testing.assert_allclose(
        nll(open_engine(folder), case.ids, prompt_len, rows)[0], gated.nll, atol=1e-4
    )


@models
@pytest.mark.parametrize(
    "case_name, alpha, divergence",
    [("three choices", 0.3, False), ("three choices", 0.0, True), ("one answer token", None, True)],
)
def test_finite_differences(
    folder: Path, case_name: str, alpha: float | None, divergence: bool
) -> None:
    """Weight moves from choice 0 to the others, in every layer and KV head at once."""
    prompt_len, answer_len, choices = case = CASES[case_name]
    decoder = GatedDecoder(folder)
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((answer_len, decoder.config["vocab_size"]))
    reference = logits if divergence else None
    groups = decoder.config["num_key_value_heads"]
    at = np.repeat(weights(choices, alpha)[..., None], groups, axis=2)
    direction = rng.standard_normal(at.shape)
    direction[:, 0] = -direction[:, 1:].sum(axis=1)

    def loss(step: float) -> float:
        return decoder.gates(case.ids, prompt_len, choices, at + step * direction, reference).loss

    gradient = decoder.gates(case.ids, prompt_len, choices, at, reference).gradient
    step = 1e-4
    central = (8 * (loss(step) - loss(-step)) - loss(2 * step) + loss(-2 * step)) / (12 * step)
    assert abs(central) > 0.01
    assert (gradient * direction).sum() == pytest.approx(central, rel=1e-7)


@pytest.mark.parametrize("name", ["qwen3"])
class TestGradient:
    def test_layers_are_told_apart(self, folder: Path) -> None:
        """Where only one layer has a choice, the others' gradient is exactly zero."""
        prompt_len, _, choices = case = CASES["a tile and one row"]
        at = weights(choices, 0.3)
        whole = GatedDecoder(folder).gates(case.ids, prompt_len, choices, at).gradient
        assert not whole[:, 0].any()
        for layer in range(L):
            windows = [w if i == layer else (w[0], w[0]) for i, w in enumerate(choices.window)]
            alone = choices._replace(window=tuple(windows))
            gradient = GatedDecoder(folder).gates(case.ids, prompt_len, alone, at).gradient
            assert not np.delete(gradient, layer, axis=0).any()
            assert gradient[layer, 1].all()

    def test_rows_that_see_the_same_keys(self, folder: Path) -> None:
        """They contribute nothing: with 3 sinks and 128 rows read, a window of 125 misses none."""
        prompt_len, _, choices = case = CASES["a tile and one row"]

        def gradient(window: int, full_from: int) -> np.ndarray:
            same = Choices(((window, 0),) * L, choices.sinks, (full_from,) * L)
            at = weights(choices, 0.3)
            return GatedDecoder(folder).gates(case.ids, prompt_len, same, at).gradient

        assert not gradient(125, case.n_tokens).any()
        assert not gradient(30, 0).any()
        assert gradient(124, case.n_tokens)[:, 1].all()
        assert not gradient(124, 127).any()

    def test_divergence_from_itself(self, folder: Path) -> None:
        prompt_len, _, choices = case = CASES["a tile and one row"]
        decoder, at = GatedDecoder(folder), weights(choices, None)
        none = torch.zeros(L, 2, decoder.config["num_key_value_heads"], dtype=torch.float64)
        shares = torch.tensor(at)[..., None]
        own = decoder.logits(case.ids, choices, shares, none)[prompt_len - 1 : -1].numpy()
        gated = decoder.gates(case.ids, prompt_len, choices, at, own)
        assert abs(gated.nll).max() < 1e-12 and abs(gated.gradient).max() < 1e-12
        other = decoder.gates(case.ids, prompt_len, choices, weights(choices, 0.0), own)
        assert (other.nll > 0.001).all() and abs(other.gradient).max() > 0.001
