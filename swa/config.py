"""What a model computes, read from `config.json`: only keys whose meaning is known.

Defaults are those of transformers' config classes. A key that would change the computation in a way
that the engine does not follow is refused, and so is every key that is not known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from swa.errors import CheckpointError
from swa.fields import MAX_SIZE, Fields
from swa.rope import Rope, read_rope

FULL, SLIDING = "full_attention", "sliding_attention"
ROPE_THETA = 10_000.0
MAX_LAYERS, MAX_HEAD_DIM = 65_536, 1024  # the engine's own limits

# Sizes that a config may leave out. qwen3 alone has a head_dim that hidden_size does not give.
_QWEN = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
}
_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "llama": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "max_position_embeddings": 2048,
        "eos_token_id": 2,
    },
    "mistral": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "eos_token_id": 2,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
}

# Keys with one supported value, or none: others would change what the layers compute.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "auto_map": (),  # the checkpoint's own code
    "chunk_size_feed_forward": (0,),
    "hidden_act": ("silu",),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (1,),
    "pretraining_tp": (1,),
    "quantization_config": (),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
}

# Keys that checkpoints of these families carry and that change no logit.
_HARMLESS = frozenset(
    (
        # where it comes from, and how to run it
        *("_name_or_path", "name_or_path", "_commit_hash", "architectures", "transformers_version"),
        *("dtype", "torch_dtype", "use_cache", "torchscript", "is_llama_config", "unsloth_fixed"),
        *("unsloth_version", "transformers.js_config", "tokenizer_class", "max_sequence_length"),
        *("_attn_implementation", "attn_implementation", "_attn_implementation_autoset"),
        *("return_dict", "output_attentions", "output_hidden_states"),
        # training
        *("initializer_range", "attention_dropout", "task_specific_params", "problem_type"),
        *("id2label", "label2id", "finetuning_task"),
        # the tokenizer's, and generation's
        *("bos_token_id", "pad_token_id", "unk_token_id", "do_sample", "temperature", "top_k"),
        *("top_p", "max_length", "min_length", "max_new_tokens", "repetition_penalty"),
    )
)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one checkpoint; L layers."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qk_norm: bool
    """RMSNorm of every query and key head before RoPE."""
    q_bias: bool
    k_bias: bool
    v_bias: bool
    o_bias: bool
    gate_bias: bool
    up_bias: bool
    down_bias: bool
    rope: Rope
    max_position_embeddings: int
    native_sliding_window: tuple[int | None, ...]
    """[L]: keys that a layer sees, its own included, where the checkpoint itself limits them."""
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, file: object) -> ModelConfig:
        """Read the content of a `config.json`; `file` is named in errors.

        Raises:
            UnsupportedModelError: a family, key or value that swa does not follow.
            CheckpointError: a value is malformed or contradicts another, or every layer slides.
        """
        if not isinstance(values, Mapping):
            raise CheckpointError("must hold a JSON object", file=file)
        fields = Fields(values, file=file)
        family = fields.text("model_type")
        if family not in _DEFAULTS:
            fields.unsupported("model_type", f"swa supports {', '.join(_DEFAULTS)}")
        defaults = _DEFAULTS[family]
        for key, supported in _ONLY.items():
            fields.require(key, supported)
        n_layers = fields.integer("num_hidden_layers", 32, high=MAX_LAYERS)
        max_positions = fields.integer(
            "max_position_embeddings", defaults["max_position_embeddings"]
        )
        heads = _read_heads(fields, defaults)
        qkv_bias, o_bias, mlp_bias = _read_biases(fields, family)
        config = cls(
            model_type=family,
            vocab_size=fields.integer("vocab_size", defaults["vocab_size"]),
            hidden_size=fields.integer("hidden_size", defaults["hidden_size"]),
            intermediate_size=fields.integer("intermediate_size", defaults["intermediate_size"]),
            num_hidden_layers=n_layers,
            **heads,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            qk_norm=family == "qwen3",
            q_bias=qkv_bias,
            k_bias=qkv_bias,
            v_bias=qkv_bias,
            o_bias=o_bias,
            gate_bias=mlp_bias,
            up_bias=mlp_bias,
            down_bias=mlp_bias,
            rope=_read_rope(fields, file, heads["head_dim"], max_positions),
            max_position_embeddings=max_positions,
            native_sliding_window=_read_windows(fields, family, n_layers),
            eos_token_ids=_read_eos(fields, values, defaults.get("eos_token_id")),
        )
        fields.refuse_unread(_HARMLESS)
        if None not in config.native_sliding_window:
            raise CheckpointError(
                "every layer is sliding in this checkpoint already: there is no full attention"
                " layer for swa to choose",
                file=file,
            )
        return config

    def engine_dict(self) -> dict[str, Any]:
        """The config of `_core.Engine`."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scale": self.rope.attention_factor,
            "tie_word_embeddings": self.tie_word_embeddings,
            "qk_norm": self.qk_norm,
            "q_bias": self.q_bias,
            "k_bias": self.k_bias,
            "v_bias": self.v_bias,
            "o_bias": self.o_bias,
            "gate_bias": self.gate_bias,
            "up_bias": self.up_bias,
            "down_bias": self.down_bias,
            "inv_freq": np.array(self.rope.inv_freq, dtype=np.float32),
        }

    def digest_bytes(self) -> bytes:
        """The computation as bytes, for a fingerprint: equal however the config was spelt."""
        values = self.engine_dict() | {
            "inv_freq": self.rope.inv_freq,
            "native_sliding_window": self.native_sliding_window,
        }
        return json.dumps(values, sort_keys=True).encode()


def _read_heads(fields: Fields, defaults: Mapping[str, int]) -> dict[str, int]:
    queries = fields.integer("num_attention_heads", 32)
    keys = fields.optional_integer(
        "num_key_value_heads", defaults.get("num_key_value_heads", queries)
    )
    keys = queries if keys is None else keys
    if queries % keys:
        fields.malformed("num_key_value_heads", f"must divide num_attention_heads, {queries}")
    if "head_dim" in fields or "head_dim" in defaults:
        head_dim = fields.integer("head_dim", defaults.get("head_dim"), high=MAX_HEAD_DIM)
    else:
        hidden = fields.integer("hidden_size", defaults["hidden_size"])
        head_dim, rest = divmod(hidden, queries)
        if rest:
            fields.malformed("num_attention_heads", f"must divide hidden_size, {hidden}")
    if head_dim % 2 or not 0 < head_dim <= MAX_HEAD_DIM:
        fields.unsupported("head_dim", f"it must be even, at most {MAX_HEAD_DIM}; here {head_dim}")
    if queries * head_dim > MAX_SIZE:
        fields.malformed("num_attention_heads", f"is too large for a head_dim of {head_dim}")
    return {"num_attention_heads": queries, "num_key_value_heads": keys, "head_dim": head_dim}


def _read_biases(fields: Fields, family: str) -> tuple[bool, bool, bool]:
    """Whether there are biases of the Q, K and V, of the output and of the MLP projections."""
    if family in ("llama", "qwen3"):
        attention = fields.boolean("attention_bias", False)
        return attention, attention, family == "llama" and fields.boolean("mlp_bias", False)
    if family == "mistral":  # transformers builds it without biases whatever the config says
        fields.require("attention_bias", [False])
        fields.require("mlp_bias", [False])
    return family == "qwen2", False, False


def _read_rope(fields: Fields, file: object, head_dim: int, max_positions: int) -> Rope:
    """RoPE in either spelling: `rope_theta` and `rope_scaling`, or `rope_parameters`."""
    theta = fields.number("rope_theta", ROPE_THETA, above=1.0)
    scaling, parameters = fields.raw("rope_scaling"), fields.raw("rope_parameters")
    if scaling is not None and parameters is not None:
        fields.unsupported("rope_scaling", "rope_parameters is given too; remove one of them")
    key = "rope_parameters" if scaling is None else "rope_scaling"
    values = {} if key not in fields else fields.raw(key)
    if not isinstance(values, Mapping):
        fields.malformed(key, "must be an object")
    rope = read_rope(Fields(values, file=file, prefix=f"{key}."), theta, head_dim, max_positions)
    if "rope_theta" in fields and theta != rope.theta:
        fields.unsupported("rope_theta", f"{key}.rope_theta is {rope.theta:g}; remove one of them")
    return rope


def _read_windows(fields: Fields, family: str, n_layers: int) -> tuple[int | None, ...]:
    """[L]: the window that the config gives a layer, by the rules of the family's code."""
    types = _read_layer_types(fields, n_layers)
    if family == "llama":  # transformers ignores these keys for llama, vLLM follows them
        why = "consumers of llama checkpoints disagree on it"
        if types is not None and SLIDING in types:
            fields.unsupported("layer_types", why)
        if "sliding_window" in fields:
            fields.unsupported("sliding_window", why)
        fields.require("use_sliding_window", [False])
        return (None,) * n_layers
    window = fields.optional_integer("sliding_window", 4096)
    first_sliding = 0
    if family != "mistral":
        first_sliding = fields.integer("max_window_layers", 28, low=0)
        if not fields.boolean("use_sliding_window", False):
            window = None
    if types is None:
        return tuple(window if i >= first_sliding else None for i in range(n_layers))
    if window is None and SLIDING in types:
        fields.malformed("layer_types", "has sliding layers, but the config gives them no window")
    return tuple(window if kind == SLIDING else None for kind in types)


def _read_layer_types(fields: Fields, n_layers: int) -> list[str] | None:
    types = fields.raw("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != n_layers:
        fields.malformed("layer_types", f"must be a list of {n_layers} strings, one per layer")
    if any(kind not in (FULL, SLIDING) for kind in types):
        fields.unsupported("layer_types", f"swa supports {FULL} and {SLIDING}")
    return types


def _read_eos(fields: Fields, values: Mapping[str, Any], default: int | None) -> tuple[int, ...]:
    """A token id, a list of them or null; `default` stands for a missing key."""
    value = fields.raw("eos_token_id") if "eos_token_id" in values else default
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int or not 0 <= token <= MAX_SIZE for token in ids):
        fields.malformed("eos_token_id", "must be a token id, a list of token ids or null")
    return tuple(ids)
