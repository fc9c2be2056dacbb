"""The study's harness, on a planted model: cells, slices, and what the page says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from engines import TIERS
from planted import Planted, planted_checkpoint

import swa
from swa.cost import Work
from swa.errors import InputError, SwaError
from swa.strategies import STRATEGIES
from swa.sweeps.estimate import stage_seconds

ROOT = Path(__file__).parent.parent
path = sys.path[:]
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed
try:
    from benchmarks.study import cells as cells_of
    from benchmarks.study.cells import DEFAULT, FULL_SCALE, TOPK, Scale, Setting, cells
    from benchmarks.study.page import TITLES, render
    from benchmarks.study.results import CellResults
    from benchmarks.study.runner import Study, takes
finally:
    sys.path[:] = path

SCALE = Scale(
    setting=Setting(prompt_tokens=120, window=16, sinks=4),
    share=1 / 3,  # three of nine layers, as many as are planted
    per_task=1,
    heldout_per_task=4,
    others_per_task=2,
    shares=(1 / 9,),
    tail=2,
    lengths=(140,),
    windows=(12, 500),
    consumer="vllm",
    consumer_windows=(16,),
    sizes=(1, 2),
    largest_joint=1,
    short=((110, 12),),
    tasks=("a", "b"),
    n_periodic=3,
)
GROUPS = list(TITLES)
STRATEGIES_HERE = (TOPK, "first_order", DEFAULT, "path", "periodic", "first")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return planted_checkpoint(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def new_study(planted: Planted) -> Callable[..., Study]:
    def make(
        model: swa.Model, setting: Setting, split: str, per_task: int, tasks: tuple[str, ...]
    ) -> list[swa.Example]:
        first = {"calibration": 0, "heldout": 100}[split]
        made = [
            (task, planted.example(setting.prompt_tokens, near=40, seed=first + 20 * i + n))
            for i, task in enumerate(tasks)
            for n in range(per_task)
        ]
        return [swa.Example(tuple(e.prompt_ids), tuple(e.answer_ids), task) for task, e in made]

    def study(journal: Path, strategies: tuple[str, ...] = STRATEGIES_HERE) -> Study:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cells_of, "FIRST", strategies)
            patch.setattr(cells_of, "STRATEGIES", {})
            return Study(str(planted.folder), SCALE, journal, make=make, threads=1)

    return study


@pytest.fixture(scope="module")
def done(new_study: Callable[..., Study], tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = new_study(tmp_path_factory.mktemp("study") / "journal")
    study.run()
    assert not study.store.failures
    return study


def cell_of(study: Study, group: str) -> CellResults:
    return CellResults(study, next(cell for cell in study.cells if cell.group == group))


def test_the_headline_comes_first_and_cells_without_signal_are_left_out() -> None:
    made = cells(FULL_SCALE, 8064)
    assert [cell.group for cell in made][:2] == ["headline", "tail"]
    assert list(dict.fromkeys(cell.group for cell in made)) == GROUPS
    strategies = {choice.strategy.partition(":")[0] for choice in made[0].choices}
    assert strategies == set(STRATEGIES)
    assert all(cell.heldout_per_task * 4 >= 64 for cell in made[:2])
    # A prompt of 1,024 tokens has nothing that a window of 1,024 hides.
    narrow = replace(FULL_SCALE, setting=replace(FULL_SCALE.setting, prompt_tokens=1024))
    assert 1024 not in {c.setting.window for c in cells(narrow, 8064) if c.group == "window"}
    assert max(cell.setting.prompt_tokens for cell in cells(FULL_SCALE, 4000)) == 3072


def test_a_model_with_too_few_positions_is_refused(planted: Planted, tmp_path: Path) -> None:
    scale = replace(SCALE, setting=replace(SCALE.setting, prompt_tokens=4000))
    with pytest.raises(InputError, match="4096 positions, too few for prompts of 4000"):
        Study(str(planted.folder), scale, tmp_path / "journal", threads=1)


def test_the_truth_is_found(done: Study, planted: Planted) -> None:
    headline = cell_of(done, "headline")
    assert headline.n_done == len(headline.cell.choices)
    for strategy in (TOPK, DEFAULT, "path"):
        measured = headline.made_here(strategy)
        assert measured is not None
        assert measured.layers == tuple(sorted(planted.n_values))
        assert headline.gap(measured) == pytest.approx(1, abs=1e-3)
    first, topk = headline.made_here("first"), headline.made_here(TOPK)
    assert first is not None and topk is not None
    assert first.against(topk).difference == pytest.approx(
        planted.deltas.sum() - planted.deltas[2], abs=1e-2
    )
    found = headline.first_order()
    assert found is not None and found.n_examples == 2 and found.exact_seconds > 0


def test_layers_are_measured_elsewhere_than_where_they_were_chosen(
    done: Study, planted: Planted
) -> None:
    for group in ("window", "length", "consumer"):
        of = cell_of(done, group)
        carried = [m for choice, m in of.done() if choice.at == SCALE.setting]
        assert [m.layers for m in carried] == [tuple(sorted(planted.n_values))] * 2
    # With the question in a tail no layer is needed, and the page says that shares mean nothing.
    assert cell_of(done, "tail").has_gap() is False
    assert cell_of(done, "window").has_gap() is True


def test_the_page(done: Study, tmp_path: Path) -> None:
    text = render(done, tmp_path / "study")
    for title in TITLES.values():
        assert f"\n## {title}\n" in text
    assert "not run yet" not in text and " choices |" not in text
    assert "The paper's top-k closes 100% of the gap" in text
    assert "`joint`'s headline choice closes 100%, one made there 100%" in text
    assert "Within 1/9 of the layers** `joint` closes" in text
    assert "chosen on one task alone, `topk` closes between 100% (`" in text
    assert "**Short prompts for long ones** (T " in text
    assert text.count("Sliding costs nothing here") == 1
    assert (
        "| `topk` | 4 |" in text and "| `joint` | 2 |" in text and "### 1/9 of the layers" in text
    )
    for name in ("headline", "budgets", "examples"):
        assert f"(study/{name}.svg)" in text
        assert (tmp_path / "study" / f"{name}.svg").read_text().startswith("<?xml")
    assert "svg" not in render(done, None)


def test_slices_go_on_where_they_stopped(
    new_study: Callable[..., Study], done: Study, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    study = new_study(journal)
    study.run(minutes=0)
    assert study.store.results == {}
    assert render(study, None).count("not run yet") == len(GROUPS)
    study.run(["short"])
    kept, half = set(study.store.results), render(study, None)
    assert kept < set(done.store.results)
    assert half.count("not run yet") < len(GROUPS) - 1  # the headline has some of these choices
    size = journal.stat().st_size
    again = new_study(journal)
    again.run(["short"])
    assert journal.stat().st_size == size and set(again.store.results) == kept
    loaded = new_study(journal)
    loaded.load()
    assert render(loaded, None) == half


def test_kernels_of_two_instruction_sets_share_choices_not_numbers(
    new_study: Callable[..., Study],
    done: Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    another = next((tier for tier in TIERS if tier != done.tier), None)
    if another is None:
        pytest.skip("needs a CPU with two instruction sets that kernels are built for")
    journal, few = tmp_path / "journal", (TOPK, DEFAULT)
    new_study(journal, few).run(["headline"])
    monkeypatch.setenv("SWA_TIER", another)
    other, said = new_study(journal, few), list[str]()
    other.run(["headline", "length"], say=said.append)
    assert len(said) == 1 and said[0].startswith("length: ")  # the other cell is done
    records = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    ran = [(r["tier"], r["inputs"]["stage"]) for r in records]
    assert len({tier for tier, _ in ran}) == 2
    # Two of the five choices made at the headline were taken over, without the scores behind them;
    # three were made at the other length.
    for stage, tiers in (("select", [5, 3]), ("score", [2, 2])):
        assert [ran.count((tier, stage)) for tier in (done.tier, another)] == tiers
    for study in (other, new_study(journal, few)):
        study.load()
        headline, length = cell_of(study, "headline"), cell_of(study, "length")
        assert (headline.tier, length.tier) == (done.tier, another)
        assert length.n_done == len(length.cell.choices)
    text = render(other, None)
    assert f"| 1 | done | {done.tier} |" in text and f"| 1 | done | {another} |" in text
    # What another instruction set has begun is left to it.
    half = tmp_path / "half"
    half.write_text("".join(journal.read_text().splitlines(keepends=True)[:-1]))
    monkeypatch.setenv("SWA_TIER", done.tier)
    before, said = half.stat().st_size, []
    new_study(half, few).run(["length"], say=said.append)
    assert f"left to kernels for {another}, which began it: set SWA_TIER={another}" in said[0]
    assert half.stat().st_size == before


def test_a_strategy_that_fails_ends_nothing(
    new_study: Callable[..., Study], tmp_path: Path
) -> None:
    study = new_study(tmp_path / "journal", (TOPK, "periodic:offset=7", "first"))
    study.run(["headline"])
    ((name, error),) = study.store.failures.values()
    assert "periodic:offset=7" in name and isinstance(error, SwaError)
    headline = cell_of(study, "headline")
    assert headline.n_done == len(headline.cell.choices) - 1 and headline.made_here("first")


def test_it_tells_how_long_it_takes(
    new_study: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swa.estimate.PROBE_SECONDS", 0.001)
    text = takes(new_study(tmp_path / "journal"))
    assert [line.split()[0] for line in text.splitlines()] == [*GROUPS, "all"]


def test_what_is_done_takes_no_time(new_study: Callable[..., Study], tmp_path: Path) -> None:
    study, speed = new_study(tmp_path / "journal", (TOPK, "path")), Work(1.0, 1.0)
    (cell,) = (cell for cell in study.cells if cell.group == "headline")
    before = stage_seconds(study.graph(cell), speed, study.store.results)
    assert before == stage_seconds(study.graph(cell), speed) and min(before) > 0
    study.run(["headline"])
    after = stage_seconds(study.graph(cell), speed, study.store.results)
    assert after == (0, 0, 0)


def test_the_command(tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = tiny(tokenizer=True, chat_template=True, max_position_embeddings=4096)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.study", "--quick", "--cells", "short"),
            *("--model", checkpoint, "--journal", tmp_path / "j", "--page", tmp_path / "p.md"),
            *("--threads", "1"),
        ],
        cwd=ROOT,
        env=os.environ | {"TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "short: T 640" in done.stderr
    page = (tmp_path / "p.md").read_text()
    assert "# The study" in page and "not run yet" in page and "## Can short" in page
