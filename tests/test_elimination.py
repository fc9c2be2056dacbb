"""The rule that ends a sweep early: how often it errs, what it promises, and sweeps under it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, make_examples
from planted import planted_checkpoint

import swa
from swa.elimination import Adaptive, AdaptiveStop, Elimination, Settled, shuffled_units
from swa.errors import InputError, ScoresError
from swa.layer_scores import LayerScores
from swa.noise import measure_noise_floor
from swa.policy import AttentionPolicy
from swa.reporting import render, score_command
from swa.score import score_layers
from swa.selection import Budget, select
from swa.stability import reliability, selection_stability

POLICY = AttentionPolicy(sliding_window=8)
TOP2 = Budget(full_attention_layers=2)

# ---- the rule, by simulation

Draw = Callable[[np.random.Generator, int], Any]  # centred noise of standard deviation 1
NOISES: dict[str, Draw] = {
    "normal": lambda rng, n: rng.normal(0, 1, n),
    "skewed": lambda rng, n: rng.exponential(1, n) - 1,
    "skewed apart": lambda rng, n: (rng.exponential(1, n) - 1) * np.resize([1, -1], n),
    "heavy-tailed": lambda rng, n: rng.standard_t(3, n) / 3**0.5,
    "one in four": lambda rng, n: (np.where(rng.random(n) < 0.25, 3, -1)) / 3**0.5,
}


def run(
    means: Any, size: int, draw: Draw, seed: int, *, looks: int = 40, **options: Any
) -> tuple[Elimination, dict[int, str], int]:
    """Feed the rule; returns it, its verdicts, and the number of units."""
    settings = {"confidence": 0.95, "tolerance": 0.0} | options
    rule = Elimination(range(len(means)), size, **settings)
    rng, verdicts, units = np.random.default_rng(seed), dict[int, str](), 0
    while not rule.is_decided and units < looks:
        units += 1
        deltas = means + draw(rng, len(means))
        verdicts |= rule.observe({layer: deltas[layer] for layer in rule.open})
    return rule, verdicts, units


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(
    ("means", "size"),
    [
        ([0.02, 0.01, 0.0], 1),  # nearly tied: any verdict is likely to be wrong
        ([1.5, 0.01, 0.0, -1.0], 2),
        ([2.0, 1.5, 1.0, 0.5, 0.48, 0.0, 0.0, 0.0], 4),
    ],
)
def test_wrong_verdicts_are_rarer_than_promised(noise: str, means: Any, size: int) -> None:
    """At 80% confidence one run in five may err; a rule without the correction errs in more."""
    runs, wrong = 60, 0
    for seed in range(runs):
        _, verdicts, _ = run(np.array(means), size, NOISES[noise], seed, confidence=0.8)
        wrong += any((layer < size) != (v == "in") for layer, v in verdicts.items())
    assert wrong / runs <= 0.2


def test_looking_after_every_unit_costs_nothing() -> None:
    """Two layers without any difference, looked at 100 times: a t-test a look would err in half of
    the runs, the martingale in one of ten at most."""
    runs, ours, naive = 100, 0, 0
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        x = rng.normal(0, 1, 100)
        rule = Elimination([0, 1], 1, 0.9, 0.0)
        settled = [bool(rule.observe({0: value, 1: 0.0})) for value in x if rule.open]
        ours += any(settled)
        n = np.arange(2, 101)
        mean = np.cumsum(x)[1:] / n
        spread = np.sqrt((np.cumsum(x**2)[1:] - n * mean**2) / (n - 1))
        naive += bool((np.abs(mean) * np.sqrt(n) / spread > 1.7).any())
    assert ours / runs <= 0.1
    assert naive / runs > 0.4


def test_clear_layers_are_settled_early_and_close_ones_late() -> None:
    means = np.array([4.0, 3.0, 0.3, 0.0, -3.0, -4.0])
    rule, verdicts, units = run(means, 3, NOISES["normal"], 0, looks=400)
    assert rule.is_decided and set(verdicts) >= {0, 1, 4, 5}
    first = run(means, 3, NOISES["normal"], 0, looks=15)[1]
    assert {0, 1} <= {layer for layer, verdict in first.items() if verdict == "in"}
    assert {4, 5} <= {layer for layer, verdict in first.items() if verdict == "out"}
    assert 15 < units < 400


def test_a_tolerance_ends_what_is_not_worth_telling_apart() -> None:
    means = np.array([2.0, 0.05, 0.0, -2.0])
    exact = [run(means, 2, NOISES["normal"], seed)[0].is_decided for seed in range(20)]
    assert sum(exact) <= 2
    tolerant = [run(means, 2, NOISES["normal"], seed, tolerance=1.5) for seed in range(20)]
    assert all(rule.is_decided for rule, _, _ in tolerant)


def test_what_is_not_decided_is_within_the_tolerance_as_often_as_promised() -> None:
    """Layer 2 is better than layer 1 by more than the tolerance, though not by much."""
    wrong = 0
    for seed in range(100):
        rule, verdicts, _ = run(
            np.array([3.0, 0.0, 0.6]), 2, NOISES["normal"], seed, tolerance=0.5, confidence=0.8
        )
        chosen = {layer for layer, verdict in verdicts.items() if verdict == "in"}
        chosen |= set(rule.leading())
        wrong += rule.is_decided and 1 in chosen
    assert wrong <= 20


def test_equal_layers_are_never_told_apart() -> None:
    rule, verdicts, _ = run(np.zeros(4), 2, lambda rng, n: np.zeros(n), 0, looks=60)
    assert not rule.is_decided and verdicts == {}


def test_differences_without_spread_still_take_several_units() -> None:
    rule, _, units = run(np.array([1.0, 0.5, 0.0]), 1, lambda rng, n: np.zeros(n), 0)
    assert rule.is_decided and units >= 4


@pytest.mark.parametrize("size", [0, 3, -1])
def test_nothing_to_choose_is_refused(size: int) -> None:
    with pytest.raises(InputError, match="nothing to find out"):
        Elimination([1, 2, 3], size, 0.95, 0.0)


@pytest.mark.parametrize(
    "options", [{"confidence": 1.0}, {"confidence": 95}, {"tolerance": -1}, {"tolerance": np.nan}]
)
def test_a_stop_out_of_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        AdaptiveStop(TOP2, **options)


# ---- the order of examples


def test_rounds_have_one_example_of_each_task() -> None:
    tasks = ["a"] * 4 + ["b"] * 4
    units = shuffled_units(tasks, 0)
    assert [sorted(tasks[i] for i in unit) for unit in units] == [["a", "b"]] * 4
    assert sorted(i for unit in units for i in unit) == list(range(8))
    assert units == shuffled_units(tasks, 0) != shuffled_units(tasks, 1)


def test_tasks_of_other_sizes_are_shuffled_as_they_come() -> None:
    units = shuffled_units(["a"] * 30 + ["b"] * 10, 0)
    assert sorted(units) == [(i,) for i in range(40)]
    early = sum(index >= 30 for (index,) in units[:20])
    assert 2 <= early <= 8


# ---- sweeps


class Spread(FakeModel):
    """Layers 3 and 1 are worth 0.5 and 0.4, the others nothing, give or take 0.05."""

    worth = (0.0, 0.4, 0.0, 0.5, 0.0)

    def per_token(self, example: Any, full_layers: Any) -> Any:
        rng = np.random.RandomState(sum(example.prompt_ids))
        gains = np.array(self.worth) + rng.normal(0, 0.05, 5)
        return np.full(example.answer_len, 5.0 - sum(gains[layer] for layer in full_layers))


def adaptive(model: Any = None, count: int = 60, **arguments: Any) -> LayerScores:
    stop = arguments.pop("stop", AdaptiveStop(TOP2))
    return score_layers(model or Spread(), make_examples(count), POLICY, stop=stop, **arguments)


def test_a_sweep_ends_when_the_selection_is_known() -> None:
    model = Spread()
    scores = adaptive(model)
    whole = score_layers(Spread(), make_examples(60), POLICY)
    found = scores.adaptive
    assert found is not None and found.is_decided
    assert select(scores, TOP2).layers == select(whole, TOP2).layers == (1, 3)
    assert len(model.sweeps) == len(scores.tasks) == len(found.examples) < 30
    assert found.n_offered == 60 and 0.5 < found.saved < 1
    for row, index in zip(scores.delta_per_example, found.examples, strict=True):
        exact = whole.delta_per_example[index]
        assert all(value in (None, exact[layer]) for layer, value in enumerate(row))
    assert "were enough to know the top 2 layers at 95%" in repr(scores)


def test_settled_layers_are_not_run_again() -> None:
    """The two best are close: the others are dropped long before."""

    class Close(Spread):
        worth = (0.4, 0.41, 0.0, 0.0, 0.0)

    model, flips = Close(), []
    original = model.sweep_example

    def counting(
        example: Any, policy: Any, base: Any, flipped: Any, *rest: Any, **more: Any
    ) -> Any:
        flips.append(len(flipped))
        return original(example, policy, base, flipped, *rest, **more)

    model.sweep_example = counting  # type: ignore[method-assign]
    stop = AdaptiveStop(Budget(full_attention_layers=1))
    scores = adaptive(model, stop=stop)
    found = scores.adaptive
    assert found is not None
    assert flips[0] == 5 and flips[-1] == 2 and sorted(flips, reverse=True) == flips
    assert found.layers("out") == (2, 3, 4)
    counts = [sum(row[i] is not None for row in scores.delta_per_example) for i in range(5)]
    assert counts == [len(flips), len(flips), *(each.n_examples for each in found.settled[:3])]
    assert scores.interval[2] is not None and np.isnan(scores.table).any()
    assert set(scores.ranking[:2]) == {0, 1}


def test_the_ranking_follows_what_was_settled() -> None:
    """A layer that is in stays ahead of one whose later mean is higher."""
    scores = adaptive()
    assert scores.adaptive is not None
    settled = (Settled(0, "in", 2), Settled(3, "out", 2))
    rows = tuple(
        tuple(None if i in (0, 3) and n >= 2 else v for i, v in enumerate(row))
        for n, row in enumerate(score_layers(Spread(), make_examples(4), POLICY).delta_per_example)
    )
    changed = dataclasses.replace(
        scores,
        tasks=("one",) * 4,
        delta_per_example=rows,
        **dict.fromkeys(("nll_base", "nll_full", "nll_swa"), (1.0,) * 4),
        adaptive=dataclasses.replace(scores.adaptive, settled=settled, examples=(0, 1, 2, 3)),
    )
    assert changed.ranking[0] == 0 and changed.ranking[-1] == 3
    assert select(changed, TOP2).layers == (0, 1)
    stability = selection_stability(changed, TOP2)
    assert stability.frequency[0] == 1 and stability.frequency[3] == 0
    with pytest.raises(InputError, match="until the top 2 layers were known"):
        selection_stability(changed, Budget(full_attention_layers=1))
    assert reliability(changed) is None
    for shown in (render(changed, select(changed, TOP2)), render(changed, TOP1(changed))):
        assert "settled before this example" in shown
    assert LayerScores.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed


def TOP1(scores: LayerScores) -> Any:
    return select(scores, Budget(full_attention_layers=1))


def test_examples_that_are_not_enough_are_said() -> None:
    scores = adaptive(count=6)
    assert scores.adaptive is not None and not scores.adaptive.is_decided
    assert "6 of 6 examples were not enough" in repr(scores)
    assert len(scores.tasks) == 6


def test_a_base_counts_and_ablation_works() -> None:
    scores = adaptive(base=[4], stop=AdaptiveStop(Budget(full_attention_layers=3)))
    assert scores.adaptive is not None and scores.adaptive.is_decided
    assert select(scores, Budget(full_attention_layers=3)).layers == (1, 3, 4)
    ablated = adaptive(direction="ablate")
    assert ablated.adaptive is not None and ablated.adaptive.is_decided
    assert select(ablated, TOP2).layers == (1, 3)
    with pytest.raises(InputError, match="choosing 0 of 4 layers leaves nothing"):
        adaptive(base=[4], stop=AdaptiveStop(Budget(full_attention_layers=1)))


def test_a_run_cut_anywhere_resumes_to_the_identical_file(tmp_path: Path) -> None:
    straight = adaptive(journal=tmp_path / "whole")
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    for kept in range(0, len(lines), 3):
        (tmp_path / "cut").write_bytes(b"".join(lines[: 1 + kept]))
        model = Spread()
        resumed = adaptive(model, journal=tmp_path / "cut")
        assert len(model.sweeps) == len(lines) - 1 - kept
        assert resumed.to_dict() == straight.to_dict()


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"stop": AdaptiveStop(TOP2, 0.9)}, {"stop": AdaptiveStop(TOP2, tolerance=0.1)}],
)
def test_another_rule_or_order_does_not_resume(tmp_path: Path, change: dict[str, Any]) -> None:
    adaptive(journal=tmp_path / "j")
    with pytest.raises(ScoresError, match="stop was"):
        adaptive(journal=tmp_path / "j", **change)


def test_a_record_of_other_layers_is_refused(tmp_path: Path) -> None:
    adaptive(journal=tmp_path / "j")
    lines = (tmp_path / "j").read_text().splitlines()
    record = json.loads(lines[1])
    record["delta"][0] = None
    (tmp_path / "j").write_text("\n".join([lines[0], json.dumps(record)]) + "\n")
    with pytest.raises(ScoresError, match=r"not of \[0-4\]: delete this file"):
        adaptive(journal=tmp_path / "j")


def test_the_bar_ends_full_when_less_was_needed(capsys: pytest.CaptureFixture[str]) -> None:
    adaptive(progress=True)
    assert "100%" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settled": (Settled(9, "in", 3),)}, "must be scored layers"),
        ({"settled": (Settled(1, "in", 3), Settled(1, "in", 3))}, "must be scored layers"),
        ({"settled": (Settled(1, "in", 99),)}, "must be after"),
        ({"settled": ()}, "with numbers in the layers"),
        ({"examples": (0, 0)}, "different ones of those offered"),
        ({"flops": 0.0}, "flops must be"),
        ({"flops_offered": 0.5}, "flops must be"),
        ({"confidence": 1.5}, "confidence must be"),
    ],
)
def test_records_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    class Close(Spread):
        worth = (0.4, 0.41, 0.0, 0.0, 0.0)

    scores = adaptive(Close(), stop=AdaptiveStop(Budget(full_attention_layers=1)))
    assert scores.adaptive is not None
    changed = dataclasses.replace(scores.adaptive, **change)
    with pytest.raises(ScoresError, match=message):
        dataclasses.replace(scores, adaptive=changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adaptive": {}}, "adaptive: not an object with the keys"),
        ({"adaptive": 3}, "adaptive: not an object"),
        ({"is_decided": 1}, "adaptive: 1 is not true or false"),
        ({"settled": [{"layer": 1, "verdict": "up", "n_examples": 3}]}, 'is not "in" or "out"'),
        ({"flops": 10**400}, "flops must be"),
    ],
)
def test_edited_records_are_refused(change: dict[str, Any], message: str) -> None:
    data = adaptive().to_dict()
    if "adaptive" in change:
        data |= change
    else:
        data["adaptive"] |= change
    with pytest.raises(ScoresError, match=message):
        LayerScores.from_dict(data)


def test_the_command_and_the_floor_know_the_rule() -> None:
    examples = make_examples(60)
    scores = adaptive(stop=AdaptiveStop(TOP2, tolerance=0.01))
    command = score_command(scores)
    assert "--stop-at-confidence 0.95 --layers 2 --tolerance 0.01" in command
    reference = Spread()
    reference.dtype = "float32"
    assert measure_noise_floor(scores, examples, reference, n_examples=3) == 0
    assert scores.adaptive is not None
    order = scores.adaptive.examples
    assert reference.sweeps == [examples[order[i * len(order) // 3]] for i in range(3)]


def test_planted_layers_are_found_with_few_examples(tmp_path: Path) -> None:
    planted = planted_checkpoint(tmp_path)
    model = swa.load(planted.folder, dtype="float32", num_threads=1)
    made = [planted.example(150, near=64, seed=seed) for seed in range(12)]
    examples = [swa.Example(tuple(e.prompt_ids), tuple(e.answer_ids)) for e in made]
    policy = swa.AttentionPolicy(sliding_window=32, num_sink_tokens=4)
    scores = swa.score_layers(
        model, examples, policy, stop=swa.AdaptiveStop(Budget(full_attention_layers=3))
    )
    assert isinstance(scores.adaptive, Adaptive) and scores.adaptive.is_decided
    assert select(scores, Budget(full_attention_layers=3)).layers == (2, 5, 7)
    assert len(scores.tasks) < 12
    np.testing.assert_allclose(np.array(scores.delta, float), planted.deltas, atol=1e-4)
