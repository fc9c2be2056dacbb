"""Does a choice survive another domain? Calibrated on one, evaluated on each."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from swa.budget import Budget
from swa.errors import ExampleError, InputError
from swa.evaluation import evaluate
from swa.examples import Example
from swa.layer_scores import checked_integer
from swa.policy import AttentionPolicy, format_layers
from swa.score import check_policy, layer_scores, run_tasks, sweep_tasks
from swa.selection import top_layers
from swa.statistics import GapClosed, gap_closed_bootstrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from swa.model import Model

ALL = "all"  # the row calibrated on every domain's examples together

Choose = Callable[[Sequence[Example]], Sequence[int]]
"""The layers to keep full, from calibration examples."""


class Domain(NamedTuple):
    """Examples of one kind; the two lists share none."""

    calibration: Sequence[Example]
    heldout: Sequence[Example]


@dataclass(frozen=True, repr=False)
class TransferMatrix:
    """Share of the gap closed on each domain by the layers chosen on each."""

    domains: tuple[str, ...]
    """The columns; the rows are these and, of more than one, "all" at the end."""
    layers: Mapping[str, tuple[int, ...]]
    """Chosen on each row's examples."""
    closed: Mapping[str, Mapping[str, GapClosed]]
    """[row][column]."""
    nll_full: Mapping[str, float]
    """Mean NLL of each column's held-out examples with full attention, nats per answer token."""
    nll_sliding: Mapping[str, float]
    """With all layers sliding."""
    model_name: str

    @property
    def rows(self) -> tuple[str, ...]:
        """What was calibrated on."""
        return tuple(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model_name": self.model_name,
            "domains": self.domains,
            "layers": dict(self.layers),
            "nll_full": dict(self.nll_full),
            "nll_sliding": dict(self.nll_sliding),
            "gap_closed": {
                row: {
                    column: {"share": cell.share, "interval": cell.interval}
                    for column, cell in cells.items()
                }
                for row, cells in self.closed.items()
            },
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the matrix (needs the extra `plot`: matplotlib)."""
        from swa import plots

        return plots.transfer_matrix(self, ax)

    def __repr__(self) -> str:
        width = max(map(len, (*self.rows, "calibrated on"))) + 2
        columns = [max(len(column), 18) for column in self.domains]
        lines = [
            "TransferMatrix: share of the gap from all sliding to full attention that is closed",
            "  "
            + "calibrated on".ljust(width)
            + "".join(
                f"  {column:>{size}}" for column, size in zip(self.domains, columns, strict=True)
            ),
        ]
        for row in self.rows:
            cells = "".join(
                f"  {cell_text(self.closed[row][column]):>{size}}"
                for column, size in zip(self.domains, columns, strict=True)
            )
            lines.append(f"  {row:{width}}{cells}  layers {format_layers(self.layers[row])}")
        return "\n".join(lines)


def cell_text(cell: GapClosed) -> str:
    """ "82% (71% to 90%)", as far as it is known."""
    if cell.share is None:
        return "no gap"
    if cell.interval is None:
        return f"{cell.share:.0%}"
    return "{:.0%} ({:.0%} to {:.0%})".format(cell.share, *cell.interval)


def transfer_matrix(
    model: Model,
    domains: Mapping[str, Domain],
    policy: AttentionPolicy,
    budget: Budget,
    *,
    choose: Choose | None = None,
    seed: int = 0,
    progress: bool = False,
) -> TransferMatrix:
    """Choose layers on each domain, and on all together; measure each choice on every domain.

    Args:
        model: what `swa.load` gives.
        domains: by name, a `Domain(calibration, heldout)` of lists of examples each (from
            swa.transfer).
        policy: how sliding layers attend, without `layer_types`.
        budget: of each choice.
        choose: makes a choice from examples, within the budget; default: the top layers by the
            exact sweep, which runs each example once. (With another, "all" is a choice of its own.)
        seed: of the bootstrap.
        progress: show bars on stderr.

    Raises:
        InputError: no domains, or one named "all"; a choice beyond the budget; as `score_layers`.
        ExampleError: a domain without held-out examples, or whose calibration examples carry no
            signal; held-out examples that are among those of calibration, of any domain.
        PolicyError, ScoresError: as `score_layers` and `evaluate`.
    """
    if not domains or ALL in domains:
        raise InputError(f'give at least one domain, and none of the name "{ALL}"')
    seed = checked_integer(seed, "seed", 0)
    n_layers = model.config.num_hidden_layers
    check_policy(policy, n_layers)
    size = budget.resolve(n_layers)
    known = {example for domain in domains.values() for example in domain.calibration}
    for name, domain in domains.items():  # before anything is run
        if not domain.heldout:
            raise ExampleError(f"the domain {name!r} has no held-out examples to evaluate on")
        telling = (policy.carries_signal(e.prompt_len, e.answer_len) for e in domain.calibration)
        if choose is None and not any(telling):
            raise ExampleError(f"no calibration example of the domain {name!r} carries a signal")
        if n_known := sum(example in known for example in domain.heldout):
            raise ExampleError(
                f"{n_known} held-out examples of the domain {name!r} are calibration examples, too:"
                " a choice must be measured on others"
            )
    pools = {name: list(domain.calibration) for name, domain in domains.items()}
    if len(pools) > 1:
        pools[ALL] = [example for pool in pools.values() for example in pool]
    if choose is None:
        choose = _exact(model, pools, policy, budget, progress)
    layers = {
        name: tuple(sorted(map(operator.index, choose(pool)))) for name, pool in pools.items()
    }

    for name, chosen in layers.items():
        if len(chosen) > size:
            raise InputError(f"{len(chosen)} layers were chosen on {name!r}: the budget is {size}")
    full, sliding = {}, {}
    closed: dict[str, dict[str, GapClosed]] = {row: {} for row in layers}
    for column, domain in domains.items():
        measured = {
            chosen: evaluate(
                model,
                domain.heldout,
                policy=policy.with_full_layers(chosen, n_layers),
                progress=progress,
            )
            for chosen in {model.selectable_layers, (), *layers.values()}
        }
        best, worst = measured[model.selectable_layers], measured[()]
        full[column], sliding[column] = best.nll, worst.nll
        for row, chosen in layers.items():
            closed[row][column] = gap_closed_bootstrap(
                measured[chosen].nll_per_example,
                full=best.nll_per_example,
                sliding=worst.nll_per_example,
                tasks=best.tasks,
                seed=seed,
            )
    return TransferMatrix(tuple(domains), layers, closed, full, sliding, model.name)


def _exact(
    model: Model,
    pools: Mapping[str, Sequence[Example]],
    policy: AttentionPolicy,
    budget: Budget,
    progress: bool,
) -> Choose:
    """The paper's choice, from one sweep over the examples of all pools."""
    every = list(dict.fromkeys(example for pool in pools.values() for example in pool))
    tasks, _ = sweep_tasks(model, every, policy, "restore", None)
    size = budget.resolve(model.config.num_hidden_layers)
    results = run_tasks(model, tasks, progress=progress)
    known = {t.example: (t, result) for t, result in zip(tasks, results, strict=True)}

    def choose(examples: Sequence[Example]) -> Sequence[int]:
        mine = [known[example] for example in examples if example in known]  # repeats count again
        return top_layers(layer_scores(model, *map(list, zip(*mine, strict=True))), size)

    return choose
