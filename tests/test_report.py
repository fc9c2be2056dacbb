"""The report: complete, self-contained, escaped, and honest about policies that differ."""

from __future__ import annotations

import itertools
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fake_model import FakeModel, make_examples

import swa
from swa.cli import main
from swa.evaluation import Evaluation, gap_closed
from swa.layer_scores import LayerScores
from swa.pages import nice_ticks
from swa.policy import AttentionPolicy
from swa.reporting import render, report, score_command
from swa.score import score_layers

POLICY = AttentionPolicy(256, num_sink_tokens=4)
SEARCHED = AttentionPolicy(8, num_sink_tokens=2)
VOID = {"meta", "br", "hr", "img", "input", "link"}


def make_scores(**changes) -> LayerScores:
    """Six layers, of which 4 is natively sliding; layers 1 and 5 matter."""
    fields = {
        "direction": "restore",
        "base": (),
        "policy": POLICY,
        "selectable_layers": (0, 1, 2, 3, 5),
        "num_hidden_layers": 6,
        "model_name": "tiny",
        "model_fingerprint": "f" * 64,
        "dtype": "float32",
        "tier": "portable",
        "examples_hash": "e" * 64,
        "version": "0.1.0",
        "tasks": ("num", "copy", "num"),
        "nll_base": (2.0, 2.2, 2.1),
        "nll_full": (0.5, 0.4, 0.6),
        "nll_swa": (2.0, 2.2, 2.1),
        "delta_per_example": (
            (0.01, 0.50, -0.10, 0.0, None, 0.90),
            (0.02, 0.40, -0.20, 0.0, None, 0.80),
            (0.03, 0.60, -0.15, 0.0, None, 1.00),
        ),
    }
    return LayerScores(**(fields | changes))


ONE = {
    "tasks": ("num",),
    "nll_base": (2.0,),
    "nll_full": (0.5,),
    "nll_swa": (2.0,),
    "delta_per_example": ((0.01, 0.50, -0.10, 0.0, None, 0.90),),
}


def make_evaluation(nll: float, policy: AttentionPolicy | None, **changes) -> Evaluation:
    fields = {
        "nll_per_example": (nll - 0.1, nll + 0.1),
        "greedy_match_per_example": (True, False),
        "tasks": ("num", "copy"),
        "policy": policy,
        "model_name": "tiny",
        "model_fingerprint": "f" * 64,
        "dtype": "float32",
        "examples_hash": "d" * 64,
    }
    return Evaluation(**(fields | changes))


class Page(HTMLParser):
    """Checks that tags nest, and collects texts, attributes and the SVG's contents."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(" ".join(data.split()))


def chosen_of(scores: LayerScores, count: int = 2) -> swa.Selection:
    return swa.select(scores, swa.Budget(full_attention_layers=count))


def test_the_page_is_self_contained_and_well_formed():
    scores = make_scores()
    html = render(scores, chosen_of(scores))
    page = Page(html)
    assert not [tag for tag, _ in page.tags if tag in {"script", "link", "img", "iframe", "object"}]
    loading = {"src", "href", "xlink:href", "srcset", "action"}
    assert not [attributes for _, attributes in page.tags if loading & attributes.keys()]
    assert "url(" not in html
    assert "@import" not in html
    assert "http" not in html


def test_everything_is_escaped():
    nasty = "<script>alert('x')</script> & \"co\""
    scores = make_scores(model_name=nasty, notes=(nasty,), tasks=(nasty, "b", "c"))
    named = {nasty: make_evaluation(1.0, POLICY, tasks=(nasty, "copy"))}
    html = render(scores, chosen_of(scores), evaluations=named, command=nasty, title=nasty)
    page = Page(html)
    assert "<script" not in html
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert page.texts.count(nasty) >= 5  # title, heading, note, table, details, command


def test_bars_show_deltas_intervals_and_the_chosen_layers():
    scores = make_scores()
    page = Page(render(scores, chosen_of(scores)))
    tips = [text for text in page.texts if re.match(r"layer \d+:", text)]
    for layer, (delta, interval) in enumerate(zip(scores.delta, scores.interval, strict=True)):
        if layer == 4:
            assert "layer 4: the checkpoint itself makes it sliding" in tips
        else:
            low, high = interval
            within = f"({low:+.4f} to {high:+.4f}), of too few examples to be trusted"
            assert f"layer {layer}: {delta:+.4f} {within}" in tips
    both = [a for tag, a in page.tags if tag == "rect" and a.get("rx") == "1.5"]
    bars = both[:5]
    assert [a["fill"] for a in bars] == [
        f"var(--{'chosen' if layer in (1, 5) else 'other'})" for layer in (0, 1, 2, 3, 5)
    ]
    heights = dict(zip((0, 1, 2, 3, 5), (float(a["height"]) for a in bars), strict=True))
    assert heights[5] / heights[1] == pytest.approx(scores.delta[5] / scores.delta[1], rel=1e-2)
    assert heights[3] == 0


def test_shares_of_resamples_are_drawn_for_a_choice():
    scores = make_scores(tasks=("num",) * 3)
    html = render(scores, chosen_of(scores))
    page = Page(html)
    assert any("A resample chooses 2.0 of the same 2" in text for text in page.texts)
    tips = [text for text in page.texts if re.fullmatch(r"layer \d+: (\d+%|not scored)", text)]
    assert tips == [
        f"layer {i}: {text}"
        for i, text in enumerate(("0%", "100%", "0%", "0%", "not scored", "100%"))
    ]
    for without in (render(scores), render(make_scores(**ONE), chosen_of(make_scores(**ONE)))):
        assert "Would other examples" not in without


def test_layers_within_rounding_are_hollow_in_a_band():
    scores = make_scores(noise_floor=0.02)
    page = Page(render(scores))
    tips = [text for text in page.texts if text.endswith("no more than rounding")]
    assert [tip.split(":")[0] for tip in tips] == ["layer 0", "layer 3"]
    bars = [a for tag, a in page.tags if tag == "rect" and a.get("rx") == "1.5"]
    assert [a["fill"] == "none" for a in bars] == [True, False, False, True, False]
    (band,) = [a for tag, a in page.tags if tag == "rect" and a.get("fill-opacity") == "0.3"]
    zero = next(a for tag, a in page.tags if tag == "line" and a["stroke"] == "var(--soft)")
    middle = float(band["y"]) + float(band["height"]) / 2
    assert middle == pytest.approx(float(zero["y1"]), abs=0.02)


def test_heat_map_has_a_cell_for_each_example_and_layer_grouped_by_task():
    scores = make_scores()
    page = Page(render(scores))
    cells = [text for text in page.texts if re.match(r"example \d+, ", text)]
    order = [int(re.match(r"example (\d+)", text)[1]) for text in cells]
    assert [index for index, _ in itertools.groupby(order)] == [0, 2, 1]  # num, num, copy
    for index, layer in itertools.product(range(3), (0, 1, 2, 3, 5)):
        delta = scores.delta_per_example[index][layer]
        text = f"example {index}, {scores.tasks[index]}, layer {layer}: {delta:+.4f}"
        assert cells.count(text) == 1
    assert len(cells) == 15


def test_table_shows_the_gap_that_each_choice_closes():
    scores = make_scores()
    chosen = chosen_of(scores)
    evaluations = {
        "everything full": make_evaluation(0.5, None),
        "nothing full": make_evaluation(2.5, POLICY.with_full_layers((), 6)),
        "ours": make_evaluation(1.0, chosen.policy),
    }
    page = Page(render(scores, chosen, evaluations=evaluations))
    rows = {name: page.texts.index(name) for name in evaluations}
    assert page.texts[rows["everything full"] :][:4] == ["everything full", "0.500", "100%", "50%"]
    assert page.texts[rows["nothing full"] :][:4] == ["nothing full", "2.500", "0%", "50%"]
    assert page.texts[rows["ours"] :][:6] == ["ours", "1.000", "75%", "50%", "0.900", "1.100"]
    assert "NLL; 75% of the gap closed" in page.texts
    assert not [text for text in page.texts if "Read this first" in text]


def test_without_evaluations_the_scores_give_both_ends_of_the_gap():
    scores = make_scores()
    page = Page(render(scores, chosen_of(scores)))
    assert "not evaluated together" in page.texts
    start = page.texts.index("full attention")
    assert page.texts[start : start + 6] == [
        "full attention", "0.500", "100%", "all sliding", "2.100", "0%",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"policy": AttentionPolicy(256, 4, num_tail_tokens=64)}, "num_tail_tokens 64 against 0"),
        ({"model_fingerprint": "a" * 64}, "another model"),
        ({"dtype": "bfloat16"}, "measured in bfloat16, not in float32"),
    ],
)
def test_an_evaluation_under_other_conditions_is_pointed_out(changes, warning):
    fields = {"policy": POLICY.with_full_layers((), 6)} | changes
    evaluation = make_evaluation(1.0, **fields)
    page = Page(render(make_scores(), evaluations={"other": evaluation}))
    warned = [text for text in page.texts if warning in text]
    assert len(warned) == 1
    assert "other" in warned[0]


def test_a_policy_that_was_not_scored_is_pointed_out():
    applied = AttentionPolicy(512, num_sink_tokens=4).with_full_layers((1, 5), 6)
    page = Page(render(make_scores(), applied))
    assert any("sliding_window 512 against 256" in text for text in page.texts)


def test_evaluations_of_different_examples_are_pointed_out():
    evaluations = {
        "a": make_evaluation(1.0, None),
        "b": make_evaluation(1.0, POLICY, examples_hash="c" * 64),
    }
    page = Page(render(make_scores(), evaluations=evaluations))
    assert any("different examples" in text for text in page.texts)


def test_one_example_and_ablation_from_a_base():
    scores = make_scores(
        direction="ablate",
        base=(1, 5),
        tasks=("default",),
        nll_base=(1.0,),
        nll_full=(0.5,),
        nll_swa=(2.0,),
        delta_per_example=((None, 0.5, None, None, None, 0.0),),
    )
    page = Page(render(scores))
    assert any("rises" in text for text in page.texts)
    assert not any("Whiskers" in text for text in page.texts)
    assert "layer 0: not scored from this base" in page.texts
    assert "none chosen yet" in " ".join(page.texts)


def test_scores_that_are_all_zero_draw():
    scores = make_scores(delta_per_example=((0.0, 0.0, 0.0, 0.0, None, 0.0),) * 3)
    page = Page(render(scores))
    assert any("layer 0: +0.0000 (+0.0000 to +0.0000)" in text for text in page.texts)


def test_the_command_repeats_the_run():
    consumer = AttentionPolicy.for_consumer("vllm", sliding_window=(256, 512) * 3)
    scores = make_scores(policy=consumer)
    words = shlex.split(score_command(scores, "my model", ["--examples", "a b.jsonl"]))
    assert words[:5] == ["swa", "score", "my model", "--examples", "a b.jsonl"]
    assert words[words.index("--sliding-window") + 1] == "256,512,256,512,256,512"
    assert words[words.index("--consumer") + 1] == "vllm"
    assert "--sink-tokens" not in words
    assert "--base" not in words
    restored = make_scores(
        base=(0,),
        delta_per_example=tuple((None, *row[1:]) for row in make_scores().delta_per_example),
    )
    words = shlex.split(score_command(restored))
    assert words[words.index("--base") + 1] == "0"
    assert words[words.index("--sink-tokens") + 1] == "4"
    recorded = make_scores(command="swa score recorded")
    page = Page(render(recorded, chosen_of(recorded)))
    assert "swa score recorded swa select scores.json --layers 2" in page.texts


def test_report_writes_the_page_whole(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    report(make_scores(), None, path)
    assert path.read_text(encoding="utf-8") == render(make_scores())
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("low", "high", "ticks", "decimals"),
    [
        (0.0, 0.9, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0], 1),
        (-0.05, 0.17, [-0.05, 0.0, 0.05, 0.1, 0.15, 0.2], 2),
        (0.0, 0.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0], 1),
        (0.0, 5e-5, [0.0, 1e-5, 2e-5, 3e-5, 4e-5, 5e-5], 5),
        (-40.0, 30.0, [-40.0, -20.0, 0.0, 20.0, 40.0], 0),
    ],
)
def test_ticks_are_round_and_span_the_values(low, high, ticks, decimals):
    found, shown = nice_ticks(low, high)
    assert found[: len(ticks)] == pytest.approx(ticks)
    assert found[-1] >= high
    assert shown == decimals


def test_gap_closed():
    assert gap_closed(1.0, full=0.5, sliding=2.5) == 0.75
    assert gap_closed(0.25, full=0.5, sliding=0.75) == 2.0
    assert gap_closed(1.0, full=1.0, sliding=1.0) is None


def test_a_search_is_told_with_its_losses_and_its_command():
    model, examples = FakeModel(9), make_examples(4)
    scores = score_layers(model, examples, SEARCHED)
    budget = swa.Budget(nll_increase=0.5)
    chosen = swa.select(model, examples, SEARCHED, budget, scores=scores)
    html = render(scores, chosen)
    page = Page(html)
    assert "How the layers were searched for" in html
    assert "by the strategy joint on 4 examples" in html
    assert f"{np.mean(chosen.search.loss_chosen):.4f}" in html
    command = next(text for text in page.texts if "--strategy" in text)
    assert "--nll-increase 0.5" in command and "--strategy joint" in command
    assert "--scores scores.json" in command
    for strategy, says in (
        ("random:seed=5", "--strategy random:seed=5"),
        (lambda problem, size: [0], "# then, in Python: swa.select by"),
    ):
        chosen = swa.select(model, examples, SEARCHED, swa.Budget(2), strategy=strategy)
        assert says in render(scores, chosen)
    assert "How the layers were searched for" not in render(scores, chosen.policy)


def test_a_choice_among_windows_is_repeated_by_its_command(tiny, tmp_path, monkeypatch):
    model = swa.load(tiny(), dtype="float32", num_threads=1)
    examples = make_examples(2, prompt_len=60)
    policy = AttentionPolicy(8, num_sink_tokens=2)
    budget = swa.Budget(prefill_flops=0.98, prompt_tokens=60)
    chosen = swa.select(model, examples, policy, budget, windows=[32, 16])
    html = render(score_layers(model, examples, policy), chosen)
    (command,) = (text for text in Page(html).texts if "--windows" in text)
    words = shlex.split(command[command.index("swa select") :])
    assert words[words.index("--windows") + 1] == "16,32"
    assert "--strategy" not in words
    monkeypatch.chdir(Path(model.source).parent)
    swa.examples.write_jsonl(tmp_path / "e.jsonl", examples)
    words[words.index("EXAMPLES.jsonl")] = str(tmp_path / "e.jsonl")
    out = tmp_path / "policy.json"
    assert main([*words[1:], "--threads", "1", "--out", str(out)]) == 0
    assert AttentionPolicy.load(out) == chosen.policy


def test_a_policy_file_with_a_search_tells_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, examples = FakeModel(9), make_examples(4)
    scores = score_layers(model, examples, SEARCHED)
    scores.save("scores.json")
    chosen = swa.select(model, examples, SEARCHED, swa.Budget(fraction=0.3))
    chosen.save("policy.json")
    chosen.policy.save("plain.json")
    for policy, says in (("policy.json", True), ("plain.json", False)):
        assert main(["report", "scores.json", "--policy", policy]) == 0
        html = (tmp_path / "report.html").read_text()
        assert ("How the layers were searched for" in html) == says
