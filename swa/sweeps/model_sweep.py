"""One model's part of a sweep: its tasks, what follows from which, and the rows they make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from swa import cost
from swa.errors import ExampleError, InputError, ScoresError
from swa.evaluation import gap_closed
from swa.examples import Example, content_hash
from swa.gates import Objective
from swa.layer_scores import LayerScores, mean
from swa.model import Model
from swa.policy import AttentionPolicy
from swa.score import layer_scores, sweep_tasks
from swa.selection import Budget
from swa.sweeps.grid import Grid, NamedStrategy, budget_name
from swa.sweeps.table import Row
from swa.sweeps.tasks import EvaluateTask, ModelSource, ScoreTask, SelectTask, Task

FULL, SLIDING = "full attention", "all sliding"
Results = Mapping[str, dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Base:
    """A policy of the grid, and the calibration examples that it hides something from."""

    policy: AttentionPolicy
    examples: tuple[Example, ...]
    examples_hash: str
    scoring: tuple[ScoreTask, ...]
    """[N]; none where no strategy takes scores."""


@dataclass(frozen=True)
class Choice:
    """A strategy within a budget."""

    strategy: NamedStrategy
    budget: Budget
    takes_scores: bool


@dataclass(frozen=True)
class Point:
    """A row to be: under a policy a choice, or one of the two ends."""

    base: Base
    choice: Choice | str


class PointRows(NamedTuple):
    """What a finished point adds to the tables."""

    row: Row
    examples: list[Row]
    timing: Row


class ModelSweep:
    """The grid for one model and dtype.

    Args:
        planned: the model, which need not hold its weights.
        source: how workers open it.

    Raises:
        InputError: a budget is more than the model's selectable layers.
        PolicyError: a policy does not fit the model.
        ExampleError: there are no examples, or no policy hides anything from any of them.
    """

    def __init__(
        self,
        grid: Grid,
        planned: Model,
        source: ModelSource,
        calibration: Sequence[Example],
        heldout: Sequence[Example],
        objective: Objective,
    ) -> None:
        for what, examples in (("calibration", calibration), ("heldout", heldout)):
            if not examples:
                raise ExampleError(f"there are no {what} examples")
        self._model, self._source, self._objective = planned, source, objective
        self._heldout = tuple((example, content_hash([example])) for example in heldout)
        self._sizes = {budget: self._size(budget) for budget in grid.budgets}
        self.notes: list[str] = []
        choices = [
            # Scores are differences in NLL: under another objective they are of no use.
            Choice(strategy, budget, strategy.takes_scores and objective == "nll")
            for strategy in grid.strategies
            for budget in grid.budgets
        ]
        scored = any(choice.takes_scores for choice in choices)
        self._bases = list(self._with_signal(grid, tuple(calibration), scored))
        self._base_of = {task.key: base for base in self._bases for task in base.scoring}
        ends: list[Choice | str] = [FULL, SLIDING]
        self.points = [Point(base, choice) for base in self._bases for choice in ends + choices]
        self._given: set[str] = set()

    def begin(self, results: Results) -> list[Task]:
        """The tasks that wait for nothing and are not in `results`, which grows later."""
        tasks: list[Task] = []
        for point in self.points:
            if isinstance(point.choice, str):
                tasks += self._evaluations(point, results)
        for base in self._bases:
            tasks += base.scoring
        tasks += self._selections(self.points, scores=None)
        return self._missing(tasks, results)

    def follow(self, task: Task, results: Results) -> list[Task]:
        """The tasks that waited for this one, which has its result now, and are not there yet."""
        return self._missing(self._followers(task, results), results)

    def rows(self, results: Results, seconds: Mapping[str, float]) -> Iterator[PointRows | None]:
        """For each point what it adds to the tables; None if it is not done.

        `seconds` that its tasks took, by key, are in the row of its timing.
        """
        ends: dict[tuple[Base, str], float] = {}
        for point in self.points:
            tasks = self._evaluations(point, results)
            if not tasks or any(task.key not in results for task in tasks):
                yield None
                continue
            measured = [_read(EvaluateTask, task, results) for task in tasks]
            nll = mean([nll for nll, _ in measured])
            if isinstance(point.choice, str):
                ends[point.base, point.choice] = nll
            full, sliding = (ends.get((point.base, end)) for end in (FULL, SLIDING))
            gap = None
            if full is not None and sliding is not None:
                gap = gap_closed(nll, full=full, sliding=sliding)
            values = {
                "nll": nll,
                "gap_closed": gap,
                "greedy_match": mean([match for _, match in measured]),
            }
            examples = [
                {"example": index, "task": task.example.task, "nll": nll, "greedy_match": match}
                for index, (task, (nll, match)) in enumerate(zip(tasks, measured, strict=True))
            ]
            yield PointRows(
                self._described(point, results) | values,
                examples,
                self._timing(point, tasks, seconds),
            )

    def _size(self, budget: Budget) -> int:
        selectable = len(self._model.selectable_layers)
        size = budget.resolve(self._model.config.num_hidden_layers)
        if size > selectable:
            raise InputError(
                f"the budget {budget_name(budget)} is {size} full-attention layers, of which"
                f" {self._model.name} has {selectable} that can be chosen"
            )
        return size

    def _with_signal(
        self, grid: Grid, calibration: tuple[Example, ...], scored: bool
    ) -> Iterator[Base]:
        policies, silent = grid.policies(), []
        hashes = {example: content_hash([example]) for example in calibration}
        for policy in policies:
            used = tuple(
                e for e in calibration if policy.carries_signal(e.prompt_len, e.answer_len)
            )
            if not used:
                silent.append(policy)
                continue
            tasks, _ = sweep_tasks(self._model, used, policy, "restore", None)
            scoring = [ScoreTask(self._source, task, hashes[task.example]) for task in tasks]
            yield Base(policy, used, content_hash(used), tuple(scoring) if scored else ())
        if len(silent) == len(policies):
            longest = max(example.prompt_len for example in calibration)
            raise ExampleError(
                f"no policy of the grid hides anything from any calibration example: the longest"
                f" prompt has {longest} tokens; use longer prompts, or smaller windows"
            )
        if silent:
            listed = ", ".join(map(repr, silent))
            self.notes.append(
                f"left out, since they hide nothing from any calibration example: {listed}"
            )

    def _followers(self, task: Task, results: Results) -> Iterable[Task]:
        if isinstance(task, ScoreTask):
            base = self._base_of[task.key]
            if all(other.key in results for other in base.scoring):
                own = [point for point in self.points if point.base is base]
                return self._selections(own, scores=self._scores(base, results))
        if isinstance(task, SelectTask):
            layers, _ = _read(SelectTask, task, results)
            return self._evaluate(self._with_layers(task.policy, layers))
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
                left += self._followers(task, results)
            else:
                missing.append(task)
        return missing

    def _selections(self, points: Iterable[Point], scores: LayerScores | None) -> list[SelectTask]:
        """Those that take scores, or those that do not."""
        return [
            self._selection(point.base, point.choice, scores)
            for point in points
            if isinstance(point.choice, Choice)
            and point.choice.takes_scores == (scores is not None)
        ]

    def _selection(self, base: Base, choice: Choice, scores: LayerScores | None) -> SelectTask:
        return SelectTask(
            self._source,
            base.policy,
            self._objective,
            choice.strategy,
            self._sizes[choice.budget],
            base.examples,
            base.examples_hash,
            scores,
        )

    def _scores(self, base: Base, results: Results) -> LayerScores:
        found = [_read(ScoreTask, task, results) for task in base.scoring]
        return layer_scores(
            self._model,
            [task.work for task in base.scoring],
            [scores for scores, _ in found],
            tier=found[0][1],
        )

    def _chosen(self, point: Point, results: Results) -> tuple[tuple[int, ...], float] | None:
        """The full layers of a point, and what choosing them cost in prefills; None: not yet."""
        base, choice = point.base, point.choice
        if isinstance(choice, str):
            return (self._model.selectable_layers if choice == FULL else ()), 0.0
        task = self._selection(base, choice, None)
        if task.key not in results:
            return None
        layers, prefills = _read(SelectTask, task, results)
        if choice.takes_scores:
            prefills += self._scoring_prefills(base)
        return layers, prefills

    def _scoring_prefills(self, base: Base) -> float:
        config = self._model.config
        sweeps = sum(task.work.work(config)[0].flops for task in base.scoring)
        lengths = [(example.prompt_len, example.answer_len) for example in base.examples]
        layers = self._model.selectable_layers
        passes = sum(cost.nll_work(config, base.policy, layers, *n).flops for n in lengths)
        return sweeps / passes

    def _evaluations(self, point: Point, results: Results) -> list[EvaluateTask]:
        """[N]: one for each held-out example; none where the layers are not known yet."""
        if point.choice == FULL:
            return self._evaluate(None)
        chosen = self._chosen(point, results)
        if chosen is None:
            return []
        return self._evaluate(self._with_layers(point.base.policy, chosen[0]))

    def _evaluate(self, policy: AttentionPolicy | None) -> list[EvaluateTask]:
        return [EvaluateTask(self._source, policy, *example) for example in self._heldout]

    def _with_layers(self, policy: AttentionPolicy, layers: Iterable[int]) -> AttentionPolicy:
        return policy.with_full_layers(layers, self._model.config.num_hidden_layers)

    def _described(self, point: Point, results: Results) -> Row:
        policy, choice = point.base.policy, point.choice
        layers, prefills = self._chosen(point, results) or ((), 0.0)
        is_choice = isinstance(choice, Choice)
        return {
            "model": self._model.name,
            "dtype": self._source.dtype,
            "consumer": policy.consumer,
            "sliding_window": policy.sliding_window,
            "num_sink_tokens": policy.num_sink_tokens,
            "num_tail_tokens": policy.num_tail_tokens,
            "decode": policy.decode,
            "strategy": choice.strategy.name if isinstance(choice, Choice) else choice,
            "objective": self._objective if is_choice else None,
            "budget": budget_name(choice.budget) if isinstance(choice, Choice) else None,
            "full_attention_layers": len(layers),
            "layers": ",".join(map(str, layers)),
            "select_prefills": prefills if is_choice else None,
            "n_calibration": len(point.base.examples) if is_choice else None,
            "n_heldout": len(self._heldout),
        }

    def _timing(
        self, point: Point, evaluations: Iterable[Task], seconds: Mapping[str, float]
    ) -> Row:
        scoring: tuple[Task, ...] = ()
        selecting: tuple[Task, ...] = ()
        if isinstance(point.choice, Choice):
            selecting = (self._selection(point.base, point.choice, None),)
            scoring = point.base.scoring if point.choice.takes_scores else ()
        stages = {"score": scoring, "select": selecting, "evaluate": evaluations}
        return {
            f"{stage}_seconds": sum(seconds[task.key] for task in tasks)
            for stage, tasks in stages.items()
        }


def _read(kind: Any, task: Task, results: Results) -> Any:
    """What a task's result holds. Raises ScoresError: it is not what such a task gives."""
    try:
        return kind.read(results[task.key])
    except (KeyError, TypeError) as error:
        raise ScoresError(
            f"the result of {task.name} in the journal is not valid ({error!r}): delete the journal"
            " to start anew"
        ) from error
