"""What follows from what: the tasks of points, of which many share scores, choices and passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from swa import cost
from swa.budget import Budget
from swa.errors import InputError, ScoresError
from swa.examples import Example, content_hash
from swa.gates import Objective
from swa.layer_scores import LayerScores
from swa.model import Model
from swa.policy import AttentionPolicy
from swa.score import layer_scores, sweep_tasks
from swa.sweeps.grid import NamedStrategy
from swa.sweeps.tasks import EvaluateTask, ModelSource, ScoreTask, SelectTask, Task

Results: TypeAlias = Mapping[str, dict[str, Any]]
End: TypeAlias = Literal["full attention", "all sliding"]
FULL: End = "full attention"
SLIDING: End = "all sliding"


@dataclass(frozen=True, eq=False)
class Base:
    """A policy, and the calibration examples that layers are chosen on under it."""

    policy: AttentionPolicy
    examples: tuple[Example, ...]
    examples_hash: str
    objective: Objective
    scoring: tuple[ScoreTask, ...]
    """[N]: those of strategies that take scores."""

    @classmethod
    def of(
        cls,
        model: Model,
        source: ModelSource,
        policy: AttentionPolicy,
        examples: Sequence[Example],
        objective: Objective = "nll",
    ) -> Base:
        """From examples that all carry a signal. Raises as `swa.score_layers`."""
        tasks, _ = sweep_tasks(model, examples, policy, "restore", None)
        scoring = [ScoreTask(source, task, content_hash([task.example])) for task in tasks]
        return cls(policy, tuple(examples), content_hash(examples), objective, tuple(scoring))


@dataclass(frozen=True)
class Choice:
    """A strategy within a budget, which is a number of layers or a tolerance."""

    base: Base
    strategy: NamedStrategy
    budget: Budget

    @classmethod
    def of(cls, base: Base, strategy: NamedStrategy, budget: Budget, model: Model) -> Choice:
        """Within any budget.

        Raises:
            InputError: it cannot be met, or is more than the model's selectable layers.
        """
        if budget.nll_increase is None:
            size, selectable = budget.size(model.config, base.policy), len(model.selectable_layers)
            if size > selectable:
                raise InputError(
                    f"the budget {budget} is {size} full-attention layers, of which {model.name}"
                    f" has {selectable} that can be chosen"
                )
            budget = Budget(full_attention_layers=size)
        return cls(base, strategy, budget)

    @property
    def size(self) -> int | None:
        """The most full layers; None: as many as it takes."""
        return self.budget.full_attention_layers

    @property
    def takes_scores(self) -> bool:
        """Whether the exact scores of `base`, made in tasks of their own, are all that it needs."""
        # Scores are differences in NLL, and tell nothing of whole selections.
        is_nll = self.base.objective == "nll"
        return self.strategy.takes_scores and is_nll and self.size is not None


@dataclass(frozen=True, eq=False)
class Heldout:
    """Examples to evaluate on."""

    examples: tuple[Example, ...]
    hashes: tuple[str, ...]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Heldout:
        return cls(tuple(examples), tuple(content_hash([example]) for example in examples))


@dataclass(frozen=True)
class Point:
    """A choice of layers (or one of the two ends), evaluated under a policy."""

    policy: AttentionPolicy
    heldout: Heldout
    choice: Choice | End


class Graph:
    """The tasks of points of one model.

    Args:
        model: need not hold its weights.
        source: how workers open it.
    """

    def __init__(self, model: Model, source: ModelSource, points: Iterable[Point]) -> None:
        self.model, self.source, self.points = model, source, list(points)
        choices = [point.choice for point in self.points if isinstance(point.choice, Choice)]
        self.choices = list(dict.fromkeys(choices))
        self._bases_of: dict[str, list[Base]] = {}
        for base in dict.fromkeys(choice.base for choice in self.choices if choice.takes_scores):
            for task in base.scoring:
                self._bases_of.setdefault(task.key, []).append(base)
        self._points_of: dict[str, list[Point]] = {}
        for point in self.points:
            if isinstance(point.choice, Choice):
                key = self.selection(point.choice).key
                self._points_of.setdefault(key, []).append(point)
        self._given: set[str] = set()

    def begin(self, results: Results) -> list[Task]:
        """The tasks that wait for nothing and are not in `results`, which grows later.

        The evaluations of choices that are known come before other choices.
        """
        tasks: list[Task] = []
        for point in self.points:
            if not isinstance(point.choice, Choice):
                tasks += self.evaluations(point, results)
        selections = [(choice, self.selection(choice)) for choice in self.choices]
        for choice, selection in sorted(selections, key=lambda pair: pair[1].key not in results):
            if choice.takes_scores and selection.key not in results:
                tasks += choice.base.scoring
            else:
                tasks.append(selection)
        return self._missing(tasks, results)

    def follow(self, task: Task, results: Results) -> list[Task]:
        """The tasks that waited for this one, which has its result now, and are not there yet."""
        return self._missing(self._followers(task, results), results)

    def selection(self, choice: Choice, scores: LayerScores | None = None) -> SelectTask:
        """The task that chooses."""
        return SelectTask(
            self.source,
            choice.base.policy,
            choice.base.objective,
            choice.strategy,
            choice.budget,
            choice.base.examples,
            choice.base.examples_hash,
            scores,
        )

    def chosen(
        self, choice: Choice | End, results: Results
    ) -> tuple[tuple[int, ...], float] | None:
        """The full layers, and what choosing them cost in prefills an example; None: not yet."""
        if not isinstance(choice, Choice):
            return (self.model.selectable_layers if choice == FULL else ()), 0.0
        task = self.selection(choice)
        if task.key not in results:
            return None
        layers, prefills = _read(SelectTask, task, results)
        return layers, prefills + (
            self._scoring_prefills(choice.base) if choice.takes_scores else 0
        )

    def scores(self, base: Base, results: Results) -> LayerScores | None:
        """The exact scores under a policy; None: not yet."""
        if any(task.key not in results for task in base.scoring):
            return None
        found = [_read(ScoreTask, task, results) for task in base.scoring]
        return layer_scores(
            self.model,
            [task.work for task in base.scoring],
            [scores for scores, _ in found],
            tier=found[0][1],
        )

    def evaluations(self, point: Point, results: Results) -> list[EvaluateTask]:
        """[N]: one for each held-out example; none where the layers are not known yet."""
        policy = None
        if point.choice != FULL:
            chosen = self.chosen(point.choice, results)
            if chosen is None:
                return []
            n_layers = self.model.config.num_hidden_layers
            policy = point.policy.with_full_layers(chosen[0], n_layers)
        return [
            EvaluateTask(self.source, policy, example, example_hash)
            for example, example_hash in zip(
                point.heldout.examples, point.heldout.hashes, strict=True
            )
        ]

    def measured(self, point: Point, results: Results) -> list[tuple[float, bool]] | None:
        """[N]: NLL and greedy match of each held-out example; None: not all are there yet."""
        tasks = self.evaluations(point, results)
        if not tasks or any(task.key not in results for task in tasks):
            return None
        return [_read(EvaluateTask, task, results) for task in tasks]

    def _followers(self, task: Task, results: Results) -> Iterable[Task]:
        if isinstance(task, ScoreTask):
            known = ((base, self.scores(base, results)) for base in self._bases_of[task.key])
            return [
                self.selection(choice, scores)
                for base, scores in known
                if scores is not None
                for choice in self.choices
                if choice.base is base and choice.takes_scores
            ]
        if isinstance(task, SelectTask):
            return [
                evaluation
                for point in self._points_of[task.key]
                for evaluation in self.evaluations(point, results)
            ]
        return ()

    def _missing(self, tasks: Iterable[Task], results: Results) -> list[Task]:
        """Those of the tasks, and of what follows from the others, that are not in `results`."""
        missing, left = [], list(tasks)
        while left:
            task = left.pop(0)
            if task.key in self._given:
                continue
            self._given.add(task.key)
            if task.key in results:
                left[:0] = self._followers(task, results)
            else:
                missing.append(task)
        return missing

    def _scoring_prefills(self, base: Base) -> float:
        config, layers = self.model.config, self.model.selectable_layers
        sweeps = sum(task.work.work(config)[0].flops for task in base.scoring)
        lengths = [(example.prompt_len, example.answer_len) for example in base.examples]
        passes = sum(cost.nll_work(config, base.policy, layers, *n).flops for n in lengths)
        return sweeps / passes


def _read(kind: Any, task: Task, results: Results) -> Any:
    """What a task's result holds. Raises ScoresError: it is not what such a task gives."""
    try:
        return kind.read(results[task.key])
    except (KeyError, TypeError) as error:
        raise ScoresError(
            f"the result of {task.name} in the journal is not valid ({error!r}): delete the journal"
            " to start anew"
        ) from error
