"""GGUF files: every number, every key, logits against transformers; hostile files."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import struct
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoint_files import DTYPES, encode, read_tensors
from gguf import GGMLQuantizationType as Type
from gguf_files import Stored, from_folder, gguf_name
from hf_reference import Transformers
from opened import collect, file_name
from processes import measure_peak

import swa
from swa import gguf_checkpoint, gguf_file
from swa.checkpoint import open_checkpoint
from swa.cli import main
from swa.demo import wheel_model
from swa.errors import CheckpointError, SwaError, TokenizerError, UnsupportedModelError
from swa.model import plan
from swa.weight_files import open_regular

Tiny = Callable[..., Path]
SMALL = {"num_hidden_layers": 2}
IDS = np.random.default_rng(7).integers(0, 250, 150).tolist()  # beyond the 64 that RoPE scales from


def _dequantised() -> list[Type]:
    """All that the installed gguf package dequantises."""
    kinds = []
    for kind, (_, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        with contextlib.suppress(NotImplementedError):
            gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
            kinds.append(kind)
    return kinds


DEQUANTISED = _dequantised()
REFUSED = [kind for kind in gguf.GGML_QUANT_SIZES if kind not in DEQUANTISED]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def loaded(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of each tensor that the file yields, by transformers' names."""
    checkpoint = open_checkpoint(path)
    found = {file_name(*key): tensor for key, tensor in collect(checkpoint).items()}
    assert sum(len(data) for _, data in found.values()) == checkpoint.n_bytes
    return found


# ---- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16], ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"tied": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 24}),
        ("qwen2", {"tied": True}),
        ("qwen2", {"num_key_value_heads": 4}),
    ],
)
def test_parameters_are_the_originals(
    tiny: Tiny, path: Path, family: str, options: dict[str, Any], kind: Type
) -> None:
    folder = tiny(family, **SMALL, **options)
    from_folder(folder, path, kind=kind)
    dtypes = {name: kind.name if x.ndim == 2 else "F32" for name, x in originals(folder)}
    assert loaded(path) == {
        name: (dtypes[name], encode(x, dtypes[name]).tobytes()) for name, x in originals(folder)
    }
    checkpoint = open_checkpoint(path)
    assert checkpoint.dtypes == {"F32", kind.name}
    assert checkpoint.config.tie_word_embeddings == options.get("tied", False)
    assert (checkpoint.source, checkpoint.folder) == (str(path), None)
    assert [stamp.path for stamp in checkpoint.weight_files] == [path]


def originals(folder: Path) -> list[tuple[str, np.ndarray]]:
    return list(read_tensors(folder).items())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", DEQUANTISED, ids=lambda kind: kind.name)
def test_every_quantisation(
    tiny: Tiny, path: Path, kind: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random blocks: the gguf package's numbers, Q and K rows back in their places.

    Read in chunks of one head, or of a few rows where nothing is permuted.
    """
    monkeypatch.setattr(gguf_checkpoint, "CHUNK_BYTES", 5 * 256 * 4)
    folder = tiny(**SMALL, hidden_size=256, intermediate_size=256, head_dim=64)
    rng = np.random.default_rng(kind.value)

    def requantise(stored: dict[str, Stored]) -> None:
        block_items, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        for name, (x, _) in stored.items():
            if x.ndim == 2:
                n_bytes = x.shape[1] // block_items * block_bytes
                stored[name] = rng.integers(0, 256, (x.shape[0], n_bytes), np.uint8), kind

    stored = from_folder(folder, path, edit=requantise)
    expected = {}
    for name, x in originals(folder):
        data, stored_kind = stored[gguf_name(name)]
        dtype = stored_kind.name if stored_kind.name in DTYPES else "F32"
        if dtype == "F32":
            with np.errstate(all="ignore"):
                data = gguf.quants.dequantize(data, stored_kind)
        if "q_proj" in name or "k_proj" in name:
            # Row i of a head's first half is row 2 i of the file, of its second half row 2 i + 1.
            heads = range(0, len(x), 64)
            data = data[[h + 2 * i + half for h in heads for half in (0, 1) for i in range(32)]]
        expected[name] = dtype, data.tobytes()
    assert loaded(path) == expected


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.name)
def test_types_that_gguf_cannot_dequantise(tiny: Tiny, path: Path, kind: Type) -> None:
    def retype(stored: dict[str, Stored]) -> None:
        block_items, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        x, _ = stored["blk.1.ffn_up.weight"]
        raw = np.zeros((x.shape[0], x.shape[1] // block_items * block_bytes), np.uint8)
        plain = {"F64": np.float64, "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": int}
        dtype = plain.get(kind.name)
        stored["blk.1.ffn_up.weight"] = raw.view(dtype) if dtype else raw, kind

    from_folder(tiny(**SMALL, hidden_size=256, head_dim=64), path, edit=retype)
    with pytest.raises(UnsupportedModelError, match=kind.name) as caught:
        open_checkpoint(path)
    assert (caught.value.tensor, caught.value.rule) == ("blk.1.ffn_up.weight", "dtype")
    assert caught.value.file == str(path)


def test_the_common_types_are_among_those_tested() -> None:
    names = {kind.name for kind in DEQUANTISED}
    assert names >= {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
    assert names >= {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "MXFP4"}


# ---- keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("rope", ["default", "linear", "yarn", "llama3"])
def test_the_config_is_that_of_the_folder(tiny: Tiny, path: Path, family: str, rope: str) -> None:
    folder = tiny(family, **SMALL, rope=rope, attention_bias=True, mlp_bias=True)
    from_folder(folder, path)
    ours, theirs = open_checkpoint(path).config, open_checkpoint(folder).config
    assert ours.rms_norm_eps == pytest.approx(theirs.rms_norm_eps)  # float32 in GGUF
    ours_inv_freq = np.array(ours.rope.inv_freq, np.float32)
    theirs_inv_freq = np.array(theirs.rope.inv_freq, np.float32)
    if rope == "llama3":
        np.testing.assert_allclose(ours_inv_freq, theirs_inv_freq, rtol=1e-6)
    else:
        assert (ours_inv_freq == theirs_inv_freq).all()
    assert ours.rope.attention_factor == theirs.rope.attention_factor
    same = {"rms_norm_eps": 1e-5, "rope": theirs.rope, "eos_token_ids": ()}
    assert replace(ours, **same) == replace(theirs, **same)


def test_keys_that_may_be_absent(tiny: Tiny, path: Path) -> None:
    absent = ["attention.key_length", "attention.value_length", "rope.dimension_count"]
    absent += ["rope.freq_base", "attention.head_count_kv", "vocab_size"]
    folder = tiny(**SMALL, num_key_value_heads=4, rope_theta=10000.0)
    from_folder(folder, path, keys=dict.fromkeys(absent))
    config = open_checkpoint(path).config
    assert (config.head_dim, config.num_key_value_heads, config.vocab_size) == (16, 4, 258)
    assert config.rope.inv_freq == open_checkpoint(folder).config.rope.inv_freq


def test_yarn_with_all_of_its_keys(tiny: Tiny, path: Path) -> None:
    scaling = {"beta_fast": 20.0, "beta_slow": 2.0}
    folder = tiny(
        "qwen2",
        rope="yarn",
        overrides={
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                **scaling,
            },
        },
    )
    keys = {f"rope.scaling.yarn_{key}": value for key, value in scaling.items()}
    keys |= {"rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.finetuned": True}
    from_folder(folder, path, keys=keys)
    plain = open_checkpoint(path).config.rope
    assert plain.inv_freq == open_checkpoint(folder).config.rope.inv_freq
    assert plain.attention_factor == pytest.approx(0.1 * np.log(4) + 1)
    from_folder(folder, path, keys={**keys, "rope.scaling.attn_factor": 0.5})
    rope = open_checkpoint(path).config.rope
    assert rope.attention_factor == pytest.approx(0.5 * plain.attention_factor)
    assert rope.inv_freq == plain.inv_freq
    from_folder(folder, path, keys={"rope.scaling.yarn_beta_fast": 8.0})
    assert open_checkpoint(path).config.rope.inv_freq != plain.inv_freq


def test_scaling_type_none_and_the_old_key(tiny: Tiny, path: Path) -> None:
    """As in llama.cpp: "none" ignores the factor; without a type a factor is linear."""
    default = open_checkpoint(tiny(**SMALL)).config.rope.inv_freq
    folder = tiny(**SMALL, rope="linear")
    linear = open_checkpoint(folder).config.rope.inv_freq
    from_folder(folder, path, keys={"rope.scaling.type": "none"})
    assert open_checkpoint(path).config.rope.inv_freq == default != linear
    from_folder(folder, path, keys={"rope.scaling.type": None})
    assert open_checkpoint(path).config.rope.inv_freq == linear
    old = {"rope.scaling.type": None, "rope.scaling.factor": None, "rope.scale_linear": 4.0}
    from_folder(folder, path, keys=old)
    assert open_checkpoint(path).config.rope.inv_freq == linear


def test_eos_tokens(tiny: Tiny, path: Path) -> None:
    keys = {"/tokenizer.ggml.eos_token_id": 3, "/tokenizer.ggml.eot_token_id": 7}
    from_folder(tiny(**SMALL), path, keys=keys)
    assert open_checkpoint(path).config.eos_token_ids == (3, 7)
    from_folder(tiny(**SMALL), path, keys={**keys, "/tokenizer.ggml.eot_token_id": 3})
    assert open_checkpoint(path).config.eos_token_ids == (3,)
    from_folder(tiny(**SMALL), path, keys={"/tokenizer.ggml.eos_token_id": 258})
    with pytest.raises(CheckpointError, match="eos_token_id is 258"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("/general.architecture", "gemma2"),
        ("/general.type", "adapter"),
        ("/general.quantization_version", 1),
        ("/split.count", 2),
        ("expert_count", 8),
        ("expert_used_count", 2),
        ("attention.sliding_window", 4096),
        ("attention.sliding_window_pattern", 4),
        ("attention.causal", False),
        ("attention.scale", 0.1),
        ("attention.value_length", 8),
        ("rope.dimension_count", 8),
        ("attention.head_count", [4, 2]),
        ("attention.head_count_kv", [2, 1]),
        ("feed_forward_length", [96, 48]),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 0.5),
        ("residual_scale", 0.5),
        ("embedding_scale", 12.0),
        ("rope.scaling.type", "longrope"),
        ("rope.scaling.alpha", 2.0),
        ("rope.scaling.yarn_attn_factor", 1.0),
        ("rope.scaling.yarn_log_multiplier", 0.1),
        ("rope.scaling.yarn_ext_factor", 1.0),  # without yarn
        ("tensor_data_layout", "another"),
        ("a.key.of.tomorrow", 1),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_the_engine_does_not_follow_is_refused(
    tiny: Tiny, path: Path, family: str, key: str, value: object
) -> None:
    from_folder(tiny(family, **SMALL), path, keys={key: value})
    with pytest.raises(UnsupportedModelError) as caught:
        open_checkpoint(path)
    error = caught.value
    assert error.key == (key[1:] if key.startswith("/") else f"{family}.{key}")
    found = list(error.value) if isinstance(value, list) else error.value
    assert found == pytest.approx(value)
    assert error.file == str(path)
    assert f"{error.key} is {error.value!r}: " in str(error)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_says_that_there_is_nothing_is_accepted(tiny: Tiny, path: Path, family: str) -> None:
    harmless = {
        "attention.sliding_window": 0,
        "attention.causal": True,
        "expert_count": 0,
        "rope.scaling.yarn_log_multiplier": 0.0,
        "/split.count": 1,
        "/general.type": "model",
        "/another.key": 1,
    }
    from_folder(tiny(family, **SMALL), path, keys=harmless)
    open_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", None),
        ("block_count", 3),
        ("block_count", 0),
        ("context_length", None),
        ("embedding_length", 128),
        ("embedding_length", 2**32 - 1),
        ("feed_forward_length", 2**31),
        ("attention.head_count", 3),
        ("attention.head_count", 0),
        ("attention.head_count_kv", 3),
        ("attention.key_length", 17),
        ("attention.key_length", 2048),
        ("attention.layer_norm_rms_epsilon", float("nan")),
        ("attention.layer_norm_rms_epsilon", None),
        ("rope.freq_base", 0.0),
        ("rope.freq_base", float("inf")),
        ("rope.scaling.factor", 0.0),
        ("rope.scaling.attn_factor", 3e38),
        ("/general.alignment", "32"),
        ("/tokenizer.ggml.eos_token_id", "</s>"),
    ],
)
def test_contradictions_are_refused(tiny: Tiny, path: Path, key: str, value: object) -> None:
    scaled = {"rope.scaling.type": "yarn", "rope.scaling.factor": 1e9}
    keys = {**(scaled if key == "rope.scaling.attn_factor" else {}), key: value}
    from_folder(tiny(**SMALL), path, keys=keys)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.file == str(path)


def _without(name: str) -> Callable[[dict[str, Stored]], None]:
    return lambda stored: stored.pop(name) and None


def _resized(name: str, *shape: int) -> Callable[[dict[str, Stored]], None]:
    return lambda stored: stored.update({name: (np.ones(shape, np.float32), Type.F32)})


def _factors(value: float) -> Callable[[dict[str, Stored]], None]:
    factors = np.full(8, value, np.float32)
    return lambda stored: stored.update({"rope_freqs.weight": (factors, Type.F32)})


@pytest.mark.parametrize(
    ("edit", "tensor", "rule"),
    [
        (_without("token_embd.weight"), "token_embd.weight", "missing-tensor"),
        (_without("output_norm.weight"), "output_norm.weight", "missing-tensor"),
        (_without("blk.1.ffn_down.weight"), "blk.1.ffn_down.weight", "missing-tensor"),
        (_without("blk.1.attn_q.bias"), "blk.1.attn_q.bias", "missing-tensor"),
        (_without("blk.0.attn_q.bias"), "blk.1.attn_q.bias", "surplus-tensor"),
        (_resized("blk.0.attn_q_norm.weight", 16), "blk.0.attn_q_norm.weight", "surplus-tensor"),
        (_resized("blk.2.ffn_up.weight", 96, 64), "blk.2.ffn_up.weight", "surplus-tensor"),
        (_resized("output.bias", 258), "output.bias", "surplus-tensor"),
        (_resized("blk.0.attn_k.weight", 64, 64), "blk.0.attn_k.weight", "shape-matches-config"),
        (_resized("blk.0.attn_k.weight", 2048), "blk.0.attn_k.weight", "shape-matches-config"),
        (_resized("output.weight", 257, 64), "output.weight", "shape-matches-config"),
        (_resized("rope_freqs.weight", 7), "rope_freqs.weight", "shape-matches-config"),
        (_factors(np.nan), "rope_freqs.weight", "rope-factors"),
        (_factors(np.inf), "rope_freqs.weight", "rope-factors"),
        (_factors(0), "rope_freqs.weight", "rope-factors"),
        (
            lambda stored: stored.update({"rope_freqs.weight": (np.ones(8, np.float16), Type.F16)}),
            "rope_freqs.weight",
            "dtype",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    tiny: Tiny,
    path: Path,
    edit: Callable[[dict[str, Stored]], None],
    tensor: str,
    rule: str,
) -> None:
    from_folder(tiny(**SMALL, attention_bias=True), path, edit=edit)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert (caught.value.tensor, caught.value.rule) == (tensor, rule)
    assert caught.value.file == str(path)


# ---- logits -----------------------------------------------------------------------------------


def close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool(np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0, Type.Q4_1], ids=lambda k: k.name)
@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("llama", {"tied": True, "num_key_value_heads": 1}), ("qwen2", {"tied": True})],
)
def test_logits_of_the_same_file_in_transformers(
    tiny: Tiny, path: Path, family: str, options: dict[str, Any], kind: Type
) -> None:
    from_folder(tiny(family, **SMALL, **options), path, kind=kind)
    ours = swa.load(path, dtype="float32").logits(IDS)
    theirs = Transformers(path.parent, gguf_file=path.name).own_logits(IDS)
    assert close(ours, theirs)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"rope": "llama3", "attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope": "yarn"}),
        ("qwen2", {"rope": "yarn"}),
        ("qwen2", {"rope": "linear"}),
    ],
)
def test_logits_of_the_folder_in_transformers(
    tiny: Tiny, path: Path, family: str, options: dict[str, Any]
) -> None:
    """transformers reads neither scaling nor llama's biases from GGUF files."""
    folder = tiny(family, **SMALL, **options)
    from_folder(folder, path)
    assert close(swa.load(path, dtype="float32").logits(IDS), Transformers(folder).own_logits(IDS))


@pytest.mark.parametrize("wrong", ["unpermuted", "no factors"])
def test_mistakes_show_in_the_logits(tiny: Tiny, path: Path, wrong: str) -> None:
    folder = tiny(**SMALL, rope="llama3")
    theirs = Transformers(folder).own_logits(IDS)

    def spoil(stored: dict[str, Stored]) -> None:
        if wrong == "no factors":
            del stored["rope_freqs.weight"]
        else:
            x = read_tensors(folder)["model.layers.1.self_attn.k_proj.weight"]
            stored["blk.1.attn_k.weight"] = x, Type.F32

    from_folder(folder, path, edit=spoil)
    assert not close(swa.load(path, dtype="float32").logits(IDS), theirs)


def test_token_ids_need_no_tokenizer(tiny: Tiny, path: Path) -> None:
    from_folder(tiny(**SMALL), path)
    model = swa.load(path)
    assert not model.has_tokenizer
    assert np.isfinite(model.nll(IDS[:4], IDS[4:9]).per_token).all()
    with pytest.raises(TokenizerError, match="tokenizer="):
        model.nll("text", "more")


def test_a_saved_model_comes_back(tiny: Tiny, path: Path, tmp_path: Path) -> None:
    from_folder(tiny(**SMALL), path)
    model = swa.load(path).patch(swa.AttentionPolicy(8, num_sink_tokens=2))
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / path.name).read_bytes() == path.read_bytes()
    again = swa.load(tmp_path / "saved")
    assert again.policy == model.policy
    assert (again.logits(IDS) == model.logits(IDS)).all()
    planned = plan(tmp_path / "saved")
    assert (planned.policy, planned.fingerprint) == (model.policy, model.fingerprint)
    estimate = ["estimate", str(tmp_path / "saved"), "--sliding-window", "8"]
    assert main([*estimate, "--prompt-tokens", "50", "--json"]) == 0


def test_fingerprint(tiny: Tiny, path: Path, tmp_path: Path) -> None:
    """Of the computation and of the numbers, not of the name or of what only describes."""
    folder = tiny(**SMALL, rope="linear")

    def print_of(**options: Any) -> str:
        from_folder(folder, path, **options)
        return open_checkpoint(path).fingerprint

    original = print_of()
    shutil.copy(path, tmp_path / "copy.gguf")
    assert open_checkpoint(tmp_path / "copy.gguf").fingerprint == original
    assert print_of(keys={"/general.name": "another"}) == original
    assert print_of(keys={"rope.scaling.factor": 5.0}) != original
    assert print_of(kind=Type.F16) != original

    for name in ("blk.1.ffn_norm.weight", "token_embd.weight"):  # the second by samples alone

        def nudge(stored: dict[str, Stored], name: str = name) -> None:
            stored[name][0].flat[-1] += 1

        assert print_of(edit=nudge) != original


def test_memory() -> None:
    """Half a GiB of numbers, out of a file of 98 MB, passes through in chunks."""
    setup = f"""
        from swa.checkpoint import open_checkpoint
        checkpoint = open_checkpoint({str(wheel_model())!r})
        assert checkpoint.n_bytes > 500 << 20
    """
    task = "total = sum(len(chunk.data) for chunk in checkpoint.parameters())"
    assert measure_peak(setup, task) < 100 << 20


# ---- files that changed, and hostile ones -----------------------------------------------------


def test_without_the_gguf_package(tiny: Tiny, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_folder(tiny(**SMALL), path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'swa\[gguf\]'"):
        open_checkpoint(path)


def test_gguf_is_imported_only_for_its_files(tiny: Tiny) -> None:
    code = "import sys, swa; swa.load(sys.argv[1]); sys.exit('gguf' in sys.modules)"
    assert (
        os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code, str(tiny(**SMALL))]) == 0
    )


@pytest.mark.parametrize("when", ["before", "while"])
@pytest.mark.parametrize("change", ["truncated", "written", "replaced", "removed"])
def test_changes_after_opening(tiny: Tiny, path: Path, change: str, when: str) -> None:
    from_folder(tiny(**SMALL), path)
    checkpoint = open_checkpoint(path)
    chunks = checkpoint.parameters()
    if when == "while":
        next(iter(chunks))
    if change == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif change == "written":
        content = path.read_bytes()
        with open(path, "r+b") as file:
            file.write(content)
        os.utime(path, ns=(1, 1))
    elif change == "replaced":
        shutil.copy(path, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
    else:
        path.unlink()
    with pytest.raises(CheckpointError) as caught:
        list(chunks)
    assert caught.value.file == str(path)
    with pytest.raises(CheckpointError):
        checkpoint.check_unchanged()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(
    *keys: bytes,
    tensors: tuple[bytes, ...] = (),
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
) -> bytes:
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    n_keys = len(keys) if n_keys is None else n_keys
    counts = struct.pack("<IQQ", version, n_tensors, n_keys)
    return b"GGUF" + counts + b"".join(keys) + b"".join(tensors)


def tensor(name: str, *shape: int, kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


STRING, ARRAY, BOOL = 8, 9, 7
KEY = text("general.name") + struct.pack("<I", STRING) + text("x")


def array_of(kind: int, count: int) -> bytes:
    return text("k") + struct.pack("<IIQ", ARRAY, kind, count)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "header-length"),
        (b"GGU", "header-length"),
        (b"GGML" + bytes(100), "magic"),
        (header(version=1), "version"),
        (header(version=4), "version"),
        (header(version=0x03000000), "version"),
        (header(n_keys=2**63), "counts"),
        (header(n_tensors=2**63), "counts"),
        (header(n_keys=1), "header-length"),
        (header(KEY, n_keys=2), "header-length"),
        (header(n_tensors=1), "header-length"),
        (header(KEY, KEY), "unique-keys"),
        (header(struct.pack("<Q", 2**63)), "header-length"),
        (header(struct.pack("<QII", 2, 0xFFFE, STRING)), "utf-8"),
        (header(text("k") + struct.pack("<I", 13)), "value-type"),
        (header(text("k") + struct.pack("<IB", BOOL, 2)), "counts"),
        (header(array_of(STRING, 2**63)), "header-length"),
        (header(array_of(STRING, 2**20)), "header-length"),
        (header(array_of(0, 2**63)), "header-length"),
        (header(array_of(12, 2**61)), "header-length"),  # 8 * 2**61 wraps to 0 in 64 bits
        (header(array_of(ARRAY, 1)), "value-type"),
        (header(text("general.alignment") + struct.pack("<II", 4, 48)), "alignment"),
        (header(text("general.alignment") + struct.pack("<II", 4, 0)), "alignment"),
        (header(tensors=(tensor("t", 8), tensor("t", 8, offset=32))), "unique-tensors"),
        (header(tensors=(tensor("t"),)), "shape"),
        (header(tensors=(tensor("t", 1, 1, 1, 1, 1),)), "counts"),
        (header(tensors=(tensor("t", 0),)), "shape"),
        (header(tensors=(tensor("t", 2**63, 2**63, 4),)), "file-end"),
        (header(tensors=(tensor("t", 2**62),)), "file-end"),
        (header(tensors=(tensor("t", 33, kind=2),)), "shape"),
        (header(tensors=(tensor("t", 8, kind=999),)), "dtype"),
        (header(tensors=(tensor("t", 8, kind=4),)), "dtype"),  # a type that was removed
        (header(tensors=(tensor("t", 8, offset=32),)), "contiguous"),
        (header(tensors=(tensor("t", 8, offset=2**64 - 32),)), "contiguous"),
        (header(tensors=(tensor("t", 8), tensor("u", 8))), "contiguous"),
        (header(tensors=(tensor("t", 8), tensor("u", 8, offset=64))), "contiguous"),
        (header(tensors=(tensor("t", 1024),)), "file-end"),
        (header(KEY) + bytes(200), "file-end"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_malformed_headers(path: Path, content: bytes, rule: str) -> None:
    """Refused by name, at once, and without memory that the file does not justify."""
    path.write_bytes(content + bytes(64) * (rule == "contiguous"))
    open_gguf_once(path)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (caught.value.rule, caught.value.file) == (rule, str(path))
    assert peak < 1 << 20


def open_gguf_once(path: Path) -> None:
    """So that imports do not count as memory."""
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


def test_a_header_without_end(path: Path) -> None:
    """A sparse file of a terabyte that claims to be all header."""
    with open(path, "wb") as file:
        file.write(header(array_of(0, 2**39)))
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match=f"at most {gguf_file.MAX_HEADER_BYTES}"):
        open_checkpoint(path)


@pytest.mark.parametrize("special", ["folder", "fifo", "missing"])
def test_what_is_no_file(path: Path, special: str) -> None:
    if special == "folder":
        path.mkdir()
    elif special == "fifo":
        os.mkfifo(path)
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


def test_every_truncation(tiny: Tiny, path: Path) -> None:
    from_folder(tiny(**SMALL), path)
    content = path.read_bytes()
    end = content.rindex(b"blk.1.") + 100  # the header, about
    for size in [*range(0, end, 7), *range(end, len(content), 4999), len(content) - 33]:
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_misaligned_data(tiny: Tiny, path: Path) -> None:
    """With an alignment of 1, numbers lie where the header happens to end."""
    from_folder(tiny(**SMALL), path)
    expected = loaded(path)
    content = path.read_bytes()
    with open_regular(path) as file:
        tensors = gguf_file.read_header(file).tensors
    name, first = list(tensors)[-1], min(entry.offset for entry in tensors.values())
    end = content.index(text(name)) + len(tensor(name, *tensors[name].shape))
    n_keys = struct.unpack_from("<Q", content, 16)[0] + 1
    alignment = text("general.alignment") + struct.pack("<II", 4, 1)
    start = content[:16] + struct.pack("<Q", n_keys) + alignment + content[24:end]
    assert len(start) % 4
    path.write_bytes(start + content[first:])
    assert loaded(path) == expected


def test_mutated_files_raise_nothing_else(tiny: Tiny, path: Path) -> None:
    """Bytes of the header changed at random: SwaError or a model, never anything else."""
    keys = {"/tokenizer.ggml.eos_token_id": 3, "/general.alignment": 32}
    from_folder(
        tiny("llama", **SMALL, rope="yarn", attention_bias=True), path, keys=keys, kind=Type.Q8_0
    )
    content = path.read_bytes()
    end = content.rindex(b"blk.1.") + 60
    rng = random.Random(20)
    refused = 0
    for _ in range(2000):
        mutated = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.randrange(4, end)
            mutated[at] = rng.choice((0, 1, 0x7F, 0xFF, mutated[at] ^ 1 << rng.randrange(8)))
        if rng.random() < 0.2:
            cut = rng.randrange(end)
            del mutated[cut : cut + rng.choice((1, 4, 8))]
        path.write_bytes(mutated)
        try:
            swa.load(path, num_threads=1)
        except SwaError:
            refused += 1
    assert 1000 < refused < 2000
