"""Generation: sampling and text streaming alone, then whole runs against transformers."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from builders import tiny_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from swa.errors import InputError
from swa.generation import Generation, Sampler, TextStream
from swa.model import Model, load
from swa.policy import AttentionPolicy


class ByteTokenizer:
    """Token i is the byte i; 256 is a special token."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class WordTokenizer:
    """Pieces as sentencepiece has them: "_" is a space, dropped where a text begins."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.pieces[i] for i in ids).replace("_", " ").removeprefix(" ")


def stream(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    text = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            break
    return [*pieces, text.finish()], text.stopped


def test_a_character_of_several_tokens_comes_whole() -> None:
    pieces, _ = stream(ByteTokenizer(), list("a\N{EURO SIGN}\N{ROCKET}z".encode()))
    assert pieces == ["a", "", "", "\N{EURO SIGN}", "", "", "", "\N{ROCKET}", "z", ""]


def test_special_tokens_are_not_text_and_unfinished_ones_are_shown_last() -> None:
    pieces, _ = stream(ByteTokenizer(), [104, 256, 105, 0xE2, 0x82])
    assert pieces == ["h", "", "i", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_a_space_that_starts_a_piece_is_kept() -> None:
    tokenizer = WordTokenizer(["_Hello", "_", "_world", "!"])
    assert stream(tokenizer, [0, 2, 3, 1, 2])[0] == ["Hello", " world", "!", " ", " world", ""]


@given(text=st.text(max_size=12))
def test_pieces_add_up_to_the_text(text: str) -> None:
    assert "".join(stream(ByteTokenizer(), list(text.encode()))[0]) == text


@given(text=st.text("abc", max_size=12), stop=st.lists(st.text("abc", min_size=1, max_size=4)))
def test_text_ends_before_the_first_stop(text: str, stop: list[str]) -> None:
    pieces, stopped = stream(ByteTokenizer(), list(text.encode()), tuple(stop))
    # The first stop is the one whose last character comes first; of those, the longest.
    ends = [at + len(s) for s in stop for at in [text.find(s)] if at >= 0]
    assert stopped == bool(ends)
    if not ends:
        assert "".join(pieces) == text
        return
    seen = text[: min(ends)]
    assert "".join(pieces) == seen[: min(seen.find(s) for s in stop if s in seen)]


def logits_of(probabilities: list[float]) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities)).astype(np.float32)


def draws(sampler: Sampler, logits: np.ndarray, n: int) -> list[int]:
    generator = sampler.generator()
    return [sampler.pick(logits, generator) for _ in range(n)]


def test_greedy_takes_the_first_maximum() -> None:
    assert draws(Sampler(), np.array([0, 3, -1, 3], np.float32), 3) == [1, 1, 1]


def test_samples_follow_the_distribution() -> None:
    probabilities = [0.1, 0.0, 0.6, 0.3]
    counts = np.bincount(draws(Sampler(True, seed=1), logits_of(probabilities), 20_000))
    assert counts[1] == 0
    # Four standard deviations of a share at 20,000 draws are 0.014.
    assert np.abs(counts / 20_000 - probabilities).max() < 0.014


def test_temperature() -> None:
    counts = np.bincount(draws(Sampler(True, 0.5, seed=1), logits_of([0.2, 0.8]), 20_000))
    assert abs(counts[0] / 20_000 - 1 / 17) < 0.01
    assert set(draws(Sampler(True, 1e-300, seed=1), logits_of([0.4, 0.6]), 50)) == {1}


@pytest.mark.parametrize(
    ("top_p", "allowed"),
    [(1e-9, {2}), (0.59, {2}), (0.61, {2, 3}), (0.89, {2, 3}), (0.91, {0, 2, 3}), (1, {0, 2, 3})],
)
def test_top_p_keeps_the_token_that_crosses(top_p: float, allowed: set[int]) -> None:
    sampler = Sampler(True, top_p=top_p, seed=3)
    assert set(draws(sampler, logits_of([0.1, 0.0, 0.6, 0.3]), 500)) == allowed


def test_seeds() -> None:
    logits = np.zeros(1000, np.float32)
    assert draws(Sampler(True, seed=7), logits, 20) == draws(Sampler(True, seed=7), logits, 20)
    assert draws(Sampler(True, seed=7), logits, 20) != draws(Sampler(True, seed=8), logits, 20)
    assert draws(Sampler(True), logits, 20) != draws(Sampler(True), logits, 20)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("do_sample", [False, True])
def test_damaged_logits_are_refused(bad: float, do_sample: bool) -> None:
    with pytest.raises(InputError, match="largest logit is"):
        draws(Sampler(do_sample), np.array([0, bad, 1], np.float32), 1)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"do_sample": True, "temperature": 0.0}, "temperature must be"),
        ({"do_sample": True, "temperature": -1.0}, "temperature must be"),
        ({"do_sample": True, "temperature": np.nan}, "temperature must be"),
        ({"do_sample": True, "temperature": np.inf}, "temperature must be"),
        ({"do_sample": True, "top_p": 0.0}, "top_p must be"),
        ({"do_sample": True, "top_p": 1.1}, "top_p must be"),
        ({"do_sample": True, "top_p": np.nan}, "top_p must be"),
        ({"do_sample": True, "seed": -1}, "seed must be"),
        ({"do_sample": True, "seed": 1.5}, "seed must be"),
        ({"temperature": 0.7}, "without do_sample=True"),
        ({"top_p": 0.7}, "without do_sample=True"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Sampler(**settings)


def test_generation_shows_its_text() -> None:
    result = Generation("hi there", (3, 4), "length", 10, 3 * 2**20)
    assert str(result) == "hi there"
    assert repr(result) == (
        "Generation('hi there', 2 tokens after 10, finish_reason='length', kv_cache=3.0 MiB)"
    )


NATIVE = {"use_sliding_window": True}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tied": True, "num_key_value_heads": 1}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen2", {"overrides": NATIVE | {"max_window_layers": 2, "sliding_window": 8}}),
    ("qwen3", {}),
    ("qwen3", {"overrides": NATIVE | {"max_window_layers": 1, "sliding_window": 11}}),
]
PROMPT = np.random.default_rng(0).integers(0, 256, 50).tolist()


@pytest.mark.parametrize(("family", "settings"), FAMILIES)
def test_greedy_equals_transformers(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, family, **settings)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.tensor([PROMPT])
    expected = reference.generate(ids, max_new_tokens=40, do_sample=False)[0, len(PROMPT) :]
    result = load(tmp_path, dtype="float32", num_threads=1).generate(PROMPT, max_new_tokens=40)
    assert list(result.ids) == expected.tolist()
    assert result.n_prompt_tokens == 50


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("tiny"), tokenizer=True)
    return load(folder, dtype="float32", num_threads=1)


@pytest.fixture(scope="module")
def endless(model: Model) -> Model:
    """Without stop tokens, so that lengths are known."""
    return replace(model, stop_ids=frozenset())


@pytest.mark.parametrize(
    "policy",
    [
        AttentionPolicy(8, num_sink_tokens=2, decode="window"),
        AttentionPolicy((8, 1, 20, 64), decode="window"),
        AttentionPolicy(8, num_sink_tokens=60, decode="window"),
        AttentionPolicy(8, num_sink_tokens=2),
        AttentionPolicy(8, num_sink_tokens=2, num_tail_tokens=5),
    ],
)
@pytest.mark.parametrize("full", [[], [1, 3]])
def test_decoding_equals_whole_runs(
    endless: Model, policy: AttentionPolicy, full: list[int]
) -> None:
    """Each token is the most likely one of a run, under that policy, of all before it."""
    hybrid = endless.patch(policy, full_attention_layers=full)
    ids = hybrid.generate(PROMPT, max_new_tokens=30).ids
    # Teacher forced, the rows that the last prompt token and the answer but its end wrote.
    logits = hybrid.logits(PROMPT, ids)[len(PROMPT) - 1 : -1]
    assert logits.argmax(axis=1).tolist() == list(ids)
    assert ids != endless.generate(PROMPT, max_new_tokens=30).ids


def test_windowed_decode_evicts(endless: Model) -> None:
    per_token = 4 * 2 * 2 * 16 * 4  # layers, K and V, KV heads, head_dim, float32
    longer = replace(endless, max_position_embeddings=4096)

    def kv_bytes(policy: AttentionPolicy | None, n_prompt: int, *full: int) -> int:
        hybrid = longer.patch(policy, full_attention_layers=full) if policy else longer
        return hybrid.generate([1] * n_prompt, max_new_tokens=4).kv_bytes

    window = AttentionPolicy(8, num_sink_tokens=2, decode="window")
    everything = kv_bytes(None, 2000)
    assert everything >= per_token * 2003
    assert kv_bytes(AttentionPolicy(8), 2000) == everything
    evicted = kv_bytes(window, 2000)
    assert evicted == kv_bytes(window, 1000) < everything / 8
    assert kv_bytes(window, 2000, 2) == everything / 4 + evicted * 3 / 4


def test_sampling_is_repeatable_and_differs_by_seed(endless: Model) -> None:
    def ids(seed: int) -> tuple[int, ...]:
        settings: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "top_p": 0.9}
        return endless.generate(PROMPT, max_new_tokens=30, seed=seed, **settings).ids

    assert ids(1) == ids(1) != ids(2)
    greedy = endless.generate(PROMPT, max_new_tokens=30).ids
    nearly = endless.generate(
        PROMPT, max_new_tokens=30, do_sample=True, temperature=1e-6, seed=1
    ).ids
    assert nearly == greedy


def test_stop_tokens(endless: Model) -> None:
    free = endless.generate(PROMPT, max_new_tokens=20)
    assert (free.finish_reason, len(free.ids)) == ("length", 20)
    stop = free.ids[5]
    stopped = replace(endless, stop_ids=frozenset({stop})).generate(PROMPT, max_new_tokens=20)
    assert stopped.ids == free.ids[: free.ids.index(stop)]
    assert stopped.finish_reason == "stop"
    nothing = replace(endless, stop_ids=frozenset({free.ids[0]})).generate(PROMPT)
    assert (nothing.ids, nothing.text, nothing.finish_reason) == ((), "", "stop")


def test_stop_texts(endless: Model) -> None:
    free = endless.generate(PROMPT, max_new_tokens=40)
    stop = free.text[4:6]
    stopped = endless.generate(PROMPT, max_new_tokens=40, stop=["never in a text", stop])
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.ids == free.ids[: len(stopped.ids)]
    assert endless.generate(PROMPT, max_new_tokens=40, stop=stop).text == stopped.text


@pytest.mark.parametrize("seed", range(3))
def test_the_stream_is_the_same_text(endless: Model, seed: int) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 60, "do_sample": True, "seed": seed}
    whole = endless.generate(PROMPT, **settings)
    pieces = endless.generate(PROMPT, stream=True, **settings)
    seen = []
    while True:
        try:
            seen.append(next(pieces))
        except StopIteration as end:
            assert end.value == whole
            break
    assert "".join(seen) == whole.text
    assert len(seen) > 5
    assert all(seen)


class Watched:
    """Passes calls on, and can be watched for its end (sessions of the engine cannot)."""

    def __init__(self, inner: Any, sessions: list[weakref.ref[Any]]) -> None:
        self._inner, self._sessions = inner, sessions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def start(self, *arguments: Any) -> Any:
        session = Watched(self._inner.start(*arguments), [])
        self._sessions.append(weakref.ref(session))
        return session


@pytest.mark.parametrize("started", [False, True])
def test_closing_the_stream_frees_the_session(endless: Model, started: bool) -> None:
    sessions: list[weakref.ref[Any]] = []
    watched = replace(endless, engine=Watched(endless.engine, sessions))  # type: ignore[arg-type]
    pieces = watched.generate(PROMPT, stream=True)
    if started:
        next(pieces)
    assert sessions[0]() is not None
    pieces.close()
    gc.collect()
    assert sessions[0]() is None
    assert list(pieces) == []


def test_two_streams_at_once(endless: Model) -> None:
    hybrid = endless.patch(AttentionPolicy(8, decode="window"))
    alone = [m.generate(PROMPT, max_new_tokens=30).text for m in (endless, hybrid)]
    streams = [m.generate(PROMPT, max_new_tokens=30, stream=True) for m in (endless, hybrid)]
    seen = ["", ""]
    for _ in range(40):
        for i, pieces in enumerate(streams):
            seen[i] += next(pieces, "")
    assert seen == alone


def test_positions_and_lengths(model: Model, endless: Model) -> None:
    assert len(endless.generate([1] * 250, max_new_tokens=6).ids) == 6
    assert len(endless.generate([1] * 250).ids) == 6
    assert len(endless.generate(PROMPT, max_new_tokens=1).ids) == 1
    with pytest.raises(InputError, match="256 tokens leave 0 of the model's 256 positions"):
        model.generate([1] * 256)
    with pytest.raises(InputError, match="250 tokens leave 6 of the model's 256 positions"):
        model.generate([1] * 250, max_new_tokens=7, stream=True)  # before the stream is read
    for bad in (0, -1):
        with pytest.raises(InputError, match="max_new_tokens must be at least 1"):
            model.generate([1], max_new_tokens=bad)
    with pytest.raises(InputError, match="a stop text is empty"):
        model.generate([1], stop=["a", ""])
    with pytest.raises(InputError, match="the prompt is empty"):
        model.generate([])
