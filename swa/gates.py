"""Gates: how the loss moves when a layer's attention moves from its window to everything.

Layer l gets a gate alpha[l] in [0, 1]: its attention output is (1 - alpha[l]) times that of the
window plus alpha[l] times that of full attention, both from the same queries, keys and values. A
selection is a point with all gates 0 or 1. One forward and one backward give the loss and its
gradient with respect to all gates, at any point: the first-order form of the exact sweep (as
attribution patching is of activation patching), and the step that joint choices are made of.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from swa.errors import InputError, ScoresError
from swa.score import NOT_FINITE, check_policy

if TYPE_CHECKING:
    from swa.examples import Example
    from swa.model import Model, Progress
    from swa.policy import AttentionPolicy

F64 = npt.NDArray[np.float64]
F32 = npt.NDArray[np.float32]
Objective = Literal["nll", "kl"]
OBJECTIVES: tuple[Objective, ...] = ("nll", "kl")
REFERENCE_BYTES = 2**30  # most that a problem keeps of reference logits


@dataclass(frozen=True, eq=False)
class GateGradient:
    """One example's loss at some gates and its gradient; L layers, G KV heads."""

    loss: float
    """Mean over the answer's tokens, nats."""
    gradient: F64
    """float64 [L]: d loss / d alpha, 0 in layers that cannot be selected. Negative: more full
    attention helps."""
    per_kv_head: F64
    """float64 [L, G]: the same through the query heads of each KV head; rows add up to
    `gradient`."""


def gate_gradient(
    model: Model,
    example: Example,
    policy: AttentionPolicy,
    alpha: npt.ArrayLike,
    *,
    objective: Objective = "nll",
    reference: F32 | None = None,
    progress: Progress | None = None,
) -> GateGradient:
    """The loss of an example's answer at the gates `alpha`, and its gradient.

    At alpha = 0, -gradient is the first-order form of the exact deltas of `score_layers`; its mean
    over alpha = s (1, ..., 1), s from 0 to 1, adds up to the whole gap between all layers sliding
    and all layers full (completeness, as with integrated gradients).

    Args:
        model: what `swa.load` gives; a policy of its own is not used.
        example: prompt and answer.
        policy: how sliding layers attend, without `layer_types`.
        alpha: [L] in 0..1, the weight of full attention in each layer.
        objective: "nll" of the answer, or "kl": the mean over the answer's rows of
            KL(full-attention model || this one). At alpha = 1 the latter has no gradient.
        reference: float32 [A, V] for "kl", if `reference_logits(model, example)` is known already.
        progress: called with (done, total) in FLOPs.

    Raises:
        InputError: an unknown objective, `alpha` not as above or not 0 in a layer that cannot be
            selected; and as `Model.nll_example`.
        PolicyError: the policy does not fit the model, or has chosen its layers already.
    """
    check_policy(policy, model.config.num_hidden_layers)
    gates = checked_gates(model, alpha)
    check_objective(objective)
    if objective == "nll":
        reference = None
    elif reference is None:
        reference = reference_logits(model, example)
    weights = np.stack([1 - gates, gates], axis=1)
    found = model.gates_example(example, policy, weights, reference=reference, progress=progress)
    per_kv_head = found.gradient[:, 1]
    return GateGradient(float(found.loss.mean()), per_kv_head.sum(axis=1), per_kv_head)


def reference_logits(model: Model, example: Example) -> F32:
    """float32 [A, V]: the full-attention model's logits at the rows that predict the answer.

    Raises as `Model.nll_example`.
    """
    ids = example.prompt_ids + example.answer_ids[:-1]
    return model.full_logits(ids, first_row=example.prompt_len - 1)


class References:
    """The reference logits of examples, made when they are first asked for.

    What is kept takes at most REFERENCE_BYTES, or is a single one: those asked for first, and the
    last. Others are made again, the same bit for bit. (Strategies take the examples in turns: were
    the oldest given up instead, none would ever be found again.)

    Threads may share it: none makes what another one is making.
    """

    def __init__(self, model: Model, examples: Sequence[Example]) -> None:
        self._model, self._examples = model, examples
        self._kept: dict[int, F32] = {}
        self._lock = threading.Lock()

    def of(self, index: int) -> F32:
        """float32 [A, V]: those of an example. Raises as `reference_logits`."""
        with self._lock:
            if index not in self._kept:
                # Room is made beforehand, so that at no time there are more.
                while self._kept and self.kept_bytes + self._size(index) > REFERENCE_BYTES:
                    self._kept.popitem()
                self._kept[index] = reference_logits(self._model, self._examples[index])
            return self._kept[index]

    @property
    def kept_bytes(self) -> int:
        """Of all that is kept now."""
        return sum(map(self._size, self._kept))

    @property
    def peak_bytes(self) -> int:
        """The most that is kept while all examples are run."""
        sizes = [self._size(index) for index in range(len(self._examples))]
        return min(sum(sizes), max(REFERENCE_BYTES, *sizes))

    def _size(self, index: int) -> int:
        return 4 * self._examples[index].answer_len * self._model.config.vocab_size


def divergence(
    model: Model,
    example: Example,
    policy: AttentionPolicy,
    full_layers: Collection[int],
    reference: F32,
) -> F64:
    """float64 [A]: KL(reference || hybrid with these full layers) of each answer row, in nats.

    reference: float32 [A, V], what `reference_logits` gives. Bit for bit the loss that
    `gate_gradient` finds at the gates of these layers. Raises as `Model.nll_example`.
    """
    ones = np.ones((model.config.num_hidden_layers, 1))
    hybrid = policy.with_full_layers(full_layers, model.config.num_hidden_layers)
    return model.gates_example(example, hybrid, ones, windows=(), reference=reference).loss


def finite_gradient(gradient: F64, index: int) -> F64:
    """`gradient`, of example `index`. Raises ScoresError: it is not finite."""
    if not np.isfinite(gradient).all():
        raise ScoresError(f"the gradient of example {index} is not finite: {NOT_FINITE}")
    return gradient


def check_objective(objective: str) -> None:
    """Raises InputError: there is no such objective."""
    if objective not in OBJECTIVES:
        raise InputError(f"objective must be one of {OBJECTIVES}, not {objective!r}")


def checked_gates(model: Model, alpha: npt.ArrayLike) -> F64:
    """float64 [L]. Raises InputError: not gates of this model."""
    gates = np.asarray(alpha, dtype=np.float64)
    n_layers = model.config.num_hidden_layers
    if gates.shape != (n_layers,) or not ((gates >= 0) & (gates <= 1)).all():
        raise InputError(f"alpha must be {n_layers} numbers in 0..1, not {alpha!r}")
    fixed = sorted({*np.flatnonzero(gates).tolist()} - {*model.selectable_layers})
    if fixed:
        raise InputError(
            f"alpha is not 0 in layers {fixed}, which cannot be selected: the checkpoint itself"
            " made them sliding"
        )
    return gates
