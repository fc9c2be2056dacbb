"""score_layers and LayerScores: definitions, statistics, files, progress."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, make_examples
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from swa import cost
from swa.errors import ExampleError, InputError, PolicyError, ScoresError, SwaWarning
from swa.layer_scores import LayerScores
from swa.policy import AttentionPolicy
from swa.score import SweepTask, score_layers
from swa.statistics import paired_bootstrap

POLICY = AttentionPolicy(sliding_window=8, num_sink_tokens=2)


def fake_scores(model: Any = None, count: int = 4, **arguments: Any) -> LayerScores:
    return score_layers(model or FakeModel(), make_examples(count), POLICY, **arguments)


# ---- what a delta is


@pytest.mark.parametrize(
    ("direction", "base", "native", "scored"),
    [
        ("restore", None, (), {0, 1, 2, 3, 4}),
        ("restore", [3, 1], (), {0, 2, 4}),
        ("restore", None, (1,), {0, 2, 3, 4}),
        ("restore", [4], (0, 1), {2, 3}),
        ("ablate", None, (), {0, 1, 2, 3, 4}),
        ("ablate", None, (2,), {0, 1, 3, 4}),
        ("ablate", [0, 3], (), {0, 3}),
    ],
)
def test_deltas_are_differences_of_independent_runs(
    direction: Any, base: list[int] | None, native: tuple[int, ...], scored: set[int]
) -> None:
    model, examples = FakeModel(native=native), make_examples(3)
    scores = score_layers(model, examples, POLICY, direction=direction, base=base)
    selectable = set(range(5)) - set(native)
    start = set(base) if base is not None else (selectable if direction == "ablate" else set())
    assert scores.base == tuple(sorted(start))
    assert set(scores.scored_layers) == scored
    for i, example in enumerate(examples):

        def nll(full: set[int], example: Any = example) -> float:
            return model.nll_example(example, full_layers=full).mean

        assert scores.nll_base[i] == nll(start)
        assert scores.nll_full[i] == nll(selectable)
        assert scores.nll_swa[i] == nll(set())
        for layer in range(5):
            expected = None
            if layer in scored and direction == "restore":
                expected = nll(start) - nll(start | {layer})
            elif layer in scored:
                expected = nll(start - {layer}) - nll(start)
            assert scores.delta_per_example[i][layer] == expected


def test_the_base_pass_is_not_run_twice() -> None:
    model = FakeModel()
    passes: list[Any] = []
    original = model.nll_example

    def counting(example: Any, policy: Any = None, full_layers: Any = None) -> Any:
        passes.append(sorted(full_layers))
        return original(example, policy, full_layers)

    model.nll_example = counting
    fake_scores(model, count=1)
    fake_scores(model, count=1, direction="ablate")
    fake_scores(model, count=1, base=[1])
    assert passes == [[0, 1, 2, 3, 4], [], [0, 1, 2, 3, 4], []]


def test_a_natural_tie_is_exactly_zero() -> None:
    """A layer that changes no bit has delta 0.0, of positive sign, in both directions."""
    model = FakeModel()
    model.per_token = lambda example, full: np.full(example.answer_len, 2.5)
    for direction in ("restore", "ablate"):
        delta = fake_scores(model, direction=direction).delta
        assert all(math.copysign(1, d) == 1 and d == 0 for d in delta if d is not None)


# ---- means, errors, intervals


def test_means_and_standard_errors() -> None:
    """Two tasks of three examples each: only what differs within a task is chance."""
    scores = fake_scores(count=6)
    table = np.array(scores.delta_per_example, dtype=float)
    np.testing.assert_allclose(np.array(scores.delta, dtype=float), table.mean(axis=0))
    within = [table[task::2].var(axis=0, ddof=1) for task in (0, 1)]
    np.testing.assert_allclose(
        np.array(scores.standard_error, dtype=float), np.sqrt(np.add(*within) / 3) / 2
    )


def test_intervals_are_those_of_the_paired_bootstrap() -> None:
    scores = fake_scores(count=8, n_bootstrap=500, seed=3)
    for layer, found in enumerate(scores.interval):
        column = [row[layer] for row in scores.delta_per_example]
        alone = paired_bootstrap(column, [0.0] * 8, tasks=scores.tasks, n_bootstrap=500, seed=3)
        assert found == alone.interval


def test_intervals_of_too_few_examples_are_marked() -> None:
    """Few are fewer than five of one task, and more where those of one task alone vary."""
    assert fake_scores(count=2).few_examples == (0, 1, 2, 3, 4)
    assert "too few" in repr(fake_scores(count=2)) and "] ?" in repr(fake_scores(count=2))
    scores = fake_scores(count=12)
    assert scores.few_examples == () and "too few" not in repr(scores)
    table = np.array(scores.delta_per_example, dtype=float)
    assert scores.tasks[:4] == ("num", "copy", "num", "copy")
    table[1::2, 2] = 0.5  # every "copy" says the same of layer 2, "num" does not
    table[::2, 2] = np.linspace(0, 1, 6)
    rows = tuple(tuple(row) for row in table[:8].tolist())
    few = dataclasses.replace(
        scores,
        delta_per_example=rows,
        tasks=scores.tasks[:8],
        **{name: getattr(scores, name)[:8] for name in ("nll_base", "nll_full", "nll_swa")},
    )
    assert 2 in few.few_examples and 0 not in few.few_examples


def test_intervals_are_seeded() -> None:
    first, again, other = (fake_scores(count=9, seed=seed).interval for seed in (1, 1, 2))
    assert first == again != other


def test_one_example_has_no_error_and_no_interval() -> None:
    scores = fake_scores(count=1)
    assert scores.standard_error == scores.interval == (None,) * 5
    assert scores.delta == scores.delta_per_example[0]


def test_equal_examples_have_no_spread() -> None:
    scores = score_layers(FakeModel(), make_examples(1) * 4, POLICY)
    for delta, error, interval in zip(
        scores.delta, scores.standard_error, scores.interval, strict=True
    ):
        assert error == pytest.approx(0, abs=1e-15)
        assert interval == pytest.approx((delta, delta))


# ---- what is refused


def test_examples_without_signal_are_left_out_and_said() -> None:
    short, long = make_examples(2, prompt_len=10), make_examples(3)
    with pytest.warns(SwaWarning, match=r"2 of 5 examples carry no signal"):
        scores = score_layers(FakeModel(), [*short, *long], POLICY)
    alone = score_layers(FakeModel(), long, POLICY)
    assert "2 of 5 examples" in scores.notes[0]
    assert dataclasses.replace(scores, notes=()) == alone


def test_no_example_with_signal_is_an_error() -> None:
    with pytest.raises(ExampleError, match="longest prompt has 10 tokens"):
        score_layers(FakeModel(), make_examples(2, prompt_len=10), POLICY)
    with pytest.raises(ExampleError, match="no examples"):
        score_layers(FakeModel(), [], POLICY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"direction": "remove"}, "direction must be"),
        ({"base": [5]}, "base has the layers"),
        ({"base": [1]}, r"base has the layers \[1\]"),  # natively sliding
        ({"base": [-1]}, "a layer of base must be an integer"),
        ({"base": [True]}, "a layer of base must be an integer"),
        ({"base": [0, 2, 3, 4]}, "no layer is left to restore"),
        ({"base": [], "direction": "ablate"}, "no layer is left to ablate"),
        ({"n_bootstrap": 0}, "n_bootstrap must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 1.5}, "seed must be"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fake_scores(FakeModel(native=(1,)), **arguments)


def test_a_policy_with_chosen_layers_is_refused() -> None:
    with pytest.raises(PolicyError, match="layer_types is set"):
        score_layers(FakeModel(), make_examples(1), POLICY.with_full_layers([1], 5))
    with pytest.raises(PolicyError, match="3 layers"):
        score_layers(FakeModel(), make_examples(1), AttentionPolicy((8, 8, 8)))


def test_an_nll_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ScoresError, match=r"example 0 is nan with full attention in layers \[3\]"):
        fake_scores(FakeModel(nan_with=frozenset({3})))


def test_rounded_weights_are_noted() -> None:
    model = FakeModel()
    assert fake_scores(model).notes == ()
    model.precision_note = "F32 rounded"
    assert fake_scores(model).notes == ("F32 rounded",)


# ---- files


def test_the_file_has_the_documented_keys(tmp_path: Path) -> None:
    fake_scores(FakeModel(native=(1,)), base=[2]).save(tmp_path / "scores.json")
    data = json.loads((tmp_path / "scores.json").read_text(), parse_constant=pytest.fail)
    assert data["schema"] == "swa.scores/1"
    assert data["sliding_window"] == 8 and data["num_sink_tokens"] == 2
    assert data["num_tail_tokens"] == 0 and data["decode"] == "full"
    assert data["direction"] == "restore" and data["base"] == [2]
    assert len(data["delta"]) == 5 and data["delta"][1] is data["delta"][2] is None
    assert [len(row) for row in data["delta_per_example"]] == [5] * 4
    assert len(data["nll_base"]) == len(data["nll_full"]) == len(data["nll_swa"]) == 4


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        fake_scores().save(tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@given(
    deltas=st.integers(2, 4).flatmap(
        lambda n_layers: st.lists(
            st.lists(st.floats(-1e6, 1e6), min_size=n_layers, max_size=n_layers),
            min_size=1,
            max_size=4,
        )
    ),
    data=st.data(),
)
def test_json_round_trip(deltas: list[list[float]], data: st.DataObject) -> None:
    n, n_layers = len(deltas), len(deltas[0])
    base = data.draw(st.sets(st.integers(0, n_layers - 1), max_size=n_layers - 1))
    nll = data.draw(st.lists(st.floats(0, 1e3), min_size=n, max_size=n))
    scores = dataclasses.replace(
        fake_scores(FakeModel(n_layers), count=1),
        base=tuple(sorted(base)),
        tasks=("täsk\n",) * n,
        nll_base=tuple(nll),
        nll_full=tuple(nll),
        nll_swa=tuple(nll),
        delta_per_example=tuple(
            tuple(None if i in base else value for i, value in enumerate(row)) for row in deltas
        ),
        n_bootstrap=20,
        command=data.draw(st.none() | st.text(max_size=5)),
        noise_floor=data.draw(st.none() | st.floats(0, 1)),
    )
    again = LayerScores.from_dict(json.loads(json.dumps(scores.to_dict(), allow_nan=False)))
    assert again == scores and again.to_dict() == scores.to_dict()


def test_save_replaces_whole_files_and_keeps_the_umask(tmp_path: Path) -> None:
    path, mask = tmp_path / "scores.json", os.umask(0o027)
    try:
        path.write_text("old")
        fake_scores().save(path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]
    assert LayerScores.load(path) == fake_scores()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "swa.scores/2"}, "the schema of scores"),
        ({"extra": 1}, r"unknown keys \['extra'\]"),
        ({"delta": None}, "delta does not follow"),
        ({"delta": [0.0] * 5}, "delta does not follow"),
        ({"delta": [10**400] * 5}, "delta does not follow"),
        ({"interval": []}, "interval does not follow"),
        ({"standard_error": [True] * 5}, "standard_error does not follow"),
        ({"nll_base": [1.0]}, "nll_base has 1 examples, tasks has 4"),
        ({"nll_full": [1.0, 2.0, 3.0, "4"]}, "nll_full: '4' is not a number"),
        ({"nll_full": [1.0, 2.0, 3.0, 10**400]}, "nll_full"),
        ({"tasks": "num"}, "tasks: 'num' is not a list"),
        ({"command": 3}, "command: 3 is not a string"),
        ({"base": [1.0]}, "base: 1.0 is not an integer"),
        ({"base": [7]}, "base must be ascending layers of 0..4"),
        ({"base": [1]}, "with numbers in the layers"),
        ({"direction": "sideways"}, "unknown direction"),
        ({"sliding_window": 0}, "sliding_window must be"),
        ({"delta_per_example": [[0.5] * 4] * 4}, "must have 5 layers"),
        ({"noise_floor": -1.0}, "noise_floor must be"),
        ({"n_bootstrap": True}, "n_bootstrap: True is not an integer"),
        ({"n_bootstrap": 10**12}, "n_bootstrap must be in"),
        ({"num_hidden_layers": -3}, "selectable_layers must be"),
    ],
)
def test_edited_files_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    data = fake_scores().to_dict() | change
    (tmp_path / "scores.json").write_text(json.dumps(data))
    with pytest.raises(ScoresError, match=message) as error:
        LayerScores.load(tmp_path / "scores.json")
    assert "scores.json: " in str(error.value)


def test_every_key_is_needed() -> None:
    for key in fake_scores().to_dict():
        data = fake_scores().to_dict()
        del data[key]
        with pytest.raises(ScoresError, match=key):
            LayerScores.from_dict(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Expecting value"),
        (b"[]", "scores are a JSON object, not list"),
        (b"\xff", "codec can't decode"),
        (b'{"schema": NaN}', "NaN is not a JSON number"),
        (b'{"schema": -Infinity}', "-Infinity is not a JSON number"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"schema": 1, "schema": "swa.scores/1"}', "the key 'schema' is given twice"),
    ],
)
def test_files_that_are_no_scores_are_refused(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "scores.json").write_bytes(text)
    with pytest.raises(ScoresError, match=message) as error:
        LayerScores.load(tmp_path / "scores.json")
    assert "scores.json: " in str(error.value)


# ---- tasks, work and progress


def test_a_task_survives_pickling() -> None:
    task = SweepTask(0, make_examples(1)[0], POLICY, "restore", (2,), (0, 1, 2, 3, 4))
    again = pickle.loads(pickle.dumps(task))
    assert again == task
    result = again.run(FakeModel())
    assert pickle.loads(pickle.dumps(result)) == result == task.run(FakeModel())


def test_a_task_reports_its_work_as_it_goes() -> None:
    model, told = FakeModel(), list[float]()
    task = SweepTask(0, make_examples(1)[0], POLICY, "restore", (2,), (0, 1, 2, 3, 4))
    task.run(model, told.append)
    sweep, full, swa = (part.flops for part in task.work(model.config))
    expected = [sweep * i / 4 for i in range(1, 5)] + [sweep, sweep + full]
    assert told == pytest.approx(expected)
    assert swa > 0


def test_the_bar_ends_full(capsys: pytest.CaptureFixture[str]) -> None:
    fake_scores(progress=True)
    assert "100%" in capsys.readouterr().err
    fake_scores()
    assert capsys.readouterr().err == ""


MATRICES = {
    "q": 2 * 16 * 16,
    "kv": 2 * 16 * (8 + 8),
    "rest": 2 * (16 * 16 + 3 * 16 * 24),
    "head": 2 * 16 * 50,
}
PER_KEY = 4 * 4 * 4


def mask_pairs(policy: AttentionPolicy, prompt: int, total: int, first: int, full: bool) -> int:
    """Pairs of a row >= `first` and a key it attends to, counted one by one."""
    window, sinks = policy.sliding_window, policy.num_sink_tokens
    exempt = prompt - policy.num_tail_tokens if policy.decode == "full" else total
    return sum(
        full or j > t - window or j < sinks or t >= exempt
        for t in range(first, total)
        for j in range(t + 1)
    )


@pytest.mark.parametrize("decode", ["full", "window"])
@pytest.mark.parametrize(("prompt", "answer"), [(5, 1), (12, 3), (30, 8)])
def test_costs_count_every_pair_of_the_masks(decode: Any, prompt: int, answer: int) -> None:
    policy = AttentionPolicy(7, 3, 4 if decode == "full" else 0, decode=decode)
    config, read, base, flips = FakeModel().config, prompt + answer - 1, {1, 4}, (0, 2, 3)

    def layer(index: int, start: int, full: bool, projects: bool = True) -> int:
        first = prompt - 1 if index == 4 else start  # the last layer finishes the scored rows
        finished = (read - first) * MATRICES["rest"]
        finished += mask_pairs(policy, prompt, read, first, full) * PER_KEY
        projected = (read - start) * MATRICES["kv"] + (read - first) * MATRICES["q"]
        return finished + projects * projected

    one_pass = sum(layer(i, 0, i in base) for i in range(5)) + answer * MATRICES["head"]
    assert cost.nll_work(config, policy, base, prompt, answer).flops == one_pass

    shared = min(7 + 3, prompt - 1)  # the rows before see every key in all runs
    forks = sum(
        layer(flip, shared, True, projects=False)
        + sum(layer(above, shared, above in base) for above in range(flip + 1, 5))
        + answer * MATRICES["head"]
        for flip in flips
    )
    assert cost.sweep_work(config, policy, base, flips, prompt, answer).flops == one_pass + forks


def test_a_sweep_costs_about_half_of_its_runs_one_by_one() -> None:
    config, policy = FakeModel(30).config, AttentionPolicy(sliding_window=64)
    runs = sum(cost.nll_work(config, policy, {layer}, 2000, 4).flops for layer in range(30))
    sweep = cost.sweep_work(config, policy, (), range(30), 2000, 4).flops
    assert 0.45 < sweep / (cost.nll_work(config, policy, (), 2000, 4).flops + runs) < 0.65


def test_rows_that_all_runs_share_cost_once() -> None:
    def forks(window: int) -> float:
        policy = AttentionPolicy(window, num_sink_tokens=4)
        single = cost.nll_work(config, policy, (), 600, 1).flops
        return cost.sweep_work(config, policy, (), range(5), 600, 1).flops / single - 1

    config = FakeModel().config
    assert 0 < forks(590) < 0.2 and forks(50) > 1


# ---- for people


def test_repr_lists_the_best_layers_first() -> None:
    scores = fake_scores(FakeModel(14))
    lines = repr(scores).splitlines()
    assert "restore, 14 of 14 layers, 4 examples, fake (bfloat16)" in lines[0]
    rows = [int(line.split()[0]) for line in lines[4:14]]
    assert tuple(rows) == scores.ranking[:10]
    assert lines[-1].strip() == "... and 4 more"
    assert "[" not in repr(fake_scores(count=1)).split("interval")[1]


def test_plot_draws_every_scored_layer() -> None:
    axes = Figure().add_subplot()
    assert fake_scores(FakeModel(native=(1,))).plot(axes) is axes
    assert len(axes.patches) == 4
