"""Quality against cost: every size, several policies, the same examples."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from fake_model import FakeModel, make_examples

import swa
from swa import cost
from swa.cli import main
from swa.errors import ExampleError, InputError
from swa.policy import AttentionPolicy

POLICY = AttentionPolicy(sliding_window=8, num_sink_tokens=2)
EXAMPLES = make_examples(4)


def curves(policy: Any = POLICY, model: Any = None, **settings: Any) -> swa.Pareto:
    return swa.pareto(model or FakeModel(6), EXAMPLES, policy, **settings)


def test_every_size_has_its_exact_loss_and_its_cost() -> None:
    model: Any = FakeModel(6, native=[2])
    found = curves(model=model)
    assert [len(point.layers) for point in found.points] == list(range(6))
    full = cost.prefill_work(model.config, POLICY, model.selectable_layers, 40).flops
    for point in found.points:
        expected = [float(model.per_token(e, point.layers).mean()) for e in EXAMPLES]
        assert list(point.loss_per_example) == expected
        work = cost.prefill_work(model.config, POLICY, point.layers, 40).flops
        assert point.prefill == pytest.approx(work / full)
        assert point.kv_cache == 1  # full decode keeps all
        assert point.policy == POLICY.with_full_layers(point.layers, 6)
    assert found.points[-1].prefill == pytest.approx(1)
    assert found.points[-1].loss_per_example == found.loss_full
    for fewer, more in zip(found.points, found.points[1:], strict=False):
        assert set(fewer.layers) < set(more.layers)  # one ranking for all sizes


def test_costs_hold_at_the_length_asked_for() -> None:
    short, long = (curves(prompt_tokens=n).points[0].prefill for n in (100, 100_000))
    assert long < 0.1 < short
    windowed = AttentionPolicy.for_consumer("vllm", sliding_window=8)
    points = curves(windowed, prompt_tokens=80).points
    assert points[0].kv_cache == pytest.approx(0.1)
    assert points[3].kv_cache == pytest.approx(0.55)


def test_layers_are_chosen_under_every_policy() -> None:
    windowed = AttentionPolicy.for_consumer("vllm", sliding_window=8)
    found = curves([POLICY, windowed], tail_tokens=[0, 8, 0], sizes=[3, 1])
    assert [point.semantics for point in found.points] == [
        *["window 8, tail 0"] * 2,
        *["window 8, tail 8"] * 2,
        *["window 8, vllm"] * 2,
    ]
    assert [len(point.layers) for point in found.points] == [1, 3] * 3


def test_only_examples_that_tell_under_every_policy_are_used() -> None:
    examples = [*make_examples(3), *make_examples(1, prompt_len=20)]
    with pytest.warns(UserWarning, match="1 of 4 examples carry no signal under some policy"):
        found = swa.pareto(FakeModel(6), examples, POLICY, tail_tokens=[0, 12])  # type: ignore[arg-type]
    assert len(found.loss_full) == 3
    with pytest.raises(ExampleError, match="under every policy"):
        curves(tail_tokens=[0, 35])


def test_the_best_are_those_that_nothing_beats() -> None:
    found = curves(tail_tokens=[0, 16])
    best = found.best
    assert [point.prefill for point in best] == sorted(point.prefill for point in best)
    for point in found.points:
        beaten = any(
            (other.loss < point.loss and other.prefill <= point.prefill)
            or (other.loss <= point.loss and other.prefill < point.prefill)
            for other in found.points
        )
        assert beaten or point in best or point.loss in [p.loss for p in best]
        assert not (beaten and point in best)


def test_what_is_shown_and_saved(tmp_path: Path) -> None:
    from rich.console import Console

    found = curves(tail_tokens=[0, 16])
    console = Console(width=120, record=True, file=open(tmp_path / "out", "w"))  # noqa: SIM115
    console.print(found.table())
    text = console.export_text()
    assert "window 8, tail 16" in text and "gap closed" in text and "100%" in text
    assert repr(found).startswith("Pareto: 14 selections of fake by path")
    found.save(tmp_path / "pareto.json")
    data = json.loads((tmp_path / "pareto.json").read_text())
    assert [point["loss"] for point in data["points"]] == [point.loss for point in found.points]
    assert [point["best"] for point in data["points"]] == [p in found.best for p in found.points]
    assert AttentionPolicy.from_dict(data["points"][3]["policy"]) == found.points[3].policy
    ax = found.plot()
    assert len(ax.lines) == 3  # two policies, and full attention


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": [7]}, "a size must be an integer in 0..6"),
        ({"tail_tokens": []}, "tail_tokens is empty"),
        ({"policy": []}, "no policy"),
        ({"strategy": "best"}, "no strategy 'best'"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        curves(**settings)


def test_the_command(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(tiny(tokenizer=True, max_position_embeddings=4096))
    file = tmp_path / "e.jsonl"
    swa.examples.write_jsonl(file, [dataclasses.replace(e, answer_ids=(1, 2)) for e in EXAMPLES])
    command = ["pareto", checkpoint, "--examples", str(file), "--sliding-window", "8"]
    command += ["--tail-tokens", "0,4", "--beside", "vllm", "--threads", "1"]
    assert main([*command, "--sizes", "0,1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["points"]) == 6
    assert main([*command, "--plot", str(tmp_path / "p.png")]) == 0
    captured = capsys.readouterr()
    assert "gap closed" in captured.out and "prefills an example" in captured.err
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--sizes", "x"]) == 2
