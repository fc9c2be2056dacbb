"""What selection strategies see of a model and its calibration examples, and what that costs.

A strategy asks for two things alone: the exact loss of a selection, and the gradient of the loss
with respect to the layers' gates at any point between none full (0) and all full (1). Both are kept
once they are known, so strategies that ask again pay nothing.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from copy import copy
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from swa import cost, jsonio
from swa.errors import InputError
from swa.examples import content_hash
from swa.gates import (
    Objective,
    References,
    check_objective,
    divergence,
    finite_gradient,
    gate_gradient,
)
from swa.layer_scores import LayerScores
from swa.policy import AttentionPolicy, format_layers
from swa.runs import F64, NOTHING, Cost, Runs
from swa.score import check_policy, finite, with_signal

if TYPE_CHECKING:
    from typing_extensions import Self

    from swa.config import ModelConfig
    from swa.examples import Example
    from swa.journal import Journal
    from swa.model import Model

F32 = npt.NDArray[np.float32]


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
    def tasks(self) -> tuple[str, ...]:
        """[N]: the task of each example."""

    @property
    def objective(self) -> Objective:
        """What the loss is: "nll" of the answers, or "kl" from the full-attention model."""

    @property
    def cost(self) -> Cost:
        """What this problem has been asked for so far, as if nothing of it had been known before.

        What is asked twice counts once.
        """

    @property
    def known_ranking(self) -> tuple[int, ...] | None:
        """The layers by a single-layer sweep that needs no work any more, the best first.

        None if there is none.
        """

    def deltas(self) -> F64:
        """float64 [M, L]: that sweep, made on the N examples if need be.

        M examples, not always the N; 0 in layers without a delta.
        """

    def loss(self, full_layers: Iterable[int], examples: Sequence[int] | None = None) -> F64:
        """float64 [n]: the exact loss with these layers full and all others sliding.

        Of the n examples (None: all N).
        """

    def gradient(self, alpha: F64, examples: Sequence[int] | None = None) -> tuple[F64, F64]:
        """Loss float64 [n] and d loss / d alpha float64 [n, L] of the n examples (None: all N).

        alpha: float64 [L] in 0..1, the weight of full attention in each layer, 0 in layers that
        cannot be selected; the gradient is 0 there.
        """

    def gradient_price(self, alpha: F64, examples: Sequence[int] | None = None) -> float:
        """What `gradient` takes at this point, in prefills an example (of all N)."""

    def lazy_ratios(self, num_last_tokens: int) -> F64:
        """float64 [N, L]: how much of their attention the prompt's last tokens leave near them.

        Near is what a sliding layer would see; a mean over tokens and heads, in the model with full
        attention.
        """

    def fresh(self) -> Problem:
        """The same problem with an account of its own: it shares all that is known."""


class RecordingProblem(ABC):
    """A problem that runs nothing twice and keeps account; subclasses say how to run and price.

    Interrupting a call loses the run under way and nothing else.

    Args:
        num_layers, selectable, tasks: see `Problem`.
        known_deltas: float64 [M, L], a single-layer sweep, where there is one.
        runs: where what was run is kept.
    """

    objective: Objective = "nll"

    def __init__(
        self,
        num_layers: int,
        selectable: Iterable[int],
        tasks: Iterable[str],
        *,
        known_deltas: F64 | None = None,
        runs: Runs | None = None,
    ) -> None:
        self.num_layers = num_layers
        self.selectable = tuple(sorted(selectable))
        self.tasks = tuple(tasks)
        self._given_deltas = known_deltas
        self._runs = runs or Runs()
        self._learned: dict[tuple[frozenset[int], int], tuple[float, Cost]] = {}
        self._charged: set[Hashable] = set()
        self._cost = NOTHING
        self._swept = False

    @abstractmethod
    def run_loss(self, full_layers: frozenset[int], index: int) -> float:
        """One example's exact loss."""

    @abstractmethod
    def run_gradient(self, alpha: F64, index: int) -> tuple[float, F64]:
        """One example's loss, and its gradient float64 [L]."""

    @abstractmethod
    def run_sweep(self, index: int) -> tuple[float, F64]:
        """One example's loss with all layers sliding, and float64 [L] with one of them full."""

    @abstractmethod
    def run_ratios(self, num_last_tokens: int, index: int) -> F64:
        """One example's lazy ratios, float64 [L]; taken to cost a full-attention pass."""

    def prepare(self, index: int) -> Cost:
        """Count, once, what an example's runs need beforehand, and tell what that takes.

        It is made where a run needs it, again if it was not kept: the time is that of the run.
        """
        return NOTHING

    @abstractmethod
    def loss_work(self, full_layers: frozenset[int], index: int) -> float:
        """What `run_loss` takes, in any unit."""

    @abstractmethod
    def gradient_work(self, alpha: F64, index: int) -> float:
        """What `run_gradient` takes, in the same unit."""

    @abstractmethod
    def sweep_work(self, index: int) -> float:
        """What `run_sweep` takes, in the same unit."""

    @property
    def n_examples(self) -> int:
        """N."""
        return len(self.tasks)

    @property
    def cost(self) -> Cost:
        """What this problem was asked for, as if nothing of it had been known before."""
        return self._cost

    @property
    def spent(self) -> Cost:
        """What was run, for this problem and all that are `fresh` from it."""
        return self._runs.spent

    @property
    def known_ranking(self) -> tuple[int, ...] | None:
        """The selectable layers by mean delta, given or measured; None where there is none."""
        if self._given_deltas is None and not self._swept:
            return None
        means = self.deltas().mean(axis=0)
        return tuple(sorted(self.selectable, key=lambda layer: (-means[layer], layer)))

    def deltas(self) -> F64:
        """float64 [M, L]: single-layer deltas, given or measured."""
        if self._given_deltas is not None:
            return self._given_deltas
        deltas = np.array([self._deltas(index) for index in range(self.n_examples)])
        self._swept = True
        return deltas

    def loss(self, full_layers: Iterable[int], examples: Sequence[int] | None = None) -> F64:
        """float64 [n]: exact losses of a selection on the n examples (None: all)."""
        layers = frozenset(map(operator.index, full_layers))  # of NumPy, too
        if strangers := layers - set(self.selectable):
            raise InputError(
                f"layers [{format_layers(strangers)}] cannot be selected: this model's can in"
                f" [{format_layers(self.selectable)}]"
            )
        return np.array([self._loss(layers, index) for index in self._indices(examples)])

    def gradient(self, alpha: F64, examples: Sequence[int] | None = None) -> tuple[F64, F64]:
        """Losses float64 [n], gradients float64 [n, L] on the n examples (None: all)."""
        gates = np.array(alpha, dtype=np.float64)
        found = [self._gradient(gates, index) for index in self._indices(examples)]
        return np.array([loss for loss, _ in found]), np.array([slope for _, slope in found])

    def gradient_price(self, alpha: F64, examples: Sequence[int] | None = None) -> float:
        """What `gradient` takes at this point, in prefills an example (of all N)."""
        return self._prefills(sum(self.gradient_work(alpha, i) for i in self._indices(examples)))

    def lazy_ratios(self, num_last_tokens: int) -> F64:
        """float64 [N, L]: the share of attention that a sliding layer would keep."""
        return np.array([self._ratios(num_last_tokens, i) for i in range(self.n_examples)])

    def fresh(self) -> Self:
        """The same problem with an account of its own: it shares all that is known."""
        other = copy(self)
        other._charged, other._cost, other._swept = set(), NOTHING, False
        return other

    def _indices(self, examples: Sequence[int] | None) -> Sequence[int]:
        every = range(self.n_examples)
        return every if examples is None else [every[index] for index in examples]

    def _loss(self, layers: frozenset[int], index: int) -> float:
        self._charge(("prepared", index), self.prepare(index))
        key = "loss", tuple(sorted(layers)), index
        if (layers, index) in self._learned and key not in self._runs:
            loss, cost = self._learned[layers, index]
        else:
            values, cost = self._runs.get(
                key,
                lambda: np.array([self.run_loss(layers, index)]),
                self._prefills(self.loss_work(layers, index)),
            )
            loss = float(values[0])
        self._charge((layers, index), cost)
        return loss

    def _gradient(self, alpha: F64, index: int) -> tuple[float, F64]:
        self._charge(("prepared", index), self.prepare(index))
        values, cost = self._runs.get(
            ("gradient", tuple(alpha.tolist()), index),
            lambda: np.hstack(self.run_gradient(alpha, index)),
            self._prefills(self.gradient_work(alpha, index)),
        )
        self._charge((alpha.tobytes(), index), cost)
        loss, slope = float(values[0]), values[1:]
        if np.isin(alpha, (0, 1)).all():
            self._learn(frozenset(np.flatnonzero(alpha).tolist()), index, loss, cost)
        return loss, slope

    def _deltas(self, index: int) -> F64:
        """float64 [L]: one example's."""
        self._charge(("prepared", index), self.prepare(index))
        chosen = list(self.selectable)

        def run() -> F64:
            sliding, restored = self.run_sweep(index)
            return np.array([sliding, *restored[chosen]])

        values, cost = self._runs.get(
            ("sweep", (), index), run, self._prefills(self.sweep_work(index))
        )
        self._charge(index, cost)
        sliding, restored = float(values[0]), values[1:]
        self._learn(frozenset(), index, sliding, cost)
        for layer, loss in zip(chosen, restored.tolist(), strict=True):
            self._learn(frozenset([layer]), index, loss, cost)
        deltas = np.zeros(self.num_layers)
        deltas[chosen] = sliding - restored
        return deltas

    def _ratios(self, num_last_tokens: int, index: int) -> F64:
        ratios, cost = self._runs.get(
            ("ratios", (num_last_tokens,), index),
            lambda: self.run_ratios(num_last_tokens, index),
            self._prefills(self.loss_work(frozenset(self.selectable), index)),
        )
        self._charge(("ratios", num_last_tokens, index), cost)
        return ratios

    def _learn(self, layers: frozenset[int], index: int, loss: float, cost: Cost) -> None:
        """Keep a loss that a larger run has shown; here it is paid for with that run."""
        prefills = self._prefills(self.loss_work(layers, index))
        seconds = cost.seconds * prefills / cost.prefills
        self._learned.setdefault((layers, index), (loss, Cost(prefills, seconds)))
        self._charged.add((layers, index))

    def _charge(self, key: Hashable, cost: Cost) -> None:
        if key not in self._charged:
            self._charged.add(key)
            self._cost += cost

    def _prefills(self, work: float) -> float:
        return work / self._full_work

    @cached_property
    def _full_work(self) -> float:
        full = frozenset(self.selectable)
        return sum(self.loss_work(full, index) for index in range(self.n_examples))


class CalibrationProblem(RecordingProblem):
    """The problem that a model, examples and a policy pose.

    Args:
        model: what `swa.load` gives; a policy of its own is not used.
        examples: those on which `policy` cannot differ from full attention are left out, with a
            warning.
        policy: how sliding layers attend, without `layer_types`.
        objective: "nll" of the answers, or "kl" from the full-attention model's answer
            distributions (see `swa.gates.References` for how many are kept).
        scores: a single-layer sweep of this model under this policy, where there is one.
        progress: told the cost so far, after every run.
        journal: open; keeps what is run.

    Raises:
        InputError: an unknown objective, or scores of something else.
        PolicyError, ExampleError, InputError: as `swa.score_layers`.
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
        journal: Journal | None = None,
    ) -> None:
        check_objective(objective)
        check_policy(policy, model.config.num_hidden_layers)
        if scores is not None:
            _check_scores(scores, model, policy, objective)
        used, self.left_out = with_signal(examples, policy)
        model.check_examples(used)
        self.model, self.examples, self.policy = model, tuple(used), policy
        self.objective = objective
        self.scores = scores
        self._references = References(model, self.examples)
        self._prepared: set[int] = set()
        super().__init__(
            model.config.num_hidden_layers,
            model.selectable_layers,
            (example.task for example in used),
            known_deltas=None if scores is None else _delta_table(scores),
            runs=Runs(progress, journal, self._identity() if journal else ""),
        )

    @property
    def known_ranking(self) -> tuple[int, ...] | None:
        """The selectable layers by the scores given, or by mean delta; None where there is none."""
        return super().known_ranking if self.scores is None else self.scores.ranking

    def journaled(self, journal: Journal) -> Self:
        """`fresh`, with a journal that gets every run that is asked for, known or not.

        Raises ScoresError: the journal is damaged.
        """
        other = self.fresh()
        other._runs = self._runs.journaled(journal, self._identity())
        return other

    def run_loss(self, full_layers: frozenset[int], index: int) -> float:
        return self.hybrid_loss(self.policy, full_layers, index)

    def hybrid_loss(
        self, policy: AttentionPolicy, full_layers: Collection[int], index: int
    ) -> float:
        """One example's exact loss under a policy that may have other windows."""
        example = self.examples[index]
        reference = self.reference(index)
        if reference is not None:
            rows = divergence(self.model, example, policy, full_layers, reference)
            return self._finite(float(rows.mean()), full_layers, index)
        result = self.model.nll_example(example, policy=policy, full_layers=full_layers)
        return self._finite(result.mean, full_layers, index)

    def run_gradient(self, alpha: F64, index: int) -> tuple[float, F64]:
        found = gate_gradient(
            self.model,
            self.examples[index],
            self.policy,
            alpha,
            objective=self.objective,
            reference=self.reference(index),
        )
        loss = self._finite(found.loss, np.flatnonzero(alpha).tolist(), index)
        return loss, finite_gradient(found.gradient, index)

    def run_sweep(self, index: int) -> tuple[float, F64]:
        restored = np.full(self.num_layers, np.nan)
        if self.objective == "kl":
            for layer in self.selectable:
                restored[layer] = self.run_loss(frozenset([layer]), index)
            return self.run_loss(frozenset(), index), restored
        example = self.examples[index]
        sweep = self.model.sweep_example(example, self.policy, (), self.selectable, True)
        for layer in self.selectable:
            restored[layer] = self._finite(float(sweep.run_nll[layer].mean()), [layer], index)
        return self._finite(float(sweep.base_nll.mean()), (), index), restored

    def run_ratios(self, num_last_tokens: int, index: int) -> F64:
        ids, windows = (
            self.examples[index].prompt_ids,
            np.array(self.policy.windows(self.num_layers)),
        )
        ratios = np.zeros(self.num_layers)
        for window in np.unique(windows).tolist():
            mass = self.model.attention_mass(
                ids,
                near_window=window,
                near_sinks=self.policy.num_sink_tokens,
                num_last_tokens=min(num_last_tokens, len(ids)),
            )
            ratios[windows == window] = mass.mean(axis=1)[windows == window]
        return ratios

    def prepare(self, index: int) -> Cost:
        if self.objective == "nll":
            return NOTHING
        price = Cost(self._prefills(self.loss_work(frozenset(self.selectable), index)))
        if index not in self._prepared:
            self._prepared.add(index)
            self._runs.spend(price)
        return price

    def reference(self, index: int) -> F32 | None:
        """float32 [A, V]: what one example's divergence is measured from; None for "nll"."""
        return None if self.objective == "nll" else self._references.of(index)

    def loss_work(self, full_layers: frozenset[int], index: int) -> float:
        return cost.nll_work(*self._shape, full_layers, *self._lengths(index)).flops

    def gradient_work(self, alpha: F64, index: int) -> float:
        weights = np.stack([1 - alpha, alpha], axis=1)
        return cost.gradient_work(*self._shape, weights, *self._lengths(index)).flops

    def sweep_work(self, index: int) -> float:
        if self.objective == "kl":
            alone = map(frozenset, combinations(self.selectable, 1))
            return sum(self.loss_work(layers, index) for layers in (frozenset(), *alone))
        return cost.sweep_work(*self._shape, (), self.selectable, *self._lengths(index)).flops

    def _identity(self) -> str:
        """Of all that results depend on beside the model."""
        parts = (self.policy.to_dict(), self.objective, content_hash(self.examples))
        return jsonio.digest(parts)

    @property
    def _shape(self) -> tuple[ModelConfig, AttentionPolicy]:
        return self.model.config, self.policy

    def _lengths(self, index: int) -> tuple[int, int]:
        return self.examples[index].prompt_len, self.examples[index].answer_len

    def _finite(self, loss: float, layers: Iterable[int], index: int) -> float:
        return finite(loss, f"the loss of example {index}", layers)


class ScoresProblem:
    """The problem that scores alone pose: they know single-layer deltas, and can run nothing."""

    objective: Objective = "nll"

    def __init__(self, scores: LayerScores) -> None:
        self.num_layers = scores.num_hidden_layers
        self.selectable = scores.selectable_layers
        self.n_examples = len(scores.tasks)
        self.tasks = scores.tasks
        self.known_ranking: tuple[int, ...] | None = (*scores.fixed_layers, *scores.ranking)
        self._deltas = _delta_table(scores)
        self.cost = NOTHING

    def fresh(self) -> ScoresProblem:
        return self

    def gradient_price(self, alpha: F64, examples: Sequence[int] | None = None) -> float:
        return 0.0

    def deltas(self) -> F64:
        return self._deltas

    def loss(self, full_layers: Iterable[int], examples: Sequence[int] | None = None) -> F64:
        raise InputError(
            "this strategy measures whole selections, which scores cannot tell: give the model and"
            " its examples"
        )

    def gradient(self, alpha: F64, examples: Sequence[int] | None = None) -> tuple[F64, F64]:
        raise InputError(
            "this strategy takes gradients of the loss, which scores cannot tell: give the model"
            " and its examples"
        )

    def lazy_ratios(self, num_last_tokens: int) -> F64:
        raise InputError(
            "this strategy looks at attention, which scores cannot tell: give the model and its"
            " examples"
        )


def _delta_table(scores: LayerScores) -> F64:
    """float64 [N, L]; the layer's mean after an adaptive sweep settled it, 0 where it has none."""
    means = [delta or 0.0 for delta in scores.delta]
    return np.array(
        [
            [mean if delta is None else delta for delta, mean in zip(row, means, strict=True)]
            for row in scores.delta_per_example
        ]
    )


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
