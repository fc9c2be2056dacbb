"""Length controls and transfer between domains, on models where the truth is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel
from matplotlib.figure import Figure
from planted import Planted, planted_checkpoint

import swa
from swa.controls import LengthControls, length_controls, shrunk
from swa.errors import ExampleError, InputError
from swa.evaluation import Evaluation
from swa.examples import Example
from swa.transfer import Domain, transfer_matrix

POLICY = swa.AttentionPolicy(sliding_window=64, num_sink_tokens=4)
TOP3 = swa.Budget(full_attention_layers=3)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return planted_checkpoint(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def model(planted: Planted) -> swa.Model:
    return swa.load(planted.folder, dtype="float32", num_threads=1)


def near_the_start(planted: Planted) -> Any:
    """Examples of a length: facts in its first half, or anywhere if it is too short for that."""

    def make(length: int) -> Sequence[Example]:
        made = [planted.example(length, near=min(length // 2, length - 60), seed=s) for s in (0, 1)]
        return [Example(tuple(e.prompt_ids), tuple(e.answer_ids)) for e in made]

    return make


@pytest.fixture(scope="module")
def controls(planted: Planted, model: swa.Model) -> LengthControls:
    return length_controls(
        model,
        POLICY,
        TOP3,
        prompt_tokens=280,
        scales=(0.5,),
        examples=near_the_start(planted),
    )


# ---- lengths


def test_a_window_in_proportion_ranks_as_full_length_does(
    planted: Planted, controls: LengthControls
) -> None:
    """The planted layers are worth the same at any length, if the window hides the facts."""
    (half,) = controls.in_proportion
    assert half.window == 32 and half.prompt_tokens == 140
    assert 0.2 < half.cost < 0.6
    assert half.agreement.overlap == 3
    np.testing.assert_allclose(np.array(half.scores.delta, float), planted.deltas, atol=1e-4)
    assert controls.reference.cost == 1 and controls.reference.agreement.spearman == 1


def test_up_to_window_and_sinks_every_delta_is_exactly_zero(controls: LengthControls) -> None:
    kept, hidden = controls.window_kept
    assert kept.window == hidden.window == 64
    assert kept.prompt_tokens == 140 and kept.largest_delta > 0.1
    assert hidden.prompt_tokens == 68
    assert hidden.largest_delta == 0
    assert hidden.scores.nll_swa == hidden.scores.nll_full
    assert hidden.agreement.spearman is None
    assert repr(controls).count("every delta is exactly 0") == 1


def test_controls_as_json_and_drawn(controls: LengthControls) -> None:
    data = json.loads(json.dumps(controls.to_dict()))
    assert data["in_proportion"][0]["sliding_window"] == 32
    assert data["window_kept"][1]["largest_delta"] == 0
    figure = Figure()
    axes = controls.plot([figure.add_subplot(1, 3, i) for i in (1, 2, 3)])
    assert ["window 32" in axes[0].get_title(), "exactly 0" in axes[2].get_title()] == [True] * 2


@pytest.mark.parametrize("decode", ["full", "window"])
def test_the_default_source_hides_nothing_at_the_end(tiny: Any, decode: Any) -> None:
    model = swa.load(tiny(tokenizer=True, max_position_embeddings=4096), num_threads=1)
    policy = swa.AttentionPolicy(800, num_sink_tokens=2, decode=decode)
    found = length_controls(
        model,
        policy,
        swa.Budget(full_attention_layers=1),
        prompt_tokens=1200,
        scales=(0.8,),
        progress=decode == "full",
    )
    assert found.window_kept[-1].largest_delta == 0 < found.window_kept[0].largest_delta
    assert found.reference.scores.tasks == found.in_proportion[0].scores.tasks


def test_tasks_that_need_more_tokens_leave_the_last_control_out(tiny: Any) -> None:
    model = swa.load(tiny(tokenizer=True, max_position_embeddings=4096), num_threads=1)
    one = swa.Budget(full_attention_layers=1)
    found = length_controls(model, POLICY, one, prompt_tokens=800, scales=(0.7,))
    assert len(found.window_kept) == 1 and found.window_kept[0].largest_delta > 0


def test_every_window_shrinks() -> None:
    assert shrunk(POLICY, 0.5).sliding_window == 32
    both = swa.AttentionPolicy((1, 7))
    assert shrunk(both, 0.5).sliding_window == (1, 4)


@pytest.mark.parametrize("scales", [(), (0.5, 1.0), (0.0,), (-0.5,)])
def test_scales_out_of_range(model: swa.Model, scales: Any) -> None:
    with pytest.raises(InputError, match="scales must be"):
        length_controls(model, POLICY, TOP3, scales=scales)


# ---- domains


class Worlds(FakeModel):
    """Task "a" needs layer 1, task "b" layer 3, both a little of layer 0; nothing else matters."""

    def per_token(self, example: Any, full_layers: Any) -> Any:
        worth = {"a": (0.3, 2.0, 0, 0, 0), "b": (0.3, 0, 0, 2.0, 0)}[example.task]
        level = 3.0 + (sum(example.prompt_ids) % 7) / 10
        gain = sum(worth[layer] for layer in full_layers)
        return np.full(example.answer_len, level - gain)


def domain(task: str, start: int, count: int = 6) -> list[Example]:
    return [Example(tuple(range(i, i + 40)), (1, 2), task) for i in range(start, start + count)]


@pytest.fixture
def worlds(monkeypatch: pytest.MonkeyPatch) -> Worlds:
    model = Worlds()

    def evaluate(model: Any, examples: Any, *, policy: Any, progress: bool = False) -> Evaluation:
        full = policy.full_attention_layers
        return Evaluation(
            nll_per_example=tuple(model.nll_example(e, full_layers=full).mean for e in examples),
            greedy_match_per_example=(False,) * len(examples),
            tasks=tuple(e.task for e in examples),
            policy=policy,
            model_name="fake",
            model_fingerprint="f",
            dtype="bfloat16",
            examples_hash="e",
        )

    monkeypatch.setattr("swa.transfer.evaluate", evaluate)
    return model


def test_each_domain_chooses_its_own_layer(worlds: Worlds) -> None:
    domains = {name: Domain(domain(name, 0), domain(name, 50)) for name in ("a", "b")}
    one = swa.Budget(full_attention_layers=1)
    found = transfer_matrix(worlds, domains, swa.AttentionPolicy(8), one)
    assert found.rows == ("a", "b", "all")
    assert found.layers["a"] == (1,) and found.layers["b"] == (3,)
    assert len(worlds.sweeps) == 12  # once an example, for its own domain and for all
    share = {row: {c: found.closed[row][c].share for c in "ab"} for row in found.rows}
    assert share["a"]["a"] == pytest.approx(2 / 2.3) == share["b"]["b"]
    assert share["a"]["b"] == pytest.approx(0) == share["b"]["a"]
    assert found.nll_sliding["a"] - found.nll_full["a"] == pytest.approx(2.3)
    low, high = found.closed["a"]["a"].interval or (0, 0)
    assert low == pytest.approx(2 / 2.3) == high  # every example closes the same share
    assert "87% (87% to 87%)" in repr(found) and "layers 3" in repr(found)
    both = transfer_matrix(worlds, domains, swa.AttentionPolicy(8), swa.Budget(fraction=0.4))
    assert both.layers["all"] == (1, 3) and both.layers["a"] == (0, 1)


def test_a_matrix_as_json_and_drawn(worlds: Worlds) -> None:
    domains = {"a": Domain(domain("a", 0), domain("a", 50))}
    one = swa.Budget(full_attention_layers=1)
    found = transfer_matrix(worlds, domains, swa.AttentionPolicy(8), one)
    assert found.rows == ("a",)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["gap_closed"]["a"]["a"]["share"] == found.closed["a"]["a"].share
    axes = found.plot(Figure().add_subplot())
    assert [text.get_text().split("\n")[0] for text in axes.texts] == ["87%"]


def test_a_choice_of_ones_own(worlds: Worlds) -> None:
    domains = {name: Domain(domain(name, 0), domain(name, 50)) for name in ("a", "b")}
    seen: list[int] = []

    def choose(examples: Sequence[Example]) -> Sequence[int]:
        seen.append(len(examples))
        return [4, 2]

    found = transfer_matrix(worlds, domains, swa.AttentionPolicy(8), TOP3, choose=choose)
    assert seen == [6, 6, 12] and worlds.sweeps == []
    assert found.layers["all"] == (2, 4) and found.closed["a"]["b"].share == pytest.approx(0)


def test_examples_given_again_count_again(worlds: Worlds) -> None:
    mixed = [*domain("a", 0, 1), *domain("b", 0, 3)]
    one = swa.Budget(full_attention_layers=1)
    for pool, expected in ((mixed, (3,)), (mixed[:1] * 9 + mixed[1:], (1,))):
        domains = {"mixed": Domain(pool, domain("a", 50))}
        assert transfer_matrix(worlds, domains, swa.AttentionPolicy(8), one).layers == {
            "mixed": expected
        }
        scores = swa.score_layers(worlds, pool, swa.AttentionPolicy(8))
        assert swa.select(scores, one).layers == expected


def test_what_is_wrong_is_found_before_anything_is_run(worlds: Worlds) -> None:
    good, short = Domain(domain("a", 0), domain("a", 50)), [Example((1, 2, 3), (1,), "a")]
    for domains, settings, message in (
        ({"a": good, "b": Domain(short, good.heldout)}, {}, "domain 'b' carries a signal"),
        ({"a": good, "b": Domain(good.calibration, [])}, {}, "'b' has no held-out examples"),
        ({"a": good}, {"seed": -1}, "seed must be"),
        ({"a": Domain(good.calibration, good.calibration[:2])}, {}, "2 held-out examples .* 'a'"),
        ({"a": good, "b": Domain(good.heldout, domain("b", 80))}, {}, "6 held-out examples .* 'a'"),
        ({"a": good}, {"choose": lambda examples: range(4)}, "4 layers were chosen on 'a'"),
    ):
        with pytest.raises((ExampleError, InputError), match=message):
            transfer_matrix(worlds, domains, swa.AttentionPolicy(8), TOP3, **settings)
    assert worlds.sweeps == []


def test_domains_that_cannot_be_told_apart_are_refused(worlds: Worlds) -> None:
    for domains in ({}, {"all": Domain(domain("a", 0), domain("a", 50))}):
        with pytest.raises(InputError, match="at least one domain"):
            transfer_matrix(worlds, domains, swa.AttentionPolicy(8), TOP3)
