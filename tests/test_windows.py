"""Several windows at once: the knapsack, and the search on a checkpoint whose truth is known."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, make_examples
from hypothesis import given
from hypothesis import strategies as st
from planted import Planted, planted_checkpoint

import swa
from swa.cli import main
from swa.errors import InputError
from swa.knapsack import knapsack

SMALL, MIDDLE, PROMPT_TOKENS = 32, 128, 260
POLICY = swa.AttentionPolicy(sliding_window=SMALL, num_sink_tokens=4)


# ---- the knapsack


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_the_knapsack_is_exact(n_layers: int, n_choices: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    value = rng.integers(-3, 6, (n_layers, n_choices)).astype(float)
    price = rng.integers(0, 5, (n_layers, n_choices)).astype(float)
    limit = float(rng.integers(price.min(axis=1).sum(), price.max(axis=1).sum() + 2))

    def total(table: np.ndarray, choice: tuple[int, ...]) -> float:
        return float(table[range(n_layers), choice].sum())

    every = itertools.product(range(n_choices), repeat=n_layers)
    best = max(total(value, c) for c in every if total(price, c) <= limit)
    found = knapsack(value, price, limit)
    assert total(price, found) <= limit
    assert total(value, found) == best


def test_the_knapsack_takes_what_is_cheaper_then_lower() -> None:
    assert knapsack(np.ones((2, 2)), np.array([[1.0, 0.0], [0.0, 0.0]]), 5.0) == (1, 0)
    forbidden = np.array([[0.0, -np.inf], [0.0, 2.0]])
    assert knapsack(forbidden, np.zeros((2, 2)), 0.0) == (0, 1)


def test_the_knapsack_of_a_large_model() -> None:
    rng = np.random.default_rng(0)
    price = np.tile([0.0, 1.0, 3.0, 10.0], (80, 1))
    value = np.sort(rng.uniform(0, 1, (80, 4)), axis=1)
    found = knapsack(value, price, 200.0)
    assert 190 < price[range(80), found].sum() <= 200


# ---- the search


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Layers 2 and 7 need everything, layer 5 what stands in the last 128 tokens."""
    return planted_checkpoint(tmp_path_factory.mktemp("planted"), n_values={2: 4, 5: 8, 7: 2})


@pytest.fixture(scope="module")
def model(planted: Planted) -> swa.Model:
    return swa.load(planted.folder, dtype="float32", num_threads=1)


def examples(planted: Planted, seeds: range = range(3)) -> list[swa.Example]:
    made = [
        planted.example(PROMPT_TOKENS, near=2 * SMALL, seed=seed, within={5: MIDDLE})
        for seed in seeds
    ]
    return [swa.Example(tuple(e.prompt_ids), tuple(e.answer_ids)) for e in made]


def just_enough(model: swa.Model) -> swa.Budget:
    """The work of layers 2 and 7 full, and 5 with the middle window."""
    windows = tuple(MIDDLE if i == 5 else SMALL for i in range(9))
    mixed = swa.AttentionPolicy(sliding_window=windows, num_sink_tokens=4)
    price, full = swa.Budget(prefill_flops=1.0, prompt_tokens=PROMPT_TOKENS).priced(
        model.config, POLICY
    )
    return swa.Budget(prefill_flops=price(mixed, (2, 7)) / full, prompt_tokens=PROMPT_TOKENS)


def test_each_layer_gets_the_window_it_needs(
    planted: Planted, model: swa.Model, tmp_path: Path
) -> None:
    budget = just_enough(model)
    journal = tmp_path / "j"
    chosen = swa.select(model, examples(planted), POLICY, budget, windows=[MIDDLE], journal=journal)
    done = journal.read_bytes()
    journal.write_bytes(done[: len(done) // 2])  # as a crash leaves it
    assert chosen == swa.select(
        model, examples(planted), POLICY, budget, windows=[MIDDLE], journal=journal
    )
    windows = chosen.policy.sliding_window
    assert chosen.layers == (2, 7)
    assert isinstance(windows, tuple) and windows[5] == MIDDLE
    search = chosen.search
    assert search is not None and max(search.loss_chosen) < 1e-3
    assert search.cost.prefills <= 9 + 2  # with both ends

    for heldout in examples(planted, range(10, 12)):
        assert model.patch(chosen).nll_example(heldout).mean < 1e-3
    nll = [model.patch(chosen).nll_example(example).mean for example in examples(planted)]
    assert nll == list(search.loss_chosen)  # bit for bit
    chosen.save(tmp_path / "policy.json")
    assert swa.Selection.load(tmp_path / "policy.json") == chosen
    assert model.patch(swa.AttentionPolicy.load(tmp_path / "policy.json")).policy == chosen.policy

    one_window = swa.select(model, examples(planted), POLICY, budget)
    assert len(one_window.layers) == 2
    assert one_window.search is not None and min(one_window.search.loss_chosen) > 0.1


def test_divergence_and_memory(planted: Planted, model: swa.Model) -> None:
    windowed = swa.AttentionPolicy(sliding_window=SMALL, num_sink_tokens=4, decode="window")
    config = model.config
    price, _ = swa.Budget(kv_bytes=10**9, prompt_tokens=300).priced(config, windowed)
    budget = swa.Budget(kv_bytes=int(price(windowed, (2, 5, 7))), prompt_tokens=300)
    chosen = swa.select(
        model, examples(planted, range(1)), windowed, budget, windows=[MIDDLE], objective="kl"
    )
    assert price(chosen.policy, chosen.layers) <= price(windowed, (2, 5, 7))
    assert chosen.search is not None and max(chosen.search.loss_chosen) < 1e-3
    assert max(chosen.search.loss_full) < 1e-6


def test_layers_that_cannot_be_selected_stay(tiny: Any) -> None:
    native = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2}
    model = swa.load(tiny("qwen2", overrides=native), dtype="float32", num_threads=1)
    policy = swa.AttentionPolicy(sliding_window=8)
    budget = swa.Budget(prefill_flops=0.99, prompt_tokens=60)
    chosen = swa.select(
        model, make_examples(2, prompt_len=60), policy, budget, windows=[16, 32], seed=1
    )
    assert set(chosen.layers) <= {0, 1}
    price, limit = budget.priced(model.config, policy)
    assert price(chosen.policy, chosen.layers) <= limit
    windows = chosen.policy.sliding_window
    assert isinstance(windows, tuple) and windows[2:] == (8, 8)
    assert chosen.search is not None
    proposed = [move.what for move in chosen.search.trace if "and full: " in move.what]
    assert {text.split(" and ")[0] for text in proposed} >= {"16", "32"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"windows": [8]}, "takes two to 7 sizes"),
        ({"windows": [16, 0]}, "a window must be an integer >= 1"),
        ({"windows": range(9, 19)}, "takes two to 7 sizes"),
        ({"windows": [16], "strategy": "path"}, "leave out strategy and scores"),
        ({"windows": [16], "budget": swa.Budget(fraction=0.5)}, "not one of work or memory"),
        (
            {"windows": [16], "policy": swa.AttentionPolicy(sliding_window=(8, 8, 8, 8, 8))},
            "give the policy one sliding_window",
        ),
        (
            {"windows": [16], "budget": swa.Budget(prefill_flops=0.01, prompt_tokens=99)},
            "cannot be met",
        ),
    ],
)
def test_bad_windows(settings: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "policy": swa.AttentionPolicy(sliding_window=8),
        "budget": swa.Budget(prefill_flops=0.9, prompt_tokens=99),
    }
    with pytest.raises(InputError, match=message):
        swa.select(FakeModel(5), examples=make_examples(2), **(arguments | settings))  # type: ignore[call-overload]


def test_the_command(planted: Planted, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    swa.examples.write_jsonl("e.jsonl", examples(planted, range(1)))
    command = ["select", str(planted.folder), "--examples", "e.jsonl", "--sliding-window", "32"]
    command += [
        "--sink-tokens",
        "4",
        "--windows",
        "128",
        "--prefill-flops",
        "0.95",
        "--threads",
        "1",
    ]
    assert main([*command, "--at-tokens", "260", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["strategy"] == "windows 32, 128"
    assert set(data["policy"]["sliding_window"]) <= {32, 128}
