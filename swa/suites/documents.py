"""RULER's two tasks of question answering, from SQuAD and HotpotQA files among other documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from swa.errors import ExampleError
from swa.fields import brief
from swa.haystack import SPLITS, Split
from swa.suites.records import Entry, read_json
from swa.suites.request import Made, Request, fit
from swa.tasks import Draw, split_reply

_INSTRUCTION = "Answer the question from these documents. Reply with the answer alone."
_LEAD = "Answer:"


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, and the documents that belong to it."""

    text: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """What a file holds; questions of one group share documents."""

    path: Path
    task: str
    """Of RULER: "qa_1" from SQuAD, "qa_2" from HotpotQA."""
    groups: tuple[tuple[Question, ...], ...]

    def of_split(self, split: Split) -> tuple[tuple[Question, ...], ...]:
        """Every other group. Raises ExampleError: there is none."""
        found = self.groups[SPLITS.index(split) :: 2]
        if not found:
            raise ExampleError(
                f"{self.path}: at least two groups of questions are needed, so that"
                " calibration and held-out examples share none"
            )
        return found


def read(path: Path) -> Source:
    """Read SQuAD 2.0's JSON (articles in "data") or HotpotQA's (a list of questions).

    Raises:
        ExampleError: malformed, with file and entry.
        OSError: the file cannot be read.
    """
    value = read_json(path)
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        read_group: Callable[[Entry], Iterator[Question]]
        entries, task, read_group = value["data"], "qa_1", _squad_article
    elif isinstance(value, list):
        entries, task, read_group = value, "qa_2", _hotpot_question
    else:
        raise ExampleError(
            f"{path}: must be SQuAD's JSON, with a list \"data\", or HotpotQA's, a list; not"
            f" {brief(value)}"
        )
    groups = (
        tuple(read_group(Entry(entry, f"{path}: entry {i}"))) for i, entry in enumerate(entries)
    )
    return Source(path, task, tuple(group for group in groups if group))


def ask(source: Source, request: Request, prompt_tokens: int, index: int, draw: Draw) -> Made:
    """The `index`-th question in an order that the seed decides, its documents among others.

    Others are drawn from the questions of the same split, over again once they run out.

    Raises:
        ExampleError: the file has fewer questions, or no other documents; too few tokens.
    """
    groups = source.of_split(request.split)
    questions = [question for group in groups for question in group]
    if index >= len(questions):
        raise ExampleError(
            f"{source.path}: the {request.split} split has {len(questions)} questions: lower"
            " examples_per_task"
        )
    order = Draw(f"{request.seed} {source.task} {request.split}")
    question = order.sample(questions, index + 1)[index]
    pool = dict.fromkeys(d for q in questions for d in q.documents if d not in question.documents)
    if not pool:
        raise ExampleError(f"{source.path}: too few documents to ask about one among others")
    most = max(prompt_tokens // 4, 1)  # documents of fewer tokens are none
    others = draw.sample(list(pool), min(len(pool), most))
    placed = [(draw.fraction(), document) for document in question.documents]
    among = [(draw.fraction(), others[i % len(others)]) for i in range(most)]
    lead, answer = split_reply(request.tokenizer, _LEAD, f" {question.answers[0]}")

    def encode(n_others: int) -> list[int]:
        chosen = sorted(placed + among[:n_others])
        shown = [f"Document {i}:\n{text}" for i, (_, text) in enumerate(chosen, start=1)]
        listed = "\n\n".join(shown)
        return request.encode(f"{_INSTRUCTION}\n\n{listed}\n\nQuestion: {question.text}")

    prompt = fit(encode, prompt_tokens, len(lead), 1, most, task=source.task)
    return Made((*prompt, *lead), tuple(answer), question.answers, question.text)


def _squad_article(article: Entry) -> Iterator[Question]:
    for paragraph in article.entries("paragraphs"):
        document = paragraph.text("context")
        for entry in paragraph.entries("qas"):
            answers = tuple(dict.fromkeys(a.text("text") for a in entry.entries("answers")))
            if answers:  # without any, the question cannot be answered
                yield Question(entry.text("question"), answers, (document,))


def _hotpot_question(entry: Entry) -> Iterator[Question]:
    documents = []
    for i, context in enumerate(entry.values("context", list)):
        if len(context) != 2 or not isinstance(context[1], list):
            entry.refuse(f"context[{i}] must be a title and a list of sentences")
        title, sentences = context
        if not all(isinstance(text, str) for text in (title, *sentences)):
            entry.refuse(f"context[{i}] must be texts")
        documents.append(f"{title}\n{''.join(sentences)}")
    yield Question(entry.text("question"), (entry.text("answer"),), tuple(documents))
