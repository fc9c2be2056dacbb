"""The work of a sweep in pieces that can be pickled: score an example, select, evaluate one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from swa import jsonio
from swa.budget import Budget
from swa.errors import CheckpointError, ScoresError
from swa.evaluation import evaluate
from swa.examples import Example
from swa.gates import Objective
from swa.journal import JournalInUse, open_journal
from swa.layer_scores import LayerScores, read_integer, read_number
from swa.policy import AttentionPolicy, format_layers
from swa.problem import CalibrationProblem
from swa.score import ExampleScores, SweepTask
from swa.search import SEARCH
from swa.strategies import Proposal, Strategy, propose
from swa.strategies.base import Plain
from swa.strategies.fewest import fewest
from swa.sweeps.grid import NamedStrategy

if TYPE_CHECKING:
    from swa.model import Dtype, Model


SECONDS = "seconds"


@dataclass(frozen=True)
class ModelSource:
    """How a worker opens a model, and what it must then be."""

    path: str
    dtype: Dtype
    fingerprint: str
    num_threads: int = 0
    revision: str | None = None
    local_files_only: bool = False
    max_position_embeddings: int | None = None
    searches: str | None = None
    """A folder where selections under way keep what they have run, for whoever goes on with them.

    Workers that do not find it there do without.
    """

    @property
    def identity(self) -> dict[str, Any]:
        """What results depend on: not where the model lies, nor how many threads run it."""
        return {"fingerprint": self.fingerprint, "dtype": self.dtype}

    def open(self) -> Model:
        """Load it, without the policy that an export may have.

        Raises:
            CheckpointError: what lies there now is another model; and as `swa.load`.
        """
        from swa.model import load

        model = load(
            self.path,
            revision=self.revision,
            local_files_only=self.local_files_only,
            dtype=self.dtype,
            num_threads=self.num_threads,
            max_position_embeddings=self.max_position_embeddings,
        )
        if model.fingerprint != self.fingerprint:
            raise CheckpointError(
                "this worker finds another model here than the process that began the sweep: give"
                " a path at which all find the same",
                file=self.path,
            )
        return replace(model, policy=None)


class Task(Protocol):
    """One piece of work: everything that it depends on, and how it is done."""

    @property
    def source(self) -> ModelSource: ...

    @property
    def key(self) -> str:
        """SHA-256 (hex) of `inputs`: equal work has equal keys."""
        ...

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def inputs(self) -> dict[str, Any]:
        """JSON values, all that the result depends on."""
        ...

    def run(self, model: Model) -> dict[str, Any]:
        """Do the work; the result in JSON values, equal for equal `inputs`.

        But for the value of SECONDS, if there is one: what to say that it took.
        """
        ...


class Keyed:
    """A key made from a dataclass's `inputs`."""

    @cached_property
    def key(self) -> str:
        inputs: dict[str, Any] = self.inputs  # type: ignore[attr-defined]
        return jsonio.digest(inputs)


@dataclass(frozen=True)
class ScoreTask(Keyed):
    """The exact deltas of one calibration example."""

    source: ModelSource
    work: SweepTask
    example_hash: str
    """As `content_hash` gives it, which takes its time: computed once for all policies."""

    @property
    def name(self) -> str:
        return f"scoring example {self.work.index} under {self.work.policy!r}"

    @cached_property
    def inputs(self) -> dict[str, Any]:
        return {
            "stage": "score",
            **self.source.identity,
            "policy": self.work.policy.to_dict(),
            "example": self.example_hash,
        }

    def run(self, model: Model) -> dict[str, Any]:
        return asdict(self.work.run(model)) | {"tier": model.engine.tier}

    @staticmethod
    def read(result: Mapping[str, Any]) -> tuple[ExampleScores, str]:
        """The scores and the kernels' tier that `run` gave. Raises KeyError, TypeError."""
        return ExampleScores.from_record(result), str(result["tier"])


@dataclass(frozen=True)
class EvaluateTask(Keyed):
    """NLL and greedy match of one example under one choice of layers."""

    source: ModelSource
    policy: AttentionPolicy | None
    """With its layers; None: the checkpoint's own attention."""
    example: Example
    example_hash: str

    @property
    def name(self) -> str:
        layers = (
            "own" if self.policy is None else format_layers(self.policy.full_attention_layers or ())
        )
        return f"evaluating {self.example!r}, full layers [{layers}]"

    @cached_property
    def inputs(self) -> dict[str, Any]:
        return {
            "stage": "evaluate",
            **self.source.identity,
            "policy": None if self.policy is None else self.policy.to_dict(),
            "example": self.example_hash,
        }

    def run(self, model: Model) -> dict[str, Any]:
        measured = evaluate(model, [self.example], policy=self.policy)
        return {
            "nll": measured.nll_per_example[0],
            "greedy_match": measured.greedy_match_per_example[0],
        }

    @staticmethod
    def read(result: Mapping[str, Any]) -> tuple[float, bool]:
        """NLL and greedy match as `run` gave them. Raises KeyError, TypeError."""
        return read_number(result["nll"]), bool(result["greedy_match"])


@dataclass(frozen=True)
class SelectTask(Keyed):
    """The layers that one strategy keeps full within one budget."""

    STAGE: ClassVar = "select"

    source: ModelSource
    policy: AttentionPolicy
    objective: Objective
    strategy: NamedStrategy
    budget: Budget
    """A number of layers, or a tolerance."""
    examples: tuple[Example, ...]
    examples_hash: str
    scores: LayerScores | None
    """For strategies that take them; they follow from the other inputs."""

    @property
    def name(self) -> str:
        return f"selecting {self.budget} by {self.strategy.name} under {self.policy!r}"

    @cached_property
    def inputs(self) -> dict[str, Any]:
        return {
            "stage": self.STAGE,
            **self.source.identity,
            "policy": self.policy.to_dict(),
            "objective": self.objective,
            "strategy": self.strategy.identity,
            **self.budget.to_dict(),
            "examples": self.examples_hash,
        }

    def run(self, model: Model) -> dict[str, Any]:
        with self._under_way(model) as problem:
            proposal = proposed(self.strategy.strategy, problem, self.budget)
        return {
            "layers": list(proposal.layers),
            "prefills": proposal.cost.prefills,
            "trace": list(map(str, proposal.trace)),
            SECONDS: round(proposal.cost.seconds, 3),
        }

    def forget(self) -> None:
        """Remove what was kept of it while it was under way. Raises OSError."""
        if self.source.searches is not None:
            for path in Path(self.source.searches).glob(f"{self.key}-*"):
                path.unlink(missing_ok=True)

    @contextmanager
    def _under_way(self, model: Model) -> Iterator[CalibrationProblem]:
        """The problem, with a journal of what it runs where there is a place for one."""
        folder, path, problem = self.source.searches, None, self._problem(model)
        if folder is not None and self.scores is None:
            path = Path(folder) / f"{self.key}-{model.engine.tier}"
        with ExitStack() as stack:

            def journaled() -> CalibrationProblem:
                journal = stack.enter_context(open_journal(path, model, SEARCH))
                return problem if journal is None else problem.journaled(journal)

            # No folder: this worker is elsewhere. In use: the task was taken for lost, runs twice.
            with suppress(JournalInUse, OSError):
                try:
                    problem = journaled()
                except JournalInUse:
                    raise
                except ScoresError:  # of another version, or damaged: there is less to go on from
                    assert path is not None
                    stack.close()
                    path.unlink(missing_ok=True)
                    problem = journaled()
            yield problem

    def _problem(self, model: Model) -> CalibrationProblem:
        """Kept from one selection to the next, which need not run again what the last one ran.

        What a strategy finds, and what it costs, does not depend on what was known before.
        """

        def pose() -> CalibrationProblem:
            return CalibrationProblem(
                model, self.examples, self.policy, self.objective, scores=self.scores
            )

        if self.scores is not None:
            return pose()
        key = self.source, self.policy, self.objective, self.examples_hash
        with _lock:
            if key not in _posed:
                _posed.clear()
                _posed[key] = pose()
            return _posed[key]

    @staticmethod
    def read(result: Mapping[str, Any]) -> tuple[tuple[int, ...], float]:
        """The layers, and their cost in prefills an example. Raises KeyError, TypeError."""
        return tuple(map(read_integer, result["layers"])), read_number(result["prefills"])


def proposed(strategy: Strategy | Plain, problem: CalibrationProblem, budget: Budget) -> Proposal:
    """What a strategy proposes within a number of layers, or a tolerance.

    Raises as `swa.select`.
    """
    if budget.nll_increase is not None:
        return fewest(strategy, problem, budget.nll_increase)
    return propose(strategy, problem, budget.resolve(problem.num_layers))


@dataclass(frozen=True)
class Outcome:
    """What became of a task: its result, or the error that it raised."""

    key: str
    result: dict[str, Any] | None = None
    error: Exception | None = None
    tier: str = ""
    """Of the kernels that ran it: bits depend on it."""
    seconds: float = 0.0
    """That it took, without opening the model."""


def run_task(task: Task, attempt: int) -> Outcome:
    """Do a task in this process, whose model stays open for the next."""
    try:
        model = opened(task.source)
        begun = time.monotonic()
        found = task.run(model)
        seconds = found.pop(SECONDS, round(time.monotonic() - begun, 3))
        result = jsonio.loads(jsonio.dumps_line(found))  # as a journal gives it back
    except Exception as error:
        return Outcome(task.key, error=error)
    return Outcome(task.key, result, tier=model.engine.tier, seconds=seconds)


_lock = threading.RLock()
_open: dict[ModelSource, Model] = {}
_posed: dict[Any, CalibrationProblem] = {}


def opened(source: ModelSource) -> Model:
    """The model, opened if it was not the last one asked for: one at a time is kept."""
    with _lock:
        if source not in _open:
            close_model()
            _open[source] = source.open()
        return _open[source]


def close_model() -> None:
    """Let go of the model that this process keeps, and of what it found out about it."""
    with _lock:
        _open.clear()
        _posed.clear()
