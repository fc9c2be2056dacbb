"""Where weights come from: a folder of safetensors, a GGUF file, or a model on the hub."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from swa.config import ModelConfig
from swa.errors import CheckpointError
from swa.weight_files import FileStamp

if TYPE_CHECKING:
    from swa.tokenizer import Tokenizer

__all__ = ["Checkpoint", "Chunk", "FileStamp", "open_checkpoint"]


@dataclass(frozen=True)
class Chunk:
    """Whole rows of one tensor, as `Engine.load_rows` takes them."""

    tensor: str
    """The engine's name."""
    layer: int
    """-1: a tensor of the model, not of a layer."""
    row_start: int
    dtype: Literal["F32", "F16", "BF16"]
    data: bytes | bytearray | memoryview
    """Row-major, little-endian; a memoryview of bytes."""


class Checkpoint(ABC):
    """A checkpoint that was found sound and supported; its weights are read chunk by chunk."""

    source: str
    """The path or hub id that it was opened by."""
    folder: Path | None
    """Where config and tokenizer lie; None for a GGUF file, which holds them itself."""
    config: ModelConfig
    weight_files: tuple[FileStamp, ...]
    dtypes: frozenset[str]
    """Of the stored numbers: "F32", "F16", "BF16", or a quantisation's name."""
    fingerprint: str
    """SHA-256 in hex of what the config computes and of every tensor's name, dtype, shape and
    bytes. Of a tensor above 64 KiB samples alone are read, so that opening stays cheap: it tells
    models apart, but it does not prove that no byte was changed."""
    n_bytes: int
    """What `parameters` yields in all."""

    @abstractmethod
    def parameters(self) -> Iterator[Chunk]:
        """Every tensor that the engine needs, each in ascending rows, in chunks of about 16 MiB.

        Raises:
            CheckpointError: a file is truncated, unreadable, or has changed since it was opened.
        """

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a file is not what it was when it was opened."""
        for stamp in self.weight_files:
            stamp.check()

    def build_tokenizer(self) -> Tokenizer | None:
        """The tokenizer inside the file of weights; None if `folder` is the place to look."""
        return None


def open_checkpoint(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Open a folder, a `.gguf` file, or a model on the Hugging Face hub ("owner/name").

    The weights are checked against the config, but not read yet. A path that exists wins over a
    hub id. `revision`, `token` and `local_files_only` are for the hub, as in huggingface_hub.

    Raises:
        CheckpointError: it is not there, cannot be downloaded, or is malformed.
        UnsupportedModelError: it asks for a computation that swa does not do.
    """
    source = os.fspath(path_or_id)
    path = Path(os.path.abspath(source))
    if os.path.isdir(path):
        from swa.safetensors_checkpoint import SafetensorsCheckpoint

        return SafetensorsCheckpoint(path, source=source)
    if path.suffix == ".gguf":
        from swa.gguf_checkpoint import open_gguf

        return open_gguf(path)
    if os.path.exists(path):
        raise CheckpointError("give the folder that holds this file, or a .gguf file", file=source)
    if not isinstance(path_or_id, str) or not _is_hub_id(source):
        raise CheckpointError(
            "no such file or folder, and not a hub id, which would be owner/name", file=source
        )
    from swa.hub import download
    from swa.safetensors_checkpoint import SafetensorsCheckpoint

    folder = download(source, revision=revision, token=token, local_files_only=local_files_only)
    return SafetensorsCheckpoint(folder, source=source)


def _is_hub_id(text: str) -> bool:
    return re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", text, re.ASCII) is not None
