"""What a sweep will take: the work of its tasks, the time of a worker, and its memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from swa import cost
from swa.cost import Work
from swa.estimate import duration, measure_speed
from swa.examples import Example
from swa.gates import References
from swa.memory import GIB
from swa.model import Model
from swa.policy import AttentionPolicy
from swa.problem import CalibrationProblem
from swa.runs import F64
from swa.sweeps.graph import FULL, SLIDING, Base, Choice, Graph, Heldout, Results
from swa.sweeps.model_sweep import ModelSweep
from swa.sweeps.run import Examples, Models, model_sweeps, threads_of
from swa.sweeps.tasks import proposed


@dataclass(frozen=True)
class ModelEstimate:
    """Work, time and memory of one model and dtype; times are those of one worker."""

    model: str
    dtype: str
    n_points: int
    score_seconds: float
    select_seconds: float
    evaluate_seconds: float
    weight_bytes: int
    peak_bytes: int
    """Of a worker, weights included."""

    @property
    def seconds(self) -> float:
        return self.score_seconds + self.select_seconds + self.evaluate_seconds


@dataclass(frozen=True, repr=False)
class SweepEstimate:
    """What `swa.sweep` would take on machines like this one, without loading models."""

    models: tuple[ModelEstimate, ...]
    workers: int
    threads: int
    """Of each worker; 0: all cores."""

    @property
    def seconds(self) -> float:
        """All points, by that many workers that never wait."""
        return sum(model.seconds for model in self.models) / max(self.workers, 1)

    def to_dict(self) -> dict[str, Any]:
        """What `swa sweep --estimate --json` prints."""
        models = [asdict(model) | {"seconds": model.seconds} for model in self.models]
        return asdict(self) | {"models": models, "seconds": self.seconds}

    def __repr__(self) -> str:
        threads = (
            f"{self.threads} thread{'s' * (self.threads != 1)}" if self.threads else "all cores"
        )
        lines = [
            f"SweepEstimate: about {duration(self.seconds)} on {self.workers or 1} x {threads}"
        ]
        for model in self.models:
            peak, weights = model.peak_bytes / GIB, model.weight_bytes / GIB
            stages = ", ".join(
                f"{stage} {duration(seconds)}"
                for stage, seconds in (
                    ("scoring", model.score_seconds),
                    ("selecting", model.select_seconds),
                    ("evaluating", model.evaluate_seconds),
                )
            )
            lines += [
                f"  {model.model} ({model.dtype}): {model.n_points} points",
                f"    time    {duration(model.seconds)} of one worker"
                f" ({duration(model.seconds / model.n_points)} a point): {stages}",
                f"    memory  {peak:,.2f} GiB a worker, {weights:,.2f} of them weights",
            ]
        return "\n".join(lines)


def estimate_sweep(
    models: Models,
    calibration: Examples,
    heldout: Examples,
    *,
    workers: int = 0,
    threads: int | None = None,
    **options: Any,
) -> SweepEstimate:
    """Measure this machine for a second a model, and tell what `sweep` would take.

    Strategies are tried on losses and gradients that are drawn, not computed, to count what they
    ask for. That choices may turn out equal, and are evaluated once, is not foreseen.

    Arguments, the other `options` among them, and errors are those of `sweep`.
    """
    threads = threads_of(workers) if threads is None else threads
    runs = model_sweeps(models, calibration, heldout, threads=threads, **options)
    return SweepEstimate(tuple(map(_of_model, runs)), workers, threads)


class DryProblem(CalibrationProblem):
    """Counts what a strategy asks for; the answers are drawn, and the model runs nothing."""

    def run_loss(self, full_layers: frozenset[int], index: int) -> float:
        share = len(full_layers) / self.num_layers
        return 2 - share + 0.1 * float(self._draws(bytes(sorted(full_layers)), index)[0])

    def run_gradient(self, alpha: F64, index: int) -> tuple[float, F64]:
        gradient = np.zeros(self.num_layers)
        chosen = list(self.selectable)
        gradient[chosen] = -self._draws(alpha.tobytes(), index)[chosen] / self.num_layers
        return 2 - float(alpha.mean()), gradient

    def run_sweep(self, index: int) -> tuple[float, F64]:
        return 2.0, 2 - self._draws(b"", index) / self.num_layers

    def run_ratios(self, num_last_tokens: int, index: int) -> F64:
        return self._draws(b"ratios", index)

    def _draws(self, key: bytes, index: int) -> F64:
        """float64 [L] in 0..1, the same for the same question."""
        return np.random.default_rng([zlib.crc32(key), index]).random(self.num_layers)


class StageSeconds(NamedTuple):
    """What the tasks of a graph take, one after the other."""

    score: float
    select: float
    evaluate: float


def stage_seconds(graph: Graph, speed: Work, done: Results = MappingProxyType({})) -> StageSeconds:
    """Estimated from the work; `speed` in FLOP/s, as `measure_speed` finds it.

    Tasks in `done` take nothing.
    """
    model = graph.model
    n_layers = len(model.selectable_layers)

    def seconds(works: Iterable[Work]) -> float:
        return sum(work.seconds(speed) for work in works)

    def passes(policy: AttentionPolicy, examples: Iterable[Example], n_full: int) -> float:
        layers = model.selectable_layers[:n_full]  # which ones makes no difference
        return seconds(
            cost.nll_work(model.config, policy, layers, example.prompt_len, example.answer_len)
            for example in examples
        )

    score = select = 0.0
    for base in dict.fromkeys(choice.base for choice in graph.choices):
        choices = [choice for choice in graph.choices if choice.base is base]
        if any(choice.takes_scores for choice in choices):
            tasks = [task for task in base.scoring if task.key not in done]
            score += seconds(work for task in tasks for work in task.work.work(model.config))
        left = [choice for choice in choices if graph.selection(choice).key not in done]
        select += _prefills(model, left) * passes(base.policy, base.examples, n_layers)
    evaluate = 0.0
    seen_full = set[Heldout]()  # under all policies the same
    for point in graph.points:
        if point.choice == FULL and point.heldout in seen_full:
            continue
        size = point.choice.size if isinstance(point.choice, Choice) else None
        if point.choice == SLIDING:
            size = 0
        known = {task.example_hash for task in graph.evaluations(point, done) if task.key in done}
        heldout = zip(point.heldout.examples, point.heldout.hashes, strict=True)
        examples = [example for example, its_hash in heldout if its_hash not in known]
        # As many as it takes may be all.
        evaluate += passes(point.policy, examples, n_layers if size is None else size)
        if point.choice == FULL:
            seen_full.add(point.heldout)
    return StageSeconds(score, select, evaluate)


def _of_model(run: ModelSweep) -> ModelEstimate:
    model = run.graph.model
    seconds = stage_seconds(run.graph, measure_speed(model))
    return ModelEstimate(
        model=model.name,
        dtype=model.dtype,
        n_points=len(run.graph.points),
        score_seconds=seconds.score,
        select_seconds=seconds.select,
        evaluate_seconds=seconds.evaluate,
        weight_bytes=model.engine.weight_bytes,
        peak_bytes=max(_memory(model, base, run.heldout.examples) for base in run.bases),
    )


def _prefills(model: Model, choices: Iterable[Choice]) -> float:
    """What selections under one policy take, in prefills an example, beside the scores.

    By one worker, which keeps what it finds out from one selection to the next.
    """
    problem: DryProblem | None = None
    for choice in choices:
        if not choice.takes_scores:
            base = choice.base
            problem = problem or DryProblem(model, base.examples, base.policy, base.objective)
            proposed(choice.strategy.strategy, problem, choice.budget)
    return 0.0 if problem is None else problem.spent.prefills


def _memory(model: Model, base: Base, heldout: Iterable[Example]) -> int:
    """Bytes that a worker needs for this policy's tasks, weights included."""
    calibration, evaluation = (
        max(example.prompt_len + example.answer_len for example in examples)
        for examples in (base.examples, heldout)
    )
    references, n_copied = 0, 0
    if base.objective == "kl":
        references = References(model, base.examples).peak_bytes
        n_copied = max(example.answer_len for example in base.examples)
    return max(
        model.memory_required(evaluation),
        model.memory_required(calibration, "sweep", base.policy),
        model.engine.weight_bytes + model.engine.gates_bytes(calibration, 2, n_copied) + references,
    )
