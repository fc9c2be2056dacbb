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
from swa.budget import Budget
from swa.elimination import (
    Adaptive,
    AdaptiveStop,
    Elimination,
    Settled,
    StoppingRule,
    looks_of,
    shortfall,
    shuffled_units,
)
from swa.errors import InputError, ScoresError
from swa.layer_scores import LayerScores
from swa.noise import measure_noise_floor
from swa.policy import AttentionPolicy
from swa.problem import ScoresProblem
from swa.reporting import render, score_command
from swa.score import score_layers
from swa.selection import select
from swa.stability import reliability, selection_stability
from swa.strategies import STRATEGIES

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
    means: Any, size: int, draw: Draw, seed: int, *, units: int = 40, error: float = 0.2
) -> dict[int, str]:
    """The verdicts of the elimination alone, on one task."""
    rule, rng = Elimination(range(len(means)), size, error), np.random.default_rng(seed)
    verdicts = dict[int, str]()
    while 0 < rule.slots < len(rule.open) and units:
        units -= 1
        deltas = means + draw(rng, len(means))
        verdicts |= rule.observe(deltas[None, list(rule.open)])
    return verdicts


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
    """One run in five may err."""
    runs, wrong = 60, 0
    for seed in range(runs):
        verdicts = run(np.array(means), size, NOISES[noise], seed)
        wrong += any((layer < size) != (v == "in") for layer, v in verdicts.items())
    assert wrong / runs <= 0.2


@pytest.mark.parametrize("spreads", [(1, 1, 1), (1, 1, 4), (0.1, 0.1, 10)])
def test_tasks_that_vary_unequally_do_no_harm(spreads: Any) -> None:
    """Layers that are tied over all tasks together, though not in each: one run in five may err."""
    runs, wrong = 60, 0
    for seed in range(runs):
        rng, rule = np.random.default_rng(seed), Elimination([0, 1, 2], 1, 0.2)
        offsets = rng.normal(0, 1, (3, 3))
        offsets += np.array([0.01, 0, 0]) - offsets.mean(axis=0)
        for _ in range(25):
            noise = rng.normal(0, 1, (3, 3)) * np.array(spreads)[:, None]
            verdicts = rule.observe((offsets + noise)[:, list(rule.open)])
            wrong += any((layer == 0) != (v == "in") for layer, v in verdicts.items())
            if verdicts:
                break
    assert wrong / runs <= 0.2


def test_looking_after_every_unit_costs_nothing() -> None:
    """Two layers without any difference, looked at 100 times: a t-test a look would err in half of
    the runs, the martingale in one of ten at most."""
    runs, ours, naive = 100, 0, 0
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        x = rng.normal(0, 1, 100)
        rule = Elimination([0, 1], 1, 0.1)
        ours += any(bool(rule.observe(np.array([[value, 0.0]]))) for value in x)
        n = np.arange(2, 101)
        mean = np.cumsum(x)[1:] / n
        spread = np.sqrt((np.cumsum(x**2)[1:] - n * mean**2) / (n - 1))
        naive += bool((np.abs(mean) * np.sqrt(n) / spread > 1.7).any())
    assert ours / runs <= 0.1
    assert naive / runs > 0.4


def test_clear_layers_are_settled_early_and_close_ones_late() -> None:
    means = np.array([4.0, 3.0, 0.3, 0.0, -3.0, -4.0])
    early = run(means, 3, NOISES["normal"], 0, units=15, error=0.05)
    assert early == {0: "in", 1: "in", 4: "out", 5: "out"}
    late = run(means, 3, NOISES["normal"], 0, units=400, error=0.05)
    assert late == early | {2: "in", 3: "out"}


def test_rounds_of_tasks_need_fewer_than_one_by_one() -> None:
    """What differs between tasks is no noise: 6 rounds of 3 settle what 18 examples do not."""
    offsets = np.array([[2.0, 0, 0], [7, 0, -5], [-3, 0, 5]])
    rounds, singles = Elimination([0, 1, 2], 1, 0.05), Elimination([0, 1, 2], 1, 0.05)
    rng = np.random.default_rng(0)
    for _ in range(6):
        unit = offsets + rng.normal(0, 0.5, (3, 3))
        if rounds.slots:
            rounds.observe(unit[:, list(rounds.open)])
        for row in unit:
            singles.observe(row[None, list(singles.open)])
    assert rounds.slots == 0 and singles.open == (0, 1, 2)


def test_equal_layers_are_never_told_apart() -> None:
    assert run(np.zeros(4), 2, lambda rng, n: np.zeros(n), 0, units=60) == {}


def test_differences_without_spread_still_take_several_units() -> None:
    still: Draw = lambda rng, n: np.zeros(n)  # noqa: E731
    means = np.array([1.0, 0.5, 0.0])
    assert run(means, 1, still, 0, units=4, error=0.05) == {}
    assert run(means, 1, still, 0, units=9, error=0.05)[0] == "in"


def fed(
    means: Any, draw: Draw, seed: int, *, n_tasks: int = 1, units: int = 24, **stop: Any
) -> tuple[Adaptive, set[int]]:
    """Both rules at work on made-up deltas; how it went, and the top two layers in the end."""
    tasks = [str(i % n_tasks) for i in range(n_tasks * units)]
    rule = StoppingRule(AdaptiveStop(TOP2, **stop), range(len(means)), 2, 0, tasks, seed)
    rng, table = np.random.default_rng(seed), []
    for unit in rule.units:
        deltas = {index: [*(means + draw(rng, len(means)))] for index in unit}
        for row in deltas.values():
            table.append([v if i in rule.open_layers else np.nan for i, v in enumerate(row)])
        rule.observe(deltas, 1.0)
        if rule.is_decided:
            break
    record = rule.record(float(units))
    means_seen = np.nanmean(np.array(table), axis=0)
    means_seen[list(record.layers("in"))] += 100
    means_seen[list(record.layers("out"))] -= 100
    return record, set(np.argsort(-means_seen)[:2].tolist())


@pytest.mark.parametrize("noise", NOISES)
def test_a_shortfall_beyond_the_bound_is_rarer_than_promised(noise: str) -> None:
    """Of five layers worth 1 to 0.6, the best two: one run in five may miss more than it says."""
    means, beyond, decided = np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.0]), 0, 0
    for seed in range(40):
        found, top = fed(means, NOISES[noise], seed, confidence=0.8, tolerance=0.3)
        missed = 1.9 / sum(means[list(top)]) - 1
        assert found.shortfall is not None
        beyond += missed > found.shortfall + 1e-12
        decided += found.is_decided
    assert beyond <= 8
    assert decided > 0


def test_a_tolerance_ends_what_is_not_worth_telling_apart() -> None:
    means = np.array([20.0, 10.0, 9.9, 0.0])
    exact = [fed(means, NOISES["normal"], seed, tolerance=0.0)[0] for seed in range(10)]
    close = [fed(means, NOISES["normal"], seed, tolerance=0.1)[0] for seed in range(10)]
    assert sum(found.is_decided for found in exact) <= 1
    assert all(found.is_decided and len(found.examples) <= 12 for found in close)
    assert all((found.shortfall or 0) <= 0.1 for found in close)


def test_layers_worth_nothing_are_not_decided_by_a_share() -> None:
    found, _ = fed(np.array([-1.0, -1.1, -1.2]), NOISES["normal"], 0)
    assert found.shortfall is None and not found.is_decided


def test_the_bound_is_within_what_is_left_to_gain() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal([1.0, 0.9, 0.5, 0.0], 0.3, (20, 4))
    small, large = (shortfall(values, 1, 2, error, 0) for error in (0.2, 0.001))
    assert 0 <= small <= large < 0.6
    assert shortfall(values, 1, 2, 0.1, 0) == shortfall(values, 1, 2, 0.1, 0)
    far = shortfall(rng.normal([3.0, 2.0, 0.0, 0.0], 0.1, (20, 4)), 1, 2, 0.01, 0)
    assert far == 0


@pytest.mark.parametrize(
    ("units", "tasks", "looks"),
    [
        (24, 1, (8, 11, 15, 21, 24)),
        (16, 4, (3, 4, 5, 7, 9, 12, 16)),
        (3, 1, ()),
        (2, 8, ()),
        (8, 1, (8,)),
    ],
)
def test_looks_grow_and_end_with_the_examples(units: int, tasks: int, looks: Any) -> None:
    assert looks_of(units, tasks) == looks


@pytest.mark.parametrize("size", [0, 3, -1])
def test_nothing_to_choose_is_refused(size: int) -> None:
    with pytest.raises(InputError, match="nothing to find out"):
        Elimination([1, 2, 3], size, 0.05)


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


@pytest.mark.parametrize("each", [1, 2])
def test_tasks_of_too_few_examples_are_taken_together(each: int) -> None:
    """Or a sweep of them could never end."""
    tasks = [str(i // each) for i in range(64)]
    assert sorted(shuffled_units(tasks, 0)) == [(i,) for i in range(64)]
    rule = StoppingRule(AdaptiveStop(TOP2), range(8), 2, 0, tasks, 0)
    worth = np.random.default_rng(0).normal([1, 1, 0, 0, 0, 0, 0, 0], 0.05, (64, 8))
    for unit in rule.units:
        if not rule.is_decided:
            rule.observe({i: worth[i].tolist() for i in unit}, 1.0)
    assert rule.is_decided and len(rule.record(1.0).examples) < 12


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
    assert "were enough for the top 2 layers (within 5%, 95% sure)" in repr(scores)


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


def test_strategies_see_the_mean_of_what_was_measured() -> None:
    class Close(Spread):
        worth = (0.4, 0.41, 0.0, 0.0, 0.0)

    scores = adaptive(Close(), stop=AdaptiveStop(Budget(full_attention_layers=1), tolerance=0))
    assert np.isnan(scores.table).any()
    np.testing.assert_allclose(ScoresProblem(scores).deltas().mean(axis=0), scores.delta)


@pytest.mark.parametrize("seed", [8, 13])
def test_searches_take_the_ranking_of_what_was_settled(seed: int) -> None:
    """Means over few examples do not compare with those over all: they would choose others."""

    class Skewed(FakeModel):
        def per_token(self, example: Any, full_layers: Any) -> Any:
            rng = np.random.RandomState(1000 * seed + example.prompt_ids[0])
            worth = rng.lognormal(sigma=0.7) * np.array([1, 0.8, 0.79, 0.1, 0.1, 0.1])
            worth += 0.05 * rng.normal(size=6)
            return np.full(example.answer_len, 9.0 - worth[sorted(full_layers)].sum())

    model: Any = Skewed(6)
    examples = [swa.Example(e.prompt_ids, e.answer_ids) for e in make_examples(40)]
    stop = AdaptiveStop(TOP2, tolerance=0.0)
    scores = score_layers(model, examples, POLICY, stop=stop, seed=seed)
    means = np.array(ScoresProblem(scores).deltas().mean(axis=0))
    expected = select(scores, TOP2).layers
    assert expected != tuple(sorted(np.argsort(-means)[:2].tolist()))
    for strategy in (STRATEGIES["topk"](), "topk"):
        assert select(scores, TOP2, strategy=strategy).layers == expected
        found = select(model, examples, POLICY, TOP2, scores=scores, strategy=strategy)
        assert found.layers == expected
    joint = select(model, examples, POLICY, TOP2, scores=scores)
    assert joint.search is not None and found.search is not None
    assert np.mean(joint.search.loss_chosen) <= np.mean(found.search.loss_chosen)


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
