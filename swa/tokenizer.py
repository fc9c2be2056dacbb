"""Text and chats to token ids and back: tokenizer.json, and chat templates in a sandbox."""

from __future__ import annotations

import json
import operator
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard

import tokenizers

from swa import jsonio
from swa.errors import InputError, TokenizerError

if TYPE_CHECKING:
    from jinja2 import Environment, Template

Messages = Sequence[Mapping[str, Any]]
"""A chat: `{"role": "user", "content": "..."}` and so on, as chat templates expect it."""

TEMPLATE_DATE = datetime(2024, 7, 26)
"""What a chat template is told that today is: scores must not change over night."""

# Files of a tokenizer; those that swa does not read are for other libraries, and travel along.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_ADDED_TOKEN_KEYS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which UTF-8 cannot write
_SLOW_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json")


class Tokenizer:
    """A tokenizer of the `tokenizers` library, with its special tokens and its chat template."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        chat_template: str | None = None,
        add_bos_token: bool = False,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """Take over `backend`; its truncation and padding are switched off.

        Args:
            backend: what encodes and decodes; its post-processor says what precedes a text.
            bos_token: starts a text. In the vocabulary, as all special tokens.
            eos_token: ends a text.
            chat_template: jinja2 source, for lists of messages.
            add_bos_token: put `bos_token` before a text even if the post-processor does not.
            special_tokens: more of them for the chat template, such as {"pad_token": "<pad>"}.

        Raises:
            TokenizerError: bos_token or eos_token is not in the vocabulary.
        """
        with library_errors("the tokenizer cannot be used"):
            backend.no_truncation()
            backend.no_padding()
        self.backend = backend
        self.chat_template = chat_template
        self.bos_token, self.eos_token = bos_token, eos_token
        named = {"bos_token": bos_token, "eos_token": eos_token}
        self._special_tokens = {
            **(special_tokens or {}),
            **{name: token for name, token in named.items() if token is not None},
        }
        self._files: dict[str, Path] = {}  # what `save` copies; without any, it writes
        self._recognise_special_tokens()
        self.bos_token_id = self._special_id("bos_token")
        eos = self._special_id("eos_token")
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (eos,)
        if add_bos_token and self.bos_token_id is not None:
            self._start_texts_with_bos(self.bos_token_id)

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read `tokenizer.json` and the settings beside it, as transformers reads them.

        Special tokens come from `tokenizer_config.json`, else `special_tokens_map.json`; the chat
        template from `chat_template.jinja`, else `chat_template.json`, else
        `tokenizer_config.json` (of several named ones the default). BOS precedes a text if the
        post-processor of `tokenizer.json` or `add_bos_token` says so.

        Args:
            path: the folder, or `tokenizer.json` itself.

        Raises:
            TokenizerError: a file is missing, or malformed, or contradicts another.
        """
        path = Path(path)
        folder = path.parent if path.is_file() else path
        file = path if path.is_file() else folder / "tokenizer.json"
        if not file.is_file():
            raise TokenizerError(_missing(folder))
        with library_errors(f"{file}: not a tokenizer"):
            backend = tokenizers.Tokenizer.from_file(str(file))
        map_file, config_file = folder / "special_tokens_map.json", folder / "tokenizer_config.json"
        config = _read_object(config_file)
        special = _special_tokens(_read_object(map_file), map_file)
        special |= _special_tokens(config, config_file)
        _add_missing_tokens(backend, config, config_file)
        chat_template = _chat_template(folder, config)
        try:
            tokenizer = cls(
                backend,
                bos_token=special.pop("bos_token", None),
                eos_token=special.pop("eos_token", None),
                chat_template=chat_template,
                add_bos_token=config.get("add_bos_token") is True,
                special_tokens={name: token for name, token in special.items() if token},
            )
        except TokenizerError as error:
            raise TokenizerError(f"{config_file}: {error}") from None
        beside = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
        tokenizer._files = beside | {"tokenizer.json": file}
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Tokens known, added ones included; the model may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be encoded."""
        return self.chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`. Special tokens written in the text count as such.

        Args:
            text: any string.
            add_special_tokens: put before it what belongs before a text, BOS mostly, unless the
                text itself starts with BOS. What belongs after a text is never added.

        Raises:
            InputError: the text is no valid Unicode.
            TokenizerError: it has no token for something in the text, not even an unknown one.
        """
        if not isinstance(text, str) or _SURROGATE.search(text):
            raise InputError("what is encoded must be a string of valid Unicode")
        with library_errors("the tokenizer fails on this text"):
            encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        if not add_special_tokens:
            return encoding.ids
        added = encoding.special_tokens_mask
        n_before = len(list(takewhile(bool, added)))
        n_after = len(list(takewhile(bool, reversed(added[n_before:]))))
        ids = encoding.ids[: len(added) - n_after]
        if all(added):  # no text, so nothing tells what comes before it from what comes after
            ids = [i for i in ids if i == self.bos_token_id]
        while len(ids) > 1 and ids[0] == ids[1] == self.bos_token_id:
            del ids[0]
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`; an unfinished character at an end becomes U+FFFD.

        Unknown ids have no text.

        Raises:
            InputError: an id is negative, beyond 32 bits or no integer.
            TokenizerError: the tokenizer fails on these ids.
        """
        plain = _integers(ids, "what is decoded must be token ids")
        if any(not 0 <= i < 2**32 for i in plain):
            raise InputError("token ids go from 0 to 2**32 - 1")
        with library_errors("the tokenizer fails on these ids"):
            return self.backend.decode(plain, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The text of a chat, as transformers renders it, but on a fixed day (TEMPLATE_DATE).

        The template runs in jinja2's sandbox and sees plain data only. The sandbox keeps it from
        files, the process and the caller's objects, not from taking long or much memory: ranges
        end at 100,000, nested loops and repeated strings do not.

        Args:
            messages: a role each, content, and whatever else the template knows.
            add_generation_prompt: end with what opens the assistant's turn.

        Raises:
            TokenizerError: no chat template, or it fails on these messages.
            InputError: not a list of messages.
        """
        plain = _plain_messages(messages)
        try:
            return self._template.render(
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (TokenizerError, MemoryError):
            raise
        except Exception as error:  # a template can raise anything
            raise TokenizerError(f"the chat template fails on these messages: {error}") from error

    def encode_prompt(self, prompt: str | Messages | Iterable[int]) -> list[int]:
        """Token ids of a prompt.

        Args:
            prompt: text (special tokens are put before it, BOS once), chat messages (the template
                is all there is) or token ids (returned as they are).

        Raises:
            InputError: none of these.
            TokenizerError: see `apply_chat_template`.
        """
        if isinstance(prompt, str):
            return self.encode(prompt, add_special_tokens=True)
        if is_chat(prompt):
            return self.encode(self.apply_chat_template(prompt))
        return _integers(prompt, "the prompt must be text, messages or token ids")

    def encode_answer(self, answer: str | Iterable[int]) -> list[int]:
        """Token ids of an answer, text (nothing is added) or ids. Raises InputError."""
        if isinstance(answer, str):
            return self.encode(answer)
        return _integers(answer, "the answer must be text or token ids")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files that `from_folder` reads into an existing folder. Raises OSError."""
        folder = Path(folder)
        if self._files:
            for name, file in self._files.items():
                shutil.copyfile(file, folder / name)
            return
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._special_tokens}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        (folder / "tokenizer_config.json").write_text(
            jsonio.dumps_document(config), encoding="utf-8"
        )

    def __repr__(self) -> str:
        chat = "with" if self.has_chat_template else "without"
        return f"Tokenizer({self.vocab_size:,} tokens, {chat} chat template)"

    @cached_property
    def _template(self) -> Template:
        if self.chat_template is None:
            raise TokenizerError(
                "the tokenizer has no chat template: give the prompt as one string, or add a"
                " chat_template.jinja to its folder"
            )
        import jinja2

        try:
            return _sandbox().from_string(self.chat_template)
        except jinja2.TemplateError as error:
            raise TokenizerError(f"the chat template cannot be compiled: {error}") from error

    def _special_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        if token is None:
            return None
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise TokenizerError(
                f"{name} is {token!r}, which is not in the vocabulary: correct {name}"
            )
        return token_id

    def _recognise_special_tokens(self) -> None:
        """Have those that the vocabulary holds found in a text, as transformers does."""
        with library_errors("its special tokens cannot be added"):
            found = {token.content for token in self.backend.get_added_tokens_decoder().values()}
            self.backend.add_special_tokens(
                [
                    token
                    for token in self._special_tokens.values()
                    if token not in found and self.backend.token_to_id(token) is not None
                ]
            )

    def _start_texts_with_bos(self, bos: int) -> None:
        with library_errors(f"bos_token {self.bos_token!r} cannot be put before texts"):
            if bos in self.backend.encode("").ids:
                return
            self.backend.post_processor = tokenizers.processors.TemplateProcessing(
                single=[self.bos_token, "$A"], special_tokens=[(self.bos_token, bos)]
            )
            if self.backend.encode("").ids != [bos]:
                raise ValueError("it means something else in a template")


def is_chat(prompt: object) -> TypeGuard[Messages]:
    """Whether `prompt` is meant as a list of messages."""
    return isinstance(prompt, Sequence) and any(isinstance(part, Mapping) for part in prompt)


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn errors of the tokenizers library, and panics of its Rust code, into TokenizerError."""
    try:
        yield
    except BaseException as error:  # what it raises has no class of its own
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(f"{what}: {error}") from error
        raise


def _missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder"
    slow = [name for name in _SLOW_FILES if (folder / name).is_file()]
    if not slow:
        return f"{folder}: no tokenizer.json: copy the model's there, or give another folder"
    return (
        f"{folder}: no tokenizer.json, only {', '.join(slow)}: convert it once, with transformers"
        " and sentencepiece installed: transformers.AutoTokenizer.from_pretrained(FOLDER)"
        ".save_pretrained(FOLDER)"
    )


def _read_text(path: Path) -> str | None:
    """The file's text; None if there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from error


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file; empty if there is no file."""
    text = _read_text(path)
    if text is None:
        return {}
    try:
        value = jsonio.loads(text)
    except ValueError as error:
        raise TokenizerError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: must hold a JSON object")
    return value


def _special_tokens(settings: Mapping[str, Any], file: Path) -> dict[str, str | None]:
    """Every `*_token` that is text, or an object with the text as its `content`, or null."""
    tokens: dict[str, str | None] = {}
    for name, value in settings.items():
        if not name.endswith("_token") or isinstance(value, bool):  # add_bos_token is a switch
            continue
        content = value.get("content") if isinstance(value, dict) else value
        if content is not None and not isinstance(content, str):
            raise TokenizerError(f"{file}: {name} must be a string, not {content!r}")
        tokens[name] = content
    return tokens


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], file: Path
) -> None:
    """Add the tokens that only `added_tokens_decoder` knows, at the ids it gives."""
    try:
        declared = {
            int(token_id): tokenizers.AddedToken(
                **{key: value for key, value in token.items() if key in _ADDED_TOKEN_KEYS}
            )
            for token_id, token in (config.get("added_tokens_decoder") or {}).items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise TokenizerError(f"{file}: added_tokens_decoder is malformed: {error}") from error
    for token_id, token in sorted(declared.items(), key=operator.itemgetter(0)):
        if backend.token_to_id(token.content) is None:
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise TokenizerError(
                f"{file}: token {token.content!r} should have id {token_id}, but has"
                f" {backend.token_to_id(token.content)} in tokenizer.json: files of one tokenizer"
                " are needed"
            )


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The default template, from the first place that has one."""
    text = _read_text(folder / "chat_template.jinja")
    if text is not None:
        return text
    for file, settings in (
        (folder / "chat_template.json", _read_object(folder / "chat_template.json")),
        (folder / "tokenizer_config.json", config),
    ):
        found = settings.get("chat_template")
        if isinstance(found, list):  # several, named
            named = [t for t in found if isinstance(t, dict) and t.get("name") == "default"]
            found = named[0].get("template") if named else None
        if isinstance(found, str):
            return found
        if found is not None:
            raise TokenizerError(f"{file}: chat_template must be a string")
    return None


def _plain_messages(messages: Messages) -> list[dict[str, Any]]:
    """A copy out of plain JSON types, so that a template meets no other object."""
    try:
        plain: list[dict[str, Any]] = json.loads(json.dumps(list(messages), default=_as_dict))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"messages must be plain data: {error}") from error
    if not plain:
        raise InputError("there are no messages")
    for i, message in enumerate(plain):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f'message {i} must be like {{"role": "user", "content": "..."}}')
    return plain


def _as_dict(value: object) -> dict[Any, Any]:
    """Of mappings that are no dict."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} is none")


def _integers(ids: Iterable[Any], rule: str) -> list[int]:
    if isinstance(ids, (bytes, bytearray)):  # text that somebody forgot to decode
        raise InputError(f"{rule}, not bytes")
    try:
        return [operator.index(i) for i in ids]
    except TypeError as error:
        raise InputError(f"{rule}: {error}") from None


def _sandbox() -> Environment:
    """A jinja2 environment that offers templates what transformers does."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's text for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: object) -> NoReturn:
        raise jinja2.TemplateError(str(message))

    def to_json(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = to_json  # jinja2's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: TEMPLATE_DATE.strftime(form)
    return environment
