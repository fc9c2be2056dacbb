"""First-order scores over examples: by layer, by KV head, on disk and drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from builders import tiny_checkpoint

import swa
from swa.errors import InputError, PolicyError
from swa.gates import divergence, gate_gradient, reference_logits

POLICY = swa.AttentionPolicy(9, num_sink_tokens=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> swa.Model:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("gates") / "model", "qwen3")
    return swa.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def examples(model: swa.Model) -> list[swa.Example]:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.config.vocab_size, (3, 50)).tolist()
    return [
        swa.Example(tuple(row[:45]), tuple(row[45:]), f"task {i % 2}") for i, row in enumerate(ids)
    ]


def test_means_of_the_gradients(model: swa.Model, examples: list[swa.Example]) -> None:
    scores = swa.score_gates(model, examples, POLICY)
    zero = np.zeros(model.config.num_hidden_layers)
    found = [gate_gradient(model, example, POLICY, zero) for example in examples]
    assert np.array_equal(scores.per_kv_head_per_example, [-each.per_kv_head for each in found])
    assert np.allclose(scores.per_layer, -np.mean([each.gradient for each in found], axis=0))
    assert scores.loss_per_example.tolist() == [each.loss for each in found]
    assert scores.ranking[0] == int(scores.per_layer.argmax())
    assert scores.tasks == ("task 0", "task 1", "task 0")


def test_forecasts_the_sweep(model: swa.Model, examples: list[swa.Example]) -> None:
    """A small step along one gate changes the loss as the score says."""
    scores = swa.score_gates(model, examples, POLICY)
    layer, step = scores.ranking[0], 1e-2
    moved = np.zeros(model.config.num_hidden_layers)
    moved[layer] = step
    after = swa.score_gates(model, examples, POLICY, alpha=moved)
    change = (scores.loss_per_example - after.loss_per_example).mean()
    assert change / step == pytest.approx(scores.per_layer[layer], rel=0.05)


def test_divergence_from_the_full_model(model: swa.Model, examples: list[swa.Example]) -> None:
    example, everything = examples[0], range(model.config.num_hidden_layers)
    reference = reference_logits(model, example)
    assert reference.shape == (example.answer_len, model.config.vocab_size)
    assert not divergence(model, example, POLICY, everything, reference).any()
    assert (divergence(model, example, POLICY, (), reference) > 0).all()
    for layers in ((), (1, 2), everything):
        alpha = np.isin(everything, list(layers)).astype(float)
        found = gate_gradient(model, example, POLICY, alpha, objective="kl")
        own = divergence(model, example, POLICY, layers, reference)
        assert found.loss == own.mean()
    assert not found.gradient.any()  # at the minimum
    ones = np.ones(len(everything))
    with pytest.raises(InputError, match="no gradient at full attention"):
        swa.score_gates(model, examples, POLICY, alpha=ones, objective="kl")
    assert swa.score_gates(model, examples, POLICY, alpha=ones).per_layer.any()
    patched = model.patch(POLICY.with_full_layers([1], len(everything)))
    assert np.array_equal(reference_logits(patched, example), reference)


def test_on_disk_and_drawn(model: swa.Model, examples: list[swa.Example], tmp_path: Path) -> None:
    scores = swa.score_gates(model, examples, POLICY)
    scores.save(tmp_path / "gates.json")
    data = json.loads((tmp_path / "gates.json").read_text())
    assert data["per_layer"] == scores.per_layer.tolist()
    assert data["schema"] == "swa.gate-scores/1"
    image = scores.plot().get_images()[0]
    assert np.array_equal(image.get_array(), scores.per_kv_head.T)
    assert repr(scores).splitlines()[4].split()[0] == str(scores.ranking[0])


def test_bad_input(model: swa.Model, examples: list[swa.Example]) -> None:
    n_layers = model.config.num_hidden_layers
    for alpha in (np.zeros(n_layers + 1), np.full(n_layers, 1.5), np.full(n_layers, np.nan)):
        with pytest.raises(InputError, match="alpha must be"):
            swa.score_gates(model, examples, POLICY, alpha=alpha)
    with pytest.raises(PolicyError, match="layer_types is set"):
        gate_gradient(model, examples[0], POLICY.with_full_layers([1], n_layers), [0.0] * n_layers)
    with pytest.raises(InputError, match="objective must be"):
        gate_gradient(model, examples[0], POLICY, np.zeros(n_layers), objective="mse")  # type: ignore[arg-type]


def test_layers_of_the_checkpoint_stay(tmp_path: Path) -> None:
    """A layer that the checkpoint made sliding has no gate."""
    own = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    model = swa.load(tiny_checkpoint(tmp_path / "model", "qwen2", overrides=own), dtype="float32")
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, 40).tolist()
    example = swa.Example(tuple(ids[:36]), tuple(ids[36:]))
    fixed = sorted({*range(model.config.num_hidden_layers)} - {*model.selectable_layers})
    assert fixed
    scores = swa.score_gates(model, [example], POLICY)
    assert (
        not scores.per_layer[fixed].any() and scores.per_layer[list(model.selectable_layers)].all()
    )
    alpha = np.ones(model.config.num_hidden_layers)
    with pytest.raises(InputError, match="cannot be selected"):
        gate_gradient(model, example, POLICY, alpha)
