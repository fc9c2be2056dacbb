"""Tokenizers rebuilt from GGUF files, token by token against references.

Each vocabulary is trained with no regard for words, so that its merges cross every boundary: a text
that is cut in the wrong place gets other tokens.
"""

from __future__ import annotations

import random
import re
import unicodedata
from array import array
from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import tokenizers
import transformers
from builders import tiny_checkpoint
from gguf_files import from_folder, tokenizer_keys
from hypothesis import given, settings
from hypothesis import strategies as st

import swa
from swa.checkpoint import open_checkpoint
from swa.demo import wheel_model
from swa.errors import CheckpointError, SwaError, TokenizerError
from swa.gguf_file import read_header
from swa.gguf_tokenizer import rebuild_tokenizer
from swa.tokenizer import Tokenizer
from swa.weight_files import open_regular

SPECIAL = {"bos": "<|im_start|>", "eos": "<|endoftext|>", "eot": "<|im_end|>"}
UNMERGED = "zebraword"
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED = ("<think>", "   ")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
VOCAB_SIZE = 2000

CORPUS = [
    "The year 1984, the 3rd of May: 12345678 people paid $1,234.56 (or 1 000 000 €).",
    "I'm sure they'll say it's what we've done; you're right, I'd SAY: IT'S YOU'LL'VE 'S 't",
    "He'SAVED what I'MEANT, they'READ of you'LLAMAS and he'Dared: it'Ts",
    "def f(x):\n    return x ** 2  # squared\n\n\n\tif x:\r\n\t\tprint('no   way')\n",
    "  two  spaces   three    four \t tabs\t\tand \n newlines \n\n  \n indented",
    "東京は日本の首都です。2024年12月31日、人口は１３００万人。中文字符测试，标点！",
    "Привет, мир! Как дела? Ελληνικά, עברית, العربية ١٢٣, हिन्दी १२३, ไทย",
    "Emoji 😀😃 👩‍👩‍👧‍👦 🇫🇷 ❤️ and ½ ² Ⅷ; naïve café, cafe\u0301, Å A\u030a, ﬁ",
    "...!!! --- *** ((())) [[x]] {y} <|im|> <|im_start|>x http://a.b/c?d=e&f=1#2",
    "\u00a0\u2003\u3000 odd\u2028spaces\u0085 here \u200b zero",
]
NASTY = [
    "",
    " ",
    "\n",
    "a",
    *CORPUS,
    "x" + " " * 9 + "7",
    "a  1  2   3\n4 \n 5",
    "1 22 333 4444 55555",
    "don't DON'T Don'T 'tis ''s 'ſ '  're",
    "cafe\u0301 \u1e9b\u0323 \uac00 \u1100\u1161",
    "\x00\x01\x7f\ufffe\U0010ffff",
    "<|im_start|>user\nhi <|im_end|>  <|endoftext|><|endoftext|> <|im_end",
    "a<think>b</think>   c",
    "é<|im_end|>é e\u0301<|im_end|>\u0301",
    "a<|im_end|>\u0338 b",  # a letter of the token would compose with what follows
    "\r\n\r\n \r \n\n\r\n!\r\n",
]
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=("Cs", "Cn"))),
    st.text(st.sampled_from("aB1 2\t\n\r'sS!.é中३½\u0301\u00a0😀<|>")),
    st.lists(st.sampled_from([*CORPUS, *CONTROL, *USER_DEFINED, "'s", "12", "  ", "\n"])).map(
        "".join
    ),
)

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# How llama.cpp cuts: with each pattern in turn, whatever lies between matches is a piece too.
PATTERNS = {
    "smollm": (r"\p{N}", _GPT2),
    "qwen2": (rf"{_LETTERS}|\p{{N}}|{_SIGNS}",),
    "llama-bpe": (rf"{_LETTERS}|\p{{N}}{{1,3}}|{_SIGNS}",),
}
PRES = list(PATTERNS)


class Reference:
    """Byte-level BPE in plain Python, by its definition."""

    def __init__(self, keys: Mapping[str, Any]) -> None:
        keys = {key.removeprefix("tokenizer.ggml."): value for key, value in keys.items()}
        self.pre = keys["pre"]
        self.ids = {token: i for i, token in enumerate(keys["tokens"])}
        self.ranks = {tuple(pair.split(" ")): i for i, pair in enumerate(keys["merges"])}
        added = [t for t, kind in zip(self.ids, keys["token_type"], strict=True) if kind in (3, 4)]
        longest_first = sorted(added, key=len, reverse=True)
        self.added = set(added)
        self.split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self.split.split(text):
            if part in self.added:
                ids.append(self.ids[part])
                continue
            if self.pre == "qwen2":
                part = unicodedata.normalize("NFC", part)
            for word in self._words(part):
                ids += self._merge([BYTES[byte] for byte in word.encode()])
        return ids

    def _words(self, text: str) -> list[str]:
        words = [text]
        for pattern in PATTERNS[self.pre]:
            words = [p for word in words for p in regex.split(f"({pattern})", word) if p]
        return words

    def _merge(self, symbols: list[str]) -> list[int]:
        if self.pre == "llama-bpe" and "".join(symbols) in self.ids:
            return [self.ids["".join(symbols)]]
        symbols = [symbol for symbol in symbols if symbol in self.ids]  # others have no token
        while True:
            ranks = [self.ranks.get(pair, 10**9) for pair in pairwise(symbols)]
            if not ranks or min(ranks) == 10**9:
                return [self.ids[symbol] for symbol in symbols]
            i = ranks.index(min(ranks))
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def _bytes_to_characters() -> dict[int, str]:
    """The byte-level alphabet of GPT-2: printable bytes stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


BYTES = _bytes_to_characters()


@cache
def vocabulary() -> tokenizers.Tokenizer:
    """Merges learned from whole lines, digits and white space in the middle of tokens included."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False
    )
    pieces = [text[i:j] for text in CORPUS for i in range(0, len(text), 5) for j in (i + 7, i + 23)]
    backend.train_from_iterator(pieces * 2, trainer)
    return backend


@cache
def keys_of(pre: str) -> dict[str, Any]:
    return tokenizer_keys(
        vocabulary(),
        pre,
        normal=[UNMERGED],
        control=CONTROL,
        user_defined=USER_DEFINED,
        padded_to=VOCAB_SIZE + 50,
    )


def rebuild(pre: str, /, **changed: Any) -> Tokenizer:
    changed = {f"tokenizer.ggml.{key}": value for key, value in changed.items()}
    metadata = {**_as_read(keys_of(pre)), **changed}
    tokenizer = rebuild_tokenizer(
        {key: value for key, value in metadata.items() if value is not None}, file="model.gguf"
    )
    assert tokenizer is not None
    return tokenizer


def _as_read(keys: Mapping[str, Any]) -> dict[str, Any]:
    types = array("i", keys["tokenizer.ggml.token_type"])
    return {**keys, "tokenizer.ggml.token_type": types}


@cache
def pair(pre: str) -> tuple[Tokenizer, Reference]:
    return rebuild(pre), Reference(keys_of(pre))


@cache
def qwen2_reference() -> Callable[[str], list[int]]:
    """transformers' own class for Qwen2."""
    keys = keys_of("qwen2")
    ids = {token: i for i, token in enumerate(keys["tokenizer.ggml.tokens"])}
    types = keys["tokenizer.ggml.token_type"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={token: i for token, i in ids.items() if types[i] != 5},
        merges=[tuple(merge.split(" ")) for merge in keys["tokenizer.ggml.merges"]],
    )
    tokenizer.add_tokens(
        [tokenizers.AddedToken(t, normalized=False, special=True) for t in CONTROL]
        + [tokenizers.AddedToken(t, normalized=False) for t in USER_DEFINED]
    )
    return lambda text: tokenizer(text)["input_ids"]


# ---- token by token ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
@pytest.mark.parametrize("pre", PRES)
def test_nasty_texts(pre: str, text: str) -> None:
    tokenizer, reference = pair(pre)
    assert tokenizer.encode(text) == reference.encode(text)
    if pre == "qwen2":
        assert tokenizer.encode(text) == qwen2_reference()(text)
    expected = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
    if "<|im_end|>" not in text:  # beside an added token NFC sees less
        assert tokenizer.decode(tokenizer.encode(text)) == expected


@pytest.mark.parametrize("pre", PRES)
@settings(max_examples=300)
@given(text=TEXTS)
def test_any_text(pre: str, text: str) -> None:
    tokenizer, reference = pair(pre)
    assert tokenizer.encode(text) == reference.encode(text)


@settings(max_examples=300)
@given(text=TEXTS)
def test_any_text_in_transformers(text: str) -> None:
    assert pair("qwen2")[0].encode(text) == qwen2_reference()(text)


def test_the_texts_tell_the_tokenizers_apart() -> None:
    """So that a recipe under a wrong name would be found out."""
    for pre in PRES:
        for other in PRES:
            differ = any(pair(pre)[0].encode(t) != pair(other)[0].encode(t) for t in NASTY)
            assert differ == (other != pre)


def test_a_word_that_is_a_token_but_no_merge() -> None:
    """Llama 3 takes it whole, the others cannot reach it."""
    whole = keys_of("smollm")["tokenizer.ggml.tokens"].index(UNMERGED)
    for pre in PRES:
        assert (pair(pre)[0].encode(UNMERGED) == [whole]) == (pre == "llama-bpe")


def test_tokens_of_each_type() -> None:
    tokenizer = pair("smollm")[0]
    im_end, think = (tokenizer.backend.token_to_id(t) for t in ("<|im_end|>", "<think>"))
    assert tokenizer.encode("a<|im_end|>")[-1] == im_end
    ids = tokenizer.encode("<think>a<|im_end|>")
    assert (ids[0], ids[-1]) == (think, im_end)
    assert tokenizer.decode(ids) == "<think>a<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a"
    padding = keys_of("smollm")["tokenizer.ggml.tokens"][-1]
    assert padding.startswith("[PAD")
    assert tokenizer.backend.token_to_id(padding) is None
    assert len(tokenizer.encode(padding)) > 1
    assert tokenizer.decode([VOCAB_SIZE + 49]) == ""


def test_a_vocabulary_that_lacks_bytes() -> None:
    """As SmolLM2's does: what has no token is left out, by the reference too."""
    keys = {key: list(v) if isinstance(v, list) else v for key, v in keys_of("smollm").items()}
    tokens = keys["tokenizer.ggml.tokens"]
    at = tokens.index(BYTES[1])
    tokens[at] = "never"
    tokenizer = rebuild("smollm", tokens=tokens)
    assert tokenizer.encode("a\x01b") == Reference(keys).encode("a\x01b") == tokenizer.encode("ab")


# ---- the real file ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return wheel_model()


@pytest.fixture(scope="module")
def ours(smollm2: Path) -> Tokenizer:
    tokenizer = open_checkpoint(smollm2).build_tokenizer()
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


@pytest.fixture(scope="module")
def defined(smollm2: Path) -> Reference:
    with open_regular(smollm2) as file:
        return Reference(read_header(file).metadata)


def test_smollm2_by_definition(ours: Tokenizer, defined: Reference) -> None:
    for text in NASTY:
        assert ours.encode(text) == defined.encode(text)
        known = set(map(ord, text)) < set(range(32, 0x2000))  # its vocabulary lacks some bytes
        assert not known or ours.decode(ours.encode(text)) == text

    @settings(max_examples=200)
    @given(text=TEXTS)
    def any_text(text: str) -> None:
        assert ours.encode(text) == defined.encode(text)

    any_text()


def test_smollm2_in_transformers(ours: Tokenizer, theirs: Any) -> None:
    """transformers does not cut out digits: it agrees where no merge joins them to spaces."""
    texts = [text for text in NASTY if not regex.search(r"\s\s\p{N}|[\p{N}--0-9]", text, regex.V1)]
    assert len(texts) > 15
    for text in texts:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode("a  1") != theirs("a  1", add_special_tokens=False)["input_ids"]


def test_smollm2_chat(ours: Tokenizer, theirs: Any) -> None:
    chat = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert ours.apply_chat_template(chat) == expected
    assert ours.encode_prompt(chat) == theirs(expected, add_special_tokens=False)["input_ids"]
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    assert ours.eos_token_ids == (2,)
    assert ours.vocab_size == len(theirs) == 49152
    assert ours.encode_prompt("Hello") == ours.encode("Hello")  # no BOS


# ---- what the keys say ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pre", "flag", "starts"),
    [
        ("smollm", None, False),
        ("smollm", True, True),
        ("qwen2", None, False),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
    ],
)
def test_bos(pre: str, flag: bool | None, starts: bool) -> None:
    """As llama.cpp: the file's word, else what goes with `pre`; once, and only before prompts."""
    bos = keys_of(pre)["tokenizer.ggml.tokens"].index("<|im_start|>")
    tokenizer = rebuild(pre, bos_token_id=bos, add_bos_token=flag)
    plain = tokenizer.encode("hi")
    assert bos not in plain
    assert tokenizer.encode_prompt("hi") == [bos] * starts + plain
    assert tokenizer.encode_prompt("<|im_start|>hi") == [bos, *plain]
    assert tokenizer.encode_answer("hi") == plain


def test_a_model_with_its_tokenizer(tmp_path: Path) -> None:
    """Through a file and back, and saved as tokenizer.json."""
    (tmp_path / "gguf").mkdir()
    path = tmp_path / "gguf" / "model.gguf"
    keys = keys_of("qwen2")
    tokens = keys["tokenizer.ggml.tokens"]
    special = {f"{name}_token_id": tokens.index(token) for name, token in SPECIAL.items()}
    folder = tiny_checkpoint(tmp_path / "folder", "qwen2", vocab_size=len(tokens))
    named = {f"tokenizer.ggml.{key}": value for key, value in special.items()}
    from_folder(folder, path, tokenizer={**keys, **named, "tokenizer.chat_template": TEMPLATE})
    model = swa.load(path)
    tokenizer = model.tokenizer
    assert [tokenizer.encode(t) for t in NASTY] == [pair("qwen2")[0].encode(t) for t in NASTY]
    assert model.stop_ids == {special["eos_token_id"], special["eot_token_id"]}
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat) == "<|im_start|>user\nhi<|im_end|>\n"
    model.save_pretrained(tmp_path / "saved")
    again = Tokenizer.from_folder(tmp_path / "saved")
    assert [again.encode(t) for t in NASTY] == [tokenizer.encode(t) for t in NASTY]
    assert again.encode_prompt(chat) == tokenizer.encode_prompt(chat)
    assert again.eos_token == "<|endoftext|>"


@pytest.mark.parametrize("model", [None, "none", "no_vocab"])
def test_no_tokenizer(model: str | None) -> None:
    keys = {} if model is None else {"tokenizer.ggml.model": model}
    assert rebuild_tokenizer(keys, file="model.gguf") is None


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "llama"},
        {"model": "bert"},
        {"pre": "tekken"},
        {"pre": "default"},
        {"pre": None},
    ],
    ids=str,
)
def test_what_is_not_tested_is_not_rebuilt(changed: dict[str, str | None]) -> None:
    value = next(iter(changed.values())) or "default"
    with pytest.raises(TokenizerError, match=f"model.gguf.*{value}.*tokenizer="):
        rebuild("smollm", **changed)


def test_token_ids_work_without_it(tmp_path: Path) -> None:
    keys = {**keys_of("smollm"), "tokenizer.ggml.pre": "tekken"}
    folder = tiny_checkpoint(tmp_path / "folder", vocab_size=len(keys["tokenizer.ggml.tokens"]))
    from_folder(folder, tmp_path / "model.gguf", tokenizer=keys)
    with pytest.warns(swa.SwaWarning, match="tekken.*tokenizer=") as caught:
        model = swa.load(tmp_path / "model.gguf")
    assert caught[0].filename == __file__
    assert model.nll([1, 2], [3]).mean > 0
    with pytest.raises(TokenizerError, match="tokenizer="):
        model.nll("text", "more")
    own = Tokenizer(vocabulary())
    assert swa.load(tmp_path / "model.gguf", tokenizer=own).tokenizer is own


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens": None},
        {"tokens": array("i", [1, 2])},
        {"tokens": ["a", "a"], "token_type": None, "merges": []},
        {"tokens": ["a", ""], "token_type": None, "merges": []},
        {"merges": None},
        {"merges": ["a"]},
        {"merges": ["a b c"]},
        {"merges": ["a \u1234"]},
        {"merges": ["z q"]},
        {"merges": [" a"]},
        {"token_type": array("i", [1])},
        {"token_type": 3},
        {"bos_token_id": 10**6},
        {"bos_token_id": VOCAB_SIZE + 49},  # unused
        {"eos_token_id": -1},
        {"add_bos_token": 1},
    ],
    ids=lambda changed: str(changed)[:40],
)
def test_malformed_keys(changed: dict[str, Any]) -> None:
    with pytest.raises((TokenizerError, CheckpointError), match="model.gguf"):
        rebuild("smollm", **changed)


def test_a_template_that_is_no_text() -> None:
    keys = {**_as_read(keys_of("smollm")), "tokenizer.chat_template": 3}
    with pytest.raises(TokenizerError, match="chat_template"):
        rebuild_tokenizer(keys, file="model.gguf")


def test_mutated_vocabularies_raise_nothing_else() -> None:
    rng = random.Random(3)
    odd = ["", " ", "a", "\x00", "Ġ", "é", "<|im_end|>", "\u1234", "a b", "aa"]
    refused = 0
    for _ in range(300):
        tokens = rng.choices(odd, k=rng.randrange(8))
        merges = [" ".join(rng.choices(odd, k=2)) for _ in range(rng.randrange(3))]
        types = array("i", rng.choices(range(-1, 8), k=len(tokens)))
        ids = {f"{name}_token_id": rng.randrange(-1, 8) for name in ("bos", "eos", "unknown")}
        try:
            tokenizer = rebuild("qwen2", tokens=tokens, merges=merges, token_type=types, **ids)
            tokenizer.decode(tokenizer.encode("a Ġ\u1234 <|im_end|>aa"))
        except SwaError:
            refused += 1
    assert 100 < refused < 300
