"""A GGUF file of architecture llama or qwen2 as a checkpoint, dequantised while it is read.

What llama.cpp computes from such a file is the reference; where its versions disagree, or the
engine does not follow, the key is refused.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from swa.checkpoint import Checkpoint, Chunk
from swa.config import MAX_HEAD_DIM, MAX_LAYERS, ROPE_THETA, ModelConfig
from swa.errors import CheckpointError, UnsupportedModelError
from swa.fields import Fields
from swa.gguf_file import GgufHeader, GgufTensor, NumberType, read_header
from swa.gguf_tokenizer import rebuild_tokenizer
from swa.rope import Rope, read_rope
from swa.safetensors_checkpoint import (
    CHUNK_BYTES,
    Parameter,
    expected_parameters,
)
from swa.safetensors_file import ITEM_BYTES, Dtype
from swa.weight_files import FileStamp, OpenFile, open_regular

if TYPE_CHECKING:
    from swa.tokenizer import Tokenizer

# Whether the file has Q and K rows in llama.cpp's order: pairs that RoPE turns are neighbours.
_PERMUTED = {"llama": True, "qwen2": False}

# GGUF's names; within a layer they follow "blk.N.".
_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_EMBEDDING, _HEAD, _ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"

# Keys of an architecture with one supported value, or none.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.yarn_attn_factor": (),  # llama.cpp's versions take it in two ways
    "rope.scaling.yarn_log_multiplier": (0,),
    "tensor_data_layout": ("Meta AI original pth",),  # the permuted one
}
# The tensors say it better, or it changes nothing.
_HARMLESS = frozenset(("vocab_size", "rope.scaling.finetuned"))

_FORMATS: Mapping[Dtype, str] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_AS_STORED: Mapping[str, Dtype] = {dtype: dtype for dtype in _FORMATS}


class _Slot(NamedTuple):
    """A parameter and where the file has it."""

    parameter: Parameter
    stored: GgufTensor


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file; its header is checked, its weights are not read yet.

    Raises:
        CheckpointError: the file is missing, malformed or incomplete, or gguf is not installed.
        UnsupportedModelError: it asks for a computation, or a quantisation, that swa does not do.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            "GGUF files need the gguf package: pip install 'swa[gguf]'", file=path
        ) from error
    return GgufCheckpoint(path)


class GgufCheckpoint(Checkpoint):
    """One GGUF file; quantised numbers are yielded as F32, F16 and BF16 as they are."""

    def __init__(self, path: Path) -> None:
        """Check all of it but the numbers themselves. Raises as `open_gguf`."""
        self.source, self.folder = str(path), None
        with open_regular(path) as file:
            header = read_header(file)
            self._metadata = header.metadata
            self.config = _read_config(header, file)
            self._slots = _match(self.config, header, path)
            self.fingerprint = _fingerprint(self.config, self._slots, file)
            self._stamp: FileStamp = file.stamp
        self.weight_files = (self._stamp,)
        self.dtypes = frozenset(stored.kind.name for _, stored in self._slots)
        self.n_bytes = sum(
            ITEM_BYTES[_dtype(stored.kind)] * math.prod(stored.shape) for _, stored in self._slots
        )

    def parameters(self) -> Iterator[Chunk]:
        with self._stamp.reopened() as file:
            for slot in self._slots:
                yield from self._chunks(file, slot)
        self.check_unchanged()  # nor was it written while it was read

    def build_tokenizer(self) -> Tokenizer | None:
        """The tokenizer that the file describes; None if it describes none.

        Raises:
            TokenizerError: it is not among those that swa rebuilds exactly, or is malformed.
        """
        return rebuild_tokenizer(self._metadata, file=self._stamp.path)

    def _chunks(self, file: OpenFile, slot: _Slot) -> Iterator[Chunk]:
        """A vector whole; a matrix in rows, or in heads if permuted, of about CHUNK_BYTES."""
        (_, tensor, layer, shape), stored = slot
        kind, head_dim = stored.kind, self.config.head_dim
        permuted = _PERMUTED[self.config.model_type] and tensor.startswith(("q_proj", "k_proj"))
        n_rows, n_columns = shape if len(shape) == 2 else (1, shape[0])
        row_bytes = n_columns // kind.block_items * kind.block_bytes
        unit = head_dim if permuted and len(shape) == 2 else 1
        step = max(1, CHUNK_BYTES // (4 * n_columns * unit)) * unit
        for row in range(0, n_rows, step):
            n_bytes = min(step, n_rows - row) * row_bytes
            raw = file.read(stored.offset + row * row_bytes, n_bytes)
            values = _numbers(raw, kind, n_columns)
            if permuted:
                values = _unpermuted(values.reshape(-1, *shape[1:]), head_dim)
            yield Chunk(tensor, layer, row, _dtype(kind), values.data.cast("B"))


def _dtype(kind: NumberType) -> Dtype:
    """The type in which numbers are yielded: their own, if the engine takes it."""
    return _AS_STORED.get(kind.name, "F32")


def _numbers(raw: bytes, kind: NumberType, n_columns: int) -> npt.NDArray[Any]:
    """Rows [n, n_columns] of whole blocks, in the type of `_dtype`."""
    if kind.name in _AS_STORED:
        return np.frombuffer(raw, _FORMATS[_dtype(kind)]).reshape(-1, n_columns)
    from gguf import GGMLQuantizationType, dequantize

    blocks = np.frombuffer(raw, np.uint8)
    rows = blocks.reshape(-1, n_columns // kind.block_items * kind.block_bytes)
    with np.errstate(all="ignore"):  # a scale may be anything; what is not finite stays so
        values = dequantize(rows, GGMLQuantizationType[kind.name])
    return np.ascontiguousarray(values, "<f4")


def _unpermuted(rows: npt.NDArray[Any], head_dim: int) -> npt.NDArray[Any]:
    """Rows [heads * head_dim, ...]: of each head first all even ones, then all odd ones."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


# ---- the architecture -------------------------------------------------------------------------


def _read_config(header: GgufHeader, file: OpenFile) -> ModelConfig:
    """The computation that keys and tensors describe."""
    path, tensors = file.stamp.path, header.tensors
    general = _section(header, "general.", path)
    family = general.text("architecture")
    if family not in _PERMUTED:
        general.unsupported("architecture", f"swa supports {', '.join(_PERMUTED)} in GGUF files")
    general.require("type", ["model"])
    general.require("quantization_version", [2])
    split = _section(header, "split.", path)
    if split.integer("count", 1, low=0) > 1:
        split.unsupported("count", "join the parts first: llama-gguf-split --merge")
    fields = _section(header, f"{family}.", path)
    for key, supported in _ONLY.items():
        fields.require(key, supported)
    heads = _read_heads(fields)
    n_layers = fields.integer("block_count", high=MAX_LAYERS)
    context_length = fields.integer("context_length")
    if _EMBEDDING not in tensors:
        raise CheckpointError(
            "the file does not have it", file=path, tensor=_EMBEDDING, rule="missing-tensor"
        )
    vocab_size = tensors[_EMBEDDING].shape[0]

    def has_bias(tensor: str) -> bool:  # in one layer and so in all; `_match` sees to it
        return f"blk.0.{tensor}.bias" in tensors

    config = ModelConfig(
        model_type=family,
        vocab_size=vocab_size,
        hidden_size=fields.integer("embedding_length"),
        intermediate_size=fields.integer("feed_forward_length"),
        num_hidden_layers=n_layers,
        **heads,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        tie_word_embeddings=_HEAD not in tensors,
        qk_norm=False,
        q_bias=has_bias("attn_q"),
        k_bias=has_bias("attn_k"),
        v_bias=has_bias("attn_v"),
        o_bias=has_bias("attn_output"),
        gate_bias=has_bias("ffn_gate"),
        up_bias=has_bias("ffn_up"),
        down_bias=has_bias("ffn_down"),
        rope=_read_rope(header, fields, file, heads["head_dim"], context_length),
        max_position_embeddings=context_length,
        native_sliding_window=(None,) * n_layers,
        eos_token_ids=_read_eos(_section(header, "tokenizer.ggml.", path), vocab_size),
    )
    fields.refuse_unread(_HARMLESS)
    return config


def _section(header: GgufHeader, prefix: str, path: Path) -> Fields:
    """The keys that begin with `prefix`."""
    return Fields(
        {k.removeprefix(prefix): v for k, v in header.metadata.items() if k.startswith(prefix)},
        file=path,
        prefix=prefix,
    )


def _read_heads(fields: Fields) -> dict[str, int]:
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(fields.raw(key), array):
            fields.unsupported(key, "swa supports one size for all layers")
    queries = fields.integer("attention.head_count")
    keys = fields.integer("attention.head_count_kv", queries)
    if queries % keys:
        fields.malformed("attention.head_count_kv", f"must divide attention.head_count, {queries}")
    hidden = fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", hidden // queries, low=0)
    if head_dim % 2 or not 0 < head_dim <= MAX_HEAD_DIM:
        fields.unsupported(
            "attention.key_length", f"it must be even, at most {MAX_HEAD_DIM}; here {head_dim}"
        )
    fields.require("attention.value_length", [head_dim])
    fields.require("rope.dimension_count", [head_dim])
    return {"num_attention_heads": queries, "num_key_value_heads": keys, "head_dim": head_dim}


def _read_rope(
    header: GgufHeader, fields: Fields, file: OpenFile, head_dim: int, context_length: int
) -> Rope:
    """RoPE as llama.cpp has it: a scaling recipe, and factors that divide each frequency."""
    theta = fields.number("rope.freq_base", ROPE_THETA, above=1.0)
    kind = fields.text("rope.scaling.type", "linear")  # so does llama.cpp
    fields.require("rope.scaling.type", ["none", "linear", "yarn"])
    fields.require("rope.scaling.yarn_ext_factor", [1 if kind == "yarn" else 0])
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    yarn = {
        "factor": factor,
        "original_max_position_embeddings": fields.integer(
            "rope.scaling.original_context_length", context_length
        ),
        "beta_fast": fields.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": fields.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    recipe: dict[str, Any] = {"rope_type": "default"}
    if kind == "yarn":
        recipe = {"rope_type": "yarn", **yarn}
    elif kind == "linear" and factor != 1:
        recipe = {"rope_type": "linear", "factor": factor}
    scaling = Fields(recipe, file=file.stamp.path, prefix="rope.scaling.")
    rope = read_rope(scaling, theta, head_dim, context_length)
    attn_factor = fields.number("rope.scaling.attn_factor", 1.0)
    if attn_factor != 1:
        rope = replace(
            rope,
            attention_factor=rope.attention_factor * attn_factor,
            parameters={**rope.parameters, "attn_factor": attn_factor},
        )
    factors = header.tensors.get(_ROPE_FACTORS)
    with np.errstate(over="ignore"):
        if factors is not None:
            rope = rope.divided_by(_read_factors(file, factors, head_dim))
        used = np.array([*rope.inv_freq, rope.attention_factor], np.float32)
    if not np.isfinite(used).all():
        fields.unsupported("rope.freq_base", "scaled, the frequencies are not finite")
    return rope


def _read_factors(file: OpenFile, stored: GgufTensor, head_dim: int) -> npt.NDArray[np.float32]:
    """float32 [head_dim / 2]."""
    path = file.stamp.path
    _check_shape(_ROPE_FACTORS, stored, (head_dim // 2,), path)
    if stored.kind.name != "F32":
        raise UnsupportedModelError(
            f"its type is {stored.kind.name}: swa supports F32",
            key=_ROPE_FACTORS,
            value=stored.kind.name,
            file=path,
            tensor=_ROPE_FACTORS,
            rule="dtype",
        )
    factors = np.frombuffer(file.read(stored.offset, stored.n_bytes), "<f4").astype(np.float32)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise CheckpointError(
            "its factors must be finite and above 0",
            file=path,
            tensor=_ROPE_FACTORS,
            rule="rope-factors",
        )
    return factors


def _read_eos(tokenizer: Fields, vocab_size: int) -> tuple[int, ...]:
    """What ends a text, and what ends a turn."""
    ids = [
        tokenizer.integer(key, low=0, high=vocab_size - 1)
        for key in ("eos_token_id", "eot_token_id")
        if key in tokenizer
    ]
    return tuple(dict.fromkeys(ids))


# ---- the tensors ------------------------------------------------------------------------------


def _gguf_name(parameter: Parameter) -> str:
    tensor, _, bias = parameter.tensor.partition(".")
    name = f"{_NAMES[tensor]}.{bias or 'weight'}"
    return name if parameter.layer < 0 else f"blk.{parameter.layer}.{name}"


def _match(config: ModelConfig, header: GgufHeader, path: Path) -> list[_Slot]:
    """The place of every parameter, in the order of the file."""
    wanted = {}
    for parameter in expected_parameters(config):
        name = _gguf_name(parameter)
        if name not in header.tensors:
            raise CheckpointError(
                "the file does not have it", file=path, tensor=name, rule="missing-tensor"
            )
        wanted[name] = parameter
    slots = []
    for name, stored in header.tensors.items():
        if name in wanted:
            _check_type(name, stored, path)
            _check_shape(name, stored, wanted[name].shape, path)
            slots.append(_Slot(wanted[name], stored))
        elif name != _ROPE_FACTORS:
            raise UnsupportedModelError(
                f"swa knows no such tensor in a {config.model_type} of these keys",
                key=name,
                value=stored.kind.name,
                file=path,
                tensor=name,
                rule="surplus-tensor",
            )
    return slots


def _check_shape(name: str, stored: GgufTensor, shape: tuple[int, ...], path: Path) -> None:
    if stored.shape != shape:
        raise CheckpointError(
            f"its shape is {list(stored.shape)}, the keys make it {list(shape)}",
            file=path,
            tensor=name,
            rule="shape-matches-config",
        )


def _check_type(name: str, stored: GgufTensor, path: Path) -> None:
    """Refuse what the gguf package cannot dequantise: found out on a block of zeros."""
    try:
        _numbers(bytes(stored.kind.block_bytes), stored.kind, stored.kind.block_items)
    except NotImplementedError:
        raise UnsupportedModelError(
            f"the gguf package cannot dequantise {stored.kind.name}",
            key="type",
            value=stored.kind.name,
            file=path,
            tensor=name,
            rule="dtype",
        ) from None


def _fingerprint(config: ModelConfig, slots: list[_Slot], file: OpenFile) -> str:
    """SHA-256 of the computation and of every tensor, of a large one only samples."""
    whole = hashlib.sha256(config.digest_bytes())
    for (_, tensor, layer, shape), stored in slots:
        whole.update(f"{tensor} {layer} {stored.kind.name} {shape} ".encode())
        for sample in file.samples(stored.offset, stored.n_bytes):
            whole.update(sample)
    return whole.hexdigest()
