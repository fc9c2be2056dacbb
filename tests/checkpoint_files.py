"""Checkpoint folders written from NumPy arrays: safetensors, shards, a byte tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

BYTE_VOCAB = 258  # 256 bytes, <bos>, <eos>
BYTE_BOS, BYTE_EOS = 256, 257
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors name: torch name


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Bit patterns uint16 of finite float32 values, rounded to nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_bf16(x: np.ndarray) -> np.ndarray:
    """float32 values that bfloat16 holds exactly."""
    return from_bf16(to_bf16(x))


def encode(x: np.ndarray, dtype: str) -> np.ndarray:
    """The array whose bytes a file of `dtype` stores."""
    return to_bf16(x) if dtype == "BF16" else x.astype({"F32": "<f4", "F16": "<f2"}[dtype])


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], dtype: str) -> None:
    """Written by hand: the library's NumPy interface has no bfloat16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, x in tensors.items():
        encoded = encode(x, dtype).tobytes()
        offsets = [len(data), len(data) + len(encoded)]
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": offsets}
        data += encoded
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """float32 tensors of all safetensors files of a folder."""
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            if name != "__metadata__":
                begin, end = (start + offset for offset in entry["data_offsets"])
                stored = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry["dtype"]]
                x = np.frombuffer(content[begin:end], stored).reshape(entry["shape"])
                tensors[name] = from_bf16(x) if entry["dtype"] == "BF16" else x.astype(np.float32)
    return tensors


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: str = "F32",
    shards: int = 1,
) -> Path:
    """config.json and the weights, in one file or in `shards` files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return folder
    weight_map: dict[str, str] = {}
    for i, names in enumerate(np.array_split(np.array(list(tensors)), shards)):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / file, {str(n): tensors[str(n)] for n in names}, dtype)
        weight_map |= dict.fromkeys(map(str, names), file)
    total = sum(encode(x, dtype).nbytes for x in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def write_tokenizer(
    folder: Path, backend: tokenizers.Tokenizer, *, chat_template: str | None = None
) -> None:
    """tokenizer.json and tokenizer_config.json of a tokenizer that knows <bos> and <eos>."""
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Token i < 256 is one byte (in the byte-level alphabet's order); a text starts with <bos>."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BYTE_BOS)]
    )
    return backend
