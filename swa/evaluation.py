"""How well a model answers: NLL and greedy match over examples, per example and per task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swa.errors import ExampleError, PolicyError, ScoresError
from swa.examples import content_hash
from swa.layer_scores import mean
from swa.policy import AttentionPolicy

if TYPE_CHECKING:
    from swa.examples import Example
    from swa.model import Model

SCHEMA = "swa.evaluation/1"


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What `evaluate` measured; N examples, in their order.

    NLL is in nats per answer token: the mean over an example's answer, then over examples.
    An example matches greedily where every answer token is the model's first choice.
    """

    nll_per_example: tuple[float, ...]
    greedy_match_per_example: tuple[bool, ...]
    tasks: tuple[str, ...]
    policy: AttentionPolicy | None
    """None: the checkpoint's own attention, every layer as it was trained."""
    model_name: str
    model_fingerprint: str
    dtype: str
    examples_hash: str

    @property
    def nll(self) -> float:
        """Mean over examples, nats per answer token."""
        return mean(self.nll_per_example)

    @property
    def greedy_match(self) -> float:
        """Fraction of examples whose whole answer is the greedy one."""
        return mean(self.greedy_match_per_example)

    @property
    def by_task(self) -> dict[str, float]:
        """Mean NLL of each task, in order of first appearance."""
        groups: dict[str, list[float]] = {}
        for task, nll in zip(self.tasks, self.nll_per_example, strict=True):
            groups.setdefault(task, []).append(nll)
        return {task: mean(values) for task, values in groups.items()}

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, schema "swa.evaluation/1"; `from_dict` reads it back."""
        return {
            "schema": SCHEMA,
            "nll": self.nll,
            "greedy_match": self.greedy_match,
            "nll_by_task": self.by_task,
            "nll_per_example": list(self.nll_per_example),
            "greedy_match_per_example": list(self.greedy_match_per_example),
            "tasks": list(self.tasks),
            "policy": None if self.policy is None else self.policy.to_dict(),
            "model_name": self.model_name,
            "model_fingerprint": self.model_fingerprint,
            "dtype": self.dtype,
            "examples_hash": self.examples_hash,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """Read what `to_dict` gave. Raises ScoresError: not such a mapping."""
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            raise ScoresError(f"an evaluation is a JSON object with schema {SCHEMA!r}")
        try:
            policy = data["policy"]
            evaluation = cls(
                nll_per_example=tuple(float(nll) for nll in data["nll_per_example"]),
                greedy_match_per_example=tuple(map(bool, data["greedy_match_per_example"])),
                tasks=tuple(map(str, data["tasks"])),
                policy=None if policy is None else AttentionPolicy.from_dict(policy),
                **{key: str(data[key]) for key in _TEXT_KEYS},
            )
        except KeyError as error:
            raise ScoresError(f"the evaluation has no {error}") from error
        except (TypeError, ValueError, PolicyError) as error:
            raise ScoresError(f"not a valid evaluation: {error}") from error
        lengths = {
            len(evaluation.nll_per_example),
            len(evaluation.greedy_match_per_example),
            len(evaluation.tasks),
        }
        if len(lengths) != 1 or 0 in lengths:
            raise ScoresError("the evaluation's lists must have one entry for each example")
        return evaluation

    def __repr__(self) -> str:
        tasks = ", ".join(f"{task} {nll:.3f}" for task, nll in self.by_task.items())
        return (
            f"Evaluation(nll={self.nll:.4f}, greedy_match={self.greedy_match:.0%}, "
            f"{len(self.nll_per_example)} examples: {tasks})"
        )


_TEXT_KEYS = ("model_name", "model_fingerprint", "dtype", "examples_hash")


def evaluate(
    model: Model,
    examples: Sequence[Example],
    *,
    policy: AttentionPolicy | None = None,
    progress: bool = False,
) -> Evaluation:
    """Teacher-forced answer NLL and greedy match of `model` over `examples`.

    Args:
        model: as loaded (full attention) or patched.
        examples: at least one.
        policy: evaluate `model.patch(policy)` instead; its `layer_types` say which layers are full,
            without them all that can slide do.
        progress: show a bar on stderr.

    Raises:
        ExampleError: no examples.
        ScoresError: an NLL is not finite.
        PolicyError, InputError, MemoryError: as `Model.patch` and `Model.nll`.
    """
    if not examples:
        raise ExampleError("there are no examples to evaluate on")
    subject = model if policy is None else model.patch(policy)
    shown: Sequence[Example] | Any = examples
    if progress:
        from tqdm import tqdm

        shown = tqdm(examples, desc="evaluating", unit="example")
    results = [subject.nll_example(example) for example in shown]
    nll_per_example = tuple(result.mean for result in results)
    for index, nll in enumerate(nll_per_example):
        if not math.isfinite(nll):
            raise ScoresError(
                f"the NLL of example {index} is {nll}: the checkpoint's weights overflow or are not"
                ' numbers (if dtype is "bfloat16", try "float32")'
            )
    return Evaluation(
        nll_per_example=nll_per_example,
        greedy_match_per_example=tuple(bool(result.is_greedy.all()) for result in results),
        tasks=tuple(example.task for example in examples),
        policy=subject.policy,
        model_name=model.name,
        model_fingerprint=model.fingerprint,
        dtype=model.dtype,
        examples_hash=content_hash(examples),
    )


def gap_closed(nll: float, *, full: float, sliding: float) -> float | None:
    """Share of the gap between all-sliding and full attention that `nll` closes; 1 = all of it.

    None where sliding costs nothing, so that there is no gap.
    """
    gap = sliding - full
    return (sliding - nll) / gap if gap > 0 else None
