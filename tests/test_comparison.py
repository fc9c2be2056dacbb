"""Comparisons: values by task, paired differences, the table, the page, the JSON form."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import planted_checkpoint
from rich.console import Console

import swa
from swa.cli import main
from swa.comparison import MEASURES, Comparison, compare, with_ends
from swa.comparison_page import render
from swa.errors import InputError, ScoresError
from swa.evaluation import Evaluation
from swa.examples import Example
from swa.statistics import paired_bootstrap

POLICY = swa.AttentionPolicy(16, num_sink_tokens=2)
TASKS = ("a", "b") * 6


def evaluation(nll: Any, policy: swa.AttentionPolicy | None = None, **changes: Any) -> Evaluation:
    nll = tuple(map(float, nll))
    greedy = tuple(value < 1 for value in nll)
    made = Evaluation(nll, greedy, TASKS[: len(nll)], policy, "m", "f", "float32", "e")
    return replace(made, **changes)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 1.5, len(TASKS))

    def replied(offset: float, policy: swa.AttentionPolicy | None) -> Evaluation:
        nll = base + offset + rng.normal(0, 0.02, len(TASKS)) * bool(offset)
        scores = tuple(float(value < 1.2) for value in nll)
        replies = ("yes",) * len(TASKS)
        return evaluation(nll, policy, replies=replies, score_per_example=scores)

    return Comparison(
        {
            "full": replied(0, None),
            "sliding": replied(0.8, POLICY.with_full_layers([], 4)),
            "chosen": replied(0.2, POLICY.with_full_layers([1], 4)),
        },
        "chosen",
    )


def test_values_and_differences_by_task_and_over_all(comparison):
    full, chosen = comparison.evaluations["full"], comparison.evaluations["chosen"]
    assert comparison.tasks == ("a", "b")
    assert comparison.value("full") == full.nll
    assert comparison.value("full", "greedy_match", "b") == full.greedy_match_by_task["b"]
    assert comparison.value("full", "score") == full.score
    first = paired_bootstrap(full.nll_per_example[::2], chosen.nll_per_example[::2])
    assert comparison.difference("full", task="a") == first
    assert first.excludes_zero and first.difference < 0
    everything = paired_bootstrap(full.nll_per_example, chosen.nll_per_example, tasks=TASKS)
    assert comparison.difference("full") == everything
    scores = (full.score_per_example, chosen.score_per_example)
    judged = paired_bootstrap(*scores, tasks=TASKS, higher_is_better=True)
    assert comparison.difference("full", "score") == judged
    assert comparison.difference("chosen").interval == (0.0, 0.0)


def test_what_is_of_one_text_is_resampled_together():
    tasks, units = ("near", "far") * 6, tuple(i // 2 for i in range(12))
    values = np.random.default_rng(1).uniform(0, 1, 12)
    a = evaluation(values, tasks=tasks, units=units)
    b = evaluation(values[::-1], tasks=tasks, units=units)
    found = Comparison({"a": a, "b": b}, "b")
    by_text = [np.mean(np.reshape(e.nll_per_example, (6, 2)), axis=1) for e in (a, b)]
    assert found.difference("a").n_examples == 6
    assert found.difference("a").interval == pytest.approx(paired_bootstrap(*by_text).interval)
    assert found.value("a") == pytest.approx(a.nll)
    far = (a.nll_per_example[1::2], b.nll_per_example[1::2])
    assert found.difference("a", task="far").interval == paired_bootstrap(*far).interval


def test_units_of_the_same_tasks_are_resampled_among_themselves():
    """Three questions asked at two lengths, and six of another task."""
    tasks = ("qa 1k", "qa 2k") * 3 + ("vt",) * 6
    units = (0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8)
    values = np.random.default_rng(3).uniform(0, 1, 12)
    a, b = (evaluation(v, tasks=tasks, units=units) for v in (values, values[::-1]))
    by_unit = [
        0.75
        * np.array(
            [*np.sum(np.reshape(e.nll_per_example[:6], (3, 2)), axis=1), *e.nll_per_example[6:]]
        )
        for e in (a, b)
    ]
    expected = paired_bootstrap(*by_unit, tasks=["qa"] * 3 + ["vt"] * 6)
    found = Comparison({"a": a, "b": b}, "b").difference("a")
    assert found.n_examples == 9 and found.interval == pytest.approx(expected.interval)


def test_units_count_by_their_size():
    units = (0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8)
    values = np.random.default_rng(2).uniform(0, 1, 12)
    a, b = evaluation(values, units=units), evaluation(values[::-1], units=units)
    found = Comparison({"a": a, "b": b}, "b")
    assert found.value("a") == pytest.approx(a.nll)
    assert found.difference("a").difference == pytest.approx(a.nll - b.nll)
    assert found.difference("a").n_examples == 9


def test_greedy_match_is_left_out_where_nothing_matches():
    one = evaluation(np.full(12, 2.0))
    assert Comparison({"a": one, "b": one}, "a").measures == ("nll",)
    assert "greedy match" not in render(Comparison({"a": one}, "a"))


def test_the_gap(comparison):
    nll = {name: e.nll for name, e in comparison.evaluations.items()}
    closed = (nll["sliding"] - nll["chosen"]) / (nll["sliding"] - nll["full"])
    assert comparison.gap_closed("chosen") == pytest.approx(closed)
    assert comparison.gap_closed("full") == 1.0
    assert comparison.gap_closed("sliding") == 0.0
    other = evaluation(np.ones(12), swa.AttentionPolicy(99).with_full_layers([1], 4))
    plain = {n: replace(e, replies=None, score_per_example=None) for n, e in
             comparison.evaluations.items()}  # fmt: skip
    found = Comparison(plain | {"other": other}, "full")
    assert found.gap_closed("other") is None  # its own end was not measured
    assert found.measures == ("nll", "greedy_match")
    del plain["full"]
    assert Comparison(plain, "chosen").gap_closed("chosen") is None


def test_only_the_same_examples_are_compared():
    one = evaluation(np.ones(12))
    for other, says in (
        (replace(one, examples_hash="x"), "'b' was measured on other examples than 'a'"),
        (replace(one, tasks=("c",) * 12), "other examples"),
        (replace(one, units=tuple(range(12))), "other examples"),
        (replace(one, replies=("x",) * 12, score_per_example=(1.0,) * 12), "has replies"),
    ):
        with pytest.raises(InputError, match=says):
            Comparison({"a": one, "b": other}, "a")
    with pytest.raises(InputError, match="no 'x' to compare with: choose from a"):
        Comparison({"a": one}, "x")
    with pytest.raises(InputError, match="no evaluations"):
        Comparison({}, "a")
    alone = Comparison({"a": one}, "a")
    with pytest.raises(InputError, match="no task 'x'"):
        alone.value("a", task="x")
    with pytest.raises(InputError, match="no replies"):
        alone.value("a", "score")


def test_what_a_reader_should_know():
    one = evaluation(np.ones(12), judge="j")
    other = replace(one, model_fingerprint="g", dtype="bfloat16", judge=None)
    said = " ".join(Comparison({"a": one, "b": other}, "a").warnings())
    for part in (
        '"b" and "a" are different models',
        "in bfloat16, not in float32",
        "judged by None",
    ):
        assert part in said
    few = evaluation(np.ones(3))
    assert Comparison({"a": few}, "a").warnings() == [
        "Too few examples for intervals to be trusted: a, b."
    ]
    assert Comparison({"a": one}, "a").warnings() == []


def shown(comparison: Comparison, measure: Any = "nll") -> str:
    out = StringIO()
    Console(file=out, width=200).print(comparison.table(measure))
    return out.getvalue()


def test_the_table(comparison):
    text = shown(comparison)
    for name in ("full", "sliding", "chosen"):
        assert name in text
        for task in ("a", "b", None):
            assert f"{comparison.value(name, task=task):.3f}" in text
    low, high = comparison.difference("full").interval
    assert f"[{low:+.3f}, {high:+.3f}]*" in text
    assert f"{comparison.gap_closed('chosen'):.0%}" in text
    assert "gap closed" not in shown(comparison, "score")
    assert f"{comparison.value('sliding', 'score'):.0%}" in shown(comparison, "score")
    assert "'chosen'" in " ".join(text.split())


def test_names_are_text_and_no_markup():
    name = "[red]<script>alert(1)</script>"
    one = evaluation(np.ones(12), tasks=("[b]<i>",) * 12)
    found = Comparison({name: one, "b": one}, name)
    assert name in shown(found)
    assert "[b]<i>" in shown(found)
    page = render(found, title="<b>")
    assert "<script" not in page
    assert "<i>" not in page
    assert "<title>&lt;b&gt;</title>" in page


class Page(HTMLParser):
    """Checks that tags are closed, and collects what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "line", "circle", "br"):
            self.open.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_the_page_is_whole_and_needs_nothing(comparison, tmp_path):
    comparison.report(tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.fetched == []
    text = " ".join(page.texts)
    for part in (*MEASURES.values(), "paired bootstrap, 95%", "AttentionPolicy(", "full: 1"):
        assert part in text
    assert text.count(f"{comparison.value('sliding'):.3f}") == 2  # figure and table
    low, high = comparison.difference("sliding").interval
    assert f"[{low:+.3f}, {high:+.3f}]*" in text


def test_a_page_of_one_policy_and_one_example(tmp_path):
    page = Page(render(Comparison({"only": evaluation([1.25])}, "only")))
    assert "1.250" in page.texts
    assert any("Too few examples" in text for text in page.texts)
    two = Comparison({"one": evaluation([1.25]), "two": evaluation([1.5])}, "one")
    assert "+0.250" in Page(render(two)).texts
    assert "+0.250" in shown(two)


def test_json_round_trip(comparison, tmp_path):
    path = tmp_path / "c.json"
    comparison.save(path)
    loaded = Comparison.load(path)
    assert loaded.evaluations == comparison.evaluations
    data = json.loads(path.read_text())
    assert loaded.to_dict() == comparison.to_dict() == data
    rows = {(r["name"], r["measure"], r["task"]): r for r in data["table"]}
    assert len(rows) == 3 * 3 * 3
    row = rows["full", "nll", None]
    assert row["value"] == comparison.value("full")
    assert tuple(row["interval"]) == comparison.difference("full").interval
    assert row["excludes_zero"] is True
    assert "NLL" in repr(comparison)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "x"}, "schema"),
        ({"baseline": "x"}, "no 'x' to compare with"),
        ({"baseline": None}, "compare with"),
        ({"evaluations": []}, "not a valid comparison"),
        ({"evaluations": {"a": {}}}, "schema 'swa.evaluation/2'"),
    ],
)
def test_damaged_comparisons_are_refused(comparison, tmp_path, change, says):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(comparison.to_dict() | change))
    with pytest.raises(ScoresError, match=says) as caught:
        Comparison.load(path)
    assert str(path) in str(caught.value)
    missing = {k: v for k, v in comparison.to_dict().items() if k != "seed"}
    with pytest.raises(ScoresError, match="'seed'"):
        Comparison.from_dict(missing)


# ---- on a model


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[swa.Model, list[Example]]:
    made = planted_checkpoint(tmp_path_factory.mktemp("planted"))
    model = swa.load(made.folder, dtype="float32", num_threads=1)
    given = [made.example(160, near=80, seed=seed) for seed in range(6)]
    return model, [Example(tuple(e.prompt_ids), tuple(e.answer_ids), "ask") for e in given]


def test_compare_finds_what_is_planted(planted, capsys):
    model, examples = planted
    policy = swa.AttentionPolicy(32)
    chosen = {
        "right": policy.with_full_layers([2, 5, 7], 9),  # the planted layers
        "wrong": policy.with_full_layers([0, 1, 3], 9),
    }
    found = compare(model, chosen, examples, baseline="wrong", generate=True, progress=True)
    assert list(found.evaluations) == ["full attention", "all sliding", "right", "wrong"]
    assert found.gap_closed("right") == pytest.approx(1, abs=0.01)
    assert found.gap_closed("wrong") == pytest.approx(0, abs=0.01)
    assert found.difference("right").excludes_zero
    assert found.value("right", "score") == 1.0 > found.value("wrong", "score")
    again = compare(model.patch(policy), chosen, examples, ends=False, generate=True)
    assert list(again.evaluations) == ["right", "wrong"]
    assert again.baseline == "right"
    assert again.evaluations["right"] == found.evaluations["right"]
    assert capsys.readouterr().out == ""


def test_ends_are_those_that_are_missing():
    sliding, chosen = POLICY.with_full_layers([], 4), POLICY.with_full_layers([1], 4)
    assert with_ends({"x": chosen}) == {"full attention": None, "all sliding": POLICY, "x": chosen}
    assert list(with_ends({"x": chosen, "f": None})) == ["all sliding", "x", "f"]
    assert list(with_ends({"x": chosen, "s": sliding})) == ["full attention", "x", "s"]
    assert list(with_ends({"f": None})) == ["f"]
    with pytest.raises(InputError, match="'all sliding' is the name"):
        with_ends({"all sliding": chosen})


def test_compare_refuses_before_it_runs(planted):
    model, examples = planted
    with pytest.raises(InputError, match="no policies"):
        compare(model, {}, examples)
    with pytest.raises(InputError, match="no 'x' to compare with"):
        compare(model, {"a": POLICY}, examples, baseline="x")


# ---- on the command line


RUN = ["--dtype", "float32", "--threads", "1"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    POLICY.with_full_layers([1], 4).save("one.json")
    POLICY.with_full_layers([0, 2], 4).save("two.json")
    return tmp_path


@pytest.fixture(scope="module")
def checkpoint(tiny) -> str:
    return str(tiny(tokenizer=True, chat_template=True, max_position_embeddings=4096))


def test_swa_compare(here, checkpoint, capsys):
    run = ["compare", checkpoint, *RUN, "--policy", "one=one.json", "--policy", "two=two.json"]
    run += ["--suite", "needle", "--lengths", "700", "--depths", "0,1"]
    assert main([*run, "--report", "c.html", "--plot", "c.svg", "--json"]) == 0
    captured = capsys.readouterr()
    found = Comparison.from_dict(json.loads(captured.out))
    assert list(found.evaluations) == ["full attention", "all sliding", "one", "two"]
    assert found.baseline == "one"
    assert "Too few examples" in captured.err
    page = Page((here / "c.html").read_text())
    assert f"{found.value('two'):.3f}" in page.texts
    assert re.findall(r"<!-- (two|one) -->", (here / "c.svg").read_text())
    model = swa.load(checkpoint, dtype="float32", num_threads=1)
    made = swa.suites.examples("needle", model.tokenizer, lengths=[700], depths=[0.0, 1.0])
    two = swa.AttentionPolicy.load("two.json")
    assert found.evaluations["two"] == swa.evaluate(model, made, policy=two)
    assert main([*run, "--no-ends", "--baseline", "two"]) == 0
    out = capsys.readouterr().out
    assert "needle 700 at 0" in out
    assert "all sliding" not in out
    assert "'two'" in " ".join(out.split())


def test_swa_compare_of_strategies(here, checkpoint, capsys):
    lines = [
        {"prompt_ids": [7 * i % 256 for i in range(s, s + 60)], "answer_ids": [s, 9]}
        for s in range(3)
    ]
    for name in ("calibration", "heldout"):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    select = ["--sliding-window", "16", "--sink-tokens", "2", "--layers", "2"]
    run = ["compare", checkpoint, *RUN, *select, "--calibration", "calibration.jsonl"]
    run += ["--strategy", "first", "--strategy", "first_order", "--examples", "heldout.jsonl"]
    assert main([*run, "--policy", "one=one.json", "--json"]) == 0
    captured = capsys.readouterr()
    found = Comparison.from_dict(json.loads(captured.out))
    assert list(found.evaluations)[2:] == ["one", "first", "first_order"]
    policies = {name: e.policy for name, e in found.evaluations.items()}
    assert policies["first"] == POLICY.with_full_layers([0, 1], 4)
    model = swa.load(checkpoint, dtype="float32", num_threads=1)
    given = swa.examples.from_jsonl("calibration.jsonl")
    budget = swa.Budget(full_attention_layers=2)
    chosen = swa.select(model, given, POLICY, budget, strategy="first_order")
    assert policies["first_order"] == chosen.policy
    assert "selecting by first_order" in captured.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--suite perplexity --lengths 99 --generate", "no replies to generate"),
        ("--suite perplexity --lengths 99 --journal j", "keeps no journal"),
        ("--suite longmemeval --file l.jsonl --generate", "give a judge"),
        ("--examples e.jsonl --generate --scorer judge", "give a judge"),
        ("--examples e.jsonl --generate --scorer regex", "not a regular expression"),
        ("--examples e.jsonl --policy 'full attention=one.json'", "the name of another policy"),
        ("--examples e.jsonl --policy 'all sliding=one.json'", "the name of another policy"),
        ("--examples e.jsonl --policy none=none.json --baseline 'all sliding'", "choose from"),
        ("--examples e.jsonl --policy nine=nine.json", "9 layers"),
        ("--examples e.jsonl --journal one.json", "not a journal"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_search(
    here, checkpoint, capsys, monkeypatch, options, says
):
    monkeypatch.setattr("swa.selection.select", lambda *_, **__: pytest.fail("it searched"))
    Path("e.jsonl").write_text(json.dumps({"prompt": "one", "answer": "(7"}))
    entry = {"prompt": "Who?", "question": "Who?", "answer": "Ann", "question_type": "x"}
    Path("l.jsonl").write_text(json.dumps(entry))
    POLICY.with_full_layers([], 4).save("none.json")
    POLICY.with_full_layers([1], 9).save("nine.json")
    run = ["compare", checkpoint, *RUN, "--strategy", "first", "--sliding-window", "16"]
    run += ["--layers", "1", "--calibration", "e.jsonl"]
    assert main([*run, *shlex.split(options)]) in (1, 2)
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_swa_compare_goes_on_with_searches(here, checkpoint, capsys):
    """Both journals hold what was done; the same command ends in the same result."""
    line = {"prompt_ids": list(range(60)), "answer_ids": [7, 9]}
    Path("e.jsonl").write_text(json.dumps(line) + "\n")
    run = ["compare", checkpoint, *RUN, "--sliding-window", "16", "--layers", "2", "--json"]
    run += ["--strategy", "joint", "--calibration", "e.jsonl", "--examples", "e.jsonl"]
    assert main(run) == 0
    unkept = json.loads(capsys.readouterr().out)
    run += ["--journal", "kept"]
    journals = Path("kept"), Path("kept.search")
    ends = []
    for _ in range(2):
        assert main(run) == 0
        assert json.loads(capsys.readouterr().out) == unkept
        ends.append([journal.read_bytes() for journal in journals])
    assert ends[0] == ends[1]
    # Killed in the middle of the search.
    journals[0].unlink()
    journals[1].write_bytes(b"".join(ends[0][1].splitlines(keepends=True)[:4]))
    assert main(run) == 0
    assert json.loads(capsys.readouterr().out) == unkept
    assert journals[1].read_bytes().count(b"\n") == ends[0][1].count(b"\n")


def test_swa_compare_of_evaluations(here, capsys, comparison):
    for name, one in comparison.evaluations.items():
        one.save(f"{name}.json")
    named = [x for n in comparison.evaluations for x in ("--evaluation", f"{n}={n}.json")]
    assert main(["compare", *named, "--baseline", "chosen", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == comparison.to_dict()
    assert main(["compare", *named]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in MEASURES.values())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give MODEL and a --policy or --strategy"),
        (["m"], "give MODEL and a --policy or --strategy"),
        (["m", "--strategy", "topk"], "needs --sliding-window and --calibration"),
        (
            ["m", "--strategy", "topk", "--sliding-window", "9", "--calibration", "c"],
            "give one budget",
        ),
        (["m", "--policy", "a=one.json", "--layers", "2"], "are for --strategy"),
        (["m", "--policy", "a=one.json", "--baseline", "b"], "'b' is none of a"),
        (
            shlex.split(
                "m --strategy first --strategy first --sliding-window 9 --calibration c --layers 1"
            ),
            "the same name: first, first",
        ),
        (["m", "--policy", "a=one.json", "--tail-tokens", "2"], "are for --strategy"),
        (["m", "--evaluation", "a=b"], "leave out MODEL"),
        (["--evaluation", "a=b", "--layers", "3", "--generate"], "leave out --layers, --generate"),
        (["--policy", "a=one.json"], "give MODEL and a --policy"),
        (["m", "--policy", "one.json"], "NAME=FILE"),
        (["m", "--policy", "a=one.json", "--policy", "a=two.json"], "given twice"),
        (["m", "--policy", "a=absent.json"], "absent.json"),
        (["m", "--policy", "a=one.json", "--plot", "x.png"], "--plot draws"),
        (["m", "--policy", "a=one.json", "--report", "absent/r.html"], "directory"),
        (["--evaluation", "a=one.json"], "one.json: an evaluation is"),
    ],
)
def test_bad_command_lines(here, capsys, arguments, says):
    assert main(["compare", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err.splitlines()[-1]
