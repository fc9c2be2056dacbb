"""One model's part of a sweep: the points that a grid makes, and the rows that they become."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from swa.budget import Budget
from swa.errors import ExampleError
from swa.evaluation import gap_closed
from swa.examples import Example
from swa.gates import Objective
from swa.layer_scores import mean
from swa.model import Model
from swa.sweeps.graph import FULL, SLIDING, Base, Choice, End, Graph, Heldout, Point, Results
from swa.sweeps.grid import Grid
from swa.sweeps.table import Row
from swa.sweeps.tasks import ModelSource, Task


class PointRows(NamedTuple):
    """What a finished point adds to the tables."""

    row: Row
    examples: list[Row]
    timing: Row


class ModelSweep:
    """The grid for one model and dtype.

    Args:
        model: need not hold its weights.
        source: how workers open it.

    Raises:
        InputError: a budget cannot be met, or is more than the model's selectable layers.
        PolicyError: a policy does not fit the model.
        ExampleError: there are no examples, or no policy hides anything from any of them.
    """

    def __init__(
        self,
        grid: Grid,
        model: Model,
        source: ModelSource,
        calibration: Sequence[Example],
        heldout: Sequence[Example],
        *,
        objective: Objective,
    ) -> None:
        for what, examples in (("calibration", calibration), ("heldout", heldout)):
            if not examples:
                raise ExampleError(f"there are no {what} examples")
        self.notes: list[str] = []
        self.heldout = Heldout.of(heldout)
        points: list[tuple[Point, Budget | None]] = []
        self.bases = list(self._bases(grid, model, source, calibration, objective))
        for base in self.bases:
            ends: tuple[End, ...] = (FULL, SLIDING)
            points += ((Point(base.policy, self.heldout, end), None) for end in ends)
            points += (
                (
                    Point(base.policy, self.heldout, Choice.of(base, strategy, budget, model)),
                    budget,
                )
                for strategy in grid.strategies
                for budget in grid.budgets
            )
        self._budgets = [budget for _, budget in points]
        self.graph = Graph(model, source, (point for point, _ in points))

    def rows(self, results: Results, seconds: Mapping[str, float]) -> Iterator[PointRows | None]:
        """For each point what it adds to the tables; None if it is not done.

        `seconds` that its tasks took, by key, are in the row of its timing.
        """
        ends: dict[tuple[object, End], float] = {}
        for point, budget in zip(self.graph.points, self._budgets, strict=True):
            measured = self.graph.measured(point, results)
            if measured is None:
                yield None
                continue
            nll = mean([nll for nll, _ in measured])
            if not isinstance(point.choice, Choice):
                ends[point.policy, point.choice] = nll
            full, sliding = ends.get((point.policy, FULL)), ends.get((point.policy, SLIDING))
            gap = None
            if full is not None and sliding is not None:
                gap = gap_closed(nll, full=full, sliding=sliding)
            values = {
                "nll": nll,
                "gap_closed": gap,
                "greedy_match": mean([match for _, match in measured]),
            }
            yield PointRows(
                self._described(point, budget, results) | values,
                [
                    {"example": index, "task": example.task, "nll": nll, "greedy_match": match}
                    for index, (example, (nll, match)) in enumerate(
                        zip(self.heldout.examples, measured, strict=True)
                    )
                ],
                self._timing(point, results, seconds),
            )

    def _bases(
        self,
        grid: Grid,
        model: Model,
        source: ModelSource,
        calibration: Sequence[Example],
        objective: Objective,
    ) -> Iterator[Base]:
        policies, silent = grid.policies(), []
        for policy in policies:
            used = [e for e in calibration if policy.carries_signal(e.prompt_len, e.answer_len)]
            if used:
                yield Base.of(model, source, policy, used, objective)
            else:
                silent.append(policy)
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

    def _described(self, point: Point, budget: Budget | None, results: Results) -> Row:
        policy, choice = point.policy, point.choice
        layers, prefills = self.graph.chosen(choice, results) or ((), 0.0)
        row: Row = {
            "model": self.graph.model.name,
            "dtype": self.graph.source.dtype,
            "consumer": policy.consumer,
            "sliding_window": policy.sliding_window,
            "num_sink_tokens": policy.num_sink_tokens,
            "num_tail_tokens": policy.num_tail_tokens,
            "decode": policy.decode,
            "strategy": choice,
            "objective": None,
            "budget": None,
            "full_attention_layers": len(layers),
            "layers": ",".join(map(str, layers)),
            "select_prefills": None,
            "n_calibration": None,
            "n_heldout": len(self.heldout.examples),
        }
        if isinstance(choice, Choice) and budget is not None:
            row |= {
                "strategy": choice.strategy.name,
                "objective": choice.base.objective,
                "budget": str(budget),
                "select_prefills": prefills,
                "n_calibration": len(choice.base.examples),
            }
        return row

    def _timing(self, point: Point, results: Results, seconds: Mapping[str, float]) -> Row:
        stages: dict[str, Iterable[Task]] = {
            "score": (),
            "select": (),
            "evaluate": self.graph.evaluations(point, results),
        }
        if isinstance(point.choice, Choice):
            stages["select"] = (self.graph.selection(point.choice),)
            stages["score"] = point.choice.base.scoring if point.choice.takes_scores else ()
        return {
            f"{stage}_seconds": sum(seconds[task.key] for task in tasks)
            for stage, tasks in stages.items()
        }
