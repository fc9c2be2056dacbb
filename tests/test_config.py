"""config.json of real checkpoints as transformers reads it, and everything that is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from swa import _core
from swa.config import FULL, SLIDING, ModelConfig
from swa.errors import CheckpointError, UnsupportedModelError

FILE = "folder/config.json"

LLAMA_2_7B = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_length": 4096,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
MISTRAL_7B_V01 = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
MISTRAL_7B_V03 = MISTRAL_7B_V01 | {
    "attention_dropout": 0.0,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32768,
}
QWEN2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
REAL: dict[str, dict[str, Any]] = {
    "Llama-2-7b": LLAMA_2_7B,
    "Llama-3.2-1B": LLAMA_3_2_1B,
    "TinyLlama-1.1B": LLAMA_2_7B
    | {"hidden_size": 2048, "num_key_value_heads": 4, "num_hidden_layers": 22, "max_length": None},
    "vicuna-7b": {k: v for k, v in LLAMA_2_7B.items() if k != "num_key_value_heads"}
    | {"max_sequence_length": 2048, "temperature": 0.9, "top_p": 0.6},
    "SmolLM2-135M": SMOLLM2_135M,
    "DeepSeek-R1-Distill-Llama-8B": LLAMA_3_2_1B
    | {"eos_token_id": 128001, "num_hidden_layers": 32, "tie_word_embeddings": False},
    "Mistral-7B-v0.3": MISTRAL_7B_V03,
    "Mistral-Nemo": MISTRAL_7B_V03 | {"head_dim": 128, "hidden_size": 5120},
    "mistral-relabelled": MISTRAL_7B_V03
    | {"head_dim": 128, "sliding_window": 512, "layer_types": [FULL, SLIDING] * 16},
    "Qwen2.5-7B": QWEN2_5_7B,
    "Qwen2.5-7B-yarn": QWEN2_5_7B
    | {
        "rope_scaling": {
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "type": "yarn",
        }
    },
    "DeepSeek-R1-Distill-Qwen-1.5B": QWEN2_5_7B
    | {"use_mrope": False, "max_window_layers": 21, "rope_theta": 10000, "sliding_window": 4096},
    "Qwen2-sliding": QWEN2_5_7B | {"use_sliding_window": True, "max_window_layers": 20},
    "Qwen3-0.6B": QWEN3_0_6B,
    "Qwen3-v5": {k: v for k, v in QWEN3_0_6B.items() if not k.startswith("rope")}
    | {
        "dtype": "bfloat16",
        "layer_types": [FULL] * 28,
        "pad_token_id": None,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    },
    "Qwen3-layer-types": QWEN3_0_6B
    | {
        "use_sliding_window": True,
        "sliding_window": 1024,
        "max_window_layers": 5,
        "layer_types": [SLIDING, FULL, FULL, SLIDING] * 7,
    },
}

BARE = [{"model_type": family} for family in ("llama", "qwen2", "qwen3")]
BARE.append({"model_type": "mistral", "sliding_window": None})
TINY: dict[str, dict[str, Any]] = {
    family: {
        "model_type": family,
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    | ({"sliding_window": None} if family == "mistral" else {})
    for family in ("llama", "mistral", "qwen2", "qwen3")
}


def read(values: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig.from_dict(values, file=FILE)


def their_windows(config: Any) -> tuple[int | None, ...]:
    """[L]: what transformers' model code makes of its config."""
    if config.model_type == "llama":
        return (None,) * config.num_hidden_layers
    if config.model_type == "mistral":
        return (config.sliding_window,) * config.num_hidden_layers
    return tuple(config.sliding_window if t == SLIDING else None for t in config.layer_types)


def assert_as_transformers_reads_it(values: Mapping[str, Any]) -> None:
    config = read(values)
    label = values["model_type"]
    if "layer_types" in values and label == "mistral":
        label = "ministral"  # as AutoConfig does
    theirs = AutoConfig.for_model(label, **{k: v for k, v in values.items() if k != "model_type"})
    for name in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
        "tie_word_embeddings",
    ):
        default = theirs.hidden_size // theirs.num_attention_heads if name == "head_dim" else None
        expected = getattr(theirs, name, None)
        assert getattr(config, name) == (default if expected is None else expected), name
    assert config.native_sliding_window == their_windows(theirs)
    assert config.rope.theta == theirs.rope_parameters["rope_theta"]
    assert config.rope.rope_type == theirs.rope_parameters["rope_type"]
    eos = theirs.eos_token_id
    assert list(config.eos_token_ids) == (
        eos if isinstance(eos, list) else [eos] * (eos is not None)
    )


@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints(name: str) -> None:
    assert_as_transformers_reads_it(REAL[name])


@pytest.mark.parametrize("values", BARE, ids=lambda values: values["model_type"])
def test_defaults_of_transformers(values: dict[str, Any]) -> None:
    assert_as_transformers_reads_it(values)


@pytest.mark.parametrize("values", [*REAL.values(), *TINY.values()])
def test_what_transformers_saves_again(values: dict[str, Any]) -> None:
    """Either version's spelling of a config means the same."""
    label = "ministral" if "layer_types" in values and values["model_type"] == "mistral" else None
    arguments = {k: v for k, v in values.items() if k != "model_type"}
    saved = AutoConfig.for_model(label or values["model_type"], **arguments).to_dict()
    saved["model_type"] = values["model_type"]
    assert "rope_parameters" in saved and "rope_theta" not in saved
    assert read(saved).digest_bytes() == read(values).digest_bytes()
    assert read(saved).eos_token_ids == read(values).eos_token_ids


def test_a_real_config_in_full() -> None:
    config = read(LLAMA_3_2_1B)
    assert config.model_type == "llama"
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, 64)
    assert config.tie_word_embeddings is True
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.rope.rope_type == "llama3" and config.rope.parameters["factor"] == 32
    assert config.native_sliding_window == (None,) * 16
    assert config.max_position_embeddings == 131072


BIASES = ("q_bias", "k_bias", "v_bias", "o_bias", "gate_bias", "up_bias", "down_bias")


@pytest.mark.parametrize(
    ("family", "values", "expected"),
    [
        ("llama", {}, ""),
        ("llama", {"attention_bias": None, "mlp_bias": None}, ""),
        ("llama", {"attention_bias": True}, "q k v o"),
        ("llama", {"mlp_bias": True}, "gate up down"),
        ("llama", {"attention_bias": True, "mlp_bias": True}, "q k v o gate up down"),
        ("mistral", {}, ""),
        ("mistral", {"attention_bias": False, "mlp_bias": False}, ""),
        ("qwen2", {}, "q k v"),
        ("qwen3", {}, ""),
        ("qwen3", {"attention_bias": True}, "q k v o"),
    ],
)
def test_biases(family: str, values: dict[str, Any], expected: str) -> None:
    config = read(TINY[family] | values)
    found = [name for name in BIASES if getattr(config, name)]
    assert found == [f"{name}_bias" for name in expected.split()]
    assert config.qk_norm == (family == "qwen3")


@pytest.mark.parametrize("family", TINY)
def test_the_engine_takes_it(family: str) -> None:
    config = read(TINY[family])
    values = config.engine_dict()
    engine = _core.Engine(values, dtype="float32", num_threads=1)
    assert engine.num_hidden_layers == 4 and engine.vocab_size == 64
    assert values["inv_freq"].dtype == np.float32
    assert values["rope_scale"] == 1.0
    for name in (*BIASES, "qk_norm", "tie_word_embeddings", "rms_norm_eps", "hidden_size"):
        assert values[name] == getattr(config, name)


def test_rope_reaches_the_engine() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = read(TINY["qwen2"] | {"rope_scaling": scaling, "rope_theta": 1e6})
    assert config.rope.theta == 1e6
    assert config.engine_dict()["rope_scale"] == config.rope.attention_factor > 1.1
    assert config.engine_dict()["inv_freq"].tolist() == list(config.rope.inv_freq)


@pytest.mark.parametrize(("given_heads", "expected"), [({}, 4), ({"num_key_value_heads": None}, 4)])
def test_without_grouped_heads(given_heads: dict[str, Any], expected: int) -> None:
    values = {k: v for k, v in TINY["llama"].items() if k != "num_key_value_heads"} | given_heads
    assert read(values).num_key_value_heads == expected
    assert read(TINY["llama"] | {"num_key_value_heads": 1}).num_key_value_heads == 1


@pytest.mark.parametrize(
    ("value", "expected"), [(None, ()), (7, (7,)), ([], ()), ([7, 3], (7, 3)), (0, (0,))]
)
def test_eos_token_id(value: Any, expected: tuple[int, ...]) -> None:
    assert read(TINY["llama"] | {"eos_token_id": value}).eos_token_ids == expected


@pytest.mark.parametrize(
    ("family", "values", "expected"),
    [
        ("llama", {"layer_types": [FULL] * 4, "sliding_window": None}, [None] * 4),
        ("llama", {"use_sliding_window": False}, [None] * 4),
        ("mistral", {"layer_types": [FULL, SLIDING] * 2, "sliding_window": 8}, [None, 8] * 2),
        ("mistral", {"layer_types": [FULL] * 4, "sliding_window": 8}, [None] * 4),
        ("mistral", {"layer_types": None}, [None] * 4),
        ("qwen2", {"sliding_window": 8}, [None] * 4),
        ("qwen2", {"sliding_window": 8, "max_window_layers": 1}, [None] * 4),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            [None, 8, 8, 8],
        ),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}, [None] * 3 + [4096]),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, [None] * 4),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
            [None] * 4,
        ),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 0,
                "layer_types": [SLIDING, FULL, FULL, SLIDING],
            },
            [8, None, None, 8],
        ),
        ("qwen3", {"layer_types": [FULL] * 4, "sliding_window": 8}, [None] * 4),
    ],
)
def test_layers_that_slide(family: str, values: dict[str, Any], expected: list[int | None]) -> None:
    assert read(TINY[family] | values).native_sliding_window == tuple(expected)
    if family != "llama":
        assert_as_transformers_reads_it(TINY[family] | values)


@pytest.mark.parametrize(
    "values",
    [
        MISTRAL_7B_V01,
        {"model_type": "mistral"},  # 4,096 by default
        TINY["mistral"] | {"sliding_window": 8, "layer_types": [SLIDING] * 4},
        TINY["qwen2"] | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    ],
)
def test_a_model_that_slides_everywhere(values: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="every layer is sliding") as caught:
        read(values)
    assert caught.value.file == FILE


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"model_type": "gemma3_text"}),
    ("llama", {"model_type": "ministral"}),
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"pretraining_tp": 2}),
    ("llama", {"pretraining_tp": True}),
    ("llama", {"rope_interleaved": True}),
    ("llama", {"partial_rotary_factor": 0.5}),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}),
    ("llama", {"is_encoder_decoder": True}),
    ("llama", {"chunk_size_feed_forward": 128}),
    ("llama", {"layer_types": [FULL, SLIDING] * 2}),
    ("llama", {"sliding_window": 8}),
    ("llama", {"use_sliding_window": True}),
    ("llama", {"layer_types": ["chunked_attention"] * 4}),
    ("llama", {"logit_softcapping": 30.0}),
    ("llama", {"embedding_multiplier": 12.0}),
    ("llama", {"is_causal": False}),
    ("llama", {"num_local_experts": 8}),
    ("llama", {"original_max_position_embeddings": 4096}),
    ("llama", {"head_dim": 7}),
    ("llama", {"no_such_key": 1}),
    ("mistral", {"attention_bias": True}),
    ("mistral", {"mlp_bias": True}),
    ("mistral", {"use_sliding_window": True}),
    ("qwen2", {"use_mrope": True}),
    ("qwen2", {"attention_bias": True}),
    ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 262144}}),
    ("qwen3", {"num_experts": 128}),
    ("qwen3", {"mlp_bias": True}),
    ("qwen3", {"layer_types": ["linear_attention", FULL, FULL, FULL]}),
]


@pytest.mark.parametrize(("family", "change"), REFUSED)
def test_refused_with_key_and_value(family: str, change: dict[str, Any]) -> None:
    ((key, value),) = change.items()
    with pytest.raises(UnsupportedModelError) as caught:
        read(TINY[family] | change)
    assert (caught.value.key, caught.value.value, caught.value.file) == (key, value, FILE)
    assert str(caught.value).startswith(f"{FILE}: {key} is {value!r}: ")


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type"),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e4}, "rope_theta"),
        ({"rope_parameters": {}, "rope_scaling": {"rope_type": "default"}}, "rope_scaling"),
    ],
)
def test_rope_is_refused(values: dict[str, Any], key: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read(TINY["llama"] | values)
    assert caught.value.key == key


def test_rope_theta_may_be_said_twice() -> None:
    spelt = {"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1000000}
    assert read(TINY["llama"] | spelt).rope.theta == 1e6


MALFORMED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": None}, "model_type is missing"),
    ("llama", {"model_type": 3}, "model_type is 3"),
    ("llama", {"hidden_size": "32"}, "hidden_size is '32'"),
    ("llama", {"hidden_size": 32.0}, "hidden_size is 32.0"),
    ("llama", {"hidden_size": True}, "hidden_size is True"),
    ("llama", {"hidden_size": 0}, "hidden_size is 0"),
    ("llama", {"vocab_size": -1}, "vocab_size is -1"),
    ("llama", {"vocab_size": 2**31}, "vocab_size is 2147483648"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads is 3: it must divide"),
    ("llama", {"num_key_value_heads": 8}, "num_key_value_heads is 8: it must divide"),
    ("llama", {"head_dim": None, "num_attention_heads": 6}, "must divide hidden_size"),
    ("llama", {"head_dim": None, "num_attention_heads": 64}, "must divide hidden_size"),
    ("llama", {"head_dim": 2048}, "head_dim is 2048"),
    ("llama", {"num_attention_heads": 2**30}, "num_attention_heads is 1073741824: it is too large"),
    ("llama", {"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
    ("llama", {"attention_bias": "no"}, "attention_bias is 'no'"),
    ("llama", {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ("llama", {"eos_token_id": [1, None]}, "eos_token_id is [1, None]"),
    ("llama", {"eos_token_id": -1}, "eos_token_id is -1"),
    ("llama", {"eos_token_id": True}, "eos_token_id is True"),
    ("llama", {"rope_theta": "big"}, "rope_theta is 'big'"),
    ("llama", {"rope_scaling": [1]}, "rope_scaling is [1]: it must be an object"),
    ("llama", {"rope_parameters": "yarn"}, "rope_parameters is 'yarn'"),
    ("llama", {"layer_types": FULL}, "layer_types is 'full_attention'"),
    ("qwen2", {"layer_types": [FULL] * 3}, "must be a list of 4 strings"),
    ("qwen2", {"layer_types": [SLIDING] + [FULL] * 3}, "the config gives them no window"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": None, "layer_types": [SLIDING, FULL] * 2},
        "the config gives them no window",
    ),
    ("mistral", {"layer_types": [SLIDING, FULL] * 2}, "the config gives them no window"),
    ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window is 'yes'"),
    ("qwen2", {"sliding_window": 0}, "sliding_window is 0"),
    ("qwen2", {"max_window_layers": -1}, "max_window_layers is -1"),
    ("mistral", {"sliding_window": 4096.0}, "sliding_window is 4096.0"),
]


@pytest.mark.parametrize(("family", "change", "says"), MALFORMED)
def test_malformed(family: str, change: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(TINY[family] | change)
    assert type(caught.value) is CheckpointError
    assert caught.value.file == FILE
    assert says in str(caught.value)


@pytest.mark.parametrize("values", [[], None, "llama", 3])
def test_not_an_object(values: Any) -> None:
    with pytest.raises(CheckpointError, match="must hold a JSON object"):
        read(values)


def test_the_digest_tells_computations_apart() -> None:
    tiny = TINY["qwen2"]
    same = [{"eos_token_id": 5}, {"torch_dtype": "float16"}, {"rope_theta": 10000}]
    same += [{"rope_parameters": {"rope_type": "default"}}, {"max_position_embeddings": 64}]
    other = [{"rms_norm_eps": 1e-5}, {"rope_theta": 1e5}, {"tie_word_embeddings": True}]
    other += [{"head_dim": 16}, {"layer_types": [FULL] * 4, "num_attention_heads": 2}]
    other += [{"use_sliding_window": True, "max_window_layers": n} for n in (1, 2)]
    digest = read(tiny).digest_bytes()
    assert all(read(tiny | change).digest_bytes() == digest for change in same)
    assert len({digest, *(read(tiny | change).digest_bytes() for change in other)}) == 8


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = sorted({key for values in REAL.values() for key in values} | {"rope_parameters"})


@given(
    family=st.sampled_from(list(TINY)),
    change=st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=5)), JSON, max_size=4),
)
@settings(max_examples=400)
@pytest.mark.filterwarnings("error")
def test_any_json_is_read_or_refused(family: str, change: dict[str, Any]) -> None:
    try:
        config = read(TINY[family] | change)
    except CheckpointError as error:
        assert error.file == FILE
        return
    assert len(config.native_sliding_window) == config.num_hidden_layers
    assert len(config.rope.inv_freq) * 2 == config.head_dim
    assert config.num_attention_heads % config.num_key_value_heads == 0
