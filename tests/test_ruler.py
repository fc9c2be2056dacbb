"""RULER's tasks: each is solved again from the text of its prompt, which must fit its length."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from text_tokenizers import CHATML, text_tokenizer

from swa.errors import ExampleError
from swa.examples import Example
from swa.suites import Request, examples, ruler, word_lists
from swa.tasks import Draw
from swa.tokenizer import Tokenizer

LENGTH = 1536


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return text_tokenizer("bpe", CHATML)


def make(tokenizer: Tokenizer, *tasks: str, length: int = LENGTH, **wanted: Any) -> list[Example]:
    return examples("ruler", tokenizer, tasks=tasks or None, lengths=[length], **wanted)


def solve(task: str, prompt: str) -> set[str]:
    """The answers, from the prompt's text alone."""
    body, question = prompt.rsplit("\n\n", 1)
    if task.startswith("niah"):
        asked = re.search(r"magic \w+ for (.+?) mentioned", question)[1]
        keys = re.split(r", and |, ", asked)
        found = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", body)
        return {value for key, value in found if key in keys}
    if task == "vt":
        values = dict(re.findall(r"VAR (\w+) = ((?:VAR )?\w+)\.", body))
        for _ in values:
            values = {
                name: values[value[4:]] if value.startswith("VAR ") else value
                for name, value in values.items()
            }
        asked = re.search(r"value (\d+)", question)[1]
        return {name for name, value in values.items() if value == asked}
    text = body.rsplit("\n\n", 1)[1]
    words = re.findall(r"[a-z-]+", text) if task == "cwe" else re.findall(r"[a-z]+", text)
    n = len(ruler_references[task])
    counted = Counter(words).most_common(n + 1)
    assert counted[n - 1][1] > counted[n][1]  # no tie at the border
    return {word for word, _ in counted[:n]}


ruler_references = {"cwe": range(10), "fwe": range(3)}


@pytest.mark.parametrize("task", ruler.SYNTHETIC)
@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_every_task_can_be_solved_from_its_prompt(task, kind):
    tokenizer = text_tokenizer(kind, CHATML if kind == "bpe" else None)
    length = LENGTH if kind == "bpe" else (6 if task == "cwe" else 3) * LENGTH
    for example in make(tokenizer, task, length=length, examples_per_task=2):
        prompt = tokenizer.decode(example.prompt_ids, skip_special_tokens=True)
        reply = tokenizer.decode(example.answer_ids)
        references = example.grading.references
        assert solve(task, prompt) == set(references)
        assert len(set(references)) == len(references)
        places = [reply.index(reference) for reference in references]
        assert places == sorted(places)
        assert example.grading.scorer == "contains_all"
        assert example.grading.max_new_tokens == ruler.NEW_TOKENS[task]
        assert example.task == f"{task} {length}"
        room = length - ruler.NEW_TOKENS[task] - example.prompt_len
        assert 0 <= room <= 25
        if task.startswith(("niah", "vt")) and task != "niah_multikey_3":
            assert room == 0
        if kind == "bpe":
            assert example.answer_len <= ruler.NEW_TOKENS[task]


def test_the_eleven_tasks_and_what_they_hide(tokenizer):
    made = make(tokenizer)
    assert len(made) == len(ruler.SYNTHETIC) == 11
    counts = {example.task.split()[0]: len(example.grading.references) for example in made}
    single = dict.fromkeys((task for task in counts if task.startswith("niah")), 1)
    many = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}
    assert counts == single | many
    texts = {e.task.split()[0]: tokenizer.decode(e.prompt_ids) for e in made}
    needles = {task: text.count("One of the special magic") for task, text in texts.items()}
    assert needles["niah_single_1"] == needles["niah_single_2"] == needles["niah_single_3"] == 1
    assert needles["niah_multikey_1"] == needles["niah_multiquery"] == 4
    assert needles["niah_multikey_2"] > 20 < needles["niah_multikey_3"] + 10
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    for task in ("niah_single_3", "niah_multikey_3"):
        (value,) = next(e for e in made if e.task.startswith(task)).grading.references
        assert re.fullmatch(uuid, value)


@pytest.mark.parametrize("task", ruler.SYNTHETIC)
def test_what_is_made_depends_on_seed_and_number_alone(tokenizer, task):
    one, two = make(tokenizer, task, examples_per_task=2)
    assert make(tokenizer, task) == [one]
    assert one.grading.references != two.grading.references
    assert make(tokenizer, task, seed=1)[0].grading.references != one.grading.references


def test_the_splits_share_no_needle(tokenizer):
    tasks = ("niah_multikey_1", "niah_multikey_2", "vt", "cwe", "fwe")

    def hidden(split: str) -> set[str]:
        made = make(tokenizer, *tasks, examples_per_task=3, split=split)
        texts = [tokenizer.decode(e.prompt_ids) for e in made]
        keys = {k for text in texts for k in re.findall(r"magic \w+ for (\S+) is:", text)}
        words = {r for e in made for r in e.grading.references if not e.task.startswith("niah")}
        return keys | words

    calibration, heldout = hidden("calibration"), hidden("heldout")
    assert not calibration & heldout
    assert len(calibration) > 100 < len(heldout)


def test_needles_lie_at_every_depth(tokenizer):
    depths = [
        tokenizer.decode(e.prompt_ids).index("One of the special magic") / (3.5 * LENGTH)
        for e in make(tokenizer, "niah_single_1", examples_per_task=16)
    ]
    assert min(depths) < 0.3
    assert max(depths) > 0.6


def test_a_haystack_of_ones_own(tokenizer):
    haystack = "Der Regen fällt auf die Stadt. Die Leute gehen nach Hause. " * 40
    made = make(tokenizer, "niah_single_2", "cwe", haystack=haystack)
    assert "Der Regen" in tokenizer.decode(made[0].prompt_ids)
    assert solve("cwe", tokenizer.decode(made[1].prompt_ids, skip_special_tokens=True)) == set(
        made[1].grading.references
    )


def test_words_of_a_haystack_run_out(tokenizer):
    words = {"tasks": ["cwe"], "haystack": "天地玄黄. 宇宙洪荒. " * 40, "lengths": [10**5]}
    with pytest.raises(ExampleError, match="give a haystack of more words"):
        examples("ruler", tokenizer, **words)
    draw = Draw("x")
    own = word_lists._words("heldout", words["haystack"])
    request = Request(tokenizer, haystack=words["haystack"])
    assert len(set(word_lists._different_words(request, draw, len(own) ** 2))) == len(own) ** 2
    with pytest.raises(ExampleError, match=f"takes {len(own) ** 2 + 1} different words"):
        word_lists._different_words(request, draw, len(own) ** 2 + 1)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"tasks": ["vt"], "lengths": [30]}, "reply to task 'vt' may have 30"),
        ({"tasks": ["cwe"], "lengths": [400]}, "task 'cwe' needs at least"),
        ({"tasks": ["fwe"], "lengths": [120]}, "task 'fwe' needs at least"),
        (
            {"tasks": ["niah_single_2"], "lengths": [150]},
            "length 150 is too short: task 'niah_single_2' needs",
        ),
        ({"tasks": ["qa_1"]}, "made from a SQuAD file"),
        ({"tasks": ["qa_2"]}, "made from a HotpotQA file"),
        ({"tasks": ["niah"]}, "no task 'niah'"),
        ({"tasks": []}, "tasks must be"),
        ({"tasks": ["vt", "vt"]}, "tasks must be different"),
        ({"lengths": [0]}, "length"),
        ({"lengths": [True]}, "length"),
        ({"split": "test"}, "no split"),
        ({"examples_per_task": 0}, "examples_per_task"),
    ],
)
def test_what_cannot_be_made_is_refused(tokenizer, wanted, says):
    with pytest.raises(ExampleError, match=says):
        examples("ruler", tokenizer, **wanted)


# ---- question answering, from files as they are published


def squad(n_articles: int = 6) -> dict[str, Any]:
    def article(i: int) -> dict[str, Any]:
        def paragraph(j: int) -> dict[str, Any]:
            name = f"Town{i}x{j}"
            known = {
                "id": f"{i}{j}",
                "question": f"Who founded {name}?",
                "answers": [
                    {"text": f"Founder{i}x{j}", "answer_start": 30},
                    {"text": f"F. {i}x{j}", "answer_start": 0},
                    {"text": f"Founder{i}x{j}", "answer_start": 30},
                ],
                "is_impossible": False,
            }
            unknown = {
                "id": f"{i}{j}-",
                "question": f"Who burnt {name}?",
                "answers": [],
                "plausible_answers": [{"text": "no one", "answer_start": 0}],
                "is_impossible": True,
            }
            context = f"The town of {name} lies by a river. Founder{i}x{j} (F. {i}x{j}) founded it."
            return {"context": context, "qas": [unknown, known]}

        return {"title": f"Article {i}", "paragraphs": [paragraph(j) for j in range(3)]}

    return {"version": "v2.0", "data": [article(i) for i in range(n_articles)]}


def hotpot(n: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "_id": str(i),
            "question": f"Where was the author of Book{i} born?",
            "answer": f"City{i:02}",
            "type": "bridge",
            "level": "hard",
            "supporting_facts": [[f"Book{i}", 0]],
            "context": [
                [f"Book{i}", [f"Book{i} is by Author{i}.", " It sold well."]],
                [f"Author{i}", [f"Author{i} was born in City{i:02}."]],
            ],
        }
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("qa")
    for name, value in (("squad", squad()), ("hotpot", hotpot())):
        (folder / f"{name}.json").write_text(json.dumps(value))
    return {name: folder / f"{name}.json" for name in ("squad", "hotpot")}


def shown_documents(text: str) -> list[str]:
    return re.split(r"\n*Document \d+:\n", text.split("\n\nQuestion:")[0])[1:]


@pytest.mark.parametrize(("task", "name"), [("qa_1", "squad"), ("qa_2", "hotpot")])
def test_questions_come_with_their_documents_among_others(tokenizer, files, task, name):
    made = make(tokenizer, task, files=[files[name]], examples_per_task=6, length=700)
    assert len({example.grading.question for example in made}) == 6
    for example in made:
        text = tokenizer.decode(example.prompt_ids, skip_special_tokens=True)
        assert example.prompt_len <= 700 - 32
        assert example.prompt_len > 700 - 32 - 60  # a document more would not fit
        documents = shown_documents(text)
        assert sum(example.grading.references[0] in document for document in documents) == 1
        assert len(documents) > 5
        assert example.grading.question in text.split("\n\nQuestion:")[1]
        assert tokenizer.decode(example.answer_ids) == f" {example.grading.references[0]}"
        assert example.grading.scorer == "contains_any"
    if task == "qa_1":
        assert all(len(e.grading.references) == 2 for e in made)  # duplicates once
    else:
        number = re.search(r"Book(\d+)", made[0].grading.question)[1]
        shown = shown_documents(tokenizer.decode(made[0].prompt_ids))
        assert any(d.startswith(f"Book{number}\nBook{number} is by") for d in shown)


def test_the_splits_share_no_question_and_no_document(tokenizer, files):
    def texts(split: str) -> tuple[set[str], set[str]]:
        wanted = {"files": [files["squad"]], "examples_per_task": 5, "length": 500}
        made = make(tokenizer, "qa_1", split=split, **wanted)
        shown = (shown_documents(tokenizer.decode(e.prompt_ids)) for e in made)
        return {e.grading.question for e in made}, {d for ds in shown for d in ds}

    for calibration, heldout in zip(texts("calibration"), texts("heldout"), strict=True):
        assert calibration
        assert not calibration & heldout


def test_a_file_adds_its_task(tokenizer, files, tmp_path):
    made = examples("ruler", tokenizer, files=files.values(), lengths=[LENGTH])
    assert [e.task.split()[0] for e in made] == [*ruler.SYNTHETIC, "qa_1", "qa_2"]
    assert [e.unit for e in made] == [None] * len(ruler.SYNTHETIC) + ["qa_1 0", "qa_2 0"]
    other = tmp_path / "other.json"
    other.write_bytes(files["squad"].read_bytes())
    with pytest.raises(ExampleError, match=r"squad\.json and .*other\.json are both for qa_1"):
        examples("ruler", tokenizer, files=[files["squad"], other], lengths=[LENGTH])


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"questions": []}, "must be SQuAD's JSON"),
        (3, "must be SQuAD's JSON"),
        ({"data": [{"title": "x"}] * 2}, "entry 0: paragraphs is missing"),
        ({"data": [{"paragraphs": [{"context": "", "qas": []}]}]}, r"paragraphs\[0\]: context"),
        ({"data": [{"paragraphs": [{"context": "c", "qas": [3]}]}]}, r"qas\[0\]: must be an obj"),
        (
            {"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q"}]}]}]},
            "answers is missing",
        ),
        ({"data": []}, "at least two groups"),
        ([{"question": "q", "answer": "a"}], "entry 0: context is missing"),
        ([{"question": "q", "answer": "a", "context": [["t"]]}], r"context\[0\] must be a title"),
        ([{"question": "q", "answer": "a", "context": [["t", [1]]]}], r"context\[0\] must be text"),
        ([{"question": 3, "answer": "a", "context": []}], "question is 3"),
        (hotpot(2), "too few documents"),
    ],
)
def test_malformed_files_are_named_with_the_entry(tokenizer, tmp_path, value, says):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(value))
    task = "qa_2" if isinstance(value, list) else "qa_1"
    with pytest.raises(ExampleError, match=says) as caught:
        make(tokenizer, task, files=[path])
    assert str(path) in str(caught.value)


def test_more_questions_than_a_file_has(tokenizer, files):
    with pytest.raises(ExampleError, match="split has 9 questions: lower"):
        make(tokenizer, "qa_1", files=[files["squad"]], examples_per_task=10)


def test_a_file_that_is_not_json(tokenizer, tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(ExampleError, match="not JSON"):
        make(tokenizer, "qa_1", files=[path])
    with pytest.raises(OSError):
        make(tokenizer, "qa_1", files=[tmp_path / "absent"])
