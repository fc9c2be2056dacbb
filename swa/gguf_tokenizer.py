"""The tokenizer inside a GGUF file, rebuilt where its reference is known token by token."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import normalizers, pre_tokenizers

from swa.errors import TokenizerError
from swa.fields import Fields
from swa.tokenizer import Tokenizer, library_errors

_NO_VOCABULARY = ("none", "no_vocab")
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # types of a token; others are found by merging
# A word: contractions and letters, then numbers, then punctuation and white space.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class _Recipe:
    """What one value of `tokenizer.ggml.pre` stands for."""

    pre_tokenizers: tuple[pre_tokenizers.PreTokenizer, ...]
    """How a text is cut into words, and these into bytes."""
    normalizer: normalizers.Normalizer | None = None
    ignore_merges: bool = False
    """A word that is a token itself needs no merges."""
    add_bos: bool = False
    """Where the file does not say."""


def _words(numbers: str) -> tuple[pre_tokenizers.PreTokenizer, ...]:
    pattern = tokenizers.Regex(f"{_LETTERS}|{numbers}|{_SIGNS}")
    return (
        pre_tokenizers.Split(pattern, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )


_RECIPES: Mapping[str, _Recipe] = {
    "smollm": _Recipe(
        (
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        )
    ),
    "qwen2": _Recipe(_words(r"\p{N}"), normalizers.NFC()),
    "llama-bpe": _Recipe(_words(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True),
}


def rebuild_tokenizer(metadata: Mapping[str, Any], *, file: object) -> Tokenizer | None:
    """The tokenizer that the keys of a GGUF file describe; None if they describe none.

    Args:
        metadata: all keys of the file.
        file: is named in errors.

    Raises:
        TokenizerError: it is not one of those that swa rebuilds, or contradicts itself.
        CheckpointError: a key has the wrong type.
    """
    prefix = "tokenizer.ggml."
    fields = Fields(
        {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)},
        file=file,
        prefix=prefix,
    )
    model, pre = fields.text("model", "none"), fields.text("pre", "default")
    if model in _NO_VOCABULARY:
        return None
    recipe = _RECIPES.get(pre) if model == "gpt2" else None
    if recipe is None:
        raise TokenizerError(
            f"{file}: its tokenizer, {model!r} with pre {pre!r}, is none that swa rebuilds (gpt2"
            f" with {', '.join(_RECIPES)}): give the original's folder, as in"
            " swa.load(..., tokenizer=FOLDER)"
        )
    tokens = _texts(fields, "tokens")
    types = fields.raw("token_type")
    if types is None:
        types = array("i", bytes(4 * len(tokens)))
    if not isinstance(types, array) or len(types) != len(tokens):
        raise TokenizerError(f"{file}: token_type must have one number for each token")
    merges, named = _texts(fields, "merges"), _named_tokens(fields, tokens)
    with library_errors(f"{file}: the tokenizer cannot be rebuilt"):
        backend = _backend(recipe, tokens, types, merges)
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"{file}: tokenizer.chat_template must be text")
    try:
        return Tokenizer(
            backend,
            bos_token=named.pop("bos_token", None),
            eos_token=named.pop("eos_token", None),
            chat_template=template,
            add_bos_token=fields.boolean("add_bos_token", recipe.add_bos),
            special_tokens=named,
        )
    except TokenizerError as error:
        raise TokenizerError(f"{file}: {error}") from None


def _backend(
    recipe: _Recipe, tokens: list[str], types: array[int], merges: list[str]
) -> tokenizers.Tokenizer:
    """Byte-level BPE; tokens of the types CONTROL and USER_DEFINED are found in the text first."""
    ids = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
    if "" in ids or len(ids) != len(tokens) - types.count(_UNUSED):
        raise ValueError("a token is empty or listed twice")
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    for left, right in pairs:  # the library panics on some that do not fit
        if not {left, right, left + right} <= ids.keys():
            raise ValueError(f"the merge of {left!r} and {right!r} needs a token that is not there")
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=ids, merges=pairs, ignore_merges=recipe.ignore_merges)
    )
    if recipe.normalizer is not None:
        backend.normalizer = recipe.normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(recipe.pre_tokenizers))
    backend.decoder = tokenizers.decoders.ByteLevel()
    added = [
        tokenizers.AddedToken(token, normalized=False, special=types[i] == _CONTROL)
        for token, i in ids.items()
        if types[i] in (_CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(added)
    return backend


def _texts(fields: Fields, key: str) -> list[str]:
    value = fields.raw(key)
    if not isinstance(value, list):
        fields.malformed(key, "must be a list of texts")
    return value


def _named_tokens(fields: Fields, tokens: list[str]) -> dict[str, str]:
    """The special tokens that a chat template may ask for."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {
        f"{name}_token": tokens[fields.integer(key, low=0, high=len(tokens) - 1)]
        for name, word in names.items()
        if (key := f"{word}_token_id") in fields
    }
