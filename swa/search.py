"""How a selection was searched for on a model: the problem, the strategy, its trace and cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from swa.errors import ScoresError
from swa.gates import OBJECTIVES, Objective
from swa.layer_scores import are_ascending, mean, read_integer, read_number
from swa.policy import AttentionPolicy, format_layers
from swa.runs import Cost
from swa.strategies import Move

SEARCH = "search"  # what a journal of runs is of
MAX_SHOWN = 12  # lines of a trace in a repr

Losses = tuple[float, ...]  # [N], nats per answer token


@dataclass(frozen=True, repr=False)
class Search:
    """What `swa.select` did on a model and N calibration examples, and what it measured there.

    Losses are those of the objective, in nats per answer token, one an example.

    Raises:
        ScoresError: values that do not fit together.
    """

    policy: AttentionPolicy
    """As it was searched under: without layers."""
    objective: Objective
    size: int | None
    """Most layers that the budget allowed; None where it is a tolerance."""
    num_hidden_layers: int
    selectable_layers: tuple[int, ...]
    model_name: str
    model_fingerprint: str
    dtype: str
    tier: str
    version: str
    """Of the package."""
    examples_hash: str
    tasks: tuple[str, ...]
    """[N]: the task of each example."""
    loss_full: Losses
    """All layers full."""
    loss_sliding: Losses
    """All layers that can slide sliding, where there are several windows by the smallest."""
    loss_first_order: Losses | None
    """As many layers by first order alone, where that was measured."""
    loss_chosen: Losses
    """The layers chosen."""
    trace: tuple[Move, ...]
    cost: Cost
    """The strategy's own, and the measurements above where they were not part of it."""

    def __post_init__(self) -> None:
        _require(self.policy.layer_types is None, "the policy searched must not have layer_types")
        _require(self.objective in OBJECTIVES, f"unknown objective {self.objective!r}")
        n, layers = len(self.tasks), self.selectable_layers
        _require(
            are_ascending(layers, self.num_hidden_layers),
            f"selectable_layers must be ascending layers of 0..{self.num_hidden_layers - 1}",
        )
        for name in ("loss_full", "loss_sliding", "loss_first_order", "loss_chosen"):
            losses = getattr(self, name)
            absent = losses is None and name == "loss_first_order"
            _require(
                absent or (len(losses or ()) == n > 0 and all(map(math.isfinite, losses or ()))),
                f"{name} must have one finite value an example",
            )

    def check(self, layers: Sequence[int]) -> None:
        """Raises ScoresError: not layers that this search could have chosen."""
        _require(
            list(layers) == sorted(set(layers) & set(self.selectable_layers))
            and (self.size is None or len(layers) <= self.size),
            f"the search could choose {'any' if self.size is None else f'up to {self.size}'}"
            f" ascending layers of [{format_layers(self.selectable_layers)}], not {list(layers)}",
        )

    def lines(self) -> list[str]:
        """For people: the losses, the cost and the trace."""
        ends = [
            ("full attention", self.loss_full),
            ("all sliding", self.loss_sliding),
            ("first-order top-k", self.loss_first_order),
            ("these layers", self.loss_chosen),
        ]
        measured = [f"{name} {mean(values):.4f}" for name, values in ends if values is not None]
        examples = f"{len(self.tasks)} example{'s' * (len(self.tasks) != 1)}"
        lines = [f"  {self.objective} on {examples}: {', '.join(measured)}", f"  cost: {self.cost}"]
        lines += [f"  - {move}" for move in self.trace[:MAX_SHOWN]]
        if len(self.trace) > MAX_SHOWN:
            lines.append(f"  - ... and {len(self.trace) - MAX_SHOWN} more")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; the policy is not part of it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        del values["policy"]
        moves = [asdict(move) | {"layers": list(move.layers)} for move in self.trace]
        values |= {"trace": moves, "cost": asdict(self.cost)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], policy: AttentionPolicy) -> Search:
        """What `to_dict` gave, under the policy without layers. Raises ScoresError: it is not."""
        expected = {field.name for field in fields(cls)} - {"policy"}
        _require(
            isinstance(data, Mapping) and data.keys() == expected,
            f"a search has the keys {sorted(expected)}",
        )
        values = dict(data)
        try:
            values["num_hidden_layers"] = read_integer(data["num_hidden_layers"])
            values["size"] = None if data["size"] is None else read_integer(data["size"])
            for name in ("model_name", "model_fingerprint", "dtype", "tier", "version"):
                values[name] = str(data[name])
            values["selectable_layers"] = tuple(map(read_integer, data["selectable_layers"]))
            values["tasks"] = tuple(map(str, data["tasks"]))
            for name in ("loss_full", "loss_sliding", "loss_first_order", "loss_chosen"):
                losses = data[name]
                values[name] = None if losses is None else tuple(map(read_number, losses))
            values["trace"] = tuple(_move(move) for move in data["trace"])
            values["cost"] = Cost(**{k: read_number(v) for k, v in data["cost"].items()})
        except (TypeError, KeyError, AttributeError) as error:
            raise ScoresError(f"the search is not valid: {error}") from error
        return cls(policy=policy, **values)


def _move(data: Mapping[str, Any]) -> Move:
    return Move(
        str(data["what"]),
        tuple(map(read_integer, data["layers"])),
        None if data["estimate"] is None else read_number(data["estimate"]),
        None if data["loss"] is None else read_number(data["loss"]),
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ScoresError(message)
