"""`swa.select` on a model: searches, what a Selection tells of them, their files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, make_examples
from planted_problem import PlantedProblem, Term

import swa
from swa.errors import InputError, PolicyError, ScoresError
from swa.layer_scores import mean
from swa.policy import AttentionPolicy
from swa.score import score_layers
from swa.strategies import STRATEGIES, Move, Proposal, resolve
from swa.strategies.fewest import fewest

POLICY = AttentionPolicy(sliding_window=8, num_sink_tokens=2)
TWO = swa.Budget(full_attention_layers=2)
EXAMPLES = make_examples(4)


def select(budget: swa.Budget = TWO, model: Any = None, **settings: Any) -> swa.Selection:
    return swa.select(model or FakeModel(9), EXAMPLES, POLICY, budget, **settings)


def measured(model: Any, layers: tuple[int, ...]) -> list[float]:
    return [float(model.per_token(example, layers).mean()) for example in EXAMPLES]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_selects(strategy: str, tmp_path: Path) -> None:
    model: Any = FakeModel(9)
    chosen = select(model=model, strategy=strategy)
    assert chosen.strategy == strategy and len(chosen.layers) == 2
    assert chosen.policy == POLICY.with_full_layers(chosen.layers, 9)
    search = chosen.search
    assert search is not None and search.cost == chosen.cost
    assert list(search.loss_chosen) == measured(model, chosen.layers)
    assert list(search.loss_full) == measured(model, tuple(range(9)))
    assert list(search.loss_sliding) == measured(model, ())
    assert (search.loss_first_order is not None) == (strategy == "joint")
    chosen.save(tmp_path / "policy.json")
    assert swa.Selection.load(tmp_path / "policy.json") == chosen
    assert AttentionPolicy.load(tmp_path / "policy.json") == chosen.policy


def test_the_default_is_joint() -> None:
    chosen = select()
    assert chosen.strategy == "joint" and chosen == select(strategy="joint")
    assert chosen.search is not None and chosen.search.loss_first_order is not None
    assert mean(chosen.search.loss_chosen) <= mean(chosen.search.loss_first_order)
    text = repr(chosen)
    assert "Selection: full attention in 2 of 9 layers" in text
    for part in (
        "joint",
        "2 layers",
        "all sliding",
        "first-order top-k",
        "prefills",
        "first order",
    ):
        assert part in text


def test_arguments_by_name() -> None:
    assert select() == swa.select(
        FakeModel(9), examples=EXAMPLES, policy=POLICY, budget=TWO, strategy="joint"
    )  # type: ignore[call-overload]


def test_the_name_of_a_strategy_makes_it_again() -> None:
    for strategy, seed, expected in (
        ("random", 0, "random"),
        ("random", 5, "random:seed=5"),
        ("random:seed=2", 5, "random:seed=2"),
        ("path:points=3", 5, "path:points=3,seed=5"),
        ("first", 5, "first"),
    ):
        chosen = select(strategy=strategy, seed=seed)
        assert chosen.strategy == expected
        assert select(strategy=expected).layers == chosen.layers


def test_the_seed_is_that_of_strategies_that_draw() -> None:
    assert select(strategy="random", seed=3).layers == select(strategy="random:seed=3").layers
    drawn = {select(strategy="random", seed=seed).layers for seed in range(8)}
    assert len(drawn) > 3


def test_scores_count_in() -> None:
    scores = score_layers(FakeModel(9), EXAMPLES, POLICY)
    chosen = select(scores=scores)
    assert chosen.scores == scores
    assert chosen.search is not None
    assert "exact top-k" in [move.what for move in chosen.search.trace]


def test_strategies_of_ones_own() -> None:
    def mine(problem: Any, size: int) -> list[int]:
        return [3]

    chosen = select(strategy=mine)
    assert chosen.layers == (3,) and chosen.strategy.endswith("mine")

    class Mine:
        def propose(self, problem: Any, size: int) -> Proposal:
            return Proposal((1, 4))

    chosen = select(strategy=Mine())
    assert chosen.layers == (1, 4) and "Mine" in chosen.strategy
    scores = score_layers(FakeModel(9), EXAMPLES, POLICY)
    assert swa.select(scores, TWO, strategy=mine).layers == (3,)


@pytest.mark.parametrize("journal", [False, True])
def test_layers_may_be_numbers_of_numpy(journal: bool, tmp_path: Path) -> None:
    def steepest(problem: Any, size: int) -> Proposal:
        _, slope = problem.gradient(np.zeros(problem.num_layers), np.arange(2))
        layers = np.argsort(slope.mean(axis=0))[:size]
        loss = problem.loss(layers, np.arange(2)).mean().astype(np.float32)
        return Proposal(layers, (Move("steepest", layers, slope.min(), loss),))

    chosen = select(strategy=steepest, journal=tmp_path / "j" if journal else None)
    chosen.save(tmp_path / "policy.json")
    assert swa.Selection.load(tmp_path / "policy.json") == chosen
    found = swa.pareto(FakeModel(9), EXAMPLES, POLICY, strategy=steepest, sizes=[0, 2])  # type: ignore[arg-type]
    found.save(tmp_path / "pareto.json")
    with pytest.raises(InputError, match=r"proposed \[0.5, 1\]: not numbers of layers"):
        select(strategy=lambda problem, size: [0.5, 1])


def test_scores_alone_serve_strategies_that_need_no_more(tmp_path: Path) -> None:
    scores = score_layers(FakeModel(9), EXAMPLES, POLICY)
    chosen = swa.select(scores, TWO, strategy="last")
    assert chosen.layers == (7, 8) and "(last)" in repr(chosen)
    chosen.save(tmp_path / "policy.json")
    assert swa.Selection.load(tmp_path / "policy.json") == chosen
    with pytest.raises(InputError, match="gradients of the loss, which scores cannot tell"):
        swa.select(scores, TWO, strategy="joint")
    with pytest.raises(InputError, match="takes the model"):
        swa.select(scores, swa.Budget(nll_increase=0.1))


@pytest.mark.parametrize(
    "arguments",
    [
        (FakeModel(9), TWO),
        (FakeModel(9), EXAMPLES, POLICY),
        (FakeModel(9), EXAMPLES, POLICY, TWO, "joint"),
        (score_layers(FakeModel(9), EXAMPLES, POLICY),),
        (score_layers(FakeModel(9), EXAMPLES, POLICY), EXAMPLES, POLICY, TWO),
    ],
)
def test_arguments_that_do_not_go_together(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(InputError, match=r"select takes \(scores, budget\) or \(model, examples"):
        swa.select(*arguments)


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="cannot keep 9 layers full: 8 of this model's 9"):
        select(swa.Budget(full_attention_layers=9), FakeModel(9, native=[2]))
    with pytest.raises(InputError, match="no strategy 'best'"):
        select(strategy="best")
    with pytest.raises(InputError, match="objective must be"):
        select(objective="bleu")
    with pytest.raises(InputError, match="seed must be"):
        select(seed=-1)
    with pytest.raises(InputError, match="select takes"):
        swa.select(score_layers(FakeModel(9), EXAMPLES, POLICY), TWO, objective="kl")  # type: ignore[call-overload]
    with pytest.raises(PolicyError, match="layer_types is set"):
        swa.select(FakeModel(9), EXAMPLES, POLICY.with_full_layers([1], 9), TWO)  # type: ignore[call-overload]


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    select(progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "prefills an example" in captured.err


def test_old_files_are_read(tmp_path: Path) -> None:
    scores = score_layers(FakeModel(5), make_examples(2), POLICY)
    chosen = swa.select(scores, TWO)
    data = chosen.to_dict()
    data["selection"] = {
        "schema": "swa.selection/1",
        "budget": {"full_attention_layers": 2, "fraction": None},
        "scores": scores.to_dict(),
    }
    (tmp_path / "old.json").write_text(json.dumps(data))
    assert swa.Selection.load(tmp_path / "old.json") == chosen


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("search", "loss_full"), [1.0], "loss_full must have one finite value an example"),
        (("search", "loss_full"), "no", "search is not valid"),
        (("search", "objective"), "bleu", "unknown objective"),
        (("search", "size"), 1, "up to 1 ascending"),
        (("search", "size"), None, None),
        (("search", "num_hidden_layers"), None, "search is not valid"),
        (("search", "num_hidden_layers"), 10**12, "not the one that was scored"),
        (("search", "loss_full"), [10**400] * 4, "one finite value an example"),
        (("search", "loss_full"), None, "one finite value an example"),
        (("search", "cost"), {"prefills": "many"}, "search is not valid"),
        (("search", "trace"), [{"what": "add"}], "search is not valid"),
        (("search", "extra"), 1, "a search has the keys"),
        (("search",), None, "has scores, a search, or both"),
        (("budget",), {"fraction": 2}, "budget is not valid"),
    ],
)
def test_edited_files(tmp_path: Path, path: tuple[str, ...], value: Any, message: Any) -> None:
    data = select().to_dict()
    place = data["selection"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "policy.json").write_text(json.dumps(data))
    if message is None:
        assert swa.Selection.load(tmp_path / "policy.json").layers == select().layers
        return
    with pytest.raises(ScoresError, match=message):
        swa.Selection.load(tmp_path / "policy.json")


def test_a_search_is_checked() -> None:
    search = select().search
    assert search is not None
    for layers in ((2, 1), (1, 1), (0, 9), (0, 1, 2)):
        with pytest.raises(ScoresError, match="up to 2 ascending layers"):
            swa.Selection(layers, TWO, search=search)
    with pytest.raises(ScoresError, match="must not have layer_types"):
        dataclasses.replace(search, policy=POLICY.with_full_layers([1], 9))


# ---- a tolerance


def steps() -> PlantedProblem:
    """Worth: layers 1 and 4 a lot, 7 some, 3 and 9 only together, all others a little."""
    terms = [Term((1,), 1.0), Term((4,), 0.8), Term((7,), 0.2), Term((3, 9), 0.6)]
    terms += [Term((layer,), 0.01) for layer in (0, 2, 5, 6, 8, 10, 11)]
    return PlantedProblem(12, terms, top=3.0, spread=0.0)


@pytest.mark.parametrize(
    ("tolerance", "layers"),
    [
        (2.67, ()),
        (1.7, (1,)),
        (0.9, (1, 4)),
        (0.28, (1, 3, 4, 9)),
        (0.071, (1, 3, 4, 7, 9)),
        (0.0, tuple(range(12))),
    ],
)
@pytest.mark.parametrize("strategy", ["joint", "path", "frank_wolfe"])
def test_the_fewest_layers_within_a_tolerance(
    strategy: str, tolerance: float, layers: tuple[int, ...]
) -> None:
    problem = steps()
    found = fewest(resolve(strategy), problem, tolerance)
    assert problem.mean(found.layers) <= problem.mean(range(12)) + tolerance
    assert found.layers == layers
    assert found.cost == problem.spent


def test_a_tolerance_is_a_budget() -> None:
    model: Any = FakeModel(9)
    chosen = select(swa.Budget(nll_increase=0.3), model)
    assert chosen.search is not None and chosen.search.size is None
    allowed = mean(chosen.search.loss_full) + 0.3
    assert mean(chosen.search.loss_chosen) <= allowed
    for layer in chosen.layers:
        fewer = tuple(other for other in chosen.layers if other != layer)
        assert np.mean(measured(model, fewer)) > allowed


def test_a_share_of_the_prefill_is_a_budget() -> None:
    chosen = select(swa.Budget(prefill_flops=0.9, prompt_tokens=400))
    assert chosen.search is not None
    size = chosen.budget.size(FakeModel(9).config, POLICY)
    assert 0 < size < 9 and len(chosen.layers) <= size == chosen.search.size
