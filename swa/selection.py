"""Which layers keep full attention: the choice, by score or by search, and its file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

from swa import __version__, jsonio
from swa.budget import Budget
from swa.errors import InputError, ScoresError
from swa.examples import content_hash
from swa.files import read_document, write_text
from swa.gates import Objective
from swa.journal import open_journal
from swa.layer_scores import LayerScores, checked_integer
from swa.policy import AttentionPolicy, format_layers
from swa.problem import CalibrationProblem, ScoresProblem
from swa.runs import F64, Cost, Spending
from swa.search import SEARCH, Search
from swa.strategies import Move, Plain, Strategy, describe, propose, resolve
from swa.strategies.fewest import fewest
from swa.strategies.joint import FIRST_ORDER
from swa.windows import MixtureProblem, choose_windows, name_of

if TYPE_CHECKING:
    from swa.examples import Example
    from swa.model import Model

SCHEMA, OLD_SCHEMA = "swa.selection/2", "swa.selection/1"


@dataclass(frozen=True, repr=False)
class Selection:
    """The layers that keep full attention, with the budget and what chose them.

    Raises:
        ScoresError: the layers are not ascending; not among those that the scores, or the search,
            allow; without those that the scores take for granted; more than the budget says, or,
            by `topk`, not as many.
    """

    layers: tuple[int, ...]
    budget: Budget
    scores: LayerScores | None = None
    """The single-layer scores that it was chosen by, or that the search was given."""
    search: Search | None = None
    """What was measured on a model to find it; None where scores alone decided."""
    strategy: str = "topk"

    def __post_init__(self) -> None:
        if self.search is not None:
            self.search.check(self.layers)
            return
        if self.scores is None:
            raise ScoresError("a selection has scores, a search, or both")
        allowed = {*self.scores.scored_layers, *self.scores.fixed_layers}
        required = {*self.scores.fixed_layers}
        size = self.budget.resolve(self.scores.num_hidden_layers)
        exactly = self.strategy == "topk"
        if (
            list(self.layers) != sorted(set(self.layers))
            or not required <= set(self.layers) <= allowed
            or len(self.layers) > size
            or (exactly and len(self.layers) < size)
        ):
            raise ScoresError(
                f"a selection from these scores is {'' if exactly else 'up to '}{size} ascending"
                f" layers of {sorted(allowed)}, {sorted(required)} among them, not"
                f" {list(self.layers)}"
            )

    @property
    def num_hidden_layers(self) -> int:
        """L, of the model."""
        return self._source.num_hidden_layers

    @property
    def cost(self) -> Cost | None:
        """What the search took; None where scores alone decided."""
        return self.search.cost if self.search else None

    @cached_property
    def policy(self) -> AttentionPolicy:
        """The policy that was scored or searched under, with the chosen layers full."""
        return self._source.policy.with_full_layers(self.layers, self.num_hidden_layers)

    @property
    def _source(self) -> LayerScores | Search:
        source = self.search or self.scores
        assert source is not None  # by __post_init__
        return source

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: that of the policy, and under "selection" what chose it."""
        origin = {
            "schema": SCHEMA,
            "strategy": self.strategy,
            "budget": self.budget.to_dict(),
            "search": None if self.search is None else self.search.to_dict(),
            "scores": None if self.scores is None else self.scores.to_dict(),
        }
        return self.policy.to_dict() | {"selection": origin}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Selection:
        """The selection that `to_dict` gave, now or in version 0.1.

        Raises:
            ScoresError: no "selection" in it, another schema; scores, a search or a budget that
                are not valid; or a policy that is not the one scored with these layers.
        """
        policy = AttentionPolicy.from_dict(data)
        origin = data.get("selection")
        if not isinstance(origin, Mapping) or origin.get("schema") not in (SCHEMA, OLD_SCHEMA):
            raise ScoresError(
                f'there is no "selection" of schema {SCHEMA!r} in it: a plain policy is read by'
                " AttentionPolicy.load"
            )
        if origin["schema"] == OLD_SCHEMA:  # which knew two budgets and no search
            origin = {"strategy": "topk", "search": None, **origin}
        try:
            budget = Budget.from_dict(origin.get("budget"))
        except InputError as error:
            raise ScoresError(f"the selection's budget is not valid: {error}") from error
        scores, search = origin.get("scores"), origin.get("search")
        if scores is not None:
            scores = LayerScores.from_dict(scores)
        if search is not None:
            search = Search.from_dict(search, replace(policy, layer_types=None))
        layers = policy.full_attention_layers or ()
        selection = cls(layers, budget, scores, search, str(origin.get("strategy")))
        same_length = len(policy.layer_types or ()) == selection.num_hidden_layers
        if not same_length or selection.policy != policy:
            raise ScoresError("the policy is not the one that was scored")
        return selection

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write, atomically, a file that `AttentionPolicy.load` reads too. Raises OSError."""
        write_text(path, jsonio.dumps_document(self.to_dict()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Selection:
        """Read what `save` wrote. Raises OSError, or a ScoresError that names the file."""
        return read_document(path, cls.from_dict)

    def __repr__(self) -> str:
        line = (
            f"Selection: full attention in {len(self.layers)} of {self.num_hidden_layers}"
            f" layers: [{format_layers(self.layers)}]"
        )
        if self.search is None:
            return line if self.strategy == "topk" else f"{line} ({self.strategy})"
        head = f"{line}\n  strategy {self.strategy}, budget {self.budget}"
        return "\n".join([head, *self.search.lines()])


@overload
def select(
    source: LayerScores,
    budget: Budget,
    *,
    strategy: str | Strategy | Plain | None = ...,
    seed: int = ...,
) -> Selection: ...


@overload
def select(
    source: Model,
    examples: Sequence[Example],
    policy: AttentionPolicy,
    budget: Budget,
    *,
    strategy: str | Strategy | Plain | None = ...,
    objective: Objective = ...,
    scores: LayerScores | None = ...,
    windows: Sequence[int] | None = ...,
    seed: int = ...,
    progress: bool = ...,
    journal: str | os.PathLike[str] | None = ...,
) -> Selection: ...


def select(
    source: LayerScores | Model,
    *given: Any,
    strategy: str | Strategy | Plain | None = None,
    seed: int = 0,
    **named: Any,
) -> Selection:
    """Choose the layers that keep full attention, within a budget.

    `select(scores, budget)` keeps the layers that score highest, each on its own: the top-k of
    arXiv 2606.27791. Layers that were full already when the others were restored stay, and count.

    `select(model, examples, policy, budget)` searches: it measures whole selections on calibration
    examples, so that layers that help or replace each other are seen. Its budget is an upper bound.

    Args:
        source: what `swa.score_layers` gives, or what `swa.load` gives.
        examples: to calibrate on; those that carry no signal are left out, with a warning.
        policy: how sliding layers attend, without `layer_types`: select under what will be served.
        budget: what full attention may cost.
        strategy: a name of `swa.strategies.STRATEGIES` ("periodic:offset=1" gives it settings), or
            one of your own: an object with `propose(problem, size)`, or a function like it. None:
            "topk" on scores, "joint" on a model. Scores alone serve strategies that need no more.
        objective: "nll" of the answers, or "kl" from the full-attention model's answers.
        scores: a single-layer sweep of this model and policy; then the search takes its top-k
            into account.
        windows: further windows beside the policy's one: each layer gets one of them or full
            attention, by a search of its own, within a budget of `prefill_flops` or `kv_bytes`. The
            policy then has a window for each layer.
        seed: of strategies that draw, and of the turns that examples take.
        progress: show on stderr what has been spent.
        journal: a file to which each run is added when done. A search that was killed goes on from
            it to the same result, and other searches on this model need not repeat its runs.

    Raises:
        InputError: the budget is more than can be selected, or cannot be met; an unknown strategy
            or objective; arguments that do not go together.
        PolicyError, ExampleError: as `swa.score_layers`.
        ScoresError: the journal is of another model, damaged or in use; or a loss is not finite.
        OSError: the journal cannot be written.
    """
    if isinstance(source, LayerScores):
        bound = _bound(("budget",), (), given, named)
        return _from_scores(source, strategy=strategy, seed=seed, **bound)
    options = ("objective", "scores", "windows", "progress", "journal")
    bound = _bound(("examples", "policy", "budget"), options, given, named)
    return _on_model(source, strategy=strategy, seed=seed, **bound)


def _bound(
    names: tuple[str, ...],
    options: tuple[str, ...],
    given: tuple[Any, ...],
    named: dict[str, Any],
) -> dict[str, Any]:
    """Arguments by name: all of `names`, in their order or by name, and some of `options`."""
    bound = dict(zip(names, given, strict=False)) | named
    if (
        len(given) > len(names)
        or set(names[: len(given)]) & named.keys()
        or not set(names) <= bound.keys() <= {*names, *options}
    ):
        raise InputError(
            "select takes (scores, budget) or (model, examples, policy, budget), and by name"
            " strategy, seed, and with a model objective, scores, windows, progress, journal"
        )
    return bound


def _from_scores(
    scores: LayerScores, budget: Budget, strategy: str | Strategy | Plain | None, seed: int
) -> Selection:
    size = budget.resolve(scores.num_hidden_layers)
    if strategy is None or strategy == "topk":
        return Selection(top_layers(scores, size), budget, scores)
    chosen = resolve(strategy, seed=seed)
    layers = propose(chosen, ScoresProblem(scores), size).layers
    return Selection(layers, budget, scores, strategy=describe(strategy, seed))


def _on_model(
    model: Model,
    examples: Sequence[Example],
    policy: AttentionPolicy,
    budget: Budget,
    strategy: str | Strategy | Plain | None,
    seed: int,
    objective: Objective = "nll",
    scores: LayerScores | None = None,
    windows: Sequence[int] | None = None,
    progress: bool = False,
    journal: str | os.PathLike[str] | None = None,
) -> Selection:
    seed = checked_integer(seed, "seed", 0)
    if windows is not None:
        if strategy is not None or scores is not None:
            raise InputError("windows= has a search of its own: leave out strategy and scores")
        return _with_windows(
            model, examples, policy, budget, windows, seed, objective, progress, journal
        )
    named = "joint" if strategy is None else strategy
    chosen = resolve(named, seed=seed)
    size = None if budget.nll_increase is not None else budget.size(model.config, policy)
    with (
        open_journal(journal, model, SEARCH) as opened,
        Spending("selecting", shown=progress) as bar,
    ):
        problem = CalibrationProblem(
            model, examples, policy, objective, scores=scores, progress=bar.show, journal=opened
        )
        if size is not None:
            proposal = propose(chosen, problem, size)
        else:
            proposal = fewest(chosen, problem, budget.nll_increase or 0.0)
        losses = problem.loss(proposal.layers)
        search = _record(problem, policy, size, losses, proposal.trace)
    return Selection(proposal.layers, budget, scores, search, describe(named, seed))


def _with_windows(
    model: Model,
    examples: Sequence[Example],
    policy: AttentionPolicy,
    budget: Budget,
    windows: Sequence[int],
    seed: int,
    objective: Objective,
    progress: bool,
    journal: str | os.PathLike[str] | None,
) -> Selection:
    with (
        open_journal(journal, model, SEARCH) as opened,
        Spending("selecting", shown=progress) as bar,
    ):
        problem = MixtureProblem(
            model, examples, policy, windows, objective, progress=bar.show, journal=opened
        )
        found = choose_windows(problem, budget, seed)
        search = _record(problem, found.policy, None, found.losses, found.trace)
    return Selection(found.layers, budget, None, search, name_of(problem.windows[:-1]))


def _record(
    problem: CalibrationProblem,
    policy: AttentionPolicy,
    size: int | None,
    losses: F64,
    trace: tuple[Move, ...],
) -> Search:
    """What was done, with the losses of the ends."""
    first_order = [move.layers for move in trace if move.what == FIRST_ORDER]
    full, sliding = problem.loss(problem.selectable), problem.loss(())
    model = problem.model
    return Search(
        policy=policy,
        objective=problem.objective,
        size=size,
        num_hidden_layers=problem.num_layers,
        selectable_layers=problem.selectable,
        model_name=model.name,
        model_fingerprint=model.fingerprint,
        dtype=model.dtype,
        tier=model.engine.tier,
        version=__version__,
        examples_hash=content_hash(problem.examples),
        tasks=problem.tasks,
        loss_full=tuple(full.tolist()),
        loss_sliding=tuple(sliding.tolist()),
        loss_first_order=tuple(problem.loss(first_order[0]).tolist()) if first_order else None,
        loss_chosen=tuple(losses.tolist()),
        trace=trace,
        cost=problem.spent,
    )


def load_chosen(path: str | os.PathLike[str]) -> Selection | AttentionPolicy:
    """A selection if the file tells what chose it, else a plain policy.

    Raises OSError, or a ScoresError or PolicyError that names the file.
    """
    policy = AttentionPolicy.load(path)

    def chosen(data: Mapping[str, Any]) -> Selection | AttentionPolicy:
        return policy if data.get("selection") is None else Selection.from_dict(data)

    return read_document(path, chosen)


def top_layers(scores: LayerScores, size: int) -> tuple[int, ...]:
    """The top-k of arXiv 2606.27791: by mean delta, each layer on its own, ties to the lower index.

    Raises:
        InputError: more layers than can be selected, or fewer than are kept already.
    """
    fixed, candidates = scores.fixed_layers, scores.ranking
    if not len(fixed) <= size <= len(fixed) + len(candidates):
        raise InputError(
            f"the budget is {size} full-attention layers, these scores can give"
            f" {len(fixed)} to {len(fixed) + len(candidates)}: {len(fixed)} were full in the base,"
            f" {len(candidates)} have a score"
        )
    return tuple(sorted((*fixed, *candidates[: size - len(fixed)])))
