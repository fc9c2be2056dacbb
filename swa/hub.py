"""Models on the Hugging Face hub, through its own client and its cache."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from swa.errors import CheckpointError
from swa.safetensors_checkpoint import CONFIG, INDEX, WEIGHTS, has_index, read_config, read_index
from swa.tokenizer import TOKENIZER_FILES

# Beside the weights; what a repository does not have is not missed.
_SMALL_FILES = (CONFIG, INDEX, "generation_config.json", "swa.json", *TOKENIZER_FILES)


def download(
    repo_id: str, *, revision: str | None, token: str | bool | None, local_files_only: bool
) -> Path:
    """The folder of a model in the hub's cache, with only those files that swa uses.

    Raises:
        CheckpointError: there is no such model, it cannot be reached, or it is not supported, which
            is found out before its weights are downloaded.
    """

    def fetch(names: Iterable[str]) -> Path:
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=list(names),
            )
        except Exception as error:  # the client's errors have no base class of their own
            raise CheckpointError(
                f"no such file or folder here, and the Hugging Face hub did not give it:"
                f" {_advice(error, local_files_only)} ({_first_line(error)})",
                file=repo_id,
                rule="hub",
            ) from error
        return Path(folder)

    folder = fetch(_SMALL_FILES)
    read_config(folder)
    weights = {*read_index(folder / INDEX)[0].values()} if has_index(folder) else {WEIGHTS}
    return fetch([*_SMALL_FILES, *sorted(weights)])


def _advice(error: Exception, local_files_only: bool) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "accept the model's conditions on its page, then give token="
    if isinstance(error, errors.RepositoryNotFoundError):
        return "check the spelling of the path or id; a private model needs token="
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision, check revision="
    if isinstance(error, errors.HFValidationError):
        return "this is not a valid hub id, check the spelling of the path"
    if local_files_only:
        return "it is not in the cache, load it once without local_files_only"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "it is not in the cache, and HF_HUB_OFFLINE is set"
    return "check the spelling of the path or id and the network, or give a local folder"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
