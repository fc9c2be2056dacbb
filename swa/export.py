"""A model as a folder: the original weights and config, and the policy once, in `swa.json`."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swa import __version__, jsonio
from swa.errors import CheckpointError, InputError, PolicyError
from swa.files import flush_directory, flush_file, temporary_sibling
from swa.policy import AttentionPolicy

if TYPE_CHECKING:
    from swa.model import Model

SCHEMA = "swa.export/1"
RECORD = "swa.json"
# What belongs to a folder of safetensors beside its weights and its tokenizer.
CONFIGS = ("config.json", "generation_config.json", "model.safetensors.index.json")

README = """\
# {name}, with a sliding-window policy

The weights and the configuration are those of {name}, unchanged. What is new is `swa.json`:

    {policy}

**Only `swa` applies it.** transformers, vLLM, llama.cpp and other stock libraries do not read
`swa.json`: from this folder they run full attention, without a warning.

    import swa
    model = swa.load("path/to/this/folder")     # the patched model
    print(model.generate("..."))
"""


@dataclass(frozen=True)
class Export:
    """What `swa.json` says."""

    folder: Path
    policy: AttentionPolicy | None
    fingerprint: str
    gguf: str | None
    """Name of the GGUF file that holds the weights; None: they are safetensors."""

    @property
    def weights(self) -> Path:
        """What to open as a checkpoint."""
        return self.folder / self.gguf if self.gguf else self.folder

    def check(self, fingerprint: str) -> None:
        """Raises CheckpointError if the policy was not saved with these weights."""
        if fingerprint != self.fingerprint:
            raise CheckpointError(
                "the weights are not those that the policy was saved with: remove this file to load"
                " them with full attention, or patch the original model again",
                file=str(self.folder / RECORD),
            )


def read_export(folder: Path) -> Export | None:
    """The record of a folder that `write_export` wrote; None if the folder has none.

    Raises:
        CheckpointError: `swa.json` is malformed.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        data = jsonio.loads(path.read_bytes())
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError(f"schema must be {SCHEMA!r}")
        policy, fingerprint, gguf = (data.get(k) for k in ("policy", "fingerprint", "gguf"))
        if not isinstance(fingerprint, str):
            raise ValueError("fingerprint must be a string")
        if gguf is not None and not _is_gguf_name(gguf):
            raise ValueError(f"gguf must be the plain name of a .gguf file, not {gguf!r}")
        return Export(
            folder, None if policy is None else AttentionPolicy.from_dict(policy), fingerprint, gguf
        )
    except (ValueError, PolicyError) as error:
        raise CheckpointError(str(error), file=str(path)) from error


def _is_gguf_name(value: object) -> bool:
    """A plain file name, so that the weights lie in the folder itself."""
    return (
        isinstance(value, str)
        and value.endswith(".gguf")
        and not any(separator in value for separator in "/\\\0")
    )


def write_export(model: Model, directory: Path) -> None:
    """Copy the model's files and write its policy; see `Model.save_pretrained`."""
    target = directory.resolve()
    _refuse_occupied(target, model)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(target)
    temporary.mkdir()
    try:
        model.checkpoint.check_unchanged()
        for source in _sources(model):
            shutil.copyfile(source, temporary / source.name)  # the umask's mode, not the source's
        model.checkpoint.check_unchanged()  # nor did they change while being copied
        if model.has_tokenizer:
            model.tokenizer.save(temporary)
        (temporary / "README.md").write_text(_readme(model), encoding="utf-8")
        (temporary / RECORD).write_text(jsonio.dumps_document(_record(model)), encoding="utf-8")
        for path in temporary.iterdir():
            flush_file(path)
        flush_directory(temporary)
        os.rename(temporary, target)  # an empty folder may stand there, nothing else
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush_directory(target.parent)


def _refuse_occupied(target: Path, model: Model) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    sources = {stamp.path.parent.resolve() for stamp in model.checkpoint.weight_files}
    reason = (
        "is the folder that the model was loaded from"
        if target in sources
        else "exists, and nothing is ever overwritten"
    )
    raise InputError(f"cannot save to {target}: it {reason}; give a new folder")


def _sources(model: Model) -> list[Path]:
    """The checkpoint's files, by the names they are to have."""
    weights = [stamp.path for stamp in model.checkpoint.weight_files]
    folder = model.checkpoint.folder
    beside = [folder / name for name in CONFIGS] if folder else []
    return weights + [path for path in beside if path not in weights and path.exists()]


def _record(model: Model) -> dict[str, Any]:
    gguf = [s.path.name for s in model.checkpoint.weight_files if s.path.suffix == ".gguf"]
    return {
        "schema": SCHEMA,
        "swa_version": __version__,
        "model": model.name,
        "fingerprint": model.fingerprint,
        "gguf": gguf[0] if gguf else None,
        "policy": model.policy.to_dict() if model.policy else None,
    }


def _readme(model: Model) -> str:
    return README.format(name=model.name, policy=model.policy or "full attention")
