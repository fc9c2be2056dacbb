"""What a search keeps of its runs: searches cut anywhere, journals shared, damaged or of others."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fake_model import FakeModel, make_examples

import swa
from swa.errors import ScoresError
from swa.policy import AttentionPolicy

POLICY = AttentionPolicy(sliding_window=8, num_sink_tokens=2)
RUNS = ("nll_example", "gates_example", "sweep_example", "attention_mass")


class CountingModel(FakeModel):
    """Counts what it runs."""

    def __init__(self, num_layers: int = 7) -> None:
        super().__init__(num_layers)
        self.runs: Counter[str] = Counter()

    def __getattribute__(self, name: str) -> Any:
        if name in RUNS:
            self.runs[name] += 1
        return super().__getattribute__(name)


def select(journal: Path | None, model: Any = None, layers: int = 3, **settings: Any) -> Any:
    given = {"examples": make_examples(4), "policy": POLICY, "strategy": "joint"} | settings
    budget = swa.Budget(full_attention_layers=layers)
    return swa.select(model or FakeModel(7), budget=budget, journal=journal, **given)


def n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


@pytest.mark.parametrize("strategy", ["joint", "path", "topk", "lighttransfer", "backward"])
def test_a_search_cut_anywhere_ends_the_same(strategy: str, tmp_path: Path) -> None:
    whole, cut, model = tmp_path / "whole", tmp_path / "cut", CountingModel()
    straight = select(whole, model, strategy=strategy)
    assert straight == select(None, strategy=strategy)
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + sum(model.runs.values())
    for kept in {1, 2, len(lines) // 2, len(lines) - 1, len(lines)}:
        cut.write_bytes(b"".join(lines[:kept]) + lines[-1][:7])
        model = CountingModel()
        resumed = select(cut, model, strategy=strategy)
        assert resumed == straight  # its cost, too
        assert sum(model.runs.values()) == len(lines) - kept
        assert n_lines(cut) == len(lines)


def test_other_searches_do_not_repeat_its_runs(tmp_path: Path) -> None:
    journal, model = tmp_path / "j", CountingModel()
    select(journal, strategy="path")
    known = n_lines(journal)
    assert select(journal, model, layers=2, strategy="path") == select(
        None, layers=2, strategy="path"
    )
    assert sum(model.runs.values()) == n_lines(journal) - known == 4  # the selection's own loss


@pytest.mark.parametrize(
    "other",
    [
        {"policy": dataclasses.replace(POLICY, num_tail_tokens=2)},
        {"examples": make_examples(5)},
        {"examples": make_examples(4, answer_len=2)},
    ],
)
def test_another_problem_takes_nothing_of_it(other: dict[str, Any], tmp_path: Path) -> None:
    journal = tmp_path / "j"
    first = select(journal)
    assert select(journal, **other) == select(None, **other)
    model = CountingModel()
    assert select(journal, model) == first and not model.runs  # and both are kept


def test_a_pareto_front_has_many_problems(tmp_path: Path) -> None:
    def front(journal: Path | None, model: Any) -> Any:
        settings: dict[str, Any] = {"tail_tokens": [0, 2], "sizes": [1, 3], "strategy": "joint"}
        return swa.pareto(model, make_examples(4), POLICY, journal=journal, **settings)

    journal, model = tmp_path / "j", CountingModel()
    straight = front(journal, FakeModel(7))
    assert straight == front(None, FakeModel(7))
    assert front(journal, model) == straight and not model.runs
    select(journal, model)
    assert not model.runs  # a point of it


def test_another_models_journal_is_refused(tmp_path: Path) -> None:
    select(tmp_path / "j")
    before = (tmp_path / "j").read_bytes()
    for name, value in (("fingerprint", "0" * 64), ("dtype", "float32")):
        model: Any = FakeModel(7)
        setattr(model, name, value)
        with pytest.raises(ScoresError, match=rf"another run: (model_)?{name} was"):
            select(tmp_path / "j", model)
    assert (tmp_path / "j").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"values": []},
        {"values": [None]},
        {"values": "1"},
        {"at": 3},
        {"example": 0.5},
        {"seconds": "1"},
        {"seconds": 10**400},
    ],
)
def test_a_damaged_record(change: dict[str, Any], tmp_path: Path) -> None:
    journal = tmp_path / "j"
    select(journal)
    lines = journal.read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | change)
    journal.write_text("\n".join(lines) + "\n")
    with pytest.raises(ScoresError, match="j: line 4 is not the record of a run"):
        select(journal)


def test_references_are_made_where_a_run_needs_them(
    tiny: Any, tmp_path: Path, made: list[tuple[int, ...]]
) -> None:
    """Those of "kl" are large: a journal does not hold them."""
    model = swa.load(tiny(), dtype="float32", num_threads=1)
    settings = {"examples": make_examples(2, prompt_len=48), "objective": "kl", "layers": 1}
    straight = select(tmp_path / "j", model, **settings)
    before = (tmp_path / "j").read_bytes()
    assert len(made) == len(set(made)) == 2
    made.clear()
    assert select(tmp_path / "j", model, **settings) == straight  # its cost, too
    assert not made
    assert (tmp_path / "j").read_bytes() == before
    lines = before.splitlines(keepends=True)
    last = json.loads(lines[-1])["example"]
    (tmp_path / "j").write_bytes(b"".join(lines[:-1]))
    assert select(tmp_path / "j", model, **settings) == straight
    assert [ids[0] for ids in made] == [last]
    assert select(None, model, **settings) == straight


@pytest.mark.parametrize("strategy", ["joint", "topk"])
def test_few_references_are_kept(
    strategy: str,
    tiny: Any,
    tmp_path: Path,
    made: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = swa.load(tiny(), dtype="float32", num_threads=1)
    examples = make_examples(5, prompt_len=48)
    settings = {"examples": examples, "objective": "kl", "layers": 1, "strategy": strategy}
    expected = select(None, model, **settings)
    each = 4 * examples[0].answer_len * model.config.vocab_size
    for room in (each - 1, each, 3 * each + 1):
        monkeypatch.setattr("swa.gates.REFERENCE_BYTES", room)
        made.clear()
        found = select(tmp_path / f"{room}", model, **settings)
        assert found == expected  # its cost, too: references are counted once
        assert set(Counter(made)) == {e.prompt_ids + e.answer_ids[:-1] for e in examples}
        assert len(made) > 5
        assert sum(count == 1 for count in Counter(made).values()) >= min(room // each, 3) - 1
        made.clear()
        assert select(tmp_path / f"{room}", model, **settings) == expected and not made


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The ids of every reference that is made from now on."""
    ids: list[tuple[int, ...]] = []
    full_logits = swa.Model.full_logits

    def counting(self: swa.Model, given: Any, first_row: int = 0) -> Any:
        ids.append(tuple(given))
        return full_logits(self, given, first_row)

    monkeypatch.setattr(swa.Model, "full_logits", counting)
    return ids
