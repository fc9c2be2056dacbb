"""The benchmarks work: turns, medians, checks and rendering. No test asserts a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed
try:
    from benchmarks import render
    from benchmarks.harness import Call, Case, Disagreement, Row, Side, Workers, measure
    from benchmarks.rows import by_flops, by_seconds
finally:
    sys.path.remove(str(ROOT))

OURS, PEER = Side("ours"), Side("peer")


class FakeWorker:
    """Answers with the numbers it was given, and writes down what it was asked."""

    def __init__(self, name: str, values: list[float], log: list[tuple[str, str]]) -> None:
        self.name, self.values, self.log = name, iter(values), log

    def ask(self, **request: Any) -> Any:
        what = next(word for word in ("prepare", "measure", "forget") if word in request)
        self.log.append((self.name, what))
        return {"value": next(self.values), "result": self.name} if what == "measure" else {}

    def close(self) -> None:
        self.log.append((self.name, "close"))


def run_fakes(
    values: Mapping[Side, list[float]], repeats: int, seconds: float = 60.0, **settings: Any
) -> tuple[list[Row], list[tuple[str, str]]]:
    log: list[tuple[str, str]] = []
    case = Case(
        "case",
        {"ours": Call(OURS, "f"), "peer": Call(PEER, "f")},
        lambda median: by_seconds("case", median["ours"], {"peer": (median["peer"], 2.0)}),
        **settings,
    )
    start = lambda side, n: FakeWorker(side.module, values[side], log)  # noqa: E731
    with Workers(2, start) as workers:
        return measure(case, workers, repeats, seconds), log


def test_sides_are_measured_in_turns_and_medians_taken_without_the_warm_up() -> None:
    values = {OURS: [100.0, 1.0, 9.0, 2.0], PEER: [0.0, 4.0, 6.0, 50.0]}
    (row,), log = run_fakes(values, repeats=3)
    measured = [name for name, what in log if what == "measure"]
    assert measured == ["ours", "peer"] * 4
    assert (row.ours, row.theirs, row.ratio, row.repeats) == (2.0, 6.0, 3.0, 3)
    assert log[-2:] == [("ours", "close"), ("peer", "close")]


def test_a_case_that_takes_long_is_measured_once() -> None:
    values = {OURS: [3.0], PEER: [6.0]}
    (row,), _ = run_fakes(values, repeats=5, seconds=0.0, warm_up=False)
    assert (row.ours, row.repeats) == (3.0, 1)


def test_sides_that_disagree_end_the_run_after_one_round() -> None:
    def disagree(results: Mapping[str, Any]) -> None:
        assert results == {"ours": "ours", "peer": "peer"}
        raise Disagreement("different things")

    with pytest.raises(Disagreement, match="different things"):
        run_fakes({OURS: [1.0], PEER: [1.0]}, repeats=5, agree=disagree)


def test_a_rate_has_the_same_ratio_as_its_seconds() -> None:
    first, second = by_flops("f", 8.0, 2.0, {"a": (4.0, None), "b": (1.0, 1.5)}, 0.5, 0.7)
    assert (first.ours, first.theirs, first.ratio) == (4.0, 2.0, 2.0)
    assert (first.share, first.share_target) == (0.5, 0.7)
    assert (second.ratio, second.target, second.share) == (0.5, 1.5, None)
    assert render.missed(first) and render.missed(second)


def test_quantities() -> None:
    shown = [render.quantity(v, "s") for v in (123.4, 1.5, 0.0456, 3e-6)]
    assert shown == ["123 s", "1.50 s", "45.6 ms", "3.00 µs"]
    assert render.quantity(2.5e11, "FLOP/s") == "250 GFLOP/s"
    assert render.quantity(1.5 * 2**30, "B") == "1.50 GiB"


def test_results_replace_results_between_the_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{render.BEGIN}\nold\n{render.END}\nafter\n")
    machine = {
        "architecture": "x86_64",
        "cpu_flags": ["avx2"],
        "num_threads": 2,
        "tier": "avx2",
        "python": "3",
        "compiler": "gcc",
        "libraries": {"torch": None, "numpy": "2"},
    }
    row = Row("a case", "s", 1.0, "peer", 3.0, 3.0, 4.0, 0.8, 0.7, subset="gemm")
    text = render.markdown(machine, [row], "How.")
    for _ in range(2):  # again: nothing piles up
        render.insert(readme, text)
        assert readme.read_text() == (f"before\n{render.BEGIN}\n\n{text}\n\n{render.END}\nafter\n")
    assert "| a case | 1.00 s | peer | 3.00 s | 3.00x ✗ | 4x | 80% ✓ | 70% |" in text
    with pytest.raises(ValueError, match="each once"):
        render.insert(readme, render.END)
        render.insert(readme, text)


def test_windows_by_blocks_are_windows() -> None:
    import torch
    from oracle import attention
    from reference import visible

    from benchmarks.torch_kernels import window_attention, window_mask

    window, sinks, n_tokens = 16, 3, 70  # the last block is cut off
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, n_tokens, 8) for heads in (4, 2, 2))
    for s in (0, sinks):
        mask = window_mask(window, s, torch.float32)
        out = window_attention(q, k, v, window, s, mask)[0].transpose(0, 1).numpy()
        arrays = (x[0].transpose(0, 1).numpy() for x in (q, k, v))
        expected = attention(*arrays, visible(n_tokens, window, s, n_tokens))
        np.testing.assert_allclose(out, expected, atol=1e-5)


def test_the_command_measures_peaks(tmp_path: Path) -> None:
    out = tmp_path / "peaks.json"
    done = subprocess.run(
        [
            sys.executable,
            *["-m", "benchmarks", "peaks", "--quick", "--repeats", "1", "--threads", "1", "--json"],
            out,
        ],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    rows = {row["case"]: row for row in document["rows"]}
    assert "read" in rows and f"f32, {document['machine']['tier']}" in rows
    assert all(row["ours"] > 0 and row["repeats"] == 1 for row in rows.values())
    assert "GFLOP/s" in done.stdout
