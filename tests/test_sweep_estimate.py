"""What a sweep is said to take, against what it takes."""

from __future__ import annotations

from typing import Any

import pytest
from planted import Planted, planted_checkpoint
from sweep_grid import GRID, examples

import swa
from swa import cost
from swa.cost import Work
from swa.model import plan
from swa.strategies import STRATEGIES, propose, resolve
from swa.sweeps import estimate_sweep
from swa.sweeps.estimate import DryProblem


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return planted_checkpoint(tmp_path_factory.mktemp("planted"))


def test_an_estimate_counts_the_work(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swa.sweeps.estimate.measure_speed", lambda model: Work(1e9, 1e9))
    grid = GRID | {"strategies": ["topk", "path", "periodic"], "budgets": [2]}
    calibration, heldout = examples(planted, range(2)), examples(planted, range(10, 13))
    found = estimate_sweep(planted.folder, calibration, heldout, threads=1, **grid)
    (model,) = found.models
    assert model.n_points == 5 and model.dtype == "float32"

    loaded = swa.load(planted.folder, dtype="float32", num_threads=1)
    policy = swa.AttentionPolicy(16, num_sink_tokens=4)

    def passes(used: list[swa.Example], n_full: int) -> float:
        lengths = [(example.prompt_len, example.answer_len) for example in used]
        works = [cost.nll_work(loaded.config, policy, range(n_full), *n) for n in lengths]
        return sum(work.flops for work in works) / 1e9

    table = swa.sweep(planted.folder, calibration, heldout, threads=1, **grid)
    rows = {row["strategy"]: row for row in table.rows}
    prefill = passes(calibration, 9)
    selecting = rows["path"]["select_prefills"] + rows["periodic"]["select_prefills"]
    assert model.select_seconds == pytest.approx(selecting * prefill)
    assert model.score_seconds > rows["topk"]["select_prefills"] * prefill
    expected = passes(heldout, 9) + passes(heldout, 0) + 3 * passes(heldout, 2)
    assert model.evaluate_seconds == pytest.approx(expected)
    assert found.seconds == pytest.approx(selecting * prefill + model.score_seconds + expected)
    assert model.peak_bytes >= loaded.memory_required(123, "sweep", policy) > model.weight_bytes
    assert "5 points" in repr(found)
    monkeypatch.setattr("swa._core.build_info", lambda: {"num_threads": 7})
    halved = estimate_sweep(planted.folder, calibration, heldout, workers=2, **grid)
    assert halved.threads == 3
    assert halved.seconds == pytest.approx(found.seconds / 2)


def test_the_estimate_of_another_objective(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs nothing, either, and knows the references that selections keep."""
    monkeypatch.setattr("swa.sweeps.estimate.measure_speed", lambda model: Work(1e9, 1e9))
    grid = GRID | {"strategies": ["path"], "budgets": [2], "threads": 1}
    calibration, heldout = examples(planted, range(2)), examples(planted, range(10, 13))

    def found(objective: str) -> Any:
        return estimate_sweep(planted.folder, calibration, heldout, objective=objective, **grid)

    (nll,), (kl,) = found("nll").models, found("kl").models

    def prefills(objective: str) -> float:
        table = swa.sweep(planted.folder, calibration, heldout, objective=objective, **grid)
        spent: float = table.rows[2]["select_prefills"]
        return spent

    expected = prefills("kl") / prefills("nll")
    assert kl.select_seconds / nll.select_seconds == pytest.approx(expected)
    model = plan(planted.folder, dtype="float32", num_threads=1)
    sizes = [4 * example.answer_len * model.config.vocab_size for example in calibration]
    longest = max(example.prompt_len + example.answer_len for example in calibration)
    gates = model.engine.weight_bytes + model.engine.gates_bytes(longest, 2)
    assert kl.peak_bytes == gates + sum(sizes) + max(sizes) > nll.peak_bytes  # one is a copy
    monkeypatch.setattr("swa.gates.REFERENCE_BYTES", 1)
    (bounded,) = found("kl").models
    assert kl.peak_bytes - bounded.peak_bytes == sum(sizes) - max(sizes)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_has_an_estimate(planted: Planted, name: str) -> None:
    model = plan(planted.folder, num_threads=1)
    policy = swa.AttentionPolicy(16, num_sink_tokens=4)
    problem = DryProblem(model, examples(planted, range(4)), policy)
    chosen = propose(resolve(name), problem, 3)
    assert len(chosen.layers) <= 3
    assert (chosen.cost.prefills > 0) == (name not in ("first", "last", "random"))
    assert propose(resolve(name), problem, 3).layers == chosen.layers
