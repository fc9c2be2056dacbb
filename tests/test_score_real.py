"""Scores of real (tiny) checkpoints through the engine, from score_layers to a patched model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import swa
from swa.examples import Example
from swa.layer_scores import LayerScores
from swa.testing import noise_floor

POLICIES = {
    "full decode": swa.AttentionPolicy(sliding_window=12, num_sink_tokens=2),
    "tail": swa.AttentionPolicy(sliding_window=12, num_sink_tokens=2, num_tail_tokens=5),
    "windowed decode": swa.AttentionPolicy(sliding_window=12, decode="window"),
    "a window per layer": swa.AttentionPolicy(sliding_window=(8, 12, 16, 24)),
}
NATIVE = {
    "overrides": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 3}
}  # of qwen2: layer 3 slides by itself


def make_examples(count: int = 3) -> list[Example]:
    generator = np.random.default_rng(1)
    return [
        Example(
            tuple(generator.integers(0, 256, 60 + 7 * i).tolist()),
            tuple(generator.integers(0, 256, 1 + 3 * i).tolist()),
            task=("num", "copy")[i % 2],
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.parametrize("direction", ["restore", "ablate"])
@pytest.mark.parametrize("base", [None, (0, 2)])
@pytest.mark.parametrize(
    ("family", "settings", "dtype"),
    [("llama", {}, "float32"), ("qwen2", NATIVE, "bfloat16")],
    ids=["llama", "qwen2 with a native window"],
)
def test_scores_equal_independent_runs_to_the_bit(
    tiny: Any, policy: Any, direction: Any, base: Any, family: str, settings: Any, dtype: Any
) -> None:
    model = swa.load(tiny(family, **settings), dtype=dtype, num_threads=1)
    selectable = {0, 1, 2} if settings else {0, 1, 2, 3}
    scores = swa.score_layers(model, make_examples(), policy, direction=direction, base=base)
    start = set(base or (selectable if direction == "ablate" and base is None else ()))
    flips = start if direction == "ablate" else selectable - start
    sign = 1 if direction == "restore" else -1
    for i, example in enumerate(make_examples()):

        def nll(full: set[int], example: Example = example) -> float:
            return model.nll_example(example, policy=policy, full_layers=full).mean

        assert scores.nll_base[i] == nll(start)
        assert scores.nll_full[i] == nll(selectable) == model.nll_example(example).mean
        assert scores.nll_swa[i] == nll(set())
        assert list(scores.delta_per_example[i]) == [
            sign * (nll(start) - nll(start ^ {layer})) if layer in flips else None
            for layer in range(4)
        ]
    assert any(scores.delta[layer] for layer in flips)


def test_a_tail_leaves_nothing_to_the_last_layer(tiny: Any) -> None:
    """Rows that reach the answer through the last layer are all exempt: its delta is exactly 0."""
    model = swa.load(tiny(), num_threads=1)
    for direction in ("restore", "ablate"):
        with_tail, without = (
            swa.score_layers(model, make_examples(), POLICIES[name], direction=direction)
            for name in ("tail", "full decode")
        )
        assert [row[3] for row in with_tail.delta_per_example] == [0.0] * 3
        assert without.delta[3] != 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_file_is_the_same_for_every_thread_count(tiny: Any, tmp_path: Path, dtype: Any) -> None:
    contents = set()
    for threads in (1, 2, 3):
        model = swa.load(tiny(), dtype=dtype, num_threads=threads)
        scores = swa.score_layers(model, make_examples(), POLICIES["full decode"])
        scores.save(tmp_path / "scores.json")
        contents.add((tmp_path / "scores.json").read_bytes())
    assert len(contents) == 1


KILLED_RUN = """
import dataclasses, os, signal, sys
import swa, test_score_real as shared

class KilledEngine:
    calls = 0

    def __init__(self, engine):
        self.engine = engine

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def sweep(self, *arguments, **named):
        self.calls += 1
        if self.calls == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.engine.sweep(*arguments, **named)

model = swa.load(sys.argv[1], num_threads=1)
model = dataclasses.replace(model, engine=KilledEngine(model.engine))
swa.score_layers(model, shared.make_examples(6), shared.POLICIES["tail"], journal=sys.argv[2])
"""


def test_a_sweep_killed_resumes_to_the_identical_file(tiny: Any, tmp_path: Path) -> None:
    folder, journal = tiny(), tmp_path / "scores.journal"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, folder, journal],
        env=os.environ | {"PYTHONPATH": path},
        check=False,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(journal.read_text().splitlines()) == 1 + 3

    model = swa.load(folder, num_threads=2)
    examples, policy = make_examples(6), POLICIES["tail"]
    swa.score_layers(model, examples, policy, journal=journal).save(tmp_path / "resumed.json")
    swa.score_layers(model, examples, policy).save(tmp_path / "straight.json")
    assert (tmp_path / "resumed.json").read_bytes() == (tmp_path / "straight.json").read_bytes()


def test_a_selection_patches_the_model(tiny: Any, tmp_path: Path) -> None:
    model = swa.load(tiny(), num_threads=1)
    scores = swa.score_layers(model, make_examples(), POLICIES["full decode"])
    chosen = swa.select(scores, swa.Budget(full_attention_layers=2))
    chosen.save(tmp_path / "policy.json")
    expected = model.nll_example(
        make_examples()[1], policy=POLICIES["full decode"], full_layers=chosen.layers
    )
    for applied in (chosen, swa.Selection.load(tmp_path / "policy.json"), chosen.policy):
        found = model.patch(applied).nll_example(make_examples()[1])
        assert found.per_token.tolist() == expected.per_token.tolist()


def test_bfloat16_moves_deltas_by_far_less_than_they_are(tiny: Any) -> None:
    runs: list[LayerScores] = [
        swa.score_layers(
            swa.load(tiny(dtype="BF16"), dtype=dtype, num_threads=1),
            make_examples(),
            POLICIES["full decode"],
        )
        for dtype in ("bfloat16", "float32")
    ]
    largest = max(abs(delta) for delta in runs[1].delta if delta is not None)
    floor = noise_floor(*runs)
    assert floor < 0.1 * largest
    assert (floor > 0) == ("bf16" in runs[0].tier)  # others round no activations
