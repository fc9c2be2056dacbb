"""Every strategy of the registry, on problems whose best selection is known."""

from __future__ import annotations

import numpy as np
import pytest
from planted_problem import GRADIENT, SLIDING_PASS, PlantedProblem, Term

from swa.errors import InputError
from swa.strategies import STRATEGIES, Proposal, propose, resolve, summary
from swa.strategies.base import helps
from swa.strategies.refine import LocalSearch, Refine

L = 12
ALONE = {1: 0.5, 4: 0.9, 7: 0.3, 10: 0.7}  # layers that are worth something, each by itself


def simple(**settings) -> PlantedProblem:
    terms = [Term((layer,), worth) for layer, worth in ALONE.items()]
    return PlantedProblem(L, terms, top=3.0, **settings)


@pytest.fixture(params=STRATEGIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


SEEING = [name for name in STRATEGIES if name not in ("periodic", "first", "last", "random")]


@pytest.mark.parametrize("size", [0, 1, 4, L - 1, L])
def test_a_proposal_is_layers_within_the_budget(name: str, size: int) -> None:
    made = propose(resolve(name), simple(), size)
    assert len(made.layers) == (min(size, len(ALONE)) if name == "joint" else size)
    assert list(made.layers) == sorted(set(made.layers) & set(range(L)))


def test_layers_that_cannot_be_selected_are_not(name: str) -> None:
    problem = simple(unselectable=(0, 4, 11))
    for size in (3, 9):
        made = propose(resolve(name), problem, size)
        assert len(made.layers) == (3 if name == "joint" else size)
        assert not {0, 4, 11} & set(made.layers)
    with pytest.raises(InputError, match="cannot keep 10 layers full: 9 of this model's 12"):
        propose(resolve(name), problem, 10)


def test_it_says_the_same_twice(name: str) -> None:
    assert propose(resolve(name), simple(), 4) == propose(resolve(name), simple(), 4)


@pytest.mark.parametrize("name", SEEING)
def test_independent_layers_are_found(name: str) -> None:
    assert propose(resolve(name), simple(), 4).layers == tuple(sorted(ALONE))


@pytest.mark.parametrize("name", [*SEEING, "periodic"])
def test_ties_go_to_the_lower_index(name: str) -> None:
    problem = PlantedProblem(6, [Term((i,), 0.125) for i in range(6)], top=1.0, spread=0.0)
    chosen = propose(resolve(name), problem, 3).layers
    assert chosen == ((0, 2, 4) if name == "periodic" else (0, 1, 2))


def test_the_cost_is_as_if_nothing_had_been_known(name: str) -> None:
    problem = simple()
    made = propose(resolve(name), problem, 4)
    assert made.cost == problem.spent
    assert propose(resolve(name), problem, 4) == made
    assert problem.spent == made.cost  # all was known by then


def test_a_summary_is_one_line(name: str) -> None:
    assert summary(name).endswith(".") and "\n" not in summary(name)


def test_first_order_costs_one_gradient() -> None:
    assert propose(resolve("first_order"), simple(), 4).cost.prefills == pytest.approx(GRADIENT)
    assert propose(resolve("topk"), simple(), 4).cost.prefills > SLIDING_PASS * L / 2


def test_path_shares_add_up() -> None:
    from swa.strategies.rankings import Path

    terms = [Term((2, 5), 1.0), Term((3,), 0.5), Term((1, 6), 0.4, every=False)]
    problem = PlantedProblem(8, terms, top=3.0)
    benefit, _ = Path().benefit(problem)
    gap = problem.mean([]) - problem.mean(range(8))
    assert benefit.sum() == pytest.approx(gap, rel=1e-12)
    assert benefit[2] == pytest.approx(benefit[5]) and benefit[2] > 0.4


def test_batches_take_turns() -> None:
    full = propose(resolve("frank_wolfe:steps=4,batch=8"), simple(), 4)
    less = propose(resolve("frank_wolfe:steps=4,batch=2"), simple(), 4)
    assert less.cost.prefills == pytest.approx(full.cost.prefills / 4)


def test_forward_sees_what_it_has_added_and_backward_what_it_has_removed() -> None:
    """Two copies, and two layers that are useful only together."""
    terms = [Term((1, 2), 1.0, every=False), Term((5,), 0.4), Term((6, 8), 1.5)]
    problem = PlantedProblem(10, terms, top=4.0)
    assert propose(resolve("topk"), problem, 2).layers == (1, 2)
    assert propose(resolve("forward:each=1"), problem, 2).layers == (1, 5)
    assert propose(resolve("backward:rounds=10"), problem, 4).layers == (1, 5, 6, 8)


def test_periodic_takes_the_best_offset_or_the_one_named() -> None:
    made = propose(resolve("periodic"), simple(), 4)
    assert made.layers == (1, 4, 7, 10)
    assert [move.layers[0] for move in made.trace] == [0, 1, 2]
    assert min(move.loss for move in made.trace) == made.trace[1].loss
    assert propose(resolve("periodic:offset=2"), simple(), 4).layers == (2, 5, 8, 11)


def test_random_follows_its_seed() -> None:
    drawn = {propose(resolve(f"random:seed={seed}"), simple(), 4).layers for seed in range(20)}
    assert len(drawn) > 15
    assert {layer for layers in drawn for layer in layers} == set(range(L))


# ---- strategies of a user's own


def test_a_function_is_a_strategy() -> None:
    made = propose(lambda problem, size: reversed(range(size)), simple(), 3)
    assert made == Proposal((0, 1, 2))


def test_an_object_is_a_strategy() -> None:
    class Mine:
        def propose(self, problem, size):
            problem.gradient(np.zeros(L), [0])
            return Proposal((5, 3))

    made = propose(resolve(Mine()), simple(), 2)
    assert made.layers == (3, 5)
    assert made.cost.prefills == pytest.approx(GRADIENT / 8)


@pytest.mark.parametrize(
    ("layers", "message"),
    [((1, 1), "not different layers"), ((12,), "not different layers"), ((1, 2, 3), "3 layers")],
)
def test_a_bad_proposal_is_refused(layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        propose(lambda problem, size: layers, simple(), 2)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("best", "no strategy 'best': there are joint, topk"),
        ("random:sed=1", "random has no setting 'sed'"),
        ("topk:k=1", "topk has no setting 'k': it has none"),
        ("path:points=x", "points must be a number"),
        ("path:points=0", "points must be an integer >= 1"),
        ("frank_wolfe:batch=-1", "batch must be"),
        ("random:seed=-1", "seed must be an integer >= 0"),
        ("joint:seed=-1", "seed must be an integer >= 0"),
        ("path:seed=-1", "seed must be an integer >= 0"),
        ("forward:seed=-1", "seed must be an integer >= 0"),
        ("frank_wolfe:seed=-1", "seed must be an integer >= 0"),
        (3, "strategy must be"),
        (STRATEGIES["first"], "strategy must be"),
    ],
)
def test_bad_strategies(strategy, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(strategy)


# ---- layers that interact, and answers that saturate


def interacting(place: list[int], **settings) -> tuple[PlantedProblem, set[int], set[int]]:
    """Two layers useful only together, two copies of one another, two useful ones, three harmful.

    Returns the problem, the layers that must be chosen, and the copies.
    """
    terms = [
        Term((place[0], place[1]), 1.5),
        Term((place[2], place[3]), 0.9, every=False),
        Term((place[4],), 0.6),
        Term((place[5],), 0.5),
        *(Term((layer,), -0.1) for layer in place[6:9]),
        *(Term((layer,), 0.02) for layer in place[9:12]),
    ]
    problem = PlantedProblem(len(place), terms, top=4.0, **settings)
    return problem, {place[0], place[1], place[4], place[5]}, {place[2], place[3]}


def saturated(place: list[int], **settings) -> tuple[PlantedProblem, set[int], set[int]]:
    """As `interacting`, where all layers together, and most sets of them, leave no loss at all."""
    terms = [
        Term((place[0], place[1]), 6.0),
        Term((place[2], place[3]), 5.0, every=False),
        Term((place[4],), 4.0),
        Term((place[5],), 4.0),
        *(Term((layer,), 0.8) for layer in place[6:]),
    ]
    problem = PlantedProblem(len(place), terms, top=13.0, saturates=True, rounding=2e-3, **settings)
    return problem, {place[0], place[1], place[4], place[5]}, {place[2], place[3]}


def finds(name: str, case: tuple[PlantedProblem, set[int], set[int]], size: int = 5) -> bool:
    problem, needed, copies = case
    made = propose(resolve(name), problem, size)
    if name == "joint":
        assert made.cost.prefills <= problem.num_layers
    return needed <= set(made.layers) and len(copies & set(made.layers)) == 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n_examples", [1, 4, 8])
def test_the_default_finds_interacting_layers_and_top_k_does_not(
    seed: int, n_examples: int
) -> None:
    place = np.random.default_rng(seed).permutation(24).tolist()
    assert finds("joint", interacting(place, n_examples=n_examples))
    assert not finds("topk", interacting(place, n_examples=n_examples))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n_examples", [4, 8])
def test_the_default_finds_layers_behind_saturation_and_backward_does_not(
    seed: int, n_examples: int
) -> None:
    place = np.random.default_rng(seed).permutation(24).tolist()
    assert finds("joint", saturated(place, n_examples=n_examples))
    assert not finds("backward", saturated(place, n_examples=n_examples))


def test_the_default_leaves_layers_out_that_do_not_help() -> None:
    problem, needed, copies = interacting(list(range(24)))
    made = propose(resolve("joint"), problem, 12)
    chosen = set(made.layers)
    assert needed | {9, 10, 11} <= chosen and len(chosen & copies) == 1
    assert not chosen & {6, 7, 8} and not chosen - set(range(12))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("num_layers", "size"), [(9, 3), (30, 8)])
def test_the_default_is_never_worse_than_top_k_and_costs_no_more_than_a_sweep(
    seed: int, num_layers: int, size: int
) -> None:
    rng = np.random.default_rng(seed)
    alone = rng.choice([0, 0.05, 0.2, 0.5, -0.1], num_layers)
    terms = [Term((layer,), worth) for layer, worth in enumerate(alone)]
    for _ in range(5):
        group = tuple(rng.choice(num_layers, rng.integers(2, 4), replace=False).tolist())
        terms.append(Term(group, rng.uniform(0.3, 1.5), every=bool(rng.integers(2))))
    settings = {"top": 4.0, "saturates": bool(seed % 2), "rounding": 2e-3, "spread": 0.5}
    problem = PlantedProblem(num_layers, terms, n_examples=int(rng.integers(1, 9)), **settings)
    given = PlantedProblem(
        num_layers,
        terms,
        n_examples=problem.n_examples,
        known_deltas=rng.uniform(size=(3, num_layers)),  # of some other examples
        **settings,
    )
    for one in (problem, given):
        made = propose(resolve("joint"), one, size)
        assert made.cost.prefills <= num_layers
        others = [propose(resolve(name), one, size).layers for name in ("first_order", "topk")]
        assert one.mean(made.layers) <= min(map(one.mean, others[: 1 + (one is given)]))


def test_its_trace_names_what_it_compared() -> None:
    problem, *_ = interacting(list(range(24)))
    made = propose(resolve("joint"), problem, 5)
    by_name = {move.what: move for move in made.trace}
    assert {"no layer", "first order", "Frank-Wolfe", "forward", "path"} <= set(by_name)
    assert by_name["first order"].loss == pytest.approx(problem.mean(by_name["first order"].layers))
    assert "measured" in str(by_name["path"]) and "first order" in str(by_name["first order"])


def test_refine_starts_from_anything_and_only_gets_better() -> None:
    for start in ("last", "first_order", (0, 1, 2, 3), resolve("random:seed=4")):
        problem = simple()
        made = propose(Refine(start), problem, 4)
        losses = [move.loss for move in made.trace if move.loss is not None]
        assert losses == sorted(losses, reverse=True)
        assert made.layers == tuple(sorted(ALONE))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ([-1, -1, -1, -1], True),
        ([-1, 0, 0, 0], True),
        ([-9, -1, 1, 1], True),
        ([-9, 1, 1, 0], False),  # the mean falls by one example alone
        ([-1, -1, -1, 4], False),
        ([0, 0, 0, 0], False),
    ],
)
def test_what_helps(change: list[float], expected: bool) -> None:
    old = np.array([5.0, 3.0, 8.0, 4.0])
    assert helps(old + change, old) == expected
    assert not (expected and helps(old, old + change))


def test_layers_that_a_single_example_asks_for_are_not_taken() -> None:
    """Layer 2 is worth more than layer 1 on average, by one example of eight."""
    problem = PlantedProblem(L, [Term((1,), 0.5), Term((2,), 0.6)], top=9.0)
    problem.scale[:, 1] = [0, 0, 0, 9, 0, 0, 0, 0]
    assert problem.mean({2}) < problem.mean({1})
    assert propose(Refine((1,)), problem, 1).layers == (1,)
    problem = PlantedProblem(L, [Term((1,), 0.5), Term((2,), 0.6)], top=9.0)
    problem.scale[:, 1] = [0, 2, 0, 2, 0, 2, 0, 2]
    assert propose(Refine((1,)), problem, 1).layers == (2,)


def test_only_layers_that_do_not_help_are_dropped() -> None:
    """What dropping a harmful layer gains is no allowance for dropping useful ones."""
    worth = {0: 0.5, 1: 0.06, 2: 0.05, 3: -0.15}
    terms = [Term((layer,), value) for layer, value in worth.items()]
    problem = PlantedProblem(L, terms, top=3.0)
    search = LocalSearch(problem, (0, 1, 2, 3))
    before = search.loss
    search.prune()
    assert search.layers == (0, 1, 2)
    search.prune(before)  # unless that is asked for
    assert search.layers == (0,)


def test_an_expensive_example_is_priced_as_it_is() -> None:
    """The part of the examples that a gradient can afford is not judged by their mean."""

    class Uneven(PlantedProblem):
        def gradient_work(self, alpha: np.ndarray, index: int) -> float:
            return super().gradient_work(alpha, index) * (9 if index == 0 else 1)

    problem = Uneven(L, [Term((1,), 0.5)], top=3.0)
    alpha = np.zeros(L)
    parts = [problem.gradient_price(alpha, [index]) for index in range(8)]
    assert parts[0] == pytest.approx(9 * parts[1])
    assert sum(parts) == pytest.approx(problem.gradient_price(alpha))


def test_refine_can_be_limited() -> None:
    started = propose(resolve("last"), simple(), 4)
    free = propose(Refine("last"), simple(), 4)
    made = propose(Refine("last", prefills=4), simple(), 4)
    assert started.cost.prefills < made.cost.prefills <= 5 < free.cost.prefills


def test_backward_is_refused_where_it_has_no_gradient() -> None:
    problem = simple()
    problem.objective = "kl"
    with pytest.raises(InputError, match="no gradient"):
        propose(resolve("backward"), problem, 4)
