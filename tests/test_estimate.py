"""What a sweep will take, and engines that are planned but hold no weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from glue import small_config

import swa
from swa import _core, cost, estimate
from swa.checkpoint import open_checkpoint
from swa.cli import main
from swa.cost import Work
from swa.errors import ExampleError, InputError
from swa.examples import Example
from swa.model import plan
from swa.score import sweep_tasks

POLICY = swa.AttentionPolicy(16, num_sink_tokens=2)
KINDS = ("nll", "sweep", "logits", "decode")


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Path]) -> Path:
    return tiny("qwen2", max_position_embeddings=4000)


@pytest.mark.parametrize("tail, decode", [(0, "full"), (5, "full"), (0, "window")])
def test_the_cost_model_counts_what_the_engine_counts(
    folder: Path, tail: int, decode: Literal["full", "window"]
) -> None:
    """The engine adds up the work of its tasks; a window and sinks that fill whole tiles."""
    model = swa.load(folder, dtype="float32", num_threads=1)
    policy = swa.AttentionPolicy(60, num_sink_tokens=4, num_tail_tokens=tail, decode=decode)
    example = Example(tuple(range(140)), tuple(range(6)))
    told: list[float] = []

    def progress(done: float, total: float) -> None:
        told[:] = [done, total]

    shape = (model.config, policy)
    rows = policy.rows(model.config, (1,), 140, 146)
    ids = np.array(example.prompt_ids + example.answer_ids, np.int32)
    model.engine.nll(ids, 140, rows.window, rows.sinks, rows.full_from, progress=progress)
    assert told == [cost.nll_work(*shape, (1,), 140, 6).flops] * 2
    for base, flips in (((), (0, 1, 2, 3)), ((1,), (0, 3))):
        model.sweep_example(example, policy, base, flips, to_full=True, progress=progress)
        assert told == [cost.sweep_work(*shape, base, flips, 140, 6).flops] * 2
    for narrow, base, flips in ((0, (0,), (1, 2, 3)), (2, (), (3,)), (1, (), (0, 1, 2, 3))):
        windows = tuple(60 if layer == narrow else 124 for layer in range(4))
        mixed = dataclasses.replace(policy, sliding_window=windows)
        model.sweep_example(example, mixed, base, flips, to_full=True, progress=progress)
        assert told == [cost.sweep_work(model.config, mixed, base, flips, 140, 6).flops] * 2
        assert cost.shared_rows(mixed, 4, flips, 139) == (64 if narrow in flips else 128)


@pytest.fixture
def known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "measure_speed", lambda model: Work(2e9, 1e9))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_has_the_sizes_of_the_model(folder: Path, dtype: str, tier: str) -> None:
    config = open_checkpoint(folder).config.engine_dict()
    planned, real = (
        _core.Engine(config, dtype=dtype, tier=tier, num_threads=2, planned=p)
        for p in (True, False)
    )
    assert planned.weight_bytes == real.weight_bytes > 0
    for kind in KINDS:
        sizes = [engine.workspace_bytes(kind, 700, 64) for engine in (planned, real)]
        assert sizes[0] == sizes[1] > 0


def test_a_plan_loads_and_runs_nothing(folder: Path) -> None:
    model = plan(folder)
    chunk = next(model.checkpoint.parameters())
    with pytest.raises(ValueError, match="only planned"):
        model.engine.load_rows(chunk.tensor, chunk.layer, 0, chunk.dtype, chunk.data)
    with pytest.raises(ValueError, match="only planned"):
        model.engine.finish()
    with pytest.raises(RuntimeError, match="finish"):
        model.nll([1, 2, 3], [4])


def test_a_plan_takes_no_memory() -> None:
    """A hundred billion parameters, on any machine."""
    config = {
        "vocab_size": 150_000,
        "hidden_size": 12_288,
        "intermediate_size": 40_000,
        "num_hidden_layers": 60,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_scale": 1.0,
        "inv_freq": np.ones(64, np.float32),
        **dict.fromkeys(("tie_word_embeddings", "qk_norm"), False),
        **{f"{name}_bias": False for name in ("q", "k", "v", "o", "gate", "up", "down")},
    }
    assert 190e9 < _core.Engine(config, dtype="bfloat16", planned=True).weight_bytes < 230e9


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_hidden_layers": 65536, "num_attention_heads": 2**20, "head_dim": 1024},
        {"num_attention_heads": 2**29, "head_dim": 2},
        {"hidden_size": 2**31 - 1},
        {"hidden_size": 2**31 - 1, "num_hidden_layers": 65536},
        {"vocab_size": 2**31 - 1},
    ],
    ids=str,
)
def test_sizes_do_not_wrap(sizes: dict[str, int]) -> None:
    """Beyond 2^64 they stay the largest number: what more tokens need never falls."""
    names = "vocab_size", "hidden_size", "intermediate_size", "head_dim"
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1} | dict.fromkeys(names, 2) | sizes
    config = small_config(num_key_value_heads=sizes["num_attention_heads"], **sizes)
    engine = _core.Engine(config, dtype="bfloat16", num_threads=2, planned=True)
    lengths = [2**i for i in range(31)] + [2**31 - 1]
    calls: list[Callable[[int], int]] = [
        *(lambda n, kind=kind: engine.workspace_bytes(kind, n, n) for kind in KINDS),
        *(lambda n, choices=c: engine.gates_bytes(n, choices, n) for c in (1, 8)),
    ]
    for call in calls:
        needs = list(map(call, lengths))
        assert needs == sorted(needs)
        assert needs[-1] < 2**64


def test_weights_that_do_not_fit_are_refused_before_they_are_allocated(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swa.model.available_bytes", lambda: 1000)
    made: list[bool] = []

    class Engine:
        def __new__(cls, *arguments: object, planned: bool = False, **options: object) -> object:
            made.append(planned)
            return original(*arguments, planned=planned, **options)

    original = _core.Engine
    monkeypatch.setattr("swa.model._core.Engine", Engine)
    with pytest.raises(MemoryError, match="weights"):
        swa.load(folder)
    assert made == [True]


@pytest.mark.usefixtures("known_speed")
def test_work_time_and_memory(folder: Path) -> None:
    model = swa.load(folder, num_threads=1)
    found = estimate.estimate(model, POLICY, prompt_tokens=300, answer_tokens=5, n_examples=7)
    (task,), _ = sweep_tasks(model, [Example((1,) * 300, (2,) * 5)], POLICY, "restore", None)
    parts = task.work(model.config)
    assert found.work.products == pytest.approx(7 * sum(part.products for part in parts))
    assert found.work.attention == pytest.approx(7 * sum(part.attention for part in parts))
    expected = found.work.products / 2e9 + found.work.attention / 1e9
    assert found.seconds == pytest.approx(expected)
    assert found.weight_bytes == model.engine.weight_bytes
    assert found.peak_bytes == model.memory_required(305, "sweep", POLICY)
    assert "7 x 305 tokens" in repr(found)


@pytest.mark.usefixtures("known_speed")
def test_only_flipped_layers_bound_what_a_sweep_keeps(folder: Path) -> None:
    def peak(sliding_window: int | tuple[int, ...], base: list[int]) -> int:
        policy = dataclasses.replace(POLICY, sliding_window=sliding_window)
        return estimate.estimate(plan(folder), policy, prompt_tokens=3000, base=base).peak_bytes

    assert peak((16, 2000, 2000, 2000), [0]) == peak(2000, [0]) > peak(16, [0])
    assert peak((16, 2000, 2000, 2000), [1]) == peak(16, [1])


@pytest.mark.usefixtures("known_speed")
def test_fewer_flips_are_less_work(folder: Path) -> None:
    def work(**settings: object) -> float:
        settings = {"prompt_tokens": 300} | settings
        return estimate.estimate(plan(folder), POLICY, **settings).work.flops  # type: ignore[arg-type]

    assert work(base=[0, 1]) < work()
    assert work(direction="ablate") > work(direction="ablate", base=[3])
    assert work(prompt_tokens=600) > 1.5 * work()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1"),
        ({"prompt_tokens": 300, "n_examples": 0}, "n_examples must be at least 1"),
        ({"prompt_tokens": 4000}, "4016 tokens are more than the model's 4000"),
        ({"prompt_tokens": 300, "base": [9]}, "base has the layers"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, settings: dict[str, int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        estimate.estimate(plan(folder), POLICY, **settings)
    with pytest.raises(ExampleError, match="signal"):
        estimate.estimate(plan(folder), POLICY, prompt_tokens=10)


def test_speed_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "PROBE_SECONDS", 0.01)
    speed = estimate.measure_speed(plan(folder))
    assert speed.products > 0 and speed.attention > 0


def test_the_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "PROBE_SECONDS", 0.01)
    run = ["estimate", str(folder), "--sliding-window", "16", "--prompt-tokens", "300"]
    assert main([*run, "--examples", "3", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["n_examples"] == 3 and data["n_tokens"] == 316
    assert data["seconds"] > 0 and data["peak_bytes"] > data["weight_bytes"] > 0
    assert main(run) == 0
    assert "TFLOP an example" in capsys.readouterr().out
    assert main([*run, "--decode", "window", "--tail-tokens", "4"]) == 2
