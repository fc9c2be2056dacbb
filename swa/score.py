"""The exact sweep over layers, example by example: resumable, with an honest progress bar."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from swa import __version__, cost
from swa.elimination import AdaptiveStop, StoppingRule
from swa.errors import ExampleError, InputError, PolicyError, ScoresError, SwaWarning
from swa.examples import Example, content_hash
from swa.journal import Journal
from swa.layer_scores import (
    Direction,
    LayerScores,
    LayerValues,
    checked_integer,
    read_integer,
    read_layer_values,
    read_number,
    scored_layers,
)
from swa.policy import AttentionPolicy, format_layers
from swa.resampling import MAX_BOOTSTRAP

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from swa.config import ModelConfig
    from swa.model import Model

__all__ = ["ExampleScores", "LayerScores", "SweepTask", "score_layers"]

NOT_FINITE = (
    "the checkpoint holds values that are not finite, or too large for its dtype (if that is"
    ' "bfloat16", try "float32")'
)


def score_layers(
    model: Model,
    examples: Sequence[Example],
    policy: AttentionPolicy,
    *,
    direction: Direction = "restore",
    base: Iterable[int] | None = None,
    progress: bool = False,
    journal: str | os.PathLike[str] | None = None,
    stop: AdaptiveStop | None = None,
    n_bootstrap: int = 2000,
    seed: int = 0,
) -> LayerScores:
    """Score every layer by what its full attention is worth to the answers.

    With nll an example's mean negative log-likelihood per answer token (teacher forced, in nats):

    - "restore" (arXiv 2606.27791): delta[l] = nll(base) - nll(base with l full), by default from
      all layers sliding;
    - "ablate": delta[l] = nll(base without l) - nll(base), by default from all layers full.

    Either way a large delta says: keep this layer full. Every layer is really run, so deltas are
    exact, and the same to the bit for every number of threads.

    Args:
        model: what `swa.load` gives; a patched model is scored under `policy`, not under its own.
        examples: those on which `policy` cannot differ from full attention are left out, with a
            warning.
        policy: how sliding layers attend, without `layer_types`: score what will be served.
        base: the layers that are full in the base run. Restored from such a base, they have no
            delta and stay selected; ablated, they are the only ones to have one.
        progress: show a bar on stderr whose time of arrival follows the work left.
        journal: a file to which each example is added when done. A run that was killed goes on from
            it, and ends in the same scores to the bit. Timings are kept there, not in the scores.
        stop: end once the top layers are known at a confidence, and run settled layers no more
            (see `swa.elimination` for the rule). Examples are then taken in random order, and
            `LayerScores.adaptive` says which were scored, and what that saved.
        n_bootstrap: resamplings of the examples behind `LayerScores.interval`.
        seed: of those resamplings, and of the order of the examples under `stop`.

    Raises:
        InputError: `direction`, `base`, `n_bootstrap` or `seed` is not as above, no layer is left
            to score, or the budget of `stop` leaves nothing to choose.
        PolicyError: the policy does not fit the model, or has chosen its layers already.
        ExampleError: there are no examples, or none that carries a signal.
        ScoresError: the journal is of other inputs, damaged or in use; or an NLL is not finite.
    """
    n_bootstrap = checked_integer(n_bootstrap, "n_bootstrap", 1, MAX_BOOTSTRAP)
    seed = checked_integer(seed, "seed", 0)
    tasks, left_out = sweep_tasks(model, examples, policy, direction, base)
    model.check_examples([task.example for task in tasks])
    inputs = _identity(model, tasks) | {"policy": policy.to_dict()}
    rule = None
    if stop is not None:
        rule = StoppingRule(
            stop,
            tasks[0].flips,
            stop.budget.resolve(model.config.num_hidden_layers),
            len(tasks[0].base) if direction == "restore" else 0,
            [task.example.task for task in tasks],
            seed,
        )
        inputs["stop"] = rule.identity
    with Journal(journal, inputs) if journal is not None else nullcontext() as opened:
        results = _run(model, tasks, opened, progress, rule)
    return layer_scores(
        model,
        [tasks[index] for index in results],
        list(results.values()),
        notes=() if left_out is None else (left_out,),
        n_bootstrap=n_bootstrap,
        seed=seed,
        adaptive=None if rule is None else rule.record(sweep_flops(model, tasks)),
    )


def layer_scores(
    model: Model,
    tasks: Sequence[SweepTask],
    results: Sequence[ExampleScores],
    *,
    notes: Sequence[str] = (),
    **settings: Any,
) -> LayerScores:
    """The scores that the results of all `tasks`, in their order, make.

    `settings` are further fields of LayerScores. Raises ScoresError as it does.
    """
    used = [task.example for task in tasks]
    own = (model.precision_note,) if model.precision_note is not None else ()
    return LayerScores(
        **_identity(model, tasks) | settings,
        policy=tasks[0].policy,
        selectable_layers=tasks[0].selectable,
        num_hidden_layers=model.config.num_hidden_layers,
        model_name=model.name,
        tasks=tuple(example.task for example in used),
        nll_base=tuple(result.nll_base for result in results),
        nll_full=tuple(result.nll_full for result in results),
        nll_swa=tuple(result.nll_swa for result in results),
        delta_per_example=tuple(result.delta for result in results),
        notes=(*own, *notes),
    )


def _identity(model: Model, tasks: Sequence[SweepTask]) -> dict[str, Any]:
    """What the results depend on beside the policy, as fields of LayerScores."""
    return {
        "direction": tasks[0].direction,
        "base": tasks[0].base,
        "model_fingerprint": model.fingerprint,
        "dtype": model.dtype,
        "tier": model.engine.tier,
        "examples_hash": content_hash(task.example for task in tasks),
        "version": __version__,
    }


@dataclass(frozen=True)
class ExampleScores:
    """One example's mean NLLs and deltas, in nats per answer token: a line of the journal."""

    nll_base: float
    nll_full: float
    nll_swa: float
    delta: LayerValues
    """[L], None where a layer was not flipped."""

    @property
    def flipped(self) -> tuple[int, ...]:
        """The layers that have a delta, ascending."""
        return tuple(layer for layer, value in enumerate(self.delta) if value is not None)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ExampleScores:
        """Read what `dataclasses.asdict` and JSON made of it. Raises KeyError, TypeError."""
        return cls(
            nll_base=read_number(record["nll_base"]),
            nll_full=read_number(record["nll_full"]),
            nll_swa=read_number(record["nll_swa"]),
            delta=read_layer_values(record["delta"]),
        )


@dataclass(frozen=True)
class SweepTask:
    """The work on one example: can be pickled, and needs nothing but the model."""

    index: int
    example: Example
    policy: AttentionPolicy
    direction: Direction
    base: tuple[int, ...]
    selectable: tuple[int, ...]
    only: tuple[int, ...] | None = None
    """Layers still to be flipped, where a rule has settled others; None: all."""

    @property
    def flips(self) -> tuple[int, ...]:
        """The layers that the sweep flips, one a run."""
        if self.only is not None:
            return self.only
        return scored_layers(self.direction, self.base, self.selectable)

    @property
    def ends(self) -> tuple[tuple[int, ...], ...]:
        """The layers that are full in the passes beside the sweep: all, then none."""
        return tuple(layers for layers in (self.selectable, ()) if layers != self.base)

    def work(self, config: ModelConfig) -> tuple[cost.Work, ...]:
        """The estimated work: of the sweep, then of each pass of `ends`."""
        lengths = self.example.prompt_len, self.example.answer_len
        return (
            cost.sweep_work(config, self.policy, self.base, self.flips, *lengths),
            *(cost.nll_work(config, self.policy, layers, *lengths) for layers in self.ends),
        )

    def run(
        self, model: Model, progress: Callable[[float], None] = lambda flops: None
    ) -> ExampleScores:
        """Do the work; `progress` is told, now and then, the FLOPs done so far, as `work` counts.

        Raises:
            ScoresError: an NLL is not finite.
        """
        flops = [part.flops for part in self.work(model.config)]
        sweep = model.sweep_example(
            self.example,
            self.policy,
            frozenset(self.base),
            self.flips,
            self.direction == "restore",
            progress=lambda done, total: progress(flops[0] * done / total),
        )
        nll = {self.base: self._mean(sweep.base_nll, self.base)}
        for i, layers in enumerate(self.ends, start=1):
            progress(sum(flops[:i]))
            result = model.nll_example(
                self.example, policy=self.policy, full_layers=frozenset(layers)
            )
            nll[layers] = self._mean(result.per_token, layers)
        delta: list[float | None] = [None] * model.config.num_hidden_layers
        for layer in self.flips:
            flipped = self._mean(sweep.run_nll[layer], set(self.base) ^ {layer})
            sliding, restored = nll[self.base], flipped
            if self.direction == "ablate":
                sliding, restored = restored, sliding
            delta[layer] = sliding - restored
        return ExampleScores(nll[self.base], nll[self.selectable], nll[()], tuple(delta))

    def _mean(self, per_token: npt.NDArray[np.float64], full_layers: Iterable[int]) -> float:
        nll = float(per_token.mean())
        return finite(nll, f"the NLL of example {self.index}", full_layers)


def finite(value: float, what: str, full_layers: Iterable[int]) -> float:
    """`value`. Raises ScoresError: it is not finite."""
    if not math.isfinite(value):
        raise ScoresError(
            f"{what} is {value} with full attention in layers [{format_layers(full_layers)}]:"
            f" {NOT_FINITE}"
        )
    return value


def sweep_tasks(
    model: Model,
    examples: Sequence[Example],
    policy: AttentionPolicy,
    direction: Direction,
    base: Iterable[int] | None,
) -> tuple[list[SweepTask], str | None]:
    """The work of `score_layers`, one task an example, and a note where examples were left out.

    Warns and raises as `score_layers`.
    """
    check_policy(policy, model.config.num_hidden_layers)
    selectable = tuple(sorted(model.selectable_layers))
    full = _base_layers(base, direction, selectable)
    used, left_out = with_signal(examples, policy)
    return [
        SweepTask(index, example, policy, direction, full, selectable)
        for index, example in enumerate(used)
    ], left_out


def run_tasks(
    model: Model, tasks: Sequence[SweepTask], *, progress: bool = False
) -> list[ExampleScores]:
    """The results of all tasks, in their order, with a bar on stderr if asked for.

    Raises as `SweepTask.run`.
    """
    model.check_examples([task.example for task in tasks])
    with _Bar(sweep_flops(model, tasks), 0.0, shown=progress) as bar:
        return [_measured(model, task, None, bar) for task in tasks]


def sweep_flops(model: Model, tasks: Iterable[SweepTask]) -> float:
    """The estimated work of all tasks."""
    return sum(part.flops for task in tasks for part in task.work(model.config))


def _run(
    model: Model,
    tasks: Sequence[SweepTask],
    journal: Journal | None,
    progress: bool,
    rule: StoppingRule | None,
) -> dict[int, ExampleScores]:
    """Results by example, in the order of running: read from the journal, or run and added to it.

    Without a rule all examples, in their order; with one, units of examples until it is decided.
    """
    recorded = {} if journal is None else _recorded(journal, tasks)
    known = [replace(tasks[index], only=result.flipped) for index, result in recorded.items()]
    units = [(task.index,) for task in tasks] if rule is None else rule.units
    results: dict[int, ExampleScores] = {}
    with _Bar(sweep_flops(model, tasks), sweep_flops(model, known), shown=progress) as bar:
        for number, unit in enumerate(units, start=1):
            only = None if rule is None else rule.open_layers
            unit_tasks = [replace(tasks[index], only=only) for index in unit]
            for task in unit_tasks:
                if task.index in recorded:
                    results[task.index] = _fitting(recorded[task.index], task, journal)
                else:
                    results[task.index] = _measured(model, task, journal, bar)
            if rule is None:
                continue
            deltas = {index: results[index].delta for index in unit}
            if rule.observe(deltas, sweep_flops(model, unit_tasks)):
                left = [] if rule.is_decided else [i for later in units[number:] for i in later]
                open_tasks = [replace(tasks[index], only=rule.open_layers) for index in left]
                bar.expect(sweep_flops(model, open_tasks))
            if rule.is_decided:
                break
    return results


def _measured(model: Model, task: SweepTask, journal: Journal | None, bar: _Bar) -> ExampleScores:
    begun = time.monotonic()
    result = task.run(model, bar.show)
    seconds = round(time.monotonic() - begun, 3)
    if journal is not None:
        journal.append({"example": task.index, **asdict(result), "seconds": seconds})
    bar.finish(sweep_flops(model, [task]))
    return result


def _fitting(result: ExampleScores, task: SweepTask, journal: Journal | None) -> ExampleScores:
    """A result from the journal, if it is of the layers that this task flips."""
    if result.flipped != task.flips:
        raise ScoresError(
            f"{journal.path if journal else ''}: example {task.index} has deltas of the layers"
            f" [{format_layers(result.flipped)}], not of [{format_layers(task.flips)}]: delete this"
            " file to start anew"
        )
    return result


def _recorded(journal: Journal, tasks: Sequence[SweepTask]) -> dict[int, ExampleScores]:
    """The results that a journal holds, by example."""
    results: dict[int, ExampleScores] = {}

    def parse(record: dict[str, Any]) -> None:
        index = read_integer(record["example"])
        if index in results or not 0 <= index < len(tasks):
            raise ValueError(f"example {index} is not expected")
        result = results[index] = ExampleScores.from_record(record)
        if not result.flipped or not set(result.flipped) <= set(tasks[index].flips):
            raise ValueError(f"deltas of the layers {result.flipped} are not expected")

    journal.read("an example", parse)
    return results


class _Bar:
    """A tqdm bar in FLOPs, so that its pace is the machine's and its time of arrival holds."""

    def __init__(self, total: float, finished: float, *, shown: bool) -> None:
        self._finished = finished
        self._bar: Any = None
        if shown:
            from tqdm.auto import tqdm

            self._bar = tqdm(
                desc="scoring", total=total, initial=finished, unit="FLOP", unit_scale=True
            )

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, flops: float) -> None:
        """Show what is done of the task under way."""
        if self._bar is not None:
            self._bar.update(self._finished + flops - self._bar.n)

    def finish(self, flops: float) -> None:
        """A task of so many FLOPs is done."""
        self._finished += flops
        self.show(0.0)

    def expect(self, flops: float) -> None:
        """So many FLOPs are left, fewer than was thought."""
        if self._bar is not None:
            self._bar.total = self._finished + flops
            self._bar.refresh()


def check_policy(policy: AttentionPolicy, num_layers: int) -> None:
    """Raises PolicyError: `policy` does not fit, or has chosen its layers already."""
    policy.windows(num_layers)  # refuses windows for another number of layers
    if policy.layer_types is not None:
        raise PolicyError(
            "layer_types is set, but scores are what layers are chosen by: leave it out, and name"
            " the layers that are full in the base run with base="
        )


def _base_layers(
    base: Iterable[int] | None, direction: Direction, selectable: tuple[int, ...]
) -> tuple[int, ...]:
    if direction not in ("restore", "ablate"):
        raise InputError(f'direction must be "restore" or "ablate", not {direction!r}')
    if base is None:
        full = () if direction == "restore" else selectable
    else:
        full = tuple(sorted({checked_integer(layer, "a layer of base", 0) for layer in base}))
    strangers = sorted(set(full) - set(selectable))
    if strangers:
        raise InputError(
            f"base has the layers [{format_layers(strangers)}], which cannot be full or sliding at"
            f" will: this model's can in [{format_layers(selectable)}]"
        )
    if not scored_layers(direction, full, selectable):
        raise InputError(f"no layer is left to {direction} from the base [{format_layers(full)}]")
    return full


def with_signal(
    examples: Sequence[Example], policy: AttentionPolicy
) -> tuple[list[Example], str | None]:
    """The examples that can tell layers apart, and a note where some cannot.

    Warns two callers up, as `score_layers`. Raises ExampleError: none can.
    """
    if not examples:
        raise ExampleError("there are no examples to score on")
    used = [e for e in examples if policy.carries_signal(e.prompt_len, e.answer_len)]
    if len(used) == len(examples):
        return used, None
    note = (
        f"{len(examples) - len(used)} of {len(examples)} examples carry no signal and were left"
        " out: they are too short for the window and the sinks to hide a key from them"
    )
    if not used:
        longest = max(example.prompt_len for example in examples)
        raise ExampleError(
            f"no example carries a signal: the longest prompt has {longest} tokens, and {policy!r}"
            " hides nothing from it; use longer prompts, or a smaller window"
        )
    warnings.warn(note, SwaWarning, stacklevel=4)  # at the caller of score_layers
    return used, note
