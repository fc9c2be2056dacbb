"""Two controls of a calibration: do short prompts rank layers as long ones do?

With the window kept, a prompt shorter than the window and the sinks is attended to in full by
every layer, so all its deltas are zero by construction: "short prompts do not work" then says
nothing about short prompts. The better control shrinks the window with the prompt. If that ranks
the layers as long prompts do, calibration gets many times cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from swa import examples as sources
from swa.budget import Budget
from swa.errors import ExampleError, InputError
from swa.examples import Example
from swa.layer_scores import LayerScores
from swa.policy import AttentionPolicy
from swa.score import layer_scores, run_tasks, sweep_flops, sweep_tasks
from swa.stability import RankAgreement, rank_agreement

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from swa.model import Model

SCALES = (0.5, 0.25)

Source = Callable[[int], Sequence[Example]]
"""Examples of so many prompt tokens."""


@dataclass(frozen=True)
class Control:
    """Scores at another length, compared with those at full length."""

    scores: LayerScores
    prompt_tokens: int
    """Of the longest prompt."""
    cost: float
    """Work of an example, as a share of one at full length."""
    agreement: RankAgreement

    @property
    def window(self) -> int:
        """The (smallest) sliding window."""
        return min(self.scores.policy.windows(self.scores.num_hidden_layers))

    @property
    def largest_delta(self) -> float:
        """Of any layer and example; exactly 0 where the window hides nothing."""
        rows = self.scores.delta_per_example
        return max(abs(delta) for row in rows for delta in row if delta is not None)


@dataclass(frozen=True, repr=False)
class LengthControls:
    """What `length_controls` found."""

    reference: Control
    """At full length."""
    in_proportion: tuple[Control, ...]
    """Prompts and windows shrunk alike."""
    window_kept: tuple[Control, ...]
    """Prompts shrunk, the window as it was; the last, if possible, so that nothing is hidden."""

    def to_dict(self) -> dict[str, Any]:
        """The table and the mean deltas, for JSON."""

        def entry(control: Control) -> dict[str, Any]:
            return {
                "prompt_tokens": control.prompt_tokens,
                "sliding_window": control.scores.policy.to_dict()["sliding_window"],
                "cost": control.cost,
                "largest_delta": control.largest_delta,
                "delta": control.scores.delta,
                **asdict(control.agreement),
            }

        return {
            "reference": entry(self.reference),
            "in_proportion": [entry(control) for control in self.in_proportion],
            "window_kept": [entry(control) for control in self.window_kept],
        }

    def plot(self, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
        """Draw each control's deltas over those at full length (needs the extra `plot`)."""
        from swa import plots

        return plots.length_controls(self, axes)

    def __repr__(self) -> str:
        reference = self.reference
        lines = [
            f"LengthControls: {len(reference.scores.tasks)} examples, compared with"
            f" {reference.prompt_tokens} tokens, window {reference.window}",
            "  window         prompt  window   cost  rank corr.  without chance  top layers same",
        ]
        for kind, controls in (
            ("in proportion", self.in_proportion),
            ("kept", self.window_kept),
        ):
            lines += [f"  {kind:13}{_row(control)}" for control in controls]
        return "\n".join(lines)


def _row(control: Control) -> str:
    shape = f"{control.prompt_tokens:8d}{control.window:8d}{control.cost:7.0%}"
    if control.largest_delta == 0:
        return f"{shape}  every delta is exactly 0: the window hides nothing"
    agreement = control.agreement
    rank, corrected = (
        "-" if value is None else f"{value:.2f}"
        for value in (agreement.spearman, agreement.corrected)
    )
    return f"{shape}{rank:>12}{corrected:>16}{agreement.overlap:10d} of {agreement.size}"


def length_controls(
    model: Model,
    policy: AttentionPolicy,
    budget: Budget,
    *,
    prompt_tokens: int = 3072,
    scales: Iterable[float] = SCALES,
    examples: Source | None = None,
    examples_per_task: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> LengthControls:
    """Score prompts at full length, and at each scale with the window shrunk and with it kept.

    Sinks and tail stay as they are: a question does not get shorter. The last control with the
    window kept has prompts so short that nothing is hidden from them, if the tasks fit into those.

    Args:
        model: what `swa.load` gives.
        policy: at full length, without `layer_types`.
        budget: whose top layers are compared.
        prompt_tokens: full length.
        scales: shares of it, in 0..1.
        examples: makes examples of a length; default: `swa.examples.synthetic`, whose needles are
            the same at every length.
        examples_per_task: of the default.
        seed: of the default, and of the splits behind "without chance" (`RankAgreement.corrected`).
        progress: show a bar on stderr.

    Raises:
        InputError: a scale out of range; as `score_layers`.
        ExampleError: as the source of examples, at full length and at the scales.
        PolicyError, ScoresError: as `score_layers`.
    """
    shares = sorted(set(scales), reverse=True)
    if not shares or not 0 < shares[-1] <= shares[0] < 1:
        raise InputError(f"scales must be shares of the prompt between 0 and 1, not {shares}")

    def make(length: int) -> Sequence[Example]:
        if examples is not None:
            return examples(length)
        return sources.synthetic(
            model.tokenizer,
            examples_per_task=examples_per_task,
            prompt_tokens=length,
            seed=seed,
        )

    whole, _ = sweep_tasks(model, make(prompt_tokens), policy, "restore", None)
    template = whole[0]
    shorter = [(shrunk(policy, share), round(share * prompt_tokens)) for share in shares]
    shorter += [(policy, length) for _, length in shorter]
    made = [(applied, make(length)) for applied, length in shorter]
    with suppress(ExampleError):  # a task may need more tokens than the window hides nothing from
        longest = max(task.example.answer_len for task in whole)
        made.append((policy, make(_hidden_length(policy, longest))))
    runs = [whole] + [
        [replace(template, example=example, policy=applied) for example in shorter_examples]
        for applied, shorter_examples in made
    ]
    results = iter(run_tasks(model, [task for tasks in runs for task in tasks], progress=progress))
    scored = [layer_scores(model, tasks, [next(results) for _ in tasks]) for tasks in runs]
    unit = sweep_flops(model, whole) / len(whole)
    controls = [
        Control(
            scores,
            max(task.example.prompt_len for task in tasks),
            sweep_flops(model, tasks) / len(tasks) / unit,
            rank_agreement(scored[0], scores, budget, seed=seed),
        )
        for scores, tasks in zip(scored, runs, strict=True)
    ]
    n = len(shares)
    return LengthControls(controls[0], tuple(controls[1 : n + 1]), tuple(controls[n + 1 :]))


def shrunk(policy: AttentionPolicy, share: float) -> AttentionPolicy:
    """The policy with its windows at that share, of at least one key."""
    window = policy.sliding_window
    if isinstance(window, int):
        return replace(policy, sliding_window=max(1, round(share * window)))
    return replace(policy, sliding_window=tuple(max(1, round(share * w)) for w in window))


def _hidden_length(policy: AttentionPolicy, answer_tokens: int) -> int:
    """The longest prompt from which the policy hides nothing; see `carries_signal`."""
    window = policy.sliding_window
    reach = (window if isinstance(window, int) else min(window)) + policy.num_sink_tokens
    if policy.decode == "full":
        return reach + policy.num_tail_tokens
    return max(1, reach - answer_tokens + 1)
