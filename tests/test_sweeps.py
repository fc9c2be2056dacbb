"""swa.sweep: one table for every executor, nothing done twice, nothing lost with a worker."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet
import pytest
import sweep_strategies
from gguf_files import from_folder
from planted import Planted, planted_checkpoint
from sweep_grid import GRID, examples
from sweep_strategies import Deadly, Slow, highest, kill_first

import swa
from swa.cli import main
from swa.errors import (
    CheckpointError,
    ExampleError,
    InputError,
    ScoresError,
    SwaWarning,
    WorkerError,
)
from swa.journal import Journal, open_journal
from swa.model import plan
from swa.problem import CalibrationProblem
from swa.search import SEARCH
from swa.sweeps import SweepTable, driver, tasks
from swa.sweeps.driver import ATTEMPTS, Inline


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return planted_checkpoint(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def sweep(planted: Planted) -> Callable[..., SweepTable]:
    calibration, heldout = examples(planted, range(2)), examples(planted, range(10, 13))

    def run(**options: Any) -> SweepTable:
        if "executor" in options or not options.get("workers"):
            options.setdefault("threads", 1)
        return swa.sweep(planted.folder, calibration, heldout, **GRID | options)

    return run


@pytest.fixture(scope="module")
def expected(sweep: Callable[..., SweepTable]) -> SweepTable:
    return sweep()


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


# ---- what it computes


def test_points_are_what_the_steps_give_one_by_one(
    planted: Planted, sweep: Callable[..., SweepTable]
) -> None:
    expected = sweep(tails=[0, 2])
    model = swa.load(planted.folder, dtype="float32", num_threads=1)
    calibration, heldout = examples(planted, range(2)), examples(planted, range(10, 13))
    row_of = {
        (row["num_tail_tokens"], row["strategy"], row["budget"]): (point, row)
        for point, row in enumerate(expected.rows)
    }
    assert len(row_of) == len(expected.rows) == 2 * (2 + 4)
    for tail in (0, 2):
        policy = swa.AttentionPolicy(16, num_sink_tokens=4, num_tail_tokens=tail)
        scores = swa.score_layers(model, calibration, policy)
        chosen = {
            ("topk", "1 layers"): swa.select(scores, swa.Budget(full_attention_layers=1)).layers,
            ("topk", "0.3 of the layers"): swa.select(scores, swa.Budget(fraction=0.3)).layers,
            ("first", "0.3 of the layers"): (0, 1, 2),
            ("all sliding", None): (),
            ("full attention", None): tuple(range(9)),
        }
        for (strategy, budget), layers in chosen.items():
            point, row = row_of[tail, strategy, budget]
            applied = policy.with_full_layers(layers, 9)
            measured = swa.evaluate(model, heldout, policy=applied)
            assert row["layers"] == ",".join(map(str, layers))
            assert row["nll"] == measured.nll
            assert expected.nll_per_example(point) == measured.nll_per_example
            assert row["greedy_match"] == measured.greedy_match
    sliding, full = (row_of[0, end, None][1]["nll"] for end in ("all sliding", "full attention"))
    row = row_of[0, "topk", "0.3 of the layers"][1]
    assert row["gap_closed"] == (sliding - row["nll"]) / (sliding - full) > 0.99
    assert (
        row["select_prefills"]
        > 2
        > row_of[0, "first", "0.3 of the layers"][1]["select_prefills"]
        == 0
    )


def test_consumers_have_neither_sinks_nor_tail(sweep: Callable[..., SweepTable]) -> None:
    table = sweep(consumers=["vllm", None], windows=[16, 16, 24], strategies=["first"])
    policies = [(r["consumer"], r["sliding_window"], r["num_sink_tokens"]) for r in table.rows]
    expected = [("vllm", 16, 0), ("vllm", 24, 0), (None, 16, 4), (None, 24, 4)]
    assert list(dict.fromkeys(policies)) == expected
    assert {row["decode"] for row in table.rows if row["consumer"]} == {"window"}


def test_budgets_of_every_kind(planted: Planted, sweep: Callable[..., SweepTable]) -> None:
    kv_bytes = 9 * 2 * 2 * 64 * 2 * 120  # of full attention: layers, K and V, heads, width, bytes
    budgets = [
        swa.Budget(nll_increase=0.01),
        swa.Budget(prefill_flops=0.995, prompt_tokens=120),
        swa.Budget(kv_bytes=kv_bytes // 2, prompt_tokens=120),
    ]
    table = sweep(consumers=["vllm"], strategies=["topk"], budgets=budgets)
    tolerant, fast, small = table.rows[2:]
    assert tolerant["layers"] == "2,5,7" and tolerant["nll"] < 0.01
    assert tolerant["budget"] == "a loss within 0.01 nats of full attention"
    assert 0 < fast["full_attention_layers"] < 9 and 0 < small["full_attention_layers"] < 9
    with pytest.raises(InputError, match="windowed decode"):
        sweep(budgets=budgets)


def test_another_objective(sweep: Callable[..., SweepTable]) -> None:
    table = sweep(objective="kl", strategies=["topk", "first_order"], budgets=[3])
    assert [row["layers"] for row in table.rows[2:]] == ["2,5,7"] * 2
    assert [row["objective"] for row in table.rows] == [None, None, "kl", "kl"]
    assert table.timings[2]["score_seconds"] == 0  # exact scores are differences in NLL


def test_every_model_and_dtype(planted: Planted, sweep: Callable[..., SweepTable]) -> None:
    other = planted_checkpoint(planted.folder.parent / "other", seed=1)
    made: list[int] = []

    def calibration(model: swa.Model) -> list[swa.Example]:
        made.append(len(model.tokenizer.encode("w1 w2")))
        return examples(planted, range(1))

    table = swa.sweep(
        [planted.folder, str(other.folder)],
        calibration,
        examples(planted, range(9, 10)),
        windows=[16],
        strategies=["last"],
        budgets=[1],
        dtypes=["bfloat16", "float32"],
        threads=1,
    )
    assert made == [2] * 4
    found = list(dict.fromkeys((row["model"], row["dtype"]) for row in table.rows))
    names = [planted.folder.name, other.folder.name]
    assert found == [(name, dtype) for name in names for dtype in ("bfloat16", "float32")]


def test_examples_may_repeat(planted: Planted, sweep: Callable[..., SweepTable]) -> None:
    once, heldout = examples(planted, range(2)), examples(planted, range(10, 13))
    grid = GRID | {"strategies": ["topk"], "threads": 1}
    table = swa.sweep(planted.folder, once + once, heldout + heldout, **grid)
    assert [row["n_calibration"] for row in table.rows[:3]] == [None, None, 4]
    expected = sweep(strategies=["topk"])
    assert [row["layers"] for row in table.rows] == [row["layers"] for row in expected.rows]
    assert table.nll_per_example(2) == 2 * expected.nll_per_example(2)


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_patched_export_is_swept_as_the_model_that_it_was(
    kind: str, planted: Planted, sweep: Callable[..., SweepTable], tmp_path: Path
) -> None:
    source = planted.folder
    if kind == "gguf":
        source = tmp_path / "planted.gguf"
        from_folder(planted.folder, source)
    policy = swa.AttentionPolicy(16, num_sink_tokens=4).with_full_layers([1], 9)
    swa.load(source, num_threads=1).patch(policy).save_pretrained(tmp_path / "export")
    options = GRID | {"strategies": ["first"], "threads": 1}
    planned: list[swa.Model] = []

    def calibration(model: swa.Model) -> list[swa.Example]:
        planned.append(model)
        return examples(planted, range(2))

    heldout = examples(planted, range(10, 13))
    found = swa.sweep(tmp_path / "export", calibration, heldout, **options)
    expected = sweep(strategies=["first"])
    assert [row["nll"] for row in found.rows] == [row["nll"] for row in expected.rows]
    assert [model.policy for model in planned] == [None]  # as in the workers


def test_policies_that_hide_nothing_are_left_out(sweep: Callable[..., SweepTable]) -> None:
    with pytest.warns(SwaWarning, match="sliding_window=500"):
        table = sweep(windows=[16, 500], strategies=["first"])
    assert {row["sliding_window"] for row in table.rows} == {16}
    with pytest.raises(ExampleError, match="no policy of the grid"):
        sweep(windows=[500])


def test_a_model_is_opened_once_and_closed(
    sweep: Callable[..., SweepTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    load = swa.load
    monkeypatch.setattr("swa.model.load", lambda *a, **k: opened.append(a[0]) or load(*a, **k))
    with ThreadPoolExecutor(3) as executor:
        sweep(executor=executor)
    assert len(opened) == 1
    assert not tasks._open


def test_selections_share_what_they_run(
    sweep: Callable[..., SweepTable], planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two budgets of one ranking take one set of gradients, and cost as much as each alone."""
    ran: list[int] = []
    original = CalibrationProblem.run_gradient

    def counting(self: Any, alpha: Any, index: int) -> Any:
        ran.append(index)
        return original(self, alpha, index)

    monkeypatch.setattr(CalibrationProblem, "run_gradient", counting)
    table = sweep(strategies=["path"], budgets=[1, 2])
    assert sorted(ran) == [0] * 5 + [1] * 5
    one, two = table.rows[2:]
    assert one["select_prefills"] == two["select_prefills"] > 5
    assert two["layers"] == "2,5"


# ---- on any executor


class Hostile(Inline):
    """At first loses tasks, fails, answers with the result of another; runs all others twice."""

    def __init__(self) -> None:
        self.submitted = 0
        self.last: Any = None

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        self.submitted += 1
        kind = self.submitted % 4 if arguments[1] == 1 else 0
        answer: Future[Any] = Future()
        if kind == 1:
            return answer  # never done
        if kind == 2:
            answer.set_exception(OSError("connection lost"))
            return answer
        if kind == 3 and self.last is not None:
            answer.set_result(self.last)
            return answer
        super().submit(function, *arguments)
        self.last = super().submit(function, *arguments).result()
        return Twice(self.last)


class Twice(Future):
    """Calls back twice."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.set_result(result)

    def add_done_callback(self, fn: Callable[..., Any]) -> None:
        super().add_done_callback(fn)
        super().add_done_callback(fn)


@pytest.fixture(params=["threads", "processes", "workers", "hostile"])
def executor(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    if request.param == "threads":
        with ThreadPoolExecutor(3) as executor:
            yield {"executor": executor}
    elif request.param == "processes":
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, mp_context=context) as executor:
            yield {"executor": executor}
    elif request.param == "workers":
        yield {"workers": 2}
    else:
        yield {"executor": Hostile(), "lost_after": 0.01}


def test_all_executors_give_the_same(
    sweep: Callable[..., SweepTable],
    expected: SweepTable,
    executor: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "TICK", 0.02)
    table = sweep(journal=tmp_path / "j", **executor)
    assert table == expected
    assert table.rows == expected.rows and table.examples == expected.examples
    keys = [record["key"] for record in records(tmp_path / "j")]
    assert len(keys) == len(set(keys)) > 0


def slow(sweep: Callable[..., SweepTable], directory: Path, **options: Any) -> SweepTable:
    """Four slow selections, and nothing that takes long beside them."""
    strategies = [Slow(str(directory))]
    return sweep(strategies=strategies, budgets=[1, 2, 3, 4], **options)


def killed_meanwhile(run: Callable[[], SweepTable], directory: Path) -> tuple[SweepTable, int]:
    """What `run` returns though the first process that begins a `Slow` is killed; that process."""
    killed: list[int] = []
    killer = threading.Thread(target=lambda: killed.append(kill_first(directory)), daemon=True)
    killer.start()
    table = run()
    killer.join(60)
    return table, killed[0]


def check_after_kill(table: SweepTable, killed: int, marks: Path, journal: Path) -> None:
    begun = [int(mark.name.partition("-")[0]) for mark in marks.iterdir()]
    assert killed in begun and len(begun) > 4  # what it was doing was begun again
    assert [row["layers"] for row in table.rows[2:]] == ["0", "0,1", "0,1,2", "0,1,2,3"]
    keys = [record["key"] for record in records(journal)]
    assert len(keys) == len(set(keys)) == 4 + 3 * 6
    assert not table.failures and not table.unfinished


def test_a_killed_process_loses_nothing(sweep: Callable[..., SweepTable], tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    journal = tmp_path / "j"
    table, killed = killed_meanwhile(lambda: slow(sweep, marks, workers=2, journal=journal), marks)
    check_after_kill(table, killed, marks, journal)


def test_a_killed_dask_worker_loses_nothing(
    planted: Planted, sweep: Callable[..., SweepTable], expected: SweepTable, tmp_path: Path
) -> None:
    from distributed import Client, LocalCluster

    marks = tmp_path / "marks"
    marks.mkdir()
    journal = tmp_path / "j"
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        workers = set(client.run(os.getpid).values())
        table, killed = killed_meanwhile(
            lambda: slow(sweep, marks, executor=client, journal=journal), marks
        )
        check_after_kill(table, killed, marks, journal)
        assert len(workers) == 2 and killed in workers
        assert sweep(executor=client) == expected
        run = ["sweep", str(planted.folder), *("--sliding-window", "16", "--sink-tokens", "4")]
        run += ["--strategy", "topk", "--strategy", "first", "--budget", "1,0.3"]
        run += ["--dtype", "float32", "--out", str(tmp_path / "t.csv")]
        for side, seeds in (("calibration", range(2)), ("heldout", range(10, 13))):
            swa.examples.write_jsonl(tmp_path / side, examples(planted, seeds))
            run += [f"--{side}", str(tmp_path / side)]
        assert main([*run, "--scheduler", cluster.scheduler_address, "--threads", "1"]) == 0
    expected.to_csv(tmp_path / "expected.csv")
    assert (tmp_path / "t.csv").read_text() == (tmp_path / "expected.csv").read_text()


def test_a_task_that_kills_its_worker_is_given_up(sweep: Callable[..., SweepTable]) -> None:
    deadly = Deadly(os.getpid())
    with pytest.raises(WorkerError, match=f"selecting 1 layers by Deadly.*{ATTEMPTS} times"):
        sweep(strategies=[deadly], budgets=[1], workers=1, threads=1)


def test_a_broken_pool_is_said_so(sweep: Callable[..., SweepTable]) -> None:
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, mp_context=context) as pool,
        pytest.raises(WorkerError, match="broken.*same journal"),
    ):
        sweep(strategies=[Deadly(os.getpid())], executor=pool)


def test_a_lossy_executor_is_given_up(
    sweep: Callable[..., SweepTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "TICK", 0.01)

    class Hole:
        def submit(self, function: Any, *arguments: Any) -> Future[Any]:
            return Future()

    with pytest.raises(WorkerError, match="did not come back"):
        sweep(executor=Hole(), lost_after=0.01)


def test_what_is_no_executor_is_refused(sweep: Callable[..., SweepTable]) -> None:
    class Synchronous:
        def submit(self, function: Any, *arguments: Any) -> Any:
            return function(*arguments)

    with pytest.raises(InputError, match="add_done_callback"):
        sweep(executor=Synchronous())
    with pytest.raises(InputError, match="threads="):
        sweep(executor=Inline(), threads=None)
    with pytest.raises(InputError, match="threads="):
        sweep(executor=Inline(), workers=2)
    with pytest.raises(InputError, match="workers must be 0 or more"):
        sweep(workers=-1)
    with pytest.raises(InputError, match="lost_after"):
        sweep(lost_after=0)


# ---- interruption, errors


def test_a_cut_journal_is_completed(
    sweep: Callable[..., SweepTable], expected: SweepTable, tmp_path: Path
) -> None:
    whole, path = tmp_path / "whole", tmp_path / "cut"
    sweep(journal=whole)
    content = whole.read_bytes()
    keys = [record["key"] for record in records(whole)]
    path.write_bytes(content[: len(content) // 2])
    kept = path.read_bytes().count(b"\n") - 1
    counting = Counting()
    assert sweep(journal=path, executor=counting) == expected
    assert kept > 0 and counting.count == len(keys) - kept
    assert sorted(record["key"] for record in records(path)) == sorted(keys)
    again = Counting()
    assert sweep(journal=path, executor=again) == expected
    assert again.count == 0


class Counting(Inline):
    def __init__(self) -> None:
        self.count = 0

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        self.count += 1
        return super().submit(function, *arguments)


def test_another_grid_takes_what_is_there(sweep: Callable[..., SweepTable], tmp_path: Path) -> None:
    sweep(journal=tmp_path / "j")
    counting = Counting()
    sweep(journal=tmp_path / "j", budgets=[1, 0.3, 0.4], executor=counting)
    assert counting.count == 2 * (1 + 3)  # of the new budget: two selections, their evaluations


def test_time_that_is_up(
    sweep: Callable[..., SweepTable], expected: SweepTable, tmp_path: Path
) -> None:
    table = sweep(max_seconds=0, journal=tmp_path / "j")
    assert table.rows == () and table.unfinished == len(expected.rows)
    assert "6 points are not done" in repr(table)
    assert sweep(journal=tmp_path / "j") == expected


def test_interruption_keeps_what_is_done(
    sweep: Callable[..., SweepTable], expected: SweepTable, tmp_path: Path
) -> None:
    class Interrupted(Counting):
        def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
            if self.count == 10:
                raise KeyboardInterrupt
            return super().submit(function, *arguments)

    with pytest.raises(KeyboardInterrupt):
        sweep(journal=tmp_path / "j", executor=Interrupted())
    assert len(records(tmp_path / "j")) == 10
    assert sweep(journal=tmp_path / "j") == expected


def test_a_selection_goes_on_where_it_was_cut(
    sweep: Callable[..., SweepTable], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what earlier selections in the same process had found for it, too."""
    grid: dict[str, Any] = {"strategies": ["first_order", "joint"], "budgets": [3]}
    ran: list[Any] = []
    last = math.inf

    def counting(run: Any, self: Any, *arguments: Any) -> Any:
        if len(ran) == last:
            raise KeyboardInterrupt
        ran.append(arguments)
        return run(self, *arguments)

    for name in ("run_loss", "run_gradient"):
        run = getattr(CalibrationProblem, name)
        monkeypatch.setattr(CalibrationProblem, name, partialmethod(partial(counting, run)))
    expected = sweep(journal=tmp_path / "straight", **grid)
    n_runs = len(ran)
    assert not (tmp_path / "straight.searches").exists()

    journal, folder = tmp_path / "j", tmp_path / "j.searches"
    ran.clear()
    last = n_runs // 2
    with pytest.raises(KeyboardInterrupt):
        sweep(journal=journal, **grid)
    assert len(list(folder.iterdir())) == 1
    last = math.inf
    assert sweep(journal=journal, **grid) == expected
    assert len(ran) == n_runs
    assert not folder.exists()
    again = [record["result"] for record in records(journal)]
    assert again == [record["result"] for record in records(tmp_path / "straight")]


def test_a_selection_that_dies_goes_on(sweep: Callable[..., SweepTable], tmp_path: Path) -> None:
    """In the process that takes the place of the dead one."""
    journal = tmp_path / "j"
    dying = sweep_strategies.Dying(f"{journal}.searches")
    table = sweep(journal=journal, strategies=[dying], budgets=[2], workers=1)
    assert table.rows[2]["layers"] == "0,1" and not table.failures


@pytest.mark.parametrize("how", ["no folder", "in use"])
def test_selections_do_without_a_place_to_keep_runs(
    how: str, sweep: Callable[..., SweepTable], planted: Planted, tmp_path: Path
) -> None:
    journal, expected = tmp_path / "j", sweep(strategies=["path"])
    tier = plan(planted.folder).engine.tier
    held: list[Journal] = []

    class Elsewhere(Inline):
        def submit(self, function: Callable[..., Any], /, task: Any, attempt: int) -> Future[Any]:
            folder = tmp_path / "j.searches"
            if how == "no folder":
                shutil.rmtree(folder, ignore_errors=True)
            elif isinstance(task, tasks.SelectTask):
                held.append(Journal(folder / f"{task.key}-{tier}", {}))
            return super().submit(function, task, attempt)

    assert sweep(journal=journal, strategies=["path"], executor=Elsewhere()) == expected
    assert len(held) == (2 if how == "in use" else 0)
    for one in held:
        one.close()


@pytest.mark.parametrize("how", ["another version", "no journal", "no run"])
def test_selections_begin_anew_where_what_was_kept_is_of_no_use(
    how: str, sweep: Callable[..., SweepTable], planted: Planted, tmp_path: Path
) -> None:
    journal, expected = tmp_path / "j", sweep(strategies=["path"])
    model = swa.load(planted.folder, dtype="float32", num_threads=1)
    found: list[Path] = []

    class Stale(Inline):
        def submit(self, function: Callable[..., Any], /, task: Any, attempt: int) -> Future[Any]:
            if isinstance(task, tasks.SelectTask):
                path = tmp_path / "j.searches" / f"{task.key}-{model.engine.tier}"
                found.append(path)
                if how == "another version":
                    Journal(path, {"version": "0.0.1"}).close()
                elif how == "no journal":
                    path.write_text("precious")
                else:
                    with open_journal(path, model, SEARCH) as kept:
                        assert kept is not None
                        kept.append({"run": 3})
            return super().submit(function, task, attempt)

    assert sweep(journal=journal, strategies=["path"], executor=Stale()) == expected
    assert len(found) == 2 and not any(path.exists() for path in found)


def test_what_was_begun_is_finished_first(sweep: Callable[..., SweepTable], tmp_path: Path) -> None:
    """Three evaluations follow each selection: a sweep that is cut short has whole points."""
    sweep(journal=tmp_path / "j", strategies=["first", "topk", "last"], budgets=[2])
    stages = [record["inputs"]["stage"] for record in records(tmp_path / "j")]
    point = ["select"] + 3 * ["evaluate"]
    assert stages == 6 * ["evaluate"] + point + 2 * ["score"] + 2 * point


def test_what_was_begun_before_is_finished_first(
    sweep: Callable[..., SweepTable], tmp_path: Path
) -> None:
    """Whoever goes on with a journal begins with the evaluations of what it knows chosen."""
    whole, path = tmp_path / "whole", tmp_path / "cut"
    grid: dict[str, Any] = {"strategies": ["first", "last"], "budgets": [2]}
    sweep(journal=whole, **grid)
    lines = whole.read_text().splitlines(keepends=True)
    chosen = [record["inputs"]["stage"] for record in records(whole)].index("select", 7)
    path.write_text("".join([lines[0], lines[1 + chosen]]))  # the second selection alone
    sweep(journal=path, **grid)
    stages = [record["inputs"]["stage"] for record in records(path)]
    assert stages == ["select"] + 9 * ["evaluate"] + ["select"] + 3 * ["evaluate"]


def test_one_strategy_fails_the_others_go_on(
    sweep: Callable[..., SweepTable], expected: SweepTable
) -> None:
    with pytest.warns(SwaWarning, match="2 points have no row.*no 1 layers today"):
        table = sweep(strategies=["topk", sweep_strategies.refusing, "first"])
    assert table.rows == expected.rows and table.unfinished == 2
    assert any("refusing" in name for name in table.failures)
    with pytest.raises(ValueError, match="no 1 layers today"):
        sweep(strategies=[sweep_strategies.refusing])


def test_a_strategy_of_ones_own(sweep: Callable[..., SweepTable]) -> None:
    table = sweep(strategies=[highest], budgets=[2])
    assert table.rows[2]["layers"] == "7,8"
    assert table.rows[2]["strategy"] == "sweep_strategies.highest"


def test_kernels_are_not_mixed(sweep: Callable[..., SweepTable], tmp_path: Path) -> None:
    sweep(journal=tmp_path / "j")
    lines = (tmp_path / "j").read_text().splitlines()
    changed = json.dumps(json.loads(lines[1]) | {"tier": "abacus"})
    (tmp_path / "j").write_text("\n".join([lines[0], changed, *lines[2:]]) + "\n")
    with pytest.raises(ScoresError, match="abacus"):
        sweep(journal=tmp_path / "j")


@pytest.mark.parametrize("change", [{"key": None}, {"result": 3}, {"result": {}}])
def test_a_damaged_journal_is_refused(
    sweep: Callable[..., SweepTable], tmp_path: Path, change: dict[str, Any]
) -> None:
    sweep(journal=tmp_path / "j", strategies=["first"])
    lines = (tmp_path / "j").read_text().splitlines()
    record = {key: value for key, value in (json.loads(lines[3]) | change).items() if value != None}  # noqa: E711
    (tmp_path / "j").write_text("\n".join([*lines[:3], json.dumps(record), *lines[4:]]) + "\n")
    with pytest.raises(ScoresError, match="journal"):
        sweep(journal=tmp_path / "j", strategies=["first"])


def test_a_worker_that_finds_another_model(planted: Planted) -> None:
    source = tasks.ModelSource(str(planted.folder), "float32", "0" * 64)
    with pytest.raises(CheckpointError, match="another model"):
        source.open()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"windows": []}, "windows is empty"),
        ({"windows": 16}, "windows must be a list"),
        ({"windows": ["16"]}, "windows takes integers"),
        ({"tails": [True]}, "tails takes integers"),
        ({"budgets": [99]}, "99 full-attention layers"),
        ({"budgets": [1.5]}, "fraction must be"),
        ({"strategies": "topk"}, "strategies must be a list"),
        ({"strategies": ["best"]}, "no strategy 'best'"),
        ({"strategies": [lambda problem, size: []]}, "cannot be told from others"),
        ({"objective": "loss"}, "objective must be"),
        ({"threads": -1}, "threads must be"),
        ({"dtypes": ["int4"]}, "dtype must be"),
    ],
)
def test_grids_that_cannot_be(
    sweep: Callable[..., SweepTable], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        sweep(**options)


# ---- the table


def test_files(expected: SweepTable, tmp_path: Path) -> None:
    expected.save(tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["nll"]) for row in rows] == [row["nll"] for row in expected.rows]
    assert [row["layers"] for row in rows] == [row["layers"] for row in expected.rows]
    expected.save(tmp_path / "t.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pylist() == list(expected.rows)
    expected.to_parquet(tmp_path / "e.parquet", examples=True)
    found = pyarrow.parquet.read_table(tmp_path / "e.parquet").to_pylist()
    assert found == list(expected.examples) and len(found) == 3 * len(expected.rows)
    expected.to_csv(tmp_path / "e.csv", examples=True)
    assert len((tmp_path / "e.csv").read_text().splitlines()) == 1 + len(found)
    with pytest.raises(InputError, match="csv or"):
        expected.save(tmp_path / "t.xlsx")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("e.csv", "e.parquet", "t.csv", "t.parquet")
    ]


def test_without_pyarrow(
    expected: SweepTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pyarrow", "polars"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pyarrow or polars"):
        expected.to_parquet(tmp_path / "t.parquet")


def test_polars_will_do(
    expected: SweepTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class DataFrame:
        def __init__(self, rows: list[dict[str, Any]], infer_schema_length: None) -> None:
            self.rows = rows

        def write_parquet(self, path: Path) -> None:
            path.write_text(str(len(self.rows)))

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "polars", SimpleNamespace(DataFrame=DataFrame))
    expected.to_parquet(tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").read_text() == "6"
    assert expected.to_polars(examples=True).rows == list(expected.examples)


def test_timings_do_not_count(sweep: Callable[..., SweepTable], expected: SweepTable) -> None:
    assert len(expected.timings) == len(expected.rows)
    assert all(row["evaluate_seconds"] > 0 for row in expected.timings)
    topk, first = expected.timings[2], expected.timings[4]
    assert topk["score_seconds"] > 0 == first["score_seconds"]
