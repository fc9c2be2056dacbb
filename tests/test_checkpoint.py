"""Folders of safetensors: what they yield, what is refused, what changes behind our back."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from builders import tiny_checkpoint
from checkpoint_files import read_tensors, write_safetensors
from engines import logits, open_engine
from opened import collect, edit_json, file_name
from processes import measure_peak
from reference import Rows

import swa.safetensors_checkpoint
from swa import _core
from swa.checkpoint import Chunk, open_checkpoint
from swa.errors import CheckpointError, UnsupportedModelError
from swa.weight_files import MAX_JSON_BYTES, FileStamp, open_regular

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-00001-of-00003.safetensors"
MIB = 1 << 20
SMALL = {"num_hidden_layers": 2, "vocab_size": 40}
Tiny = Callable[..., Path]
Edit = Callable[[dict[str, np.ndarray]], object]


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A checkpoint in one file, for the test to damage."""
    return shutil.copytree(tiny("llama", **SMALL), tmp_path / "llama")


@pytest.fixture
def sharded(tiny: Tiny, tmp_path: Path) -> Path:
    return shutil.copytree(tiny("llama", shards=3, **SMALL), tmp_path / "sharded")


def edit_tensors(folder: Path, edit: Edit, dtype: str = "F32") -> None:
    tensors = read_tensors(folder)
    edit(tensors)
    write_safetensors(folder / WEIGHTS, tensors, dtype)


def library_tensors(folder: Path) -> dict[str, tuple[str, bytes]]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in safetensors.deserialize(path.read_bytes()):
            tensors[name] = tensor["dtype"], bytes(tensor["data"])
    return tensors


def refuse(path: Path, rule: str, **attributes: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    error = caught.value
    assert error.rule == rule, error
    for name, value in attributes.items():
        assert getattr(error, name) == value, name
    return error


# ---- what a checkpoint yields ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"tied": True, "dtype": "BF16"}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "dtype": "F16", "shards": 4}),
        ("mistral", {"num_key_value_heads": 1, "shards": 2, "dtype": "BF16"}),
        ("qwen2", {"tied": True, "shards": 3}),
        ("qwen3", {"attention_bias": True, "head_dim": 24}),
    ],
)
def test_every_tensor_is_yielded_once(tiny: Tiny, family: str, settings: dict[str, Any]) -> None:
    folder = tiny(family, **settings)
    checkpoint = open_checkpoint(folder)
    found = {file_name(*key): value for key, value in collect(checkpoint).items()}
    assert found == library_tensors(folder)
    assert checkpoint.n_bytes == sum(len(data) for _, data in found.values())
    assert checkpoint.dtypes == {settings.get("dtype", "F32")}
    assert checkpoint.folder == folder and checkpoint.source == str(folder)
    assert checkpoint.config.model_type == family
    assert {s.path for s in checkpoint.weight_files} == set(folder.glob("*.safetensors"))
    assert checkpoint.build_tokenizer() is None
    checkpoint.check_unchanged()
    open_engine(folder)  # which misses nothing


def test_chunks_are_whole_rows(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny("llama", attention_bias=True)
    whole = collect(open_checkpoint(folder))
    for limit in (1, 1000, 64 * 4 * 3, 1 << 20):
        monkeypatch.setattr(swa.safetensors_checkpoint, "CHUNK_BYTES", limit)
        checkpoint = open_checkpoint(folder)
        assert collect(checkpoint) == whole
        sizes = [len(c.data) for c in checkpoint.parameters() if c.tensor == "down_proj"]
        assert max(sizes) <= max(limit, 96 * 4)
        vectors = [c.data for c in checkpoint.parameters() if c.tensor == "q_proj.bias"]
        assert [len(v) for v in vectors] == [64 * 4] * 4  # the engine takes vectors whole


def test_types_may_be_mixed(folder: Path) -> None:
    tensors = read_tensors(folder)
    parts = {"F32": "model-a", "F16": "model-b", "BF16": "model-c"}
    weight_map = {}
    for i, (dtype, file) in enumerate(parts.items()):
        names = sorted(tensors)[i::3]
        write_safetensors(folder / f"{file}.safetensors", {n: tensors[n] for n in names}, dtype)
        weight_map |= dict.fromkeys(names, f"{file}.safetensors")
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dtypes == {"F32", "F16", "BF16"}
    found = {file_name(*key): value for key, value in collect(checkpoint).items()}
    assert found == library_tensors(folder)
    open_engine(folder)


def test_misaligned_data(tiny: Tiny, tmp_path: Path) -> None:
    """The numbers do not have to begin at a multiple of their size."""
    folder = tiny("llama", **SMALL)
    rows = Rows((0, 3), (0, 1), (0, 5))
    expected = logits(open_engine(folder), range(12), rows)
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    for blanks in (1, 2, 3):
        copy = shutil.copytree(folder, tmp_path / str(blanks))
        header = content[8 : 8 + length] + b" " * blanks
        data = content[8 + length :]
        (copy / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data)
        assert (logits(open_engine(copy), range(12), rows) == expected).all()


def test_all_bf16_patterns(tmp_path: Path) -> None:
    patterns = np.arange(65536, dtype=np.uint16)
    assert (_core.bf16_round_trip(patterns) == patterns).all()
    folder = tiny_checkpoint(tmp_path / "x", dtype="BF16", vocab_size=1024, hidden_size=64)
    path = folder / WEIGHTS
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + length])["model.embed_tokens.weight"]["data_offsets"]
    assert end - begin == 2 * 65536
    start = 8 + length + begin
    path.write_bytes(content[:start] + patterns.tobytes() + content[start + 2 * 65536 :])
    assert collect(open_checkpoint(folder))["embed_tokens", -1] == ("BF16", patterns.tobytes())


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tensor of 400 MB: a sparse file, zeros that take no room."""
    rows, hidden = 200_000, 512
    folder = tiny_checkpoint(tmp_path_factory.mktemp("sparse"), tied=True, hidden_size=hidden)
    edit_json(folder / "config.json", vocab_size=rows)
    tensors = read_tensors(folder)
    del tensors["model.embed_tokens.weight"]
    write_safetensors(folder / WEIGHTS, tensors, "F32")
    content = (folder / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header, size = json.loads(content[8:start]), len(content) - start
    header["model.embed_tokens.weight"] = {
        "dtype": "F32",
        "shape": [rows, hidden],
        "data_offsets": [size, size + rows * hidden * 4],
    }
    text = json.dumps(header).encode()
    with open(folder / WEIGHTS, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + content[start:])
        file.truncate(8 + len(text) + size + rows * hidden * 4)
    return folder


def test_memory_while_reading_is_bounded(sparse: Path) -> None:
    tracemalloc.start()
    try:
        checkpoint = open_checkpoint(sparse)
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
        read = sum(len(chunk.data) for chunk in checkpoint.parameters())
        assert tracemalloc.get_traced_memory()[1] < 48 * MIB
    finally:
        tracemalloc.stop()
    assert read == checkpoint.n_bytes > 400_000_000


def test_memory_of_loading_is_the_weights(sparse: Path) -> None:
    """Beside the packed weights, a few chunks."""
    weights = 2 * 200_000 * 512  # bfloat16; the layers are small
    task = f"model = load({str(sparse)!r}, num_threads=1)"
    peak = measure_peak("from swa.model import load", task)
    assert weights < peak < weights + 80 * MIB


# ---- tensors that do not fit the config --------------------------------------------------------

O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def test_a_missing_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(O_PROJ))
    refuse(folder, "missing-tensor", tensor=O_PROJ, file=str(folder / WEIGHTS))


def test_a_missing_head(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    error = refuse(folder, "missing-tensor", tensor="lm_head.weight")
    assert "tie_word_embeddings is false" in str(error)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    open_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "score.weight",
    ],
)
def test_a_surplus_tensor(folder: Path, name: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: np.zeros(64, np.float32)}))
    refuse(folder, "surplus-tensor", tensor=name, file=str(folder / WEIGHTS))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (O_PROJ, (64, 65)),
        (O_PROJ, (64 * 64,)),
        (O_PROJ, (64, 64, 1)),
        ("model.layers.0.mlp.down_proj.weight", (96, 64)),  # transposed
        ("model.norm.weight", (1, 64)),
        ("model.embed_tokens.weight", (41, 64)),
        ("model.layers.0.self_attn.k_proj.weight", (64, 64)),
        ("lm_head.weight", (0, 64)),
    ],
)
def test_a_misshapen_tensor(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: np.zeros(shape, np.float32)}))
    error = refuse(folder, "shape-matches-config", tensor=name, file=str(folder / WEIGHTS))
    assert f"its shape is {list(shape)}, the config makes it" in str(error)


def test_missing_biases(folder: Path) -> None:
    edit_json(folder / "config.json", attention_bias=True)
    refuse(folder, "missing-tensor", tensor="model.layers.0.self_attn.q_proj.bias")


def test_what_is_harmless_is_skipped(folder: Path) -> None:
    """RoPE frequencies, as old checkpoints hold them; a copy of the tied embeddings."""
    edit_json(folder / "config.json", tie_word_embeddings=True)
    head = read_tensors(folder)["lm_head.weight"]
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    plain = open_checkpoint(folder)
    expected = collect(plain)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8) for i in range(2)}
    edit_tensors(folder, lambda tensors: tensors.update(buffers, **{"lm_head.weight": head}))
    more = open_checkpoint(folder)
    assert collect(more) == expected
    assert (more.fingerprint, more.n_bytes) == (plain.fingerprint, plain.n_bytes)
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": head[1:]}))
    refuse(folder, "shape-matches-config", tensor="lm_head.weight")


def test_a_hostile_number_of_layers_costs_nothing(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=65536)
    refuse(folder, "missing-tensor", tensor="model.layers.2.input_layernorm.weight")


def test_an_unsupported_type_is_named(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(UnsupportedModelError, match=r"model\.embed_tokens.*dtype 'I32'"):
        open_checkpoint(folder)


# ---- files -------------------------------------------------------------------------------------


def test_a_malformed_header_names_the_file(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1])
    refuse(folder, "file-end", file=str(folder / WEIGHTS))
    (folder / WEIGHTS).write_bytes(content[:100])
    refuse(folder, "header-length", file=str(folder / WEIGHTS))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[]", "not an object"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b'{"a": "\xff"}', "utf-8"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        ('{"a": 1}'.encode("utf-8-sig"), "BOM"),
        (b'{"a": ' + b"[" * 100_000, "nested too deep"),
    ],
)
def test_a_config_that_is_not_json(folder: Path, text: bytes, says: str) -> None:
    (folder / "config.json").write_bytes(text)
    error = refuse(folder, "json", file=str(folder / "config.json"))
    assert says in str(error)


def test_a_config_that_is_too_long(folder: Path) -> None:
    with open(folder / "config.json", "ab") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    refuse(folder, "json-size", file=str(folder / "config.json"))


def test_an_unsupported_config(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"bits": 4})
    with pytest.raises(UnsupportedModelError, match="quantization_config is {'bits': 4}"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "x.pt"])
def test_pickles_are_not_read(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)
    error = refuse(folder, "weights", file=str(folder))
    assert "they can run code" in str(error) and "save_pretrained" in str(error)


def test_a_checkpoint_runs_no_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a module that its config names and that the import system would find."""
    marker = folder / "it-ran"
    code = f"open({str(marker)!r}, 'w')"
    (folder / "modeling_evil.py").write_text(code)
    (folder / "pytorch_model.bin").write_bytes(f"cbuiltins\nexec\n(V{code}\ntR.".encode())
    monkeypatch.syspath_prepend(folder)
    collect(open_checkpoint(folder))
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    with pytest.raises(UnsupportedModelError, match="auto_map is"):
        open_checkpoint(folder)
    assert not marker.exists()


def test_folders_without_what_they_need(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert "neither model.safetensors nor" in str(refuse(folder, "weights"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has a config.json: it has none" in str(refuse(empty, "config", file=str(empty)))
    (empty / "model.gguf").touch()
    assert "give the .gguf file itself" in str(refuse(empty, "config"))


def test_only_regular_files_are_opened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a pipe without a writer make it wait."""
    weights = folder / WEIGHTS
    for name in ("config.json", WEIGHTS):
        path = folder / name
        kept = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        refuse(folder, "regular-file", file=str(path))
        path.unlink()
        path.symlink_to("/dev/zero")
        refuse(folder, "regular-file", file=str(path))
        path.unlink()
        path.mkdir()
        refuse(folder, "regular-file", file=str(path))
        path.rmdir()
        path.write_bytes(kept)
    weights.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(folder)
        server.bind(WEIGHTS)  # a relative name, as such names must be short
        refuse(folder, "readable", file=str(weights))
    weights.unlink()
    weights.symlink_to(tmp_path / "nowhere")
    refuse(folder, "weights")


def test_a_loop_of_links(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    refuse(folder, "config")


def test_names_that_no_file_can_have() -> None:
    for name in ("a\0b", "a" * 300, "\ud800"):
        with pytest.raises(CheckpointError) as caught, open_regular(Path(name)):
            pass
        assert caught.value.rule == "readable"


def test_a_cache_of_the_hub(folder: Path, sharded: Path, tmp_path: Path) -> None:
    """Its snapshots are links to blobs outside the snapshot's folder."""
    for source in (folder, sharded):
        cache = tmp_path / f"models--owner--{source.name}"
        snapshot, blobs = cache / "snapshots" / "1f0c", cache / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for path in source.iterdir():
            blob = blobs / f"sha-{path.name}"
            shutil.copy(path, blob)
            (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
        linked = open_checkpoint(snapshot)
        assert collect(linked) == collect(open_checkpoint(source))
        assert all(stamp.path.parent == snapshot for stamp in linked.weight_files)
        linked.check_unchanged()


# ---- shards ------------------------------------------------------------------------------------


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/tmp/outside.safetensors",
        "inner/outside.safetensors",
        "..\\outside.safetensors",
        "./outside.safetensors",
        "outside\0.safetensors",
        "..",
        ".",
        "",
        "config.json",
        None,
        7,
        ["x.safetensors"],
    ],
)
def test_shards_cannot_escape(sharded: Path, name: Any) -> None:
    """Though the file that they point to is there and right."""
    (sharded / "inner").mkdir()
    shutil.copy(sharded / SHARD, sharded / "inner" / "outside.safetensors")
    shutil.copy(sharded / SHARD, sharded.parent / "outside.safetensors")
    edit_index(
        sharded,
        lambda weight_map: weight_map.update(
            {tensor: name for tensor, file in weight_map.items() if file == SHARD}
        ),
    )
    error = refuse(sharded, "shard-name", file=str(sharded / INDEX))
    assert error.tensor == "model.embed_tokens.weight"


def test_a_shard_whose_name_no_file_can_have(sharded: Path) -> None:
    for name in ("\ud800.safetensors", "a" * 300 + ".safetensors"):
        edit_index(sharded, lambda m, name=name: m.update(dict.fromkeys(m, name)))
        refuse(sharded, "readable")


@pytest.mark.parametrize("weight_map", [None, [], "x", 3, {}])
def test_an_index_without_a_map(sharded: Path, weight_map: Any) -> None:
    (sharded / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    refuse(sharded, "index", file=str(sharded / INDEX))


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / SHARD).unlink()
    refuse(sharded, "readable", file=str(sharded / SHARD))


def test_a_tensor_that_the_index_places_elsewhere(sharded: Path) -> None:
    other = "model-00003-of-00003.safetensors"
    edit_index(sharded, lambda m: m.update({"model.embed_tokens.weight": other}))
    error = refuse(sharded, "index-matches-shards", tensor="model.embed_tokens.weight")
    assert error.file == str(sharded / SHARD) and other in str(error)


def test_a_tensor_that_the_index_does_not_have(sharded: Path) -> None:
    edit_index(sharded, lambda m: m.pop("model.embed_tokens.weight"))
    error = refuse(sharded, "index-matches-shards", tensor="model.embed_tokens.weight")
    assert "places it in no shard" in str(error)


def test_a_tensor_that_its_shard_does_not_have(sharded: Path) -> None:
    edit_index(sharded, lambda m: m.update({"model.layers.9.x": SHARD}))
    refuse(sharded, "index-matches-shards", tensor="model.layers.9.x", file=str(sharded / SHARD))


def test_the_same_tensor_in_two_shards(sharded: Path) -> None:
    shutil.copy(sharded / SHARD, sharded / "twin.safetensors")
    edit_index(sharded, lambda m: m.update({"model.layers.9.x": "twin.safetensors"}))
    refuse(sharded, "index-matches-shards")


def test_one_file_is_preferred_to_shards(folder: Path, sharded: Path) -> None:
    shutil.copy(folder / WEIGHTS, sharded)
    (sharded / SHARD).unlink()
    assert [s.path.name for s in open_checkpoint(sharded).weight_files] == [WEIGHTS]


def test_damaged_files(sharded: Path) -> None:
    """Whatever bytes change in config, index and headers, only CheckpointError comes out."""
    rng = random.Random(4)
    pieces = [
        b"0",
        b"-1",
        b"1e9",
        b"99999999999999999999",
        b"null",
        b'""',
        b"[]",
        b"{}",
        b'"',
        b"\xff",
    ]
    files = [sharded / name for name in ("config.json", INDEX, SHARD)]
    accepted = rejected = 0
    for _ in range(1500):
        path = rng.choice(files)
        original = path.read_bytes()
        content = bytearray(original)
        end = len(content)
        if path.name == SHARD:
            end = 8 + int.from_bytes(original[:8], "little")
        for _ in range(rng.randrange(1, 3)):
            at = rng.randrange(end)
            content[at : at + rng.randrange(3)] = rng.choice(pieces)
        overwrite(path, content)
        try:
            for _ in open_checkpoint(sharded).parameters():
                pass
            accepted += 1
        except CheckpointError as error:
            assert error.file is not None
            rejected += 1
        overwrite(path, original)
    assert accepted > 5 and rejected > 1000


def overwrite(path: Path, content: bytes | bytearray) -> None:
    with open(path, "r+b") as file:  # emptying it first would flush it to the disk each time
        file.write(content)
        file.truncate()


# ---- files that change behind our back ---------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0")


def replace(path: Path) -> None:
    """By the same bytes, at the same time of change, in another file."""
    status = path.stat()
    shutil.copy(path, path.with_name("new"))
    os.replace(path.with_name("new"), path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [truncate, append, replace, touch])
def test_a_change_after_opening(folder: Path, change: Callable[[Path], None]) -> None:
    checkpoint = open_checkpoint(folder)
    change(folder / WEIGHTS)
    for call in (checkpoint.check_unchanged, lambda: list(checkpoint.parameters())):
        with pytest.raises(CheckpointError, match="changed since it was opened") as caught:
            call()
        assert caught.value.file == str(folder / WEIGHTS)
        assert caught.value.rule == "unchanged"


def test_a_file_removed_after_opening(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    (folder / WEIGHTS).unlink()
    for call in (checkpoint.check_unchanged, lambda: list(checkpoint.parameters())):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: the file cannot be read"):
            call()


def test_truncation_while_reading(folder: Path) -> None:
    chunks = open_checkpoint(folder).parameters()
    next(chunks)
    os.truncate(folder / WEIGHTS, 20_000)
    with pytest.raises(CheckpointError, match="it is truncated") as caught:
        list(chunks)
    assert (caught.value.file, caught.value.rule) == (str(folder / WEIGHTS), "truncated")


def test_a_write_while_reading(folder: Path) -> None:
    chunks = open_checkpoint(folder).parameters()
    next(chunks)
    touch(folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        list(chunks)


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD])
def test_every_file_is_watched(sharded: Path, name: str) -> None:
    checkpoint = open_checkpoint(sharded)
    checkpoint.check_unchanged()
    touch(sharded / name)
    with pytest.raises(CheckpointError, match="changed since it was opened") as caught:
        checkpoint.check_unchanged()
    assert caught.value.file == str(sharded / name)


def test_a_stamp(folder: Path) -> None:
    path = folder / WEIGHTS
    status = path.stat()
    (stamp,) = open_checkpoint(folder).weight_files
    identity = (status.st_dev, status.st_ino)
    assert stamp == FileStamp(path, status.st_size, status.st_mtime_ns, identity)


def test_nothing_stays_open(folder: Path) -> None:
    def open_files() -> list[str]:
        links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return [os.readlink(link) for link in links if os.path.exists(link)]

    checkpoint = open_checkpoint(folder)
    list(checkpoint.parameters())
    unfinished: Iterator[Chunk] = checkpoint.parameters()
    next(unfinished)
    assert str(folder / WEIGHTS) in open_files()
    del unfinished
    assert str(folder / WEIGHTS) not in open_files()


# ---- the fingerprint ---------------------------------------------------------------------------


def fingerprint(folder: Path) -> str:
    return open_checkpoint(folder).fingerprint


def test_what_leaves_the_fingerprint_alone(tiny: Tiny, folder: Path, sharded: Path) -> None:
    expected = fingerprint(folder)
    assert len(expected) == 64 and int(expected, 16)
    assert fingerprint(tiny("llama", **SMALL)) == fingerprint(sharded) == expected
    backwards = dict(reversed(read_tensors(folder).items()))
    write_safetensors(folder / WEIGHTS, backwards, "F32")
    edit_json(folder / "config.json", eos_token_id=7, torch_dtype="float16")
    assert fingerprint(folder) == expected


def test_what_changes_the_fingerprint(folder: Path) -> None:
    found = {fingerprint(folder)}
    edit_tensors(folder, lambda tensors: tensors[O_PROJ].__setitem__((63, 63), 5.0))
    found.add(fingerprint(folder))
    swapped = read_tensors(folder)
    up, gate = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
    swapped[up], swapped[gate] = swapped[gate], swapped[up]
    write_safetensors(folder / WEIGHTS, swapped, "F32")
    found.add(fingerprint(folder))
    for dtype in ("F16", "BF16"):
        edit_tensors(folder, lambda tensors: None, dtype)
        found.add(fingerprint(folder))
    for change in ({"rms_norm_eps": 1e-3}, {"rope_parameters": {"rope_theta": 500.0}}):
        edit_json(folder / "config.json", **change)
        found.add(fingerprint(folder))
    assert len(found) == 7


def test_samples_of_a_large_tensor(tmp_path: Path) -> None:
    """Its ends and two places between; what lies elsewhere is not seen, as documented."""
    folder = tiny_checkpoint(tmp_path / "x", vocab_size=1200, tied=True)
    name = "model.embed_tokens.weight"
    rows, columns = read_tensors(folder)[name].shape
    original = (folder / WEIGHTS).read_bytes()
    expected = fingerprint(folder)
    third = (rows * columns * 4 - 4096) // 3 // (columns * 4) + 1
    for row, seen in ((0, True), (third, True), (2 * third, True), (rows - 1, True), (99, False)):
        edit_tensors(folder, lambda tensors, row=row: tensors[name].__setitem__((row, 5), 7.0))
        assert (fingerprint(folder) != expected) == seen, row
        (folder / WEIGHTS).write_bytes(original)
