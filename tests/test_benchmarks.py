"""The benchmarks work: turns, medians, checks and rendering. No test asserts a time."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
path = sys.path[:]
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed
try:
    from benchmarks import agreement, gguf_bf16, harness, plots, render, results, run, shapes
    from benchmarks.harness import Call, Case, Disagreement, Row, Side, SideError, Workers, measure
    from benchmarks.model_cases import logits_in_both
    from benchmarks.results import CaseResult, Results, ResultsError, Run
    from benchmarks.rows import Title, by_flops, by_seconds, share_of
    from benchmarks.setting import Setting
finally:
    sys.path[:] = path

OURS, PEER = Side("ours"), Side("peer")
MACHINE = {
    "architecture": "x86_64",
    "cpu_flags": ["avx2"],
    "num_threads": 2,
    "tier": "avx2",
    "python": "3",
    "compiler": "gcc",
    "libraries": {"torch": None, "numpy": "2"},
}


class FakeWorker:
    """Answers with the numbers it was given, and writes down what it was asked."""

    def __init__(self, name: str, values: list[float], log: list[tuple[str, str]]) -> None:
        self.name, self.values, self.log = name, iter(values), log

    def ask(self, **request: Any) -> Any:
        what = next(word for word in ("prepare", "measure", "forget") if word in request)
        self.log.append((self.name, what))
        if what != "measure":
            return {}
        if (value := next(self.values, None)) is None:
            raise SideError("a traceback\nError: no more")
        return {"value": value, "result": self.name}

    def close(self) -> None:
        self.log.append((self.name, "close"))

    def kill(self) -> None:
        self.log.append((self.name, "kill"))


def a_case(name: str = "case", peer: Side = PEER, **settings: Any) -> Case:
    return Case(
        name,
        {"ours": Call(OURS, "f"), "peer": Call(peer, "f")},
        lambda median, _: by_seconds(Title("case"), median["ours"], median, {"peer": 2.0}),
        **settings,
    )


def run_fakes(
    values: Mapping[Side, list[float]], repeats: int, seconds: float = 60.0, **settings: Any
) -> tuple[harness.Measured, list[tuple[str, str]]]:
    log: list[tuple[str, str]] = []
    start = lambda side, n: FakeWorker(side.module, values[side], log)  # noqa: E731
    with Workers(2, start) as workers:
        return measure(a_case(peer=[*values][1], **settings), workers, repeats, seconds), log


def test_sides_are_measured_in_turns_and_medians_taken_without_the_warm_up() -> None:
    values = {OURS: [100.0, 1.0, 9.0, 2.0], PEER: [0.0, 4.0, 6.0, 50.0]}
    done, log = run_fakes(values, repeats=3)
    (row,) = done.rows
    measured = [name for name, what in log if what == "measure"]
    assert measured == ["ours", "peer"] * 4
    assert (row.ours, row.theirs, row.ratio, row.rounds) == (2.0, 6.0, 3.0, 3)
    assert log[-2:] == [("ours", "close"), ("peer", "close")]


def test_a_case_that_takes_long_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "LONG_ROUND", 0.0)
    done, _ = run_fakes({OURS: [3.0], PEER: [6.0]}, repeats=5, seconds=0.0)
    assert (done.rows[0].ours, done.rows[0].rounds) == (3.0, 1)


def test_a_case_that_is_not_timed_has_one_round() -> None:
    done, _ = run_fakes({OURS: [3.0], PEER: [6.0]}, repeats=5, is_timed=False)
    assert (done.rows[0].ours, done.rows[0].rounds) == (3.0, 1)


def test_sides_that_disagree_end_the_case_after_one_round() -> None:
    def disagree(result: Mapping[str, Any]) -> None:
        assert result == {"ours": "ours", "peer": "peer"}
        raise Disagreement("different things")

    with pytest.raises(Disagreement, match="different things"):
        run_fakes({OURS: [1.0], PEER: [1.0]}, repeats=5, agree=disagree)


def test_a_side_that_fails_ends_the_case_unless_it_is_optional() -> None:
    with pytest.raises(SideError, match="no more"):
        run_fakes({OURS: [1.0, 2.0], PEER: [1.0]}, repeats=1)
    optional = Side("peer", is_optional=True)
    done, log = run_fakes({OURS: [1.0, 2.0], optional: [1.0]}, repeats=1)
    assert done.absent == {"peer": "Error: no more"}
    assert [(row.ours, row.peer, row.theirs) for row in done.rows] == [(2.0, "", None)]
    assert ("peer", "kill") in log


def test_a_library_that_is_not_installed_is_said() -> None:
    missing = Side("peer", is_optional=True, requires="a_library_of_nobody")
    done, log = run_fakes({OURS: [1.0, 2.0], missing: []}, repeats=1)
    assert done.absent == {"peer": "a_library_of_nobody is not installed"}
    assert {name for name, _ in log} == {"ours"}


class TestRun:
    """Subsets in their time; what is measured is kept, whatever happens afterwards."""

    @pytest.fixture
    def go(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Results]]:
        monkeypatch.setattr(
            run, "Workers", lambda n: Workers(n, lambda s, _: FakeWorker(s.module, [1.0] * 9, []))
        )

        def go(
            found: Results, *subsets: str, seconds: float = 60.0, only: str = "", **cases: Any
        ) -> list[Results]:
            table = {
                name: run.Subset(lambda _, made=made: iter(made), share=1)
                for name, made in cases.items()
            }
            monkeypatch.setattr(run, "SUBSETS", table)
            kept: list[Results] = []
            setting: Any = SimpleNamespace(num_threads=1)
            run.run(
                setting,
                subsets,
                run.Limits(1, seconds, only),
                found,
                keep=lambda r: kept.append(replace(r, cases=[*r.cases], cut=[*r.cut])),
                say=lambda _: None,
            )
            return kept

        return go

    def test_results_are_kept_after_each_case(self, go: Callable[..., list[Results]]) -> None:
        found = Results(MACHINE)
        kept = go(found, "x", "y", x=[a_case("a"), a_case("b")], y=[a_case("a")])
        assert [len(each.cases) for each in kept] == [1, 2, 3]
        assert [(case.subset, case.name) for case in found.cases] == [
            ("x", "a"),
            ("x", "b"),
            ("y", "a"),
        ]
        assert not found.cut

    def test_what_is_there_is_not_measured_again(self, go: Callable[..., list[Results]]) -> None:
        found = Results(MACHINE, False, [CaseResult("x", "a", [])], [("x", "b")])
        assert len(go(found, "x", x=[a_case("a"), a_case("b")])) == 1
        assert found.rows("x")[0].ours == 1.0 and not found.cut

    def test_cases_can_be_picked_by_their_names(self, go: Callable[..., list[Results]]) -> None:
        found = Results(MACHINE)
        go(found, "x", only="long", x=[a_case("short"), a_case("long one")])
        assert [case.name for case in found.cases] == ["long one"] and not found.cut

    def test_what_there_is_no_time_for_is_said(self, go: Callable[..., list[Results]]) -> None:
        found = Results(MACHINE)
        kept = go(found, "x", seconds=0.0, x=[a_case("a"), a_case("b")])
        assert found.cut == [("x", "a"), ("x", "b")] and kept[-1].cut == found.cut
        assert "There was no time for: x: a; x: b." in list(render.notes(found))

    def test_a_disagreement_is_said_at_the_end(self, go: Callable[..., list[Results]]) -> None:
        def disagree(result: Mapping[str, Any]) -> None:
            raise Disagreement("different things")

        found = Results(MACHINE)
        with pytest.raises(run.Failed, match="x, b: different things"):
            go(found, "x", x=[a_case("a"), a_case("b", agree=disagree), a_case("c")])
        assert [case.name for case in found.cases] == ["a", "c"]


@pytest.mark.parametrize("best", ["avx2", "avx512_bf16", "amx_bf16"])
@pytest.mark.parametrize("quick", [True, False])
def test_cases_have_names_of_their_own(tmp_path: Path, best: str, quick: bool) -> None:
    """By which they are resumed and merged. No checkpoint is written before its case begins."""
    setting = Setting(best, ("avx2", "avx512", "avx512_bf16"), 2, quick, tmp_path)
    for subset in ("peaks", "gemm", "attention", "depth", "shapes"):
        names = [case.name for case in run.SUBSETS[subset].cases(setting)]
        assert len(set(names)) == len(names) > 0
        if subset == "gemm":  # on a machine with AMX, what those without it would do
            assert any("avx512_bf16" in name for name in names) == (best == "amx_bf16")
    assert not list(tmp_path.iterdir())


class TestResults:
    row = Row("a case", "s", 1.0, "peer", 3.0, 3.0, 4.0, 0.8, 0.7, "T", 512, 2)

    def saved(self, path: Path, *cases: tuple[str, str, float], **settings: Any) -> Path:
        rows = [CaseResult(s, name, [replace(self.row, ours=ours)]) for s, name, ours in cases]
        Results(**{"machine": MACHINE, "cases": rows, **settings}).save(path)
        return path

    def test_round_trip(self, tmp_path: Path) -> None:
        whole = Results(
            MACHINE,
            True,
            [CaseResult("gemm", "a", [self.row], {"peer": "ill"})],
            [("gemm", "b")],
            [Run("--repeats 1", 2.5, None)],
        )
        whole.save(tmp_path / "a.json")
        assert results.load(tmp_path / "a.json") == whole

    def test_files_become_one(self, tmp_path: Path) -> None:
        one = self.saved(tmp_path / "1", ("x", "a", 1.0), ("x", "b", 2.0), cut=[("y", "c")])
        two = self.saved(
            tmp_path / "2", ("x", "b", 3.0), ("y", "c", 4.0), cut=[("x", "a"), ("y", "d")]
        )
        merged = results.merge([one, two])
        assert {(c.name, c.rows[0].ours) for c in merged.cases} == {("a", 1), ("b", 3), ("c", 4)}
        assert merged.cut == [("y", "d")]

    @pytest.mark.parametrize(
        "other, told",
        [
            ({"machine": {**MACHINE, "num_threads": 8}}, "num_threads is 8, not 2"),
            ({"quick": True}, "quick is True, not False"),
        ],
    )
    def test_files_of_different_runs_do_not(
        self, tmp_path: Path, other: dict[str, Any], told: str
    ) -> None:
        one, two = self.saved(tmp_path / "1"), self.saved(tmp_path / "2", **other)
        with pytest.raises(ResultsError, match=f"2 cannot go with .*1: {told}"):
            results.merge([one, two])

    @pytest.mark.parametrize("content", [None, "", "{}", '{"cases": [{"rows": [{}]}]}'])
    def test_other_files_are_refused(self, tmp_path: Path, content: str | None) -> None:
        path = tmp_path / "results.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ResultsError, match="results.json holds no results"):
            results.load(path)


def test_a_rate_has_the_same_ratio_as_its_seconds() -> None:
    first, second = by_flops(
        Title("f"),
        8.0,
        2.0,
        {"a": 4.0, "b": 1.0},
        {"a": None, "b": 1.5, "c": 2.0},
        share_of(1, 2, 0.7),
    )
    assert (first.ours, first.theirs, first.ratio) == (4.0, 2.0, 2.0)
    assert (first.share, first.share_target) == (0.5, 0.7)
    assert (second.ratio, second.target, second.share) == (0.5, 1.5, None)
    assert render.missed(first) and render.missed(second)


def test_quantities() -> None:
    shown = [render.quantity(v, "s") for v in (123.4, 1.5, 0.0456, 3e-6)]
    assert shown == ["123 s", "1.50 s", "45.6 ms", "3.00 µs"]
    assert render.quantity(2.5e11, "FLOP/s") == "250 GFLOP/s"
    assert render.quantity(1.5 * 2**30, "B") == "1.50 GiB"
    assert [render.quantity(v, "%") for v in (0.0123, 4e-6)] == ["1.23 %", "0.0004 %"]


def test_results_replace_results_between_the_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{render.BEGIN}\nold\n{render.END}\nafter\n")
    long, short = (
        Row("a case", "s", 1.0, "peer", 3.0, 3.0, 4.0, 0.8, 0.7, axis="T", at=at, rounds=2)
        for at in (2048, 512)
    )
    other = Row("a case", "s", 1.0, "other", 1.6, 1.6, axis="T", at=2048, rounds=2)
    rows = [long, other, short]
    found = Results(MACHINE, cases=[CaseResult("gemm", "a", rows, {"peer": "ill"})])
    text = render.markdown(found, ["gemm"], ["plots/a.png"])
    for _ in range(2):  # again: nothing piles up
        render.insert(readme, text)
        assert readme.read_text() == (f"before\n{render.BEGIN}\n\n{text}\n\n{render.END}\nafter\n")
    expected = "| 1.00 s | peer | 3.00 s | 3.00x ✗ | 4x | 3.75x | 80% ✓ | 70% | 2 |"
    assert f"| a case, T 512 {expected}\n| a case, T 2048 {expected}" in text
    assert "| a case, T 2048 | 1.00 s | other | 1.60 s | 1.60x |  | 2.00x |  |  | 2 |" in text
    assert "![a](plots/a.png)" in text and "Without peer: ill." in text
    with pytest.raises(ValueError, match="each once"):
        render.insert(readme, render.END)
        render.insert(readme, text)


def test_plots(tmp_path: Path) -> None:
    rows = [
        Row("full", "s", 0.1 * at, "torch", 0.2 * at, 2.0, 2.2, 0.6, axis="T", at=at)
        for at in (1024, 2048)
    ]
    found = Results(MACHINE, cases=[CaseResult("attention", "a", rows)])
    drawn = plots.draw(found, tmp_path / "plots")
    assert [path.name for path in drawn] == ["attention.png", "roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert plots.draw(Results(MACHINE), tmp_path) == []


TINY = {
    family: replace(
        shapes.SMOLLM2_135M.cut_to(3, 512),
        name="tiny",
        model_type=family,
        hidden_size=192,
        intermediate_size=256,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=family != "llama",
    )
    for family in ("llama", "qwen2", "qwen3")
}


def answer(call: Call) -> Any:
    """The result of a call, in this process."""
    module = importlib.import_module(f"benchmarks.{call.side.module}")
    return getattr(module, call.function)(**call.arguments)()[1]


class TestAgreement:
    """Peers are held to the same attention, to a key."""

    n_tokens, window = 768, 256  # as with --quick

    @pytest.fixture(params=TINY)
    def case(
        self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[[int], Case]:
        """The case in which the peer's window is one's choice."""
        shapes.write_checkpoint(tmp_path, TINY[request.param])
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        work = {
            "path": str(tmp_path),
            "ids": np.random.default_rng(0).integers(0, 512, self.n_tokens).tolist(),
            "sinks": 4,
        }

        def case(window: int) -> Case:
            ours, theirs = ({**work, "window": w} for w in (self.window, window))
            return logits_in_both("window", ours, "torch", Side("torch_decoder"), theirs)

        return case

    def test_a_window_one_key_off_is_found(self, case: Callable[[int], Case]) -> None:
        right = case(self.window)
        assert right.agree is not None
        found = {name: answer(call) for name, call in right.calls.items()}
        right.agree(found)
        for window in (self.window - 1, self.window + 1):
            wrong = answer(case(window).calls["exact peer"])
            with pytest.raises(Disagreement, match="torch f32 and ours in float32"):
                right.agree({**found, "exact peer": wrong})

    def test_errors_and_numbers_that_are_none(self) -> None:
        exact = np.random.default_rng(0).standard_normal((4, 100))
        assert agreement.error(exact + 0.01, exact) == pytest.approx(0.01, rel=0.1)
        agreement.same_logits({"ours": exact, "peer": 1.01 * exact, "peak": None})
        for bad in (1.1 * exact, np.full_like(exact, np.nan)):
            with pytest.raises(Disagreement, match="logits of ours and peer"):
                agreement.same_logits({"ours": exact, "peer": bad})
            with pytest.raises(Disagreement, match="outputs of ours and peer"):
                agreement.same_numbers({"ours": exact, "peer": bad})


def test_the_real_model_has_the_shape_that_costs_are_of() -> None:
    from swa.checkpoint import open_checkpoint
    from swa.demo import wheel_model

    real, ours = open_checkpoint(wheel_model()).config, shapes.SMOLLM2_135M.config()
    of_no_cost = ("max_position_embeddings", "eos_token_ids", "rms_norm_eps")
    assert replace(ours, **{name: getattr(real, name) for name in of_no_cost}) == real


def test_a_quantised_file_in_bfloat16(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Its matrices are rounded, all else is as it was."""
    from checkpoint_files import round_bf16
    from gguf_files import from_folder

    quantised, made = tmp_path / "q8.gguf", tmp_path / "bf16.gguf"
    from_folder(tiny(), quantised, kind=gguf.GGMLQuantizationType.Q8_0)
    gguf_bf16.write(quantised, made)
    before, after = gguf.GGUFReader(quantised), gguf.GGUFReader(made)
    for old, new in zip(before.tensors, after.tensors, strict=True):
        values = gguf.dequantize(old.data, old.tensor_type)
        expected = values if values.ndim == 1 else round_bf16(values)
        assert old.name == new.name
        assert np.array_equal(gguf.dequantize(new.data, new.tensor_type), expected)
    keys = {name for name in before.fields if not name.startswith("GGUF.")}
    assert keys == after.fields.keys() - {"general.file_type"} - {
        name for name in after.fields if name.startswith("GGUF.")
    }
    assert all(before.fields[key].contents() == after.fields[key].contents() for key in keys)


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
    rows = {row["case"]: row for case in document["cases"] for row in case["rows"]}
    assert "read" in rows and f"f32, {document['machine']['tier']}" in rows
    assert all(row["ours"] > 0 and row["rounds"] == 1 for row in rows.values())
    assert "GFLOP/s" in done.stdout
