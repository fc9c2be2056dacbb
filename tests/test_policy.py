"""AttentionPolicy: validation, JSON, the engine's arrays against masks written from the rules."""

from __future__ import annotations

import json
import os
import pickle
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa.errors import PolicyError
from swa.policy import FULL, SLIDING, AttentionPolicy, Rows, format_layers


def config(native: tuple[int | None, ...]) -> Any:
    """What `rows` reads of a ModelConfig."""
    return SimpleNamespace(num_hidden_layers=len(native), native_sliding_window=native)


def oracle_mask(
    policy: AttentionPolicy, layer: int, native: int | None, full: bool, prompt: int, total: int
) -> np.ndarray:
    """[total, total] bool: row t attends to key j; the definition, one pair at a time."""
    window = policy.sliding_window
    w = window[layer] if isinstance(window, tuple) else window
    mask = np.zeros((total, total), dtype=bool)
    for t in range(total):
        for j in range(t + 1):
            if native is not None:
                mask[t, j] = j > t - native
            elif full or (policy.decode == "full" and t >= prompt - policy.num_tail_tokens):
                mask[t, j] = True
            else:
                mask[t, j] = j > t - w or j < policy.num_sink_tokens
    return mask


def engine_mask(rows: Rows, layer: int, total: int) -> np.ndarray:
    """[total, total] bool: what the engine's contract makes of the arrays."""
    t, j = np.arange(total)[:, None], np.arange(total)[None, :]
    window = int(rows.window[layer])
    seen = (window == 0) | (j > t - window) | (j < rows.sinks[layer]) | (t >= rows.full_from[layer])
    return (j <= t) & seen


@st.composite
def policies(draw: st.DrawFn, n_layers: int | None = None) -> AttentionPolicy:
    windows = st.integers(1, 12)
    n = draw(st.integers(1, 6)) if n_layers is None else n_layers
    decode = draw(st.sampled_from(["full", "window"]))
    kinds = st.lists(st.sampled_from([FULL, SLIDING]), min_size=n, max_size=n)
    return AttentionPolicy(
        sliding_window=draw(windows | st.lists(windows, min_size=n, max_size=n).map(tuple)),
        num_sink_tokens=draw(st.integers(0, 5)),
        num_tail_tokens=draw(st.integers(0, 12)) if decode == "full" else 0,
        layer_types=draw(st.none() | kinds.map(tuple)),
        decode=decode,
    )


@given(policy=policies(n_layers=3), prompt=st.integers(1, 12), answer=st.integers(0, 5))
def test_rows_equal_the_mask_of_the_definition(
    policy: AttentionPolicy, prompt: int, answer: int
) -> None:
    native, total = (None, 3, None), prompt + answer
    for full in ((), (0,), (0, 2)):
        rows = policy.rows(config(native), full, prompt, total)
        assert all(a.dtype == np.int64 and a.shape == (3,) for a in rows)
        assert (rows.full_from >= 0).all()
        for layer in range(3):
            expected = oracle_mask(policy, layer, native[layer], layer in full, prompt, total)
            assert (engine_mask(rows, layer, total) == expected).all()


def test_rows_by_hand() -> None:
    policy = AttentionPolicy(sliding_window=8, num_sink_tokens=2, num_tail_tokens=3)
    rows = policy.rows(config((None, None, 5)), {1}, prompt_len=20, n_tokens=24)
    assert rows.window.tolist() == [8, 0, 5]
    assert rows.sinks.tolist() == [2, 0, 0]
    assert rows.full_from.tolist() == [17, 0, 24]
    assert policy.decode_rows(config((None, None, 5)), {1}).window.tolist() == [0, 0, 5]
    assert policy.decode_rows(config((None, None, 5)), {1}).sinks.tolist() == [0, 0, 0]


def test_windowed_decode_exempts_no_row() -> None:
    policy = AttentionPolicy(sliding_window=(8, 9, 7), num_sink_tokens=2, decode="window")
    rows = policy.rows(config((None, None, 5)), {1}, prompt_len=20, n_tokens=24)
    assert rows.window.tolist() == [8, 0, 5]
    assert rows.full_from.tolist() == [24, 0, 24]
    decode = policy.decode_rows(config((None, None, 5)), {1})
    assert decode.window.tolist() == [8, 0, 5]
    assert decode.sinks.tolist() == [2, 0, 0]


@given(policy=policies(), prompt=st.integers(1, 30), answer=st.integers(1, 6))
def test_signal_is_a_scored_or_feeding_row_that_loses_a_key(
    policy: AttentionPolicy, prompt: int, answer: int
) -> None:
    total = prompt + answer
    layers = len(policy.sliding_window) if isinstance(policy.sliding_window, tuple) else 1
    causal = np.tri(total, dtype=bool)
    # The last answer token is only predicted, its own row feeds nothing.
    differs = any(
        (oracle_mask(policy, layer, None, False, prompt, total) != causal)[: total - 1].any()
        for layer in range(layers)
    )
    assert policy.carries_signal(prompt, answer) == differs


@given(policies())
def test_json_round_trip(policy: AttentionPolicy) -> None:
    again = AttentionPolicy.from_json(policy.to_json())
    assert again == policy
    assert hash(again) == hash(policy)
    assert again.to_json() == policy.to_json()


def test_save_and_load(tmp_path: Path) -> None:
    policy = AttentionPolicy.for_consumer("vllm", sliding_window=512).with_full_layers([1], 4)
    path = tmp_path / "policy.json"
    path.write_text("old")
    policy.save(path)
    assert AttentionPolicy.load(path) == policy
    assert os.listdir(tmp_path) == ["policy.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_save_that_fails_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "policy.json"
    path.write_text("old")

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        AttentionPolicy(sliding_window=4).save(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["policy.json"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sliding_window": 0}, "sliding_window must be in 1"),
        ({"sliding_window": -4}, "sliding_window must be in 1"),
        ({"sliding_window": 4.0}, "sliding_window must be an integer, not 4.0"),
        ({"sliding_window": True}, "must be an integer, not True"),
        ({"sliding_window": np.True_}, "must be an integer"),
        ({"sliding_window": "256"}, "must be an integer, not '256'"),
        ({"sliding_window": None}, "must be an integer, not None"),
        ({"sliding_window": 2**31}, "must be in 1..2147483647"),
        ({"sliding_window": ()}, "sliding_window is empty"),
        ({"sliding_window": (4, 0)}, r"sliding_window\[1\] must be in 1"),
        ({"sliding_window": (4, 4.5)}, r"sliding_window\[1\] must be an integer"),
        ({"sliding_window": 4, "num_sink_tokens": -1}, "num_sink_tokens must be in 0"),
        ({"sliding_window": 4, "num_sink_tokens": 1.5}, "num_sink_tokens must be an integer"),
        ({"sliding_window": 4, "num_tail_tokens": -1}, "num_tail_tokens must be in 0"),
        ({"sliding_window": 4, "num_tail_tokens": False}, "num_tail_tokens must be an integer"),
        ({"sliding_window": 4, "decode": "half"}, 'decode must be "full" or "window"'),
        ({"sliding_window": 4, "decode": "window", "num_tail_tokens": 8}, "windowed decode"),
        ({"sliding_window": 4, "layer_types": ()}, "layer_types is empty"),
        ({"sliding_window": 4, "layer_types": FULL}, "must be a list of strings"),
        ({"sliding_window": 4, "layer_types": 3}, "must be a list of strings"),
        ({"sliding_window": 4, "layer_types": (FULL, "full")}, r"layer_types\[1\] must be"),
        ({"sliding_window": 4, "layer_types": (FULL, 1)}, r"layer_types\[1\] must be"),
        ({"sliding_window": (4, 4, 4), "layer_types": (FULL,)}, "has 3 layers, layer_types 1"),
        ({"sliding_window": 4, "decode": "window", "consumer": "tgi"}, "consumer must be one of"),
        ({"sliding_window": 4, "consumer": "vllm"}, "no sinks, no tail and windowed decode only"),
    ],
)
def test_refusals(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        AttentionPolicy(**arguments)


def test_numpy_integers_and_lists_become_plain() -> None:
    policy = AttentionPolicy(
        sliding_window=np.array([4, 5]),  # type: ignore[arg-type]
        num_sink_tokens=np.int32(2),  # type: ignore[arg-type]
        layer_types=[FULL, SLIDING],  # type: ignore[arg-type]
    )
    assert policy == AttentionPolicy((4, 5), 2, layer_types=(FULL, SLIDING))
    assert json.loads(policy.to_json())["sliding_window"] == [4, 5]
    assert pickle.loads(pickle.dumps(policy)) == policy


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "a policy is a JSON object"),
        ('{"sliding_window": 4}', "schema must be 'swa.policy/1'"),
        ('{"schema": "swa.policy/2", "sliding_window": 4}', "not 'swa.policy/2'"),
        ('{"schema": "swa.policy/1"}', "no sliding_window"),
        ('{"schema": "swa.policy/1", "sliding_window": 4, "sinks": 2}', r"unknown .*\['sinks'\]"),
        ('{"schema": "swa.policy/1", "sliding_window": NaN}', "NaN is not a JSON number"),
        ('{"schema": "swa.policy/1", "sliding_window": 4, "sliding_window": 5}', "given twice"),
        ('{"schema": "swa.policy/1", "sliding_window": 4.0}', "must be an integer"),
        ('{"schema": "swa.policy/1", "sliding_window": true}', "must be an integer"),
        ('{"schema": "swa.policy/1", "sliding_window": {"0": 4}}', "must be an integer"),
    ],
)
def test_malformed_json(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        AttentionPolicy.from_json(text)
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(PolicyError, match=r"bad\.json: .*" + says):
        AttentionPolicy.load(path)


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "binary.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PolicyError, match=r"binary\.json"):
        AttentionPolicy.load(path)


def test_full_layers() -> None:
    policy = AttentionPolicy(sliding_window=4)
    assert policy.full_attention_layers is None
    chosen = policy.with_full_layers([3, 1, np.int64(1)], 5)
    assert chosen.layer_types == (SLIDING, FULL, SLIDING, FULL, SLIDING)
    assert chosen.full_attention_layers == (1, 3)
    assert policy.with_full_layers([], 2).full_attention_layers == ()
    for bad in (5, -1, 1.0, True):
        with pytest.raises(PolicyError):
            policy.with_full_layers([bad], 5)  # type: ignore[list-item]


def test_a_policy_for_another_model_is_refused() -> None:
    two = config((None, None))
    for policy in (
        AttentionPolicy((4, 4, 4)),
        AttentionPolicy(4, layer_types=(FULL, FULL, FULL)),
    ):
        with pytest.raises(PolicyError, match="has 3 layers, the model has 2"):
            policy.rows(two, (), 4, 5)
        with pytest.raises(PolicyError, match="has 3 layers, the model has 2"):
            policy.decode_rows(two, ())


def test_a_native_sliding_layer_cannot_be_full() -> None:
    with pytest.raises(PolicyError, match="layer 1 cannot get full attention.*window of 6 keys"):
        AttentionPolicy(4).rows(config((None, 6)), {1}, 4, 5)
    for bad in (2, -1):
        with pytest.raises(PolicyError):
            AttentionPolicy(4).rows(config((None, 6)), {bad}, 4, 5)


def test_differs_from() -> None:
    scored = AttentionPolicy(256, num_sink_tokens=4)
    assert scored.differs_from(scored.with_full_layers([2], 4)) is None
    assert scored.differs_from(AttentionPolicy((256, 256), num_sink_tokens=4)) is None
    applied = AttentionPolicy.for_consumer("transformers", sliding_window=(512, 512, 128))
    assert scored.differs_from(applied) == (
        "sliding_window 256 against (512 x 2, 128), num_sink_tokens 4 against 0,"
        " decode 'full' against 'window'"
    )
    same = AttentionPolicy(512, decode="window")
    assert same.differs_from(AttentionPolicy.for_consumer("vllm", sliding_window=512)) is None


def test_for_consumer() -> None:
    policy = AttentionPolicy.for_consumer("vllm", sliding_window=2048)
    assert (policy.num_sink_tokens, policy.num_tail_tokens, policy.decode) == (0, 0, "window")
    with pytest.raises(PolicyError, match="consumer must be one of"):
        AttentionPolicy.for_consumer("sglang", sliding_window=4)  # type: ignore[arg-type]


def test_repr() -> None:
    assert repr(AttentionPolicy(256)) == "AttentionPolicy(sliding_window=256)"
    policy = AttentionPolicy((512, 512, 128, 128, 128), 4).with_full_layers([0, 2, 3, 4], 5)
    assert repr(policy) == (
        "AttentionPolicy(sliding_window=(512 x 2, 128 x 3), num_sink_tokens=4,"
        " layer_types=<4 of 5 full: 0, 2-4>)"
    )
    assert "<0 of 3 full>" in repr(AttentionPolicy(4).with_full_layers([], 3))
    assert "decode='window', consumer='vllm'" in repr(
        AttentionPolicy.for_consumer("vllm", sliding_window=4)
    )


@pytest.mark.parametrize(
    ("layers", "text"),
    [((), ""), ((3,), "3"), ((3, 1), "1, 3"), ((1, 2), "1, 2"), ((9, 1, 10, 11, 3), "1, 3, 9-11")],
)
def test_format_layers(layers: tuple[int, ...], text: str) -> None:
    assert format_layers(layers) == text
