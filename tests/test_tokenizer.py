"""Tokenizer: against transformers on the same folder; chat templates, hostile ones; files."""

from __future__ import annotations

import contextlib
import copy
import json
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import tokenizers
import transformers
from checkpoint_files import BYTE_BOS, BYTE_EOS, BYTE_VOCAB, byte_tokenizer, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from text_tokenizers import CHATML, KINDS, text_tokenizer
from transformers.utils import chat_template_utils

from swa.errors import InputError, TokenizerError
from swa.tokenizer import TEMPLATE_DATE, Tokenizer

TEXTS = (
    "",
    "a",
    " leading and trailing  ",
    "The needle is hidden here: 4711.\n\nWhere? There!",
    "größer, 東京, 🙂\u200d\u0301 and \x00\x7f",
    "<bos>once",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<eos>b</s>c",
)
CHAT = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": '  Is 1 < 2 & "yes"?  '},
    {"role": "assistant", "content": "Ja, größer 🙂."},
    {"role": "user", "content": "Thanks"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in made.items():
        text_tokenizer(kind, CHATML).save(folder)
    return made


def theirs(folder: Path) -> Any:
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def byte_level(**settings: Any) -> Tokenizer:
    return Tokenizer(byte_tokenizer(), bos_token="<bos>", eos_token="<eos>", **settings)


def without_bos() -> tokenizers.Tokenizer:
    backend = byte_tokenizer()
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    return backend


def byte_folder(folder: Path, **settings: Any) -> Path:
    """A byte tokenizer's folder with these keys in tokenizer_config.json; None removes a key."""
    write_tokenizer(folder, byte_tokenizer())
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


# ---- text


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_transformers(folders: dict[str, Path], kind: str) -> None:
    ours, reference = Tokenizer.from_folder(folders[kind]), theirs(folders[kind])
    for text in TEXTS:
        assert ours.encode(text) == reference.encode(text, add_special_tokens=False), text
        if not text.startswith("<bos>"):
            assert ours.encode(text, add_special_tokens=True) == reference.encode(text), text


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_tokens_is_that_of_transformers(folders: dict[str, Path], kind: str) -> None:
    ours, reference = Tokenizer.from_folder(folders[kind]), theirs(folders[kind])
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=True)
        for skip in (False, True):
            expected = reference.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
            assert ours.decode(ids, skip_special_tokens=skip) == expected


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    tokenizer = byte_level()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_text_starts_with_bos_once() -> None:
    tokenizer = byte_level()
    assert tokenizer.encode_prompt("ab") == [BYTE_BOS, *tokenizer.encode("ab")]
    assert tokenizer.encode_prompt("<bos>ab") == tokenizer.encode_prompt("ab")
    assert tokenizer.encode_prompt("") == [BYTE_BOS]


def test_answers_get_no_special_tokens() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode_answer("ab")
    assert len(ids) == 2
    assert BYTE_BOS not in ids


def test_special_tokens_written_in_a_text_count_as_such() -> None:
    assert byte_level().encode_answer("<eos>") == [BYTE_EOS]
    assert byte_level().encode_prompt("a<eos>")[-1] == BYTE_EOS


def test_no_eos_follows_a_prompt_whatever_the_post_processor_says() -> None:
    backend = byte_tokenizer()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BYTE_BOS), ("<eos>", BYTE_EOS)]
    )
    tokenizer = Tokenizer(backend, bos_token="<bos>", eos_token="<eos>")
    assert tokenizer.encode_prompt("ab") == byte_level().encode_prompt("ab")
    assert tokenizer.encode_prompt("") == [BYTE_BOS]


def test_add_bos_token_puts_bos_before_texts() -> None:
    assert Tokenizer(without_bos(), bos_token="<bos>").encode_prompt("a")[0] != BYTE_BOS
    tokenizer = Tokenizer(without_bos(), bos_token="<bos>", add_bos_token=True)
    assert tokenizer.encode_prompt("ab") == byte_level().encode_prompt("ab")
    assert tokenizer.encode_prompt("<bos>ab") == byte_level().encode_prompt("ab")


def test_add_bos_token_adds_none_where_the_post_processor_does() -> None:
    assert byte_level(add_bos_token=True).encode_prompt("a").count(BYTE_BOS) == 1


def test_the_prompt_ends_where_a_token_ends() -> None:
    tokenizer = text_tokenizer("bpe")
    whole = tokenizer.encode("the reply")
    parts = [*tokenizer.encode_prompt("the re"), *tokenizer.encode_answer("ply")]
    assert tokenizer.decode(parts) == "the reply"
    assert parts != whole  # the tokenizer itself would cut elsewhere


def test_special_tokens_that_are_only_in_the_vocabulary_are_found_in_texts(tmp_path: Path) -> None:
    alphabet = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "<bos>", "<eos>"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    write_tokenizer(tmp_path, backend)
    text = "<bos>a<eos>"
    ids = Tokenizer.from_folder(tmp_path).encode(text)
    assert ids == theirs(tmp_path).encode(text, add_special_tokens=False)
    assert (ids[0], ids[-1]) == (BYTE_BOS, BYTE_EOS)


def test_truncation_and_padding_are_off() -> None:
    backend = byte_tokenizer()
    backend.enable_truncation(3)
    backend.enable_padding(length=50, pad_token="<eos>", pad_id=BYTE_EOS)
    tokenizer = Tokenizer(backend)
    assert len(tokenizer.encode_prompt("twelve chars")) == 13
    assert len(tokenizer.encode_answer("twelve chars")) == 12


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", None, 5, b"bytes"])
def test_what_is_no_text_is_refused(text: Any) -> None:
    with pytest.raises(InputError, match="a string of valid Unicode"):
        byte_level().encode(text)


def test_a_character_without_a_token_is_an_error() -> None:
    model = tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]")
    with pytest.raises(TokenizerError, match="fails on this text: .*UNK"):
        Tokenizer(tokenizers.Tokenizer(model)).encode("b")


def test_ids_pass_through() -> None:
    tokenizer = byte_level()
    assert tokenizer.encode_prompt([1, 2]) == [1, 2]
    assert tokenizer.encode_answer(iter((3, 4))) == [3, 4]
    assert tokenizer.encode_prompt([]) == []


@pytest.mark.parametrize("value", [None, 5, [1.0], ["1"], b"abc", {"role": "user"}, [[1]]])
def test_what_is_no_prompt_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="the prompt must be text, messages or token ids"):
        byte_level().encode_prompt(value)


@pytest.mark.parametrize("value", [None, 5, [1.0], b"abc", CHAT])
def test_what_is_no_answer_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="the answer must be text or token ids"):
        byte_level().encode_answer(value)


def test_an_unfinished_character_is_a_replacement() -> None:
    tokenizer = byte_level()
    assert tokenizer.decode(tokenizer.encode("a€")[:-1]) == "a\ufffd"


def test_unknown_ids_have_no_text() -> None:
    tokenizer = byte_level()
    assert tokenizer.decode([*tokenizer.encode("ab"), BYTE_VOCAB, 2**32 - 1]) == "ab"


@pytest.mark.parametrize("ids", [[-1], [2**32], [1.5], ["a"], None, b"a"])
def test_what_are_no_ids_is_refused(ids: Any) -> None:
    with pytest.raises(InputError, match="token ids"):
        byte_level().decode(ids)


def test_repr_and_size() -> None:
    assert repr(byte_level()) == f"Tokenizer({BYTE_VOCAB} tokens, without chat template)"
    assert "with chat template" in repr(byte_level(chat_template=CHATML))
    assert byte_level().vocab_size == BYTE_VOCAB
    assert byte_level().eos_token_ids == (BYTE_EOS,)
    assert Tokenizer(byte_tokenizer()).eos_token_ids == ()


# ---- chat templates

TEMPLATES = {
    "chatml": CHATML,
    "smollm2": """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}""",  # noqa: E501
    "llama3": """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date_string + "\n\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
""",
    "mistral": """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate user and assistant") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}
""",
    "tojson": "{{ messages | tojson }}\n{{ messages[1] | tojson(indent=2, sort_keys=true) }}"
    "{{ 'é<' | tojson(ensure_ascii=true) }}{{ {'b': 1} | tojson(separators=(',', ':')) }}",
    "generation": """\
{% for m in messages %}
    {% if m.role == 'assistant' %}
        {% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}
    {% else %}
        {{ m.role + ': ' + m.content }}
    {% endif %}
{% endfor %}
""",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.content }}{% if m.role == 'assistant' %}{% break %}{% endif %}{% endfor %}",
    "qwen3": """\
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string and not(
        message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- macro shown(m) -%}{{ m.content.split('</think>')[-1].lstrip('\n') }}{%- endmacro %}
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ loop.index0 ~ ns.last ~ shown(message) ~ '<|im_end|>\n' }}
    {%- if message.tool_calls is defined or tools or documents %}{{- 'tools' }}{%- endif %}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}{{- 'no thoughts' }}{%- endif %}
""",
    "whitespace": "  {% if true %}\n  kept \n  {% endif %}\n\n{#- note -#}  end\n",
}


class Today(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return TEMPLATE_DATE


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("opened", [True, False])
def test_templates_render_as_in_transformers(
    folders: dict[str, Path], name: str, opened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", Today)
    ours, reference = Tokenizer.from_folder(folders["bpe"]), theirs(folders["bpe"])
    ours.chat_template = reference.chat_template = TEMPLATES[name]
    expected = reference.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=opened)
    assert ours.apply_chat_template(CHAT, add_generation_prompt=opened) == expected
    assert expected.strip()


def test_a_chat_is_tokenized_as_in_transformers(folders: dict[str, Path]) -> None:
    for kind in KINDS:
        expected = theirs(folders[kind]).apply_chat_template(
            CHAT, add_generation_prompt=True, return_dict=False
        )
        assert Tokenizer.from_folder(folders[kind]).encode_prompt(CHAT) == expected


@given(st.lists(st.text(), min_size=1, max_size=3))
def test_any_content_renders_as_in_transformers(contents: list[str]) -> None:
    messages = [{"role": "user", "content": content} for content in contents]
    (expected,), _ = chat_template_utils.render_jinja_template([messages], chat_template=CHATML)
    ours = byte_level(chat_template=CHATML).apply_chat_template(messages, False)
    assert ours == expected


def test_the_template_says_whether_bos_comes_first() -> None:
    with_bos = byte_level(chat_template="{{ bos_token }}{{ messages[0].content }}")
    assert with_bos.encode_prompt(CHAT[3:]).count(BYTE_BOS) == 1
    without = byte_level(chat_template="{{ messages[0].content }}")
    assert BYTE_BOS not in without.encode_prompt(CHAT[3:])


def test_the_date_stands_still() -> None:
    tokenizer = byte_level(chat_template="{{ strftime_now('%Y-%m-%d') }}")
    assert tokenizer.apply_chat_template(CHAT) == TEMPLATE_DATE.strftime("%Y-%m-%d")


def test_a_template_that_refuses_is_quoted() -> None:
    tokenizer = byte_level(chat_template=TEMPLATES["mistral"])
    with pytest.raises(TokenizerError, match="roles must alternate user and assistant"):
        tokenizer.encode_prompt([CHAT[1], CHAT[1]])


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(TokenizerError, match="no chat template: give the prompt as one string"):
        byte_level().encode_prompt(CHAT)


@pytest.mark.parametrize("source", ["{% if %}", "{{", "{% endfor %}", "(" * 5, "{{ '" + "(" * 9])
def test_a_template_of_no_jinja_is_an_error_or_text(source: str) -> None:
    tokenizer = byte_level(chat_template=source)
    if "{" not in source:
        assert tokenizer.apply_chat_template(CHAT) == source
        return
    with pytest.raises(TokenizerError, match="the chat template cannot be compiled"):
        tokenizer.apply_chat_template(CHAT)


def test_mappings_of_any_kind_are_messages() -> None:
    messages = [MappingProxyType(message) for message in CHAT]
    tokenizer = byte_level(chat_template=CHATML)
    assert tokenizer.encode_prompt(messages) == tokenizer.encode_prompt(CHAT)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "there are no messages"),
        ("text", "message 0 must be like"),
        ([CHAT[0], "text"], "message 1 must be like"),
        ([{"content": "no role"}], "message 0 must be like"),
        ([{"role": 5}], "message 0 must be like"),
        ([{"role": "user", "content": object()}], "plain data"),
        ([{"role": "user", "content": b"bytes"}], "plain data"),
        (None, "plain data"),
    ],
)
def test_what_are_no_messages_is_refused(messages: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        byte_level(chat_template=CHATML).apply_chat_template(messages)


def test_messages_in_a_circle_are_refused() -> None:
    message: dict[str, Any] = {"role": "user"}
    message["content"] = message
    with pytest.raises(InputError, match="plain data"):
        byte_level(chat_template=CHATML).apply_chat_template([message])


# ---- hostile templates


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[0]['content'].__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['__builtins__'] }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ '{m.__class__}'.format_map({'m': messages}) }}",
        "{{ namespace.__class__.__base__ }}",
        "{% include '/etc/hostname' %}",
        "{% import 'os' as os %}{{ os.getcwd() }}",
        "{% extends '/etc/hostname' %}",
        "{{ range(10**9) | length }}",
        "{% for i in range(100001) %}{% endfor %}done",
        "{{ messages.append(1) }}",
        "{{ messages.clear() }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages[0].pop('role') }}",
        "{% set messages[0].role = 'x' %}",
        "{{ 1 / 0 }}",
        "{{ undefined_thing.attribute }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_hostile_template_does_no_harm(source: str) -> None:
    """It fails or tells nothing, and the caller's messages are as they were."""
    messages, text = copy.deepcopy(CHAT), ""
    with contextlib.suppress(TokenizerError):
        text = byte_level(chat_template=source).apply_chat_template(messages)
    assert text == ""
    assert messages == CHAT


def test_a_template_cannot_change_what_later_ones_see() -> None:
    source = "{% set ns = namespace(n=0) %}{% set ns.n = 1 %}{% set bos_token = 'x' %}{{ n }}"
    tokenizer = byte_level(chat_template=source + "{% set n = 1 %}")
    assert tokenizer.apply_chat_template(CHAT) == tokenizer.apply_chat_template(CHAT) == ""


# ---- files


def test_a_folder_or_its_file(tmp_path: Path) -> None:
    byte_folder(tmp_path)
    for path in (tmp_path, str(tmp_path), tmp_path / "tokenizer.json"):
        assert Tokenizer.from_folder(path).bos_token_id == BYTE_BOS


def test_special_tokens_from_the_map(tmp_path: Path) -> None:
    byte_folder(tmp_path, bos_token=None, eos_token=None)
    assert Tokenizer.from_folder(tmp_path).bos_token is None
    special = {"bos_token": {"content": "<bos>", "lstrip": False}, "eos_token": "<eos>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token_ids) == ("<bos>", (BYTE_EOS,))


def test_the_config_goes_before_the_map(tmp_path: Path) -> None:
    byte_folder(tmp_path, eos_token={"__type": "AddedToken", "content": "<eos>"})
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<bos>"}')
    assert Tokenizer.from_folder(tmp_path).eos_token == "<eos>"


def test_other_special_tokens_reach_the_template(tmp_path: Path) -> None:
    byte_folder(tmp_path, pad_token="<eos>", chat_template="{{ pad_token }}{{ unk_token }}")
    assert Tokenizer.from_folder(tmp_path).apply_chat_template(CHAT) == "<eos>"


def test_added_tokens_of_the_config_get_their_ids(tmp_path: Path) -> None:
    token = {"content": "<tool>", "lstrip": False, "normalized": False, "special": True}
    settings = {str(BYTE_VOCAB): token, str(BYTE_VOCAB + 1): token | {"content": "<end>"}}
    byte_folder(tmp_path, added_tokens_decoder=settings)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("<tool>a<end>")[::2] == [BYTE_VOCAB, BYTE_VOCAB + 1]
    reference = theirs(tmp_path).encode("<tool>a<end>", add_special_tokens=False)
    assert tokenizer.encode("<tool>a<end>") == reference


@pytest.mark.parametrize("place", ["jinja", "json", "config", "named"])
def test_the_chat_template_may_stand_in_several_places(tmp_path: Path, place: str) -> None:
    """Each place goes before those that come after it here, and all are filled from it on."""
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "named"}]
    byte_folder(tmp_path, chat_template="config" if place != "named" else named)
    if place in ("jinja", "json"):
        (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    if place == "jinja":
        (tmp_path / "chat_template.jinja").write_text("jinja")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.chat_template == place
    if place != "json":  # which is of processors; transformers' tokenizers do not read it
        assert theirs(tmp_path).apply_chat_template(CHAT, tokenize=False) == place


def test_named_templates_without_a_default_are_none(tmp_path: Path) -> None:
    byte_folder(tmp_path, chat_template=[{"name": "rag", "template": "x"}])
    assert not Tokenizer.from_folder(tmp_path).has_chat_template


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="nowhere: no such folder"):
        Tokenizer.from_folder(tmp_path / "nowhere")


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json: copy the model's there"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "vocab.txt", "tekken.json"])
def test_slow_files_alone_tell_how_to_convert_them(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(TokenizerError, match=f"only {name}: convert it once, with transformers"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", b"", "not a tokenizer"),
        ("tokenizer.json", b"[]", "not a tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', "not a tokenizer"),
        ("tokenizer.json", b"\xff\xfe\x00", "not a tokenizer"),
        ("tokenizer.json", b"[" * 100_000, "not a tokenizer"),
        ("tokenizer_config.json", b"{", "not JSON"),
        ("tokenizer_config.json", b"[]", "must hold a JSON object"),
        ("tokenizer_config.json", b"{" * 100_000, "not JSON"),
        ("tokenizer_config.json", b'{"a":' * 100_000, "nested too deep"),
        ("tokenizer_config.json", b'{"bos_token": "a", "bos_token": "b"}', "given twice"),
        ("tokenizer_config.json", b'{"bos_token": "\xff"}', "cannot be read"),
        ("tokenizer_config.json", b'{"bos_token": 5}', "bos_token must be a string, not 5"),
        ("tokenizer_config.json", b'{"pad_token": ["a"]}', "pad_token must be a string"),
        ("tokenizer_config.json", b'{"eos_token": {"content": 5}}', "eos_token must be a string"),
        ("tokenizer_config.json", b'{"bos_token": "<no>"}', "'<no>', which is not in the vocab"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template must be a string"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "added_tokens_decoder"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"9": {"content": 1}}}',
            "added_tokens_decoder is malformed",
        ),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"9": {"content": "<bos>"}}}',
            "token '<bos>' should have id 9, but has 256",
        ),
        ("special_tokens_map.json", b"nonsense", "not JSON"),
        ("special_tokens_map.json", b'{"eos_token": 1.5}', "eos_token must be a string"),
        ("chat_template.json", b"[]", "must hold a JSON object"),
        ("chat_template.json", b'{"chat_template": {}}', "chat_template must be a string"),
        ("chat_template.jinja", b"\xff", "cannot be read"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    byte_folder(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=says) as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to what is inside a JSON value, of long lists and objects the beginning."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in list(items)[:8]:
        found += [(*path, key)]
        if isinstance(inner, (dict, list)):
            found += places(inner, (*path, key))
    return found


DESCRIPTION = json.loads(byte_tokenizer().to_str())
ODD_VALUES = st.sampled_from(
    [None, -1, 2**31, 2**64, 1.5, "", "<bos>", "$A", "[", "\0", [], {}, [[]], True, "Isolated"]
)


@given(place=st.sampled_from(places(DESCRIPTION)), value=ODD_VALUES, text=st.text(max_size=5))
def test_a_damaged_tokenizer_works_or_is_an_error(
    place: tuple[Any, ...], value: Any, text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    *path, last = place
    damaged = copy.deepcopy(DESCRIPTION)
    inner = damaged
    for key in path:
        inner = inner[key]
    inner[last] = value
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(damaged))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<bos>", "add_bos_token": true}')
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except TokenizerError as error:
        assert str(folder) in str(error)
        return
    with contextlib.suppress(TokenizerError):
        tokenizer.decode(tokenizer.encode_prompt(f"{text}<bos>"))


def test_a_panic_of_the_library_is_an_error(tmp_path: Path) -> None:
    """A Rust panic is no Exception: it would pass every `except Exception` on its way out."""
    byte_folder(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["post_processor"]["special_tokens"] = {}
    file.write_text(json.dumps(content))
    tokenizer = Tokenizer.from_folder(tmp_path)
    with pytest.raises(TokenizerError, match="fails on this text"):
        tokenizer.encode_prompt("a")


def test_unknown_settings_of_added_tokens_are_left_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    token = {"__type": "AddedToken", "content": "<tool>", "special": True, "new": 1}
    byte_folder(tmp_path, added_tokens_decoder={str(BYTE_VOCAB): token})
    assert Tokenizer.from_folder(tmp_path).encode("<tool>") == [BYTE_VOCAB]
    assert capfd.readouterr() == ("", "")  # stdout may be somebody's JSON


def test_a_bos_token_that_is_no_token_of_a_template_is_an_error() -> None:
    backend = without_bos()
    backend.add_special_tokens(["$A"])
    with pytest.raises(TokenizerError, match=r"bos_token '\$A' cannot be put before texts"):
        Tokenizer(backend, bos_token="$A", add_bos_token=True)


# ---- saving


def test_a_folder_is_saved_as_it_was(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    byte_folder(source, chat_template=CHATML)
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (source / name).write_text("{}")
    (source / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    (source / "model.safetensors").write_bytes(b"not the tokenizer's")
    Tokenizer.from_folder(source).save(target)
    saved = {file.name: file.read_bytes() for file in target.iterdir()}
    assert saved == {
        file.name: file.read_bytes()
        for file in source.iterdir()
        if file.name != "model.safetensors"
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_without_files_comes_back(tmp_path: Path, kind: str) -> None:
    before = text_tokenizer(kind, TEMPLATES["mistral"])
    before.save(tmp_path)
    after = Tokenizer.from_folder(tmp_path)
    for prompt in (*TEXTS, CHAT):
        assert after.encode_prompt(prompt) == before.encode_prompt(prompt)
    assert repr(after) == repr(before)
    assert after.eos_token_ids == before.eos_token_ids


def test_a_bos_that_was_added_is_saved(tmp_path: Path) -> None:
    Tokenizer(without_bos(), bos_token="<bos>", add_bos_token=True).save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).encode_prompt("a")[0] == BYTE_BOS
    assert theirs(tmp_path).encode("a")[0] == BYTE_BOS
