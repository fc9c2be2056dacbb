"""Running cells: what they share is done once, every task is journaled, in slices if need be."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from benchmarks.study.cells import TOPK, Cell, Scale, Selected, Setting, cells
from swa import examples
from swa.budget import Budget
from swa.cost import nll_work
from swa.errors import InputError
from swa.estimate import measure_speed
from swa.examples import Example, content_hash
from swa.gates import gate_gradient
from swa.journal import Journal
from swa.model import Model, plan
from swa.policy import AttentionPolicy
from swa.sweeps.driver import Driver, executing
from swa.sweeps.estimate import stage_seconds
from swa.sweeps.graph import FULL, SLIDING, Base, Choice, End, Graph, Heldout, Point
from swa.sweeps.grid import NamedStrategy
from swa.sweeps.store import INPUTS, Store, searches_beside
from swa.sweeps.tasks import Keyed, ModelSource, close_model

ANSWER_ROOM = 128
"""Positions left for answers by the longest prompts."""

Make = Callable[[Model, Setting, str, int, tuple[str, ...]], Sequence[Example]]
"""Makes examples: of a model, a setting, a split, a number for each of the tasks."""


def retrieval(
    model: Model, setting: Setting, split: str, per_task: int, tasks: tuple[str, ...]
) -> list[Example]:
    """The built-in tasks; calibration and held-out examples share neither text nor needles."""
    return examples.synthetic(
        model.tokenizer,
        tasks=tasks,
        examples_per_task=per_task,
        prompt_tokens=setting.prompt_tokens,
        split=split,  # type: ignore[arg-type]
    )


@dataclass(frozen=True)
class FirstOrderTask(Keyed):
    """One example's first-order scores: minus the gates' gradient with all layers sliding."""

    source: ModelSource
    policy: AttentionPolicy
    example: Example

    @property
    def name(self) -> str:
        return f"first order of {self.example!r}"

    @cached_property
    def inputs(self) -> dict[str, Any]:
        return {
            "stage": "first order",
            **self.source.identity,
            "policy": self.policy.to_dict(),
            "example": content_hash([self.example]),
        }

    def run(self, model: Model) -> dict[str, Any]:
        alpha = np.zeros(model.config.num_hidden_layers)
        return {
            "scores": (-gate_gradient(model, self.example, self.policy, alpha).gradient).tolist()
        }


class Study:
    """The study of one model.

    Args:
        path: of the model, or a hub id.
        scale: the settings.
        journal: where every finished task is kept; opened by `run`, and read by `load`.
        make: makes the examples.
        threads: of the engine; 0: all cores.

    Raises:
        InputError: the model has too few positions for the headline setting.
    """

    def __init__(
        self,
        path: str,
        scale: Scale,
        journal: str | os.PathLike[str],
        *,
        make: Make = retrieval,
        threads: int = 0,
    ) -> None:
        self.scale, self._journal, self._make = scale, journal, make
        self.model = plan(path, num_threads=threads, with_tokenizer=True)
        self.source = ModelSource(
            os.path.abspath(path) if os.path.exists(path) else path,
            "bfloat16",
            self.model.fingerprint,
            num_threads=threads,
            searches=searches_beside(journal),
        )
        self.cells = cells(scale, self.model.max_position_embeddings - ANSWER_ROOM)
        if not any(cell.group == "headline" for cell in self.cells):
            raise InputError(
                f"{self.model.name} has {self.model.max_position_embeddings} positions, too few for"
                f" prompts of {scale.setting.prompt_tokens} tokens"
            )
        self.stores = {self.tier: Store(None)}
        """What was found, by the tier of the kernels; this machine's first."""
        self._examples: dict[Any, tuple[Example, ...]] = {}
        self._bases: dict[Any, Base] = {}
        self._heldout: dict[Any, Heldout] = {}
        self._graphs: dict[Cell, Graph] = {}

    @property
    def tier(self) -> str:
        """Of this machine's kernels."""
        return self.model.engine.tier

    @property
    def store(self) -> Store:
        """What this machine's kernels found, and what it adds."""
        return self.stores[self.tier]

    def store_of(self, cell: Cell) -> Store:
        """Whose results a cell has, which are not mixed: those of the kernels that did most of it.

        Layers chosen elsewhere are taken over by all.
        """
        # Of equals this machine's, which is the first.
        return max(self.stores.values(), key=lambda store: self._n_measured(cell, store))

    def _n_measured(self, cell: Cell, store: Store) -> int:
        graph, points = self.graph(cell), (self.point(cell, choice) for choice in cell.choices)
        return sum(graph.measured(point, store.results) is not None for point in points)

    def load(self) -> None:
        """Read what the journal holds. Raises ScoresError: it is of another version, or in use."""
        with Journal(self._journal, INPUTS) as journal:
            self._read(journal)

    def _read(self, journal: Journal) -> None:
        tiers = journal.read("a task", lambda record: record["tier"])
        self.stores = {
            tier: Store(journal, tier=tier) for tier in dict.fromkeys([self.tier, *tiers])
        }

    def run(
        self,
        groups: Iterable[str] | None = None,
        *,
        minutes: float = math.inf,
        workers: int = 0,
        progress: bool = False,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Do what is missing of the cells of these groups (None: all), in order.

        Args:
            minutes: begin nothing after that.
            workers: processes; 0: this one.
            progress: show a bar on stderr for each cell.
            say: told each cell.

        A task that fails is in `store.failures`, and ends nothing. A cell that kernels of another
        tier have begun is left to them.
        """
        deadline = time.monotonic() + 60 * minutes
        wanted = [cell for cell in self.cells if groups is None or cell.group in set(groups)]
        with Journal(self._journal, INPUTS) as journal, executing(None, workers) as used:
            self._read(journal)
            try:
                for cell in wanted:
                    if time.monotonic() >= deadline:
                        break
                    store = self.store_of(cell)
                    if store is self.store:
                        say(str(cell))
                        driver = Driver(used[0], in_flight=used[1])
                        self._complete(cell, driver, deadline, progress)
                    elif self._n_measured(cell, store) < len(cell.choices):
                        say(
                            f"{cell}: left to kernels for {store.tier}, which began it: set"
                            f" SWA_TIER={store.tier} where the CPU can run them"
                        )
            finally:
                close_model()

    def _complete(self, cell: Cell, driver: Driver, deadline: float, progress: bool) -> None:
        # A graph gives each task once: a cell that is begun again needs a new one.
        graph = self._new_graph(cell)
        self.store.complete(graph, driver, deadline, progress=progress)
        _, tasks = self.first_order(cell)
        more = [task for task in tasks if task.key not in self.store.results]

        def finished(task: Any, outcome: Any) -> list[Any]:
            self.store.add(task, outcome)
            return []

        driver.run(more, finished, begins=lambda: time.monotonic() < deadline)

    def graph(self, cell: Cell) -> Graph:
        """To read results by."""
        if cell not in self._graphs:
            self._graphs[cell] = self._new_graph(cell)
        return self._graphs[cell]

    def _new_graph(self, cell: Cell) -> Graph:
        points = [self.point(cell, choice) for choice in (FULL, SLIDING, *cell.choices)]
        return Graph(self.model, self.source, points)

    def point(self, cell: Cell, choice: Selected | End) -> Point:
        """A choice, or an end, measured in a cell."""
        if isinstance(choice, Selected):
            return Point(cell.setting.policy, self.heldout(cell), self.choice(choice))
        return Point(cell.setting.policy, self.heldout(cell), choice)

    def choice(self, selected: Selected) -> Choice:
        n_layers = self.model.config.num_hidden_layers
        size = max(1, Budget(fraction=selected.share).resolve(n_layers))
        return Choice(
            self.base(selected),
            NamedStrategy.of(selected.strategy),
            Budget(full_attention_layers=size),
        )

    def base(self, selected: Selected) -> Base:
        """The calibration of a choice."""
        key = selected.at, selected.per_task, selected.tasks
        if key not in self._bases:
            used = self._made(selected.at, "calibration", selected.per_task, selected.tasks)
            self._bases[key] = Base.of(self.model, self.source, selected.at.policy, used)
        return self._bases[key]

    def heldout(self, cell: Cell) -> Heldout:
        key = cell.setting.prompt_tokens, cell.heldout_per_task
        if key not in self._heldout:
            used = self._made(cell.setting, "heldout", cell.heldout_per_task, self.scale.tasks)
            self._heldout[key] = Heldout.of(used)
        return self._heldout[key]

    def passes(self, example: Example) -> float:
        """Work of full attention's pass over it, over that at the headline's length."""
        config, setting = self.model.config, self.scale.setting
        layers = range(config.num_hidden_layers)

        def flops(prompt_tokens: int) -> float:
            return nll_work(config, setting.policy, layers, prompt_tokens, example.answer_len).flops

        return flops(example.prompt_len) / flops(setting.prompt_tokens)

    def first_order(self, cell: Cell) -> tuple[Selected | None, list[FirstOrderTask]]:
        """First-order scores of the most examples that the cell takes exact ones of, where asked.

        The choice that takes those, and a task for each example.
        """
        exact = [choice for choice in cell.choices if choice.strategy == TOPK]
        if cell.group not in ("headline", "examples") or not exact:
            return None, []
        most = max(exact, key=lambda choice: choice.n_examples)
        base = self.base(most)
        return most, [FirstOrderTask(self.source, base.policy, one) for one in base.examples]

    def _made(
        self, setting: Setting, split: str, per_task: int, tasks: tuple[str, ...]
    ) -> tuple[Example, ...]:
        key = setting.prompt_tokens, split, per_task, tasks
        if key not in self._examples:
            self._examples[key] = tuple(self._make(self.model, setting, split, per_task, tasks))
        return self._examples[key]


def takes(study: Study) -> str:
    """How long what is missing of each group takes on this machine, by a probe of its speed."""
    speed = measure_speed(study.model)
    hours: dict[str, float] = {}
    for cell in study.cells:
        seconds = sum(stage_seconds(study.graph(cell), speed, study.store_of(cell).results))
        hours[cell.group] = hours.get(cell.group, 0.0) + seconds / 3600
    lines = [f"{group:10} {own:5.1f} h" for group, own in hours.items()]
    note = "(at most: what groups share is counted in each)"
    return "\n".join([*lines, f"{'all':10} {sum(hours.values()):5.1f} h {note}"])
