"""A folder of safetensors as a checkpoint: exactly the tensors that its config asks for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from swa import jsonio
from swa.checkpoint import Checkpoint, Chunk
from swa.config import ModelConfig
from swa.errors import CheckpointError
from swa.fields import brief
from swa.safetensors_file import TensorEntry, read_header
from swa.weight_files import FileStamp, OpenFile, open_regular

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_PICKLES = {".bin", ".pt", ".pth", ".ckpt"}

CHUNK_BYTES = 16 << 20


class Parameter(NamedTuple):
    """A tensor that the engine needs: its name in files and in the engine, its layer, its shape."""

    name: str
    tensor: str
    layer: int
    shape: tuple[int, ...]


class Stored(NamedTuple):
    """A tensor in one of the files."""

    stamp: FileStamp
    entry: TensorEntry


class Slot(NamedTuple):
    """A parameter and where it is stored."""

    parameter: Parameter
    stamp: FileStamp
    entry: TensorEntry


class SafetensorsCheckpoint(Checkpoint):
    """`config.json` with `model.safetensors`, or with shards and their index."""

    def __init__(self, folder: Path, *, source: str) -> None:
        """Check everything but the numbers themselves. Raises CheckpointError."""
        self.source, self.folder = source, folder
        self.config, config_stamp = read_config(folder)
        self._watched = [config_stamp]
        if has_index(folder):
            listing = folder / INDEX
            weight_map, index_stamp = read_index(listing)
            self._watched.append(index_stamp)
            stored = _read_shards(folder, weight_map)
        else:
            listing = folder / WEIGHTS
            _require_weights(folder)
            stored = _read_shard(listing)
        self._slots = _match(self.config, stored, listing)
        self.weight_files = tuple(dict.fromkeys(stamp for stamp, _ in stored.values()))
        self.dtypes = frozenset(slot.entry.dtype for slot in self._slots)
        self.n_bytes = sum(slot.entry.n_bytes for slot in self._slots)
        self.fingerprint = self._fingerprint()

    def parameters(self) -> Iterator[Chunk]:
        for stamp, slots in groupby(self._slots, attrgetter("stamp")):
            with stamp.reopened() as file:
                for slot in slots:
                    yield from _chunks(file, slot)
            stamp.check()  # nor was it written while it was read

    def check_unchanged(self) -> None:
        for stamp in (*self._watched, *self.weight_files):
            stamp.check()

    def _fingerprint(self) -> str:
        digests = {}
        for stamp, slots in groupby(self._slots, attrgetter("stamp")):
            with stamp.reopened() as file:
                for parameter, _, entry in slots:
                    digests[parameter.name] = _digest(file, parameter.name, entry)
        whole = hashlib.sha256(self.config.digest_bytes())
        for name in sorted(digests):  # whichever file holds it
            whole.update(digests[name])
        return whole.hexdigest()


def expected_parameters(config: ModelConfig) -> Iterator[Parameter]:
    """The tensors of a checkpoint with this config, under the names that transformers gives them.

    Matrices are [outputs, inputs].
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    projections = {
        "self_attn.q_proj": (queries, hidden, config.q_bias),
        "self_attn.k_proj": (keys, hidden, config.k_bias),
        "self_attn.v_proj": (keys, hidden, config.v_bias),
        "self_attn.o_proj": (hidden, queries, config.o_bias),
        "mlp.gate_proj": (inner, hidden, config.gate_bias),
        "mlp.up_proj": (inner, hidden, config.up_bias),
        "mlp.down_proj": (hidden, inner, config.down_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}

    table = (config.vocab_size, hidden)
    yield Parameter("model.embed_tokens.weight", "embed_tokens", -1, table)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for path, size in norms.items():
            tensor = path.rpartition(".")[2]
            yield Parameter(f"{prefix}.{path}.weight", tensor, layer, (size,))
        for path, (outputs, inputs, bias) in projections.items():
            tensor = path.rpartition(".")[2]
            yield Parameter(f"{prefix}.{path}.weight", tensor, layer, (outputs, inputs))
            if bias:
                yield Parameter(f"{prefix}.{path}.bias", f"{tensor}.bias", layer, (outputs,))
    yield Parameter("model.norm.weight", "norm", -1, (hidden,))
    if not config.tie_word_embeddings:
        yield Parameter("lm_head.weight", "lm_head", -1, table)


def read_config(folder: Path) -> tuple[ModelConfig, FileStamp]:
    """The config of a folder. Raises CheckpointError."""
    path = folder / CONFIG
    if not os.path.exists(path):
        hint = "give the .gguf file itself" if ".gguf" in _suffixes(folder) else "it has none"
        raise CheckpointError(
            f"a folder of a checkpoint has a {CONFIG}: {hint}", file=folder, rule="config"
        )
    values, stamp = _read_json(path)
    return ModelConfig.from_dict(values, file=path), stamp


def has_index(folder: Path) -> bool:
    """Whether the weights are shards; a single file is preferred, as in transformers."""
    return os.path.exists(folder / INDEX) and not os.path.exists(folder / WEIGHTS)


def _require_weights(folder: Path) -> None:
    if os.path.exists(folder / WEIGHTS):
        return
    message = f"it has neither {WEIGHTS} nor {INDEX}"
    if _suffixes(folder) & _PICKLES:
        message += (
            ", and files of PyTorch are not read because they can run code: convert them with"
            " transformers, AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    raise CheckpointError(message, file=folder, rule="weights")


def _suffixes(folder: Path) -> set[str]:
    try:
        return {path.suffix for path in folder.iterdir()}
    except OSError:  # it only serves to explain an error better
        return set()


def read_index(path: Path) -> tuple[dict[str, str], FileStamp]:
    """Which file holds which tensor, by the index of a sharded checkpoint.

    Raises:
        CheckpointError: it is malformed, or names a file that is not in its own folder.
    """
    index, stamp = _read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("weight_map must map tensors to their files", file=path, rule="index")
    for tensor, name in weight_map.items():
        if not _is_plain_name(name):
            raise CheckpointError(
                f"the shard {brief(name)} is not the plain name of a file",
                file=path,
                tensor=tensor,
                rule="shard-name",
            )
    return weight_map, stamp


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\\0")


def _read_json(path: Path) -> tuple[dict[str, Any], FileStamp]:
    with open_regular(path) as file:
        text = file.read_whole()
    try:
        value = jsonio.loads(text)
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise CheckpointError(
            f"the file does not hold a JSON object: {error}", file=path, rule="json"
        ) from error
    return value, file.stamp


def _read_shard(path: Path) -> dict[str, Stored]:
    with open_regular(path) as file:
        return {name: Stored(file.stamp, entry) for name, entry in read_header(file).items()}


def _read_shards(folder: Path, weight_map: Mapping[str, str]) -> dict[str, Stored]:
    """All tensors of all shards, each in the shard that the index names."""
    stored: dict[str, Stored] = {}
    for shard in sorted(set(weight_map.values())):
        for name, tensor in _read_shard(folder / shard).items():
            if weight_map.get(name, shard if _is_buffer(name) else None) != shard:
                place = brief(weight_map[name]) if name in weight_map else "no shard"
                raise CheckpointError(
                    f"the index places it in {place}",
                    file=folder / shard,
                    tensor=name,
                    rule="index-matches-shards",
                )
            stored[name] = tensor
    for name, shard in weight_map.items():
        if name not in stored:
            raise CheckpointError(
                "the index places it here, but it is not there",
                file=folder / shard,
                tensor=name,
                rule="index-matches-shards",
            )
    return stored


def _is_buffer(name: str) -> bool:
    """RoPE frequencies, which old checkpoints store and the config gives."""
    return name.endswith(".rotary_emb.inv_freq")


def _match(config: ModelConfig, stored: Mapping[str, Stored], listing: Path) -> list[Slot]:
    """The place of every parameter, in the order of the files."""
    slots = []
    for parameter in expected_parameters(config):
        name = parameter.name
        if name not in stored:
            hint = "the checkpoint does not have it"
            if name == "lm_head.weight":
                hint += ", and tie_word_embeddings is false: set it to true if the two are tied"
            raise CheckpointError(hint, file=listing, tensor=name, rule="missing-tensor")
        slots.append(Slot(parameter, *stored[name]))
        _check_shape(name, stored[name], parameter.shape)
    used = {slot.parameter.name for slot in slots}
    for name, tensor in stored.items():
        if name in used or _is_buffer(name):
            continue
        if name != "lm_head.weight":
            raise CheckpointError(
                f"a {config.model_type} of this config has no such tensor",
                file=tensor.stamp.path,
                tensor=name,
                rule="surplus-tensor",
            )
        _check_shape(name, tensor, (config.vocab_size, config.hidden_size))  # a copy of the tied
    order = {stamp: i for i, stamp in enumerate(dict.fromkeys(s.stamp for s in stored.values()))}
    return sorted(slots, key=lambda slot: (order[slot.stamp], slot.entry.offset))


def _check_shape(name: str, tensor: Stored, shape: tuple[int, ...]) -> None:
    if tensor.entry.shape != shape:
        raise CheckpointError(
            f"its shape is {list(tensor.entry.shape)}, the config makes it {list(shape)}",
            file=tensor.stamp.path,
            tensor=name,
            rule="shape-matches-config",
        )


def _chunks(file: OpenFile, slot: Slot) -> Iterator[Chunk]:
    """A vector whole, a matrix in as many rows as CHUNK_BYTES hold."""
    (_, tensor, layer, shape), _, entry = slot
    n_rows = shape[0]
    row_bytes = entry.n_bytes // n_rows
    step = n_rows if len(shape) == 1 else max(1, CHUNK_BYTES // row_bytes)
    for row in range(0, n_rows, step):
        n_bytes = min(step, n_rows - row) * row_bytes
        data = file.read(entry.offset + row * row_bytes, n_bytes)
        yield Chunk(tensor, layer, row, entry.dtype, data)


def _digest(file: OpenFile, name: str, entry: TensorEntry) -> bytes:
    digest = hashlib.sha256(f"{name} {entry.dtype} {entry.shape} ".encode())
    for sample in file.samples(entry.offset, entry.n_bytes):
        digest.update(sample)
    return digest.digest()
