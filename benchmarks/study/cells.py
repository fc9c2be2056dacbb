"""The cells of the study: one factor at a time around the headline setting, that one first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from swa.policy import AttentionPolicy
from swa.strategies import STRATEGIES

TASKS = ("num", "num4", "words", "copy")
TOPK = "topk"
DEFAULT = "joint"
ALL_PERIODIC = "periodic:offset="
# Of the headline, in the order in which they are run; those that the package gains come after them.
FIRST = (TOPK, "first_order", DEFAULT, "path", "forward", "frank_wolfe", "backward", "periodic")
LIMITS = {"refine": "refine:prefills=31"}
MAIN = (TOPK, "first_order", DEFAULT, "path", "periodic")
FEW = (TOPK, DEFAULT, "periodic")


@dataclass(frozen=True)
class Setting:
    """How long prompts are, and who attends to what."""

    prompt_tokens: int
    window: int
    sinks: int
    tail: int = 0
    consumer: str | None = None

    @property
    def policy(self) -> AttentionPolicy:
        """Without layers."""
        if self.consumer is not None:
            return AttentionPolicy.for_consumer(
                self.consumer,  # type: ignore[arg-type]
                sliding_window=self.window,
            )
        return AttentionPolicy(self.window, num_sink_tokens=self.sinks, num_tail_tokens=self.tail)

    @property
    def has_signal(self) -> bool:
        """Whether the policy hides anything from such prompts."""
        return self.policy.carries_signal(self.prompt_tokens, 1)

    def __str__(self) -> str:
        if self.consumer is not None:
            return f"T {self.prompt_tokens}, W {self.window}, {self.consumer}"
        return f"T {self.prompt_tokens}, W {self.window}, S {self.sinks}, tail {self.tail}"


@dataclass(frozen=True)
class Selected:
    """Layers that a strategy chose within a share of them, at a setting, on examples of tasks."""

    strategy: str
    share: float
    at: Setting
    per_task: int
    tasks: tuple[str, ...] = TASKS

    @property
    def n_examples(self) -> int:
        return self.per_task * len(self.tasks)


@dataclass(frozen=True)
class Cell:
    """Choices that are measured on the same held-out examples."""

    group: str
    setting: Setting
    heldout_per_task: int
    choices: tuple[Selected, ...]

    def __str__(self) -> str:
        return f"{self.group}: {self.setting}"


@dataclass(frozen=True)
class Scale:
    """The headline setting, and the values of each factor beside it."""

    setting: Setting
    share: float
    per_task: int
    """Calibration examples of each task."""
    heldout_per_task: int
    """At the headline setting."""
    others_per_task: int
    """Held-out examples of each task in the other cells."""
    shares: tuple[float, ...]
    tail: int
    lengths: tuple[int, ...]
    windows: tuple[int, ...]
    consumer: str
    consumer_windows: tuple[int, ...]
    sizes: tuple[int, ...]
    """Calibration examples of each task, in the cell about their number."""
    largest_joint: int
    """Of them, the most that the default, whose cost grows with them, is tried on."""
    short: tuple[tuple[int, int], ...]
    """(T, W) of short prompts that may stand in for the headline's."""
    tasks: tuple[str, ...] = TASKS
    n_periodic: int = 4
    """Offsets of the headline's share: the reciprocal of it."""


FULL_SCALE = Scale(
    setting=Setting(prompt_tokens=3072, window=256, sinks=4),
    share=0.25,
    per_task=2,
    heldout_per_task=16,
    others_per_task=8,
    shares=(0.125, 0.5),
    tail=64,
    lengths=(1024, 8064),
    windows=(128, 1024),
    consumer="vllm",
    consumer_windows=(256,),
    sizes=(1, 2, 4, 8),
    largest_joint=4,
    short=((1536, 128), (768, 64), (1024, 256)),
)
QUICK = Scale(
    setting=Setting(prompt_tokens=640, window=64, sinks=4),
    share=0.25,
    per_task=1,
    heldout_per_task=1,
    others_per_task=1,
    shares=(0.125,),
    tail=64,
    lengths=(768,),
    windows=(128,),
    consumer="vllm",
    consumer_windows=(64,),
    sizes=(1, 2),
    largest_joint=2,
    short=((704, 32),),
)


def cells(scale: Scale, max_prompt_tokens: int) -> list[Cell]:
    """In the order in which they are run; settings without signal, or too long, are left out."""
    made = [
        cell
        for cell in _all(scale)
        if cell.choices
        and cell.setting.has_signal
        and cell.setting.prompt_tokens <= max_prompt_tokens
    ]
    return [
        replace(cell, choices=tuple(c for c in cell.choices if c.at.has_signal)) for cell in made
    ]


def headline_strategies(scale: Scale) -> tuple[str, ...]:
    """All that the package has; periodic at each offset, too, whose best and worst are shown."""
    others = [name for name in STRATEGIES if name not in FIRST]
    offsets = [f"{ALL_PERIODIC}{offset}" for offset in range(scale.n_periodic)]
    return (*FIRST, *offsets, *(LIMITS.get(name, name) for name in others))


def _all(scale: Scale) -> Iterator[Cell]:
    headline = scale.setting

    def chosen(
        strategies: tuple[str, ...],
        at: Setting = headline,
        share: float = scale.share,
        per_task: int = scale.per_task,
        tasks: tuple[str, ...] = scale.tasks,
    ) -> tuple[Selected, ...]:
        return tuple(Selected(name, share, at, per_task, tasks) for name in strategies)

    def cell(group: str, setting: Setting, *choices: Selected) -> Cell:
        n = scale.heldout_per_task if setting == headline else scale.others_per_task
        return Cell(group, setting, n, choices)

    carried = chosen((TOPK, DEFAULT))
    yield cell("headline", headline, *chosen(headline_strategies(scale)))
    tail = replace(headline, tail=scale.tail)
    yield replace(
        cell(
            "tail",
            tail,
            *chosen(MAIN, tail),
            *chosen(MAIN, tail, scale.shares[0]),
            *carried,
        ),
        heldout_per_task=scale.heldout_per_task,
    )
    for share in scale.shares:
        budget = cell("budget", headline, *chosen(MAIN, share=share))
        yield replace(budget, heldout_per_task=scale.others_per_task)
    yield cell(
        "examples",
        headline,
        *(
            choice
            for per_task in scale.sizes
            for choice in chosen((TOPK, "first_order", DEFAULT), per_task=per_task)
            if choice.strategy != DEFAULT or per_task <= scale.largest_joint
        ),
    )
    for window in scale.windows:
        setting = replace(headline, window=window)
        yield cell("window", setting, *chosen(FEW, setting), *carried)
    for window in scale.consumer_windows:
        setting = replace(headline, window=window, consumer=scale.consumer)
        yield cell("consumer", setting, *chosen(FEW, setting), *carried)
    domain = cell(
        "domain",
        headline,
        *chosen((TOPK, DEFAULT), per_task=1),
        *(
            choice
            for task in scale.tasks
            for choice in chosen((TOPK, DEFAULT), per_task=len(scale.tasks), tasks=(task,))
        ),
    )
    yield replace(domain, heldout_per_task=scale.others_per_task)
    settings = [
        replace(headline, prompt_tokens=length, window=window) for length, window in scale.short
    ]
    short = cell(
        "short",
        headline,
        *carried,
        *(choice for setting in settings for choice in chosen((TOPK, DEFAULT), setting)),
    )
    yield replace(short, heldout_per_task=scale.others_per_task)
    for length in scale.lengths:
        setting = replace(headline, prompt_tokens=length)
        yield cell("length", setting, *chosen(FEW, setting), *carried)
