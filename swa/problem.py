"""What selection strategies see of a model and its calibration examples, and what that costs.

A strategy asks for two things alone: the exact loss of a selection, and the gradient of the loss
with respect to the layers' gates at any point between none full (0) and all full (1). Both are kept
once they are known, so strategies that ask again pay nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from swa import cost
from swa.errors import InputError, ScoresError
from swa.layer_scores import LayerScores
from swa.policy import AttentionPolicy, format_layers
from swa.score import check_policy, with_signal

if TYPE_CHECKING:
    from swa.examples import Example
    from swa.model import Model

F64 = npt.NDArray[np.float64]
Objective = Literal["nll", "kl"]
OBJECTIVES: tuple[Objective, ...] = ("nll", "kl")


@dataclass(frozen=True)
class Cost:
    """Work done: in prefills an example (FLOPs over those of one pass in full attention), and time.

    One full-attention pass over every calibration example is one prefill.
    """

    prefills: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.prefills + other.prefills, self.seconds + other.seconds)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.prefills - other.prefills, self.seconds - other.seconds)

    def __str__(self) -> str:
        return f"{self.prefills:.1f} prefills an example, {self.seconds:.1f} s"


NOTHING = Cost()


class Problem(Protocol):
    """A choice among L layers, judged on N examples; losses in nats per answer token."""

    @property
    def num_layers(self) -> int:
        """L, layers that cannot be selected included."""

    @property
    def selectable(self) -> tuple[int, ...]:
        """The layers that can be full or sliding, ascending."""

    @property
    def n_examples(self) -> int:
        """N."""

    @property
    def cost(self) -> Cost:
        """What has been spent since the problem was made."""

    @property
    def known_deltas(self) -> F64 | None:
        """float64 [M, L]: a single-layer sweep that needs no work any more; None if there is none.

        M examples, not always the N; 0 in layers without a delta.
        """

    def deltas(self) -> F64:
        """`known_deltas`, measured on the N examples if need be."""

    def loss(self, full_layers: Iterable[int]) -> F64:
        """float64 [N]: the exact loss with these layers full and all others sliding."""

    def gradient(self, alpha: F64, examples: Sequence[int] | None = None) -> tuple[F64, F64]:
        """Loss float64 [n] and d loss / d alpha float64 [n, L] of the n examples (None: all N).

        alpha: float64 [L] in 0..1, the weight of full attention in each layer, 0 in layers that
        cannot be selected; the gradient is 0 there.
        """


class CalibrationProblem:
    """The problem that a model, examples and a policy pose.

    Interrupting a call loses the passes under way and nothing else.

    Args:
        model: what `swa.load` gives; a policy of its own is not used.
        examples: those on which `policy` cannot differ from full attention are left out, with a
            warning.
        policy: how sliding layers attend, without `layer_types`.
        objective: "nll" of the answers, or "kl" from the full-attention model's answer
            distributions.
        scores: a single-layer sweep of this model under this policy, where there is one.
        progress: told the cost so far, now and then.

    Raises:
        InputError: an unknown objective, or scores of something else.
        PolicyError, ExampleError: as `swa.score_layers`.
    """

    def __init__(
        self,
        model: Model,
        examples: Sequence[Example],
        policy: AttentionPolicy,
        objective: Objective = "nll",
        *,
        scores: LayerScores | None = None,
        progress: Callable[[Cost], None] | None = None,
    ) -> None:
        if objective not in OBJECTIVES:
            raise InputError(f"objective must be one of {OBJECTIVES}, not {objective!r}")
        check_policy(policy, model.config.num_hidden_layers)
        if scores is not None:
            _check_scores(scores, model, policy, objective)
        used, self.left_out = with_signal(examples, policy)
        self.examples: tuple[Example, ...] = tuple(used)
        self.model, self.policy, self.objective, self.scores = model, policy, objective, scores
        self.num_layers = model.config.num_hidden_layers
        self.selectable = tuple(sorted(model.selectable_layers))
        self.n_examples = len(self.examples)
        self._progress = progress
        self._cost = Cost()
        self._losses: dict[tuple[frozenset[int], int], float] = {}
        self._gradients: dict[tuple[bytes, int], tuple[float, F64]] = {}
        self._deltas = None if scores is None else _delta_table(scores)
        self._full_flops = sum(self._pass(self.selectable, i) for i in range(self.n_examples))

    @property
    def cost(self) -> Cost:
        return self._cost

    @property
    def known_deltas(self) -> F64 | None:
        return self._deltas

    def deltas(self) -> F64:
        if self._deltas is None:
            self._deltas = np.array([self._sweep(index) for index in range(self.n_examples)])
        return self._deltas

    def loss(self, full_layers: Iterable[int]) -> F64:
        layers = self._checked(full_layers)
        return np.array([self._loss(layers, index) for index in range(self.n_examples)])

    def gradient(self, alpha: F64, examples: Sequence[int] | None = None) -> tuple[F64, F64]:
        gates = np.array(alpha, dtype=np.float64)
        _check_gates(gates, self.num_layers, self.selectable)
        indices = range(self.n_examples) if examples is None else examples
        found = [self._gradient(gates, index) for index in indices]
        return np.array([loss for loss, _ in found]), np.array([slope for _, slope in found])

    def _checked(self, full_layers: Iterable[int]) -> frozenset[int]:
        layers = frozenset(full_layers)
        if strangers := layers - set(self.selectable):
            raise InputError(
                f"layers [{format_layers(strangers)}] cannot be selected: this model's can in"
                f" [{format_layers(self.selectable)}]"
            )
        return layers

    def _loss(self, layers: frozenset[int], index: int) -> float:
        if (layers, index) not in self._losses:
            example = self.examples[index]
            begun = time.perf_counter()
            result = self.model.nll_example(example, policy=self.policy, full_layers=layers)
            self._losses[layers, index] = self._finite(result.mean, layers, index)
            self._spend(self._pass(layers, index), begun)
        return self._losses[layers, index]

    def _gradient(self, alpha: F64, index: int) -> tuple[float, F64]:
        key = alpha.tobytes(), index
        if key not in self._gradients:
            example, begun = self.examples[index], time.perf_counter()
            found = import_module("swa.gates").gate_gradient(
                self.model, example, self.policy, alpha
            )
            full = np.flatnonzero(alpha).tolist()
            loss = self._finite(float(found.loss), full, index)
            self._gradients[key] = loss, found.gradient
            if np.isin(alpha, (0, 1)).all():
                self._losses[frozenset(full), index] = loss
            lengths = example.prompt_len, example.answer_len
            work = cost.gradient_work(self.model.config, self.policy, alpha, *lengths)
            self._spend(work.flops, begun)
        return self._gradients[key]

    def _sweep(self, index: int) -> F64:
        """float64 [L]: one example's deltas; keeps the losses of its runs."""
        example, begun = self.examples[index], time.perf_counter()
        sweep = self.model.sweep_example(example, self.policy, (), self.selectable, True)
        runs = {(): sweep.base_nll} | {(i,): sweep.run_nll[i] for i in self.selectable}
        for layers, per_token in runs.items():
            nll = self._finite(float(per_token.mean()), layers, index)
            self._losses[frozenset(layers), index] = nll
        lengths = example.prompt_len, example.answer_len
        work = cost.sweep_work(self.model.config, self.policy, (), self.selectable, *lengths)
        self._spend(work.flops, begun)
        deltas = np.zeros(self.num_layers)
        for layer in self.selectable:
            deltas[layer] = (
                self._losses[frozenset(), index] - self._losses[frozenset([layer]), index]
            )
        return deltas

    def _finite(self, loss: float, layers: Iterable[int], index: int) -> float:
        if not math.isfinite(loss):
            raise ScoresError(
                f"the loss of example {index} is {loss} with full attention in layers"
                f" [{format_layers(layers)}]: the checkpoint holds values that are not finite, or"
                ' too large for its dtype (if that is "bfloat16", try "float32")'
            )
        return loss

    def _pass(self, layers: Iterable[int], index: int) -> float:
        """FLOPs of one example's pass."""
        example = self.examples[index]
        return cost.nll_work(
            self.model.config,
            self.policy,
            frozenset(layers),
            example.prompt_len,
            example.answer_len,
        ).flops

    def _spend(self, flops: float, begun: float) -> None:
        self._cost += Cost(flops / self._full_flops, time.perf_counter() - begun)
        if self._progress is not None:
            self._progress(self._cost)


class ScoresProblem:
    """The problem that scores alone pose: they know single-layer deltas, and can run nothing."""

    def __init__(self, scores: LayerScores) -> None:
        self.num_layers = scores.num_hidden_layers
        self.selectable = scores.selectable_layers
        self.n_examples = len(scores.tasks)
        self.known_deltas: F64 | None = _delta_table(scores)
        self.cost = Cost()

    def deltas(self) -> F64:
        assert self.known_deltas is not None
        return self.known_deltas

    def loss(self, full_layers: Iterable[int]) -> F64:
        raise InputError(
            "this strategy measures whole selections, which scores cannot tell: give the model and"
            " its examples"
        )

    def gradient(self, alpha: F64, examples: Sequence[int] | None = None) -> tuple[F64, F64]:
        raise InputError(
            "this strategy takes gradients of the loss, which scores cannot tell: give the model"
            " and its examples"
        )


def _delta_table(scores: LayerScores) -> F64:
    """float64 [N, L], 0 where there is no delta."""
    return np.array([[delta or 0.0 for delta in row] for row in scores.delta_per_example])


def _check_scores(
    scores: LayerScores, model: Model, policy: AttentionPolicy, objective: Objective
) -> None:
    """Refuse scores that are not the single-layer sweep of this very problem."""
    if objective != "nll":
        raise InputError(f"scores are differences in NLL: leave them out with {objective!r}")
    if scores.direction != "restore" or scores.base:
        raise InputError(
            "scores for a search must be restored from all layers sliding: these are"
            f" {scores.direction!r} from the base [{format_layers(scores.base)}]"
        )
    if scores.model_fingerprint != model.fingerprint:
        raise InputError(f"the scores are of another checkpoint: {scores.model_name}")
    if difference := policy.differs_from(scores.policy):
        raise InputError(f"the scores were taken under another policy: {difference}")


def _check_gates(alpha: F64, num_layers: int, selectable: Sequence[int]) -> None:
    if alpha.shape != (num_layers,) or not ((alpha >= 0) & (alpha <= 1)).all():
        raise InputError(f"alpha must be {num_layers} numbers in 0..1, not {alpha!r}")
    others = np.delete(alpha, list(selectable))
    if others.any():
        raise InputError(
            f"alpha must be 0 outside of the selectable layers [{format_layers(selectable)}]"
        )
