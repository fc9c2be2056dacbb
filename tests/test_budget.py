"""Budgets: what they mean in layers, and what they refuse."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel
from hypothesis import given
from hypothesis import strategies as st

from swa import cost
from swa.budget import Budget
from swa.errors import InputError
from swa.policy import AttentionPolicy

POLICY = AttentionPolicy(sliding_window=64, num_sink_tokens=2)
WINDOWED = AttentionPolicy.for_consumer("vllm", sliding_window=64)
LENGTH = 1000


@pytest.mark.parametrize(
    ("fraction", "num_layers", "expected"),
    [
        (0.25, 30, 8),  # 7.5
        (0.25, 28, 7),
        (0.25, 36, 9),
        (0.25, 29, 7),  # 7.25
        (0.35, 10, 4),  # 3.5, though the float 0.35 is below it
        (1 / 12, 30, 3),  # 2.5, though the float 1/12 is not a twelfth
        (Fraction(1, 12), 30, 3),
        (1 / 3, 30, 10),
        (0.2499999, 30, 7),
        (np.float32(0.125), 28, 4),  # 3.5
        (0.0, 30, 0),
        (0.01, 30, 0),
        (1, 30, 30),
    ],
)
def test_fractions_round_half_up(fraction: Any, num_layers: int, expected: int) -> None:
    assert Budget(fraction=fraction).resolve(num_layers) == expected


@given(num_layers=st.integers(1, 200), size=st.integers(0, 200))
def test_any_half_layer_rounds_up(num_layers: int, size: int) -> None:
    if size < num_layers:
        assert Budget(fraction=(2 * size + 1) / (2 * num_layers)).resolve(num_layers) == size + 1
        assert Budget(fraction=size / num_layers).resolve(num_layers) == size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one, not none"),
        ({"full_attention_layers": 3, "fraction": 0.5}, "not full_attention_layers and fraction"),
        ({"full_attention_layers": -1}, "full_attention_layers must be"),
        ({"full_attention_layers": 2.0}, "full_attention_layers must be"),
        ({"full_attention_layers": True}, "full_attention_layers must be"),
        ({"fraction": 1.01}, "fraction must be"),
        ({"fraction": -0.1}, "fraction must be"),
        ({"fraction": float("nan")}, "fraction must be"),
        ({"fraction": True}, "fraction must be"),
        ({"fraction": "a quarter"}, "fraction must be"),
        ({"prefill_flops": 0.5}, "prefill_flops holds at a length: give prompt_tokens="),
        ({"kv_bytes": 100}, "kv_bytes holds at a length"),
        ({"prefill_flops": 2.0, "prompt_tokens": 10}, "prefill_flops must be"),
        ({"prefill_flops": 0.5, "prompt_tokens": 0}, "prompt_tokens must be"),
        ({"kv_bytes": 0, "prompt_tokens": 10}, "kv_bytes must be"),
        ({"fraction": 0.5, "prompt_tokens": 10}, "prompt_tokens says nothing beside fraction"),
        ({"prompt_tokens": 10}, "not none"),
        ({"nll_increase": -0.1}, "nll_increase must be"),
        ({"nll_increase": float("inf")}, "nll_increase must be"),
    ],
)
def test_bad_budgets(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Budget(**arguments)


def test_a_budget_beyond_the_model() -> None:
    with pytest.raises(InputError, match="31 full-attention layers, the model has 30"):
        Budget(full_attention_layers=31).resolve(30)


@pytest.mark.parametrize(
    "budget", [Budget(prefill_flops=0.5, prompt_tokens=9), Budget(nll_increase=0.1)]
)
def test_a_number_of_layers_alone_does_not_tell_these(budget: Budget) -> None:
    with pytest.raises(InputError, match="takes the model"):
        budget.resolve(30)


@pytest.mark.parametrize("windows", [64, (64, 256, 32, 999, 64)])
def test_prefill_flops_are_kept_to_whichever_layers_are_chosen(windows: Any) -> None:
    config: Any = FakeModel().config
    policy = AttentionPolicy(sliding_window=windows, num_sink_tokens=2)

    def share(layers: tuple[int, ...]) -> float:
        every = cost.prefill_work(config, policy, range(5), LENGTH).flops
        return cost.prefill_work(config, policy, layers, LENGTH).flops / every

    order = sorted(range(5), key=lambda layer: -share((layer,)))  # the most expensive first
    for size in range(6):
        just = Budget(prefill_flops=share(tuple(order[:size])), prompt_tokens=LENGTH)
        found = just.size(config, policy)
        assert found >= size
        assert share(tuple(order[:found])) <= just.prefill_flops * (1 + 1e-9)
    less = Budget(prefill_flops=share((order[0],)) - 1e-6, prompt_tokens=LENGTH)
    assert less.size(config, policy) == 0
    with pytest.raises(InputError, match=r"cannot be met: with all layers sliding it is 0\.\d+ of"):
        Budget(prefill_flops=share(()) - 1e-6, prompt_tokens=LENGTH).size(config, policy)


def test_work_grows_with_layers_and_length() -> None:
    config: Any = FakeModel().config
    budget = Budget(prefill_flops=0.5, prompt_tokens=4000)
    assert 0 < budget.size(config, POLICY) < 5
    assert Budget(prefill_flops=1.0, prompt_tokens=4000).size(config, POLICY) == 5
    assert Budget(prefill_flops=0.5, prompt_tokens=200_000).size(config, POLICY) == 2


def test_kv_bytes() -> None:
    config: Any = FakeModel(native=[1]).config
    each = 2 * 2 * 4 * 2  # keys and values, KV heads, head_dim, bytes
    windowed = 4 * 64 * each + 8 * each  # layer 1 has a window of 8 of its own
    assert cost.kv_bytes(config, WINDOWED, (), LENGTH) == windowed
    assert cost.kv_bytes(config, WINDOWED, (0, 4), LENGTH) == windowed + 2 * (LENGTH - 64) * each
    assert cost.kv_bytes(config, WINDOWED, (0,), 10) == 4 * 10 * each + 8 * each
    for size in range(5):
        fits = windowed + size * (LENGTH - 64) * each
        assert Budget(kv_bytes=fits, prompt_tokens=LENGTH).size(config, WINDOWED) == size
    with pytest.raises(InputError, match="cannot be met: with all layers sliding it is"):
        Budget(kv_bytes=windowed - 1, prompt_tokens=LENGTH).size(config, WINDOWED)


def test_kv_bytes_are_refused_where_nothing_is_saved() -> None:
    config: Any = FakeModel().config
    with pytest.raises(InputError, match="every layer keeps all keys, and nothing is saved"):
        Budget(kv_bytes=10**6, prompt_tokens=LENGTH).size(config, POLICY)


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget(full_attention_layers=3), "3 layers"),
        (Budget(fraction=1 / 3), "0.3333 of the layers"),
        (Budget(prefill_flops=0.5, prompt_tokens=4096), "0.5 of the prefill at 4,096 tokens"),
        (Budget(kv_bytes=2**29, prompt_tokens=9), "0.5 GiB of KV cache at 9 tokens"),
        (Budget(nll_increase=0.01), "a loss within 0.01 nats of full attention"),
    ],
)
def test_words_and_files(budget: Budget, text: str) -> None:
    assert str(budget) == text
    assert Budget.from_dict(budget.to_dict()) == budget
