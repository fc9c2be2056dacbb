"""The problem that a model and its examples pose: losses, what they cost, what is refused."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, make_examples

from swa import cost
from swa.errors import InputError, PolicyError, ScoresError
from swa.gates import GateGradient
from swa.policy import AttentionPolicy
from swa.problem import CalibrationProblem, ScoresProblem
from swa.runs import Cost
from swa.score import score_layers
from swa.strategies import propose, resolve

POLICY = AttentionPolicy(sliding_window=8, num_sink_tokens=2)


def pose(model: Any = None, n: int = 3, **settings: Any) -> CalibrationProblem:
    return CalibrationProblem(model or FakeModel(), make_examples(n), POLICY, **settings)


def flops(model: Any, problem: CalibrationProblem, layers: tuple[int, ...]) -> float:
    return sum(
        cost.nll_work(model.config, POLICY, layers, e.prompt_len, e.answer_len).flops
        for e in problem.examples
    )


def test_losses_are_the_models_own() -> None:
    model: Any = FakeModel()
    problem = pose(model)
    expected = [model.per_token(e, [1, 3]).mean() for e in problem.examples]
    np.testing.assert_array_equal(problem.loss([3, 1]), expected)


def test_a_pass_is_paid_for_once() -> None:
    model: Any = FakeModel()
    problem = pose(model)
    assert problem.cost == Cost()
    problem.loss(range(5))
    assert problem.cost.prefills == pytest.approx(1)
    problem.loss([2])
    share = flops(model, problem, (2,)) / flops(model, problem, (0, 1, 2, 3, 4))
    assert problem.cost.prefills == pytest.approx(1 + share)
    paid = problem.cost
    problem.loss({2})
    assert problem.cost == problem.spent == paid and paid.seconds > 0


def test_an_account_of_its_own_is_as_if_nothing_had_been_known() -> None:
    problem = pose()
    problem.deltas()
    other = problem.fresh()
    assert other.cost == Cost() and other.known_ranking is None
    other.loss([2]), other.loss([2])
    once = pose()
    once.loss([2])
    assert other.cost == once.cost
    assert problem.spent == other.spent == problem.cost  # nothing was run again


def test_deltas_are_the_sweeps() -> None:
    model: Any = FakeModel(native=[3])
    problem = pose(model)
    assert problem.known_ranking is None
    scores = score_layers(model, make_examples(3), POLICY)
    expected = np.array(scores.delta_per_example, float)
    np.testing.assert_array_equal(problem.deltas(), np.nan_to_num(expected))
    assert problem.known_ranking == scores.ranking
    paid = problem.cost
    problem.loss([]), problem.loss([4])  # runs of the sweep
    assert problem.cost == paid
    assert len(model.sweeps) == 6


def test_scores_that_are_there_cost_nothing() -> None:
    model: Any = FakeModel()
    scores = score_layers(model, make_examples(5), POLICY)
    problem = pose(model, scores=scores)
    assert problem.deltas().shape == (5, 5)
    assert problem.cost == Cost()


def test_progress_is_told_the_cost() -> None:
    told: list[Cost] = []
    problem = pose(progress=told.append)
    problem.loss([1])
    assert len(told) == 3 and told[-1] == problem.cost
    assert [c.prefills for c in told] == sorted(c.prefills for c in told)


def test_an_interrupted_loss_keeps_what_was_done() -> None:
    model: Any = FakeModel()
    problem = pose(model)
    run, calls = model.nll_example, []

    def interrupted(example: Any, **how: Any) -> Any:
        calls.append(example)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(example, **how)

    model.nll_example = interrupted
    with pytest.raises(KeyboardInterrupt):
        problem.loss([1])
    problem.loss([1])
    assert len(calls) == 4  # the first example is not run again
    assert problem.cost.prefills == pytest.approx(
        flops(model, problem, (1,)) / flops(model, problem, (0, 1, 2, 3, 4))
    )


def test_examples_without_signal_are_left_out() -> None:
    examples = [*make_examples(2), *make_examples(1, prompt_len=5)]
    with pytest.warns(UserWarning, match="1 of 3 examples carry no signal"):
        problem = CalibrationProblem(FakeModel(), examples, POLICY)  # type: ignore[arg-type]
    assert problem.n_examples == 2 and problem.left_out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "bleu"}, "objective must be one of"),
        ({"policy": POLICY.with_full_layers([1], 5)}, "layer_types is set"),
        ({"policy": dataclasses.replace(POLICY, sliding_window=(8, 8))}, "2 layers, the model"),
    ],
)
def test_bad_problems(change: dict[str, Any], message: str) -> None:
    arguments = {"policy": POLICY, "objective": "nll"} | change
    with pytest.raises((InputError, PolicyError), match=message):
        CalibrationProblem(FakeModel(), make_examples(2), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "ablate", "base": (0, 1, 2, 3, 4)}, "restored from all layers sliding"),
        ({"model_fingerprint": "0"}, "another checkpoint"),
        ({"policy": dataclasses.replace(POLICY, num_sink_tokens=0)}, "another policy: num_sink"),
    ],
)
def test_scores_of_something_else_are_refused(change: dict[str, Any], message: str) -> None:
    scores = dataclasses.replace(score_layers(FakeModel(), make_examples(2), POLICY), **change)
    with pytest.raises(InputError, match=message):
        pose(scores=scores)


def test_a_layer_that_cannot_be_selected() -> None:
    with pytest.raises(InputError, match=r"layers \[3\] cannot be selected"):
        pose(FakeModel(native=[3])).loss([1, 3])


def test_a_loss_that_is_not_finite() -> None:
    with pytest.raises(ScoresError, match=r"the loss of example 0 is nan .* layers \[1\]"):
        pose(FakeModel(nan_with=frozenset([1]))).loss([1])


def test_a_gradient_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    slope = np.array([0.0, np.nan, 0.0, 0.0, 0.0])
    found = GateGradient(1.0, slope, slope[:, None])
    monkeypatch.setattr("swa.problem.gate_gradient", lambda *args, **kwargs: found)
    with pytest.raises(ScoresError, match="the gradient of example 0 is not finite"):
        pose().gradient(np.zeros(5))


def test_scores_alone_answer_what_they_can() -> None:
    scores = score_layers(FakeModel(), make_examples(2), POLICY)
    problem = ScoresProblem(scores)
    assert propose(resolve("topk"), problem, 2).layers == tuple(sorted(scores.ranking[:2]))
    assert propose(resolve("first"), problem, 2).layers == (0, 1)
    with pytest.raises(InputError, match="measures whole selections"):
        propose(resolve("periodic"), problem, 2)
    with pytest.raises(InputError, match="gradients"):
        propose(resolve("path"), problem, 2)


# ---- on the engine


@pytest.fixture(scope="module")
def tiny_problem(tiny: Any) -> Any:
    import swa

    model = swa.load(tiny(), dtype="float32", num_threads=1)

    def make(objective: Any = "nll") -> CalibrationProblem:
        return CalibrationProblem(model, make_examples(2, prompt_len=48), POLICY, objective)

    return make


@pytest.mark.parametrize("objective", ["nll", "kl"])
def test_gradients_are_those_of_the_losses(tiny_problem: Any, objective: str) -> None:
    problem = tiny_problem(objective)
    n_layers = problem.num_layers
    alpha = np.linspace(0.2, 0.8, n_layers)
    _, slope = problem.gradient(alpha, [1])
    for layer in range(n_layers):
        step = np.zeros(n_layers)
        step[layer] = 1e-2
        ends = [problem.gradient(alpha + sign * step, [1])[0][0] for sign in (1, -1)]
        assert slope[0, layer] == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=0.02, abs=2e-5)


@pytest.mark.parametrize("objective", ["nll", "kl"])
def test_a_gradient_at_a_selection_knows_its_loss(tiny_problem: Any, objective: str) -> None:
    problem = tiny_problem(objective)
    alpha = np.zeros(problem.num_layers)
    alpha[1] = 1
    loss, _ = problem.gradient(alpha)
    paid = problem.cost
    np.testing.assert_array_equal(problem.loss([1]), loss)
    assert problem.cost == paid
    np.testing.assert_array_equal(tiny_problem(objective).loss([1]), loss)  # bit for bit


def test_divergence_is_paid_with_its_reference(tiny_problem: Any) -> None:
    problem = tiny_problem("kl")
    assert problem.loss(range(problem.num_layers)) == pytest.approx(0, abs=1e-6)
    assert problem.cost.prefills == pytest.approx(2)
    other = problem.fresh()
    other.loss(range(problem.num_layers))
    assert other.cost == problem.cost == problem.spent
    deltas = problem.deltas()
    assert deltas[0, 1] == problem.loss([])[0] - problem.loss([1])[0]
    with pytest.raises(InputError, match="no gradient"):
        propose(resolve("backward"), problem, 1)


def test_threads_share_references(tiny_problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, made = tiny_problem("kl"), []
    full_logits = type(problem.model).full_logits

    def slow(self: Any, ids: Any, first_row: int = 0) -> Any:
        made.append(ids)
        time.sleep(0.05)
        return full_logits(self, ids, first_row)

    monkeypatch.setattr(type(problem.model), "full_logits", slow)
    choices = [[layer] for layer in range(problem.num_layers)]
    with ThreadPoolExecutor(len(choices)) as pool:
        losses = list(pool.map(lambda chosen: problem.fresh().loss(chosen), choices))
    assert len(made) == 2
    np.testing.assert_array_equal(losses, [tiny_problem("kl").loss(c) for c in choices])


def test_a_gradients_price_is_what_it_costs(tiny_problem: Any) -> None:
    problem = tiny_problem()
    alpha = np.full(problem.num_layers, 0.5)
    price = problem.gradient_price(alpha)
    problem.gradient(alpha)
    assert problem.cost.prefills == pytest.approx(price) and 3 < price < 6
