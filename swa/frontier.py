"""Quality against cost: the exact loss of selections of every size, under one policy or several."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from swa import cost, jsonio
from swa.errors import ExampleError, InputError, SwaWarning
from swa.evaluation import gap_closed
from swa.examples import content_hash
from swa.files import write_text
from swa.gates import Objective
from swa.journal import open_journal
from swa.layer_scores import checked_integer, mean
from swa.policy import AttentionPolicy, format_layers
from swa.problem import CalibrationProblem
from swa.runs import Cost, Spending
from swa.search import SEARCH
from swa.strategies import Plain, Strategy, describe, propose, resolve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

    from swa.examples import Example
    from swa.model import Model

SCHEMA = "swa.pareto/1"


@dataclass(frozen=True)
class ParetoPoint:
    """A selection: what it costs and what it loses."""

    policy: AttentionPolicy
    """With its layers."""
    layers: tuple[int, ...]
    """The full ones; fewer than asked for where more did not help the strategy."""
    loss_per_example: tuple[float, ...]
    """[N], exact, nats per answer token."""
    prefill: float
    """FLOPs of a prefill at `Pareto.prompt_tokens`, as a share of full attention's."""
    kv_cache: float
    """Bytes of keys and values after as many tokens, as a share of full attention's."""

    @property
    def loss(self) -> float:
        """Mean over the examples."""
        return mean(self.loss_per_example)

    @property
    def semantics(self) -> str:
        """The policy in short, for tables: "window 256, tail 64", "window 256, vllm", ..."""
        window, kind = self.policy.sliding_window, self.policy.consumer
        if kind is None and self.policy.decode == "window":
            kind = "windowed decode"
        elif kind is None:
            kind = f"tail {self.policy.num_tail_tokens}"
        return f"window {window if isinstance(window, int) else 'by layer'}, {kind}"


@dataclass(frozen=True, repr=False)
class Pareto:
    """The curves of `pareto`: points by policy, in each by falling number of sliding layers."""

    points: tuple[ParetoPoint, ...]
    loss_full: tuple[float, ...]
    """[N], of full attention, nats per answer token."""
    prompt_tokens: int
    """The length at which costs hold."""
    strategy: str
    objective: Objective
    model_name: str
    examples_hash: str
    cost: Cost
    """Of all of it."""

    @property
    def best(self) -> tuple[ParetoPoint, ...]:
        """The points that none beats, by rising work: each has less loss than all before it."""
        found: list[ParetoPoint] = []
        for point in sorted(self.points, key=lambda point: (point.prefill, point.loss)):
            if not found or point.loss < found[-1].loss:
                found.append(point)
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """What `swa pareto --json` prints, schema "swa.pareto/1"."""
        best = self.best
        return {
            "schema": SCHEMA,
            "model_name": self.model_name,
            "strategy": self.strategy,
            "objective": self.objective,
            "prompt_tokens": self.prompt_tokens,
            "loss_full": mean(self.loss_full),
            "loss_full_per_example": list(self.loss_full),
            "examples_hash": self.examples_hash,
            "prefills_per_example": self.cost.prefills,
            "points": [
                {
                    "layers": list(point.layers),
                    "loss": point.loss,
                    "loss_per_example": list(point.loss_per_example),
                    "prefill": point.prefill,
                    "kv_cache": point.kv_cache,
                    "best": point in best,
                    "policy": point.policy.to_dict(),
                }
                for point in self.points
            ],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON form, atomically. Raises OSError."""
        write_text(path, jsonio.dumps_document(self.to_dict()))

    def table(self) -> Table:
        """For a rich console; points that nothing beats are marked."""
        from rich import box
        from rich.table import Table

        full, best = mean(self.loss_full), self.best
        sliding = max((point.loss for point in self.points if not point.layers), default=full)
        table = Table(
            title=f"{self.model_name}: {self.objective} on {len(self.loss_full)} examples,"
            f" {full:.3f} with full attention; costs at {self.prompt_tokens:,} tokens",
            box=box.SIMPLE_HEAVY,
        )
        for name in ("policy", "layers", "prefill", "KV", self.objective, "gap closed", ""):
            table.add_column(name, justify="left" if name == "policy" else "right")
        previous = None
        for point in self.points:
            if previous is not None and point.semantics != previous:
                table.add_section()
            previous = point.semantics
            closed = gap_closed(point.loss, full=full, sliding=sliding)
            table.add_row(
                point.semantics,
                f"{len(point.layers)}",
                f"{point.prefill:.0%}",
                f"{point.kv_cache:.0%}",
                f"{point.loss:.3f}",
                "" if closed is None else f"{closed:.0%}",
                "*" if point in best else "",
            )
        return table

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw loss over work (needs the extra `plot`: matplotlib)."""
        from swa import plots

        return plots.pareto(self, ax=ax)

    def __repr__(self) -> str:
        lines = [
            f"Pareto: {len(self.points)} selections of {self.model_name} by {self.strategy},"
            f" {self.objective} {mean(self.loss_full):.4f} with full attention",
            *(
                f"  {point.prefill:6.1%} of the prefill  {point.loss:.4f}  {point.semantics}:"
                f" [{format_layers(point.layers)}]"
                for point in self.best
            ),
        ]
        return "\n".join(lines)


def pareto(
    model: Model,
    examples: Sequence[Example],
    policy: AttentionPolicy | Sequence[AttentionPolicy],
    *,
    tail_tokens: Iterable[int] | None = None,
    sizes: Iterable[int] | None = None,
    strategy: str | Strategy | Plain = "path",
    objective: Objective = "nll",
    prompt_tokens: int | None = None,
    seed: int = 0,
    progress: bool = False,
    journal: str | os.PathLike[str] | None = None,
) -> Pareto:
    """Measure quality against cost: choose layers at every size, under every policy.

    Layers are chosen anew under each policy, since those that matter differ, and each selection's
    loss is measured, not estimated: on the examples that it was chosen by, which flatters it.

    Args:
        model: what `swa.load` gives.
        examples: those that carry no signal under some policy are left out of all, with a warning.
        policy: one or several, without `layer_types`.
        tail_tokens: in place of the policies' own: each policy with full decode is taken once with
            each of these tails.
        sizes: numbers of full layers; None: all, from none to every layer.
        strategy: as for `swa.select`. "path" ranks once for all sizes; one that searches anew at
            each size, as "joint" does, costs that many times as much.
        objective: as for `swa.select`.
        prompt_tokens: length at which costs are told; None: that of the longest example.
        seed: of strategies that draw.
        progress: show on stderr what has been spent.
        journal: as for `swa.select`, with which it may be shared.

    Raises:
        InputError: a size that the model does not have; an unknown strategy or objective; a length
            or a seed that is none.
        PolicyError: a policy that does not fit the model, or has chosen its layers.
        ExampleError: no example carries a signal under every policy.
        ScoresError, OSError: of the journal, as `swa.select`.
    """
    policies = _policies(policy, tail_tokens)
    used = _shared(examples, policies)
    most = len(model.selectable_layers)
    wanted = range(most + 1) if sizes is None else sizes
    checked = sorted({checked_integer(size, "a size", 0, most) for size in wanted})
    seed = checked_integer(seed, "seed", 0)
    length = max(example.prompt_len for example in used)
    if prompt_tokens is not None:
        length = checked_integer(prompt_tokens, "prompt_tokens", 1)
    chosen = resolve(strategy, seed=seed)
    points: list[ParetoPoint] = []
    spent, full = Cost(), tuple[float, ...]()
    with (
        open_journal(journal, model, SEARCH) as opened,
        Spending("measuring", shown=progress) as bar,
    ):
        for one in policies:
            show = partial(_show, bar, spent)
            problem = CalibrationProblem(model, used, one, objective, progress=show, journal=opened)
            full = tuple(problem.loss(problem.selectable).tolist())
            for size in checked:
                layers = propose(chosen, problem, size).layers
                losses = tuple(problem.loss(layers).tolist())
                points.append(_point(model, one, layers, losses, length))
            spent += problem.spent
    return Pareto(
        points=tuple(points),
        loss_full=full,
        prompt_tokens=length,
        strategy=describe(strategy, seed),
        objective=objective,
        model_name=model.name,
        examples_hash=content_hash(used),
        cost=spent,
    )


def _show(bar: Spending, before: Cost, now: Cost) -> None:
    bar.show(before + now)


def _policies(
    policy: AttentionPolicy | Sequence[AttentionPolicy], tail_tokens: Iterable[int] | None
) -> list[AttentionPolicy]:
    """Every policy once."""
    given = [policy] if isinstance(policy, AttentionPolicy) else list(policy)
    if not given:
        raise InputError("there is no policy to measure")
    if tail_tokens is None:
        return list(dict.fromkeys(given))
    tails = list(tail_tokens)
    if not tails:
        raise InputError("tail_tokens is empty: give at least one number, 0 for no tail")
    return list(
        dict.fromkeys(
            one if one.decode == "window" else replace(one, num_tail_tokens=tail)
            for one in given
            for tail in tails
        )
    )


def _shared(examples: Sequence[Example], policies: Sequence[AttentionPolicy]) -> list[Example]:
    """The examples that can tell layers apart under every policy: curves need the same ones."""
    used = [
        example
        for example in examples
        if all(one.carries_signal(example.prompt_len, example.answer_len) for one in policies)
    ]
    if not used:
        raise ExampleError(
            f"none of the {len(examples)} examples carries a signal under every policy: use longer"
            " prompts, a smaller window, or shorter tails"
        )
    if len(used) < len(examples):
        warnings.warn(
            f"{len(examples) - len(used)} of {len(examples)} examples carry no signal under some"
            " policy and were left out of all",
            SwaWarning,
            stacklevel=3,
        )
    return used


def _point(
    model: Model,
    policy: AttentionPolicy,
    layers: tuple[int, ...],
    losses: tuple[float, ...],
    length: int,
) -> ParetoPoint:
    config = model.config
    prices: tuple[Callable[[tuple[int, ...]], float], ...] = (
        lambda full: cost.prefill_work(config, policy, full, length).flops,
        lambda full: cost.kv_bytes(config, policy, full, length),
    )
    prefill, kv_cache = (price(layers) / price(model.selectable_layers) for price in prices)
    hybrid = policy.with_full_layers(layers, config.num_hidden_layers)
    return ParetoPoint(hybrid, layers, losses, prefill, kv_cache)
