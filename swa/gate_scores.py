"""First-order scores by layer and KV head: what gate gradients say at one point."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from swa import cost, jsonio
from swa.errors import InputError
from swa.examples import Example, content_hash
from swa.files import write_text
from swa.gates import F64, Objective, checked_gates, finite_gradient, gate_gradient
from swa.layer_scores import SHOWN_LAYERS
from swa.policy import AttentionPolicy
from swa.score import check_policy, finite, with_signal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from swa.model import Model

SCHEMA = "swa.gate-scores/1"


@dataclass(frozen=True, repr=False, eq=False)
class GateScores:
    """-d loss / d alpha at one point, example by example: N examples, L layers, G KV heads.

    In nats per answer token for a whole layer of full attention, as deltas of `LayerScores` are.
    Positive: more full attention there would lower the loss.
    """

    policy: AttentionPolicy
    alpha: tuple[float, ...]
    """[L]: where the gradient was taken."""
    objective: Objective
    selectable_layers: tuple[int, ...]
    loss_per_example: F64
    """float64 [N], nats per answer token, at `alpha`."""
    per_kv_head_per_example: F64
    """float64 [N, L, G]; 0 in layers that cannot be selected."""
    tasks: tuple[str, ...]
    model_name: str
    model_fingerprint: str
    dtype: str
    examples_hash: str

    @cached_property
    def per_kv_head(self) -> F64:
        """float64 [L, G]: mean over the examples, through the query heads of each KV head."""
        return np.asarray(self.per_kv_head_per_example.mean(axis=0), dtype=np.float64)

    @cached_property
    def per_layer(self) -> F64:
        """float64 [L]: mean over the examples."""
        return np.asarray(self.per_kv_head.sum(axis=1), dtype=np.float64)

    @cached_property
    def ranking(self) -> tuple[int, ...]:
        """The selectable layers by falling score, ties to the lower index."""
        return tuple(sorted(self.selectable_layers, key=lambda layer: -self.per_layer[layer]))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, schema "swa.gate-scores/1"."""
        return {
            "schema": SCHEMA,
            "policy": self.policy.to_dict(),
            "alpha": list(self.alpha),
            "objective": self.objective,
            "selectable_layers": list(self.selectable_layers),
            "per_layer": self.per_layer.tolist(),
            "per_kv_head": self.per_kv_head.tolist(),
            "loss_per_example": self.loss_per_example.tolist(),
            "per_kv_head_per_example": self.per_kv_head_per_example.tolist(),
            "tasks": list(self.tasks),
            "model_name": self.model_name,
            "model_fingerprint": self.model_fingerprint,
            "dtype": self.dtype,
            "examples_hash": self.examples_hash,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON form atomically. Raises OSError."""
        write_text(path, jsonio.dumps_document(self.to_dict()))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw layers by KV heads (needs the extra `plot`: matplotlib)."""
        from swa import plots

        return plots.gate_heads(self, ax=ax)

    def __repr__(self) -> str:
        n = len(self.tasks)
        lines = [
            f"GateScores: {self.objective}, {len(self.selectable_layers)} of {len(self.alpha)}"
            f" layers, {n} example{'s' * (n != 1)}, {self.model_name} ({self.dtype})",
            f"  {self.policy!r}",
            f"  loss {self.loss_per_example.mean():.4f} at {_describe(self.alpha)}",
            "  layer     score  by KV head",
            *(f"  {self._row(layer)}" for layer in self.ranking[:SHOWN_LAYERS]),
        ]
        if len(self.ranking) > SHOWN_LAYERS:
            lines.append(f"  ... and {len(self.ranking) - SHOWN_LAYERS} more")
        return "\n".join(lines)

    def _row(self, layer: int) -> str:
        heads = " ".join(f"{value:+.4f}" for value in self.per_kv_head[layer])
        return f"{layer:5d}  {self.per_layer[layer]:+.5f}  {heads}"


def score_gates(
    model: Model,
    examples: Sequence[Example],
    policy: AttentionPolicy,
    *,
    alpha: npt.ArrayLike | None = None,
    objective: Objective = "nll",
    progress: bool = False,
) -> GateScores:
    """First-order scores of every layer and KV head: one forward and one backward an example.

    At alpha = 0 (the default) they are the linear forecast of the exact deltas of `score_layers`,
    for the price of two or three prefills instead of a sweep. They are no deltas: verify what is
    chosen by them.

    Args:
        model, examples, policy, objective: as for `gate_gradient`; examples on which the policy
            cannot differ from full attention are left out, with a warning.
        alpha: [L] in 0..1: the point; None: every layer slides.
        progress: show a bar on stderr.

    Raises:
        InputError: objective "kl" with every layer full, where all scores would be 0.
        ScoresError: a loss or gradient is not finite; and as `gate_gradient` and `score_layers`.
    """
    n_layers = model.config.num_hidden_layers
    check_policy(policy, n_layers)
    gates = checked_gates(model, np.zeros(n_layers) if alpha is None else alpha)
    if objective == "kl" and gates.sum() == len(model.selectable_layers):
        raise InputError(
            "the divergence from full attention has no gradient at full attention: give another"
            ' alpha, or objective "nll"'
        )
    used, _ = with_signal(examples, policy)
    model.check_examples(used)
    weights = np.stack([1 - gates, gates], axis=1)
    work = [
        cost.gradient_work(model.config, policy, weights, example.prompt_len, example.answer_len)
        for example in used
    ]
    losses, heads = [], []
    with tqdm(
        total=sum(part.flops for part in work),
        desc="gates",
        unit="FLOP",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        for i, (example, part) in enumerate(zip(used, work, strict=True)):
            found = gate_gradient(model, example, policy, gates, objective=objective)
            losses.append(finite(found.loss, f"the loss of example {i}", np.flatnonzero(gates)))
            heads.append(-finite_gradient(found.per_kv_head, i))
            bar.update(part.flops)
    return GateScores(
        policy=policy,
        alpha=tuple(gates.tolist()),
        objective=objective,
        selectable_layers=tuple(sorted(model.selectable_layers)),
        loss_per_example=np.array(losses),
        per_kv_head_per_example=np.array(heads) + 0.0,  # no -0.0
        tasks=tuple(example.task for example in used),
        model_name=model.name,
        model_fingerprint=model.fingerprint,
        dtype=model.dtype,
        examples_hash=content_hash(used),
    )


def _describe(alpha: Sequence[float]) -> str:
    values = set(alpha)
    return f"alpha = {alpha[0]:g}" if len(values) == 1 else "the given alpha"
