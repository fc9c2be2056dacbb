"""How a generated reply is scored: against references, by a rule or by a judge."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeAlias

from swa.errors import ExampleError, InputError

JUDGED = "judge"
"""The scorer that is no rule: somebody, or some model, reads the reply."""


@dataclass(frozen=True)
class Grading:
    """What a reply should have, and how that is told. Raises ExampleError."""

    references: tuple[str, ...]
    """What is looked for, at least one; for "regex" these are patterns."""
    scorer: str = "contains_all"
    """One of SCORERS, or "judge"."""
    max_new_tokens: int = 128
    """Longest reply that is generated."""
    question: str = ""
    """For judges, and for "only_choice": what was asked."""
    choices: tuple[str, ...] = ()
    """For "only_choice": all the answers that could be given."""
    criterion: str = ""
    """For judges: what counts as right, beyond agreeing with a reference."""

    def __post_init__(self) -> None:
        for name in ("references", "choices"):
            object.__setattr__(self, name, _texts(getattr(self, name), name))
        if not self.references:
            raise ExampleError("a grading needs at least one reference")
        if self.scorer not in (*SCORERS, JUDGED):
            known = ", ".join((*SCORERS, JUDGED))
            raise ExampleError(f"there is no scorer {self.scorer!r}: choose from {known}")
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise ExampleError(f"max_new_tokens must be an integer >= 1, not {self.max_new_tokens}")
        for name in ("question", "criterion"):
            if not isinstance(getattr(self, name), str):
                raise ExampleError(f"{name} must be text, not {getattr(self, name)!r}")
            refuse_surrogates(getattr(self, name), name)
        if self.scorer == "regex":
            for pattern in self.references:
                _compiled(pattern)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; what has its default is left out."""
        values = asdict(self)
        given = {f.name: values[f.name] for f in fields(self) if values[f.name] != f.default}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}

    @classmethod
    def from_dict(cls, data: object) -> Grading:
        """Read what `to_dict` gave. Raises ExampleError: not such a mapping."""
        if not isinstance(data, Mapping):
            raise ExampleError('a grading is a JSON object such as {"references": ["..."]}')
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(key) for key in data.keys() - set(known))
        if unknown:
            raise ExampleError(f"unknown grading keys {unknown}: known are {known}")
        if "references" not in data:
            raise ExampleError("the grading has no references")
        return cls(**data)


Judge: TypeAlias = Callable[[Grading, str], bool | float]
"""Says how right a reply is, from 0 (False) to 1 (True)."""


def score_reply(grading: Grading, reply: str, judge: Judge | None = None) -> float:
    """How right a reply is, from 0 to 1.

    Raises:
        InputError: the grading asks for a judge and there is none, or the judge's score is none.
    """
    if grading.scorer != JUDGED:
        return SCORERS[grading.scorer](grading, reply)
    if judge is None:
        raise InputError(
            "these replies are to be judged: give a judge, or another scorer"
            f" ({', '.join(SCORERS)})"
        )
    score = judge(grading, reply)
    if not isinstance(score, (bool, int, float)) or not 0 <= score <= 1:
        raise InputError(f"a judge returns True, False or a number from 0 to 1, not {score!r}")
    return float(score)


def _contains_all(grading: Grading, reply: str) -> float:
    """Fraction of the references that the reply has, in any case (as RULER scores)."""
    found = [reference.casefold() in reply.casefold() for reference in grading.references]
    return sum(found) / len(found)


def _contains_any(grading: Grading, reply: str) -> float:
    """Whether the reply has a reference, in any case."""
    return float(any(reference.casefold() in reply.casefold() for reference in grading.references))


def _exact(grading: Grading, reply: str) -> float:
    """Whether the reply is a reference, but for case and space."""
    return float(any(_plain(reference) == _plain(reply) for reference in grading.references))


def _regex(grading: Grading, reply: str) -> float:
    """Whether a pattern is found in the reply."""
    return float(any(_compiled(pattern).search(reply) for pattern in grading.references))


def _only_choice(grading: Grading, reply: str) -> float:
    """Whether the first sentence names the references and no other choice (as BABILong scores).

    What the question names may be repeated; what a model makes up after its answer does not count.
    Unlike in the published code, neither does a choice that is only a part of another one that is
    named: "one" in "none", say, for which no reply "none" could be right there.
    """
    sentence = re.split(r"\.|<context>|<example>", reply.casefold(), maxsplit=1)[0]
    question = grading.question.casefold()
    choices = {choice.casefold() for choice in (*grading.choices, *grading.references)}

    def is_named(choice: str) -> bool:
        rest = sentence
        for longer in sorted(choices, key=len, reverse=True):
            if choice in longer and choice != longer:
                rest = rest.replace(longer, "\n")
        return choice in rest and choice not in question

    named = set(filter(is_named, choices))
    return float(named == {reference.casefold() for reference in grading.references})


SCORERS: dict[str, Callable[[Grading, str], float]] = {
    "contains_all": _contains_all,
    "contains_any": _contains_any,
    "exact": _exact,
    "regex": _regex,
    "only_choice": _only_choice,
}


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ExampleError(f"{pattern!r} is not a regular expression: {error}") from None


def _texts(values: object, name: str) -> tuple[str, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, (list, tuple)):
        raise ExampleError(f"{name} must be a list of texts, not {values!r}")
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise ExampleError(f"{name} must be texts that are not empty, not {value!r}")
        refuse_surrogates(value, name)
    return tuple(values)


def refuse_surrogates(text: str, name: str) -> None:
    """Raise ExampleError for half a character, which UTF-8 cannot write."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ExampleError(f"{name} must be valid Unicode, not {text!r}")
