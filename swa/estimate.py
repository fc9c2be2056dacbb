"""What a sweep will take: its work from the model's shape, its time by a probe of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from swa import _core
from swa.cost import Work
from swa.errors import InputError
from swa.examples import Example
from swa.layer_scores import Direction
from swa.memory import GIB
from swa.score import sweep_tasks

if TYPE_CHECKING:
    from swa.model import Model
    from swa.policy import AttentionPolicy

PROBE_SECONDS = 0.5  # of each kind of work


@dataclass(frozen=True, repr=False)
class Estimate:
    """Work, time and memory of `score_layers` on examples of one length."""

    n_examples: int
    n_tokens: int
    """Of prompt and answer."""
    work: Work
    """FLOPs of all examples."""
    speed: Work
    """FLOP/s that this machine reached at each kind of work."""
    weight_bytes: int
    peak_bytes: int
    """Weights included."""

    @property
    def seconds(self) -> float:
        """All examples one after the other, without loading."""
        return self.work.seconds(self.speed)

    def to_dict(self) -> dict[str, Any]:
        """What `swa estimate --json` prints."""
        return asdict(self) | {
            "work": self.work._asdict(),
            "speed": self.speed._asdict(),
            "seconds": self.seconds,
        }

    def __repr__(self) -> str:
        each = self.work.flops / self.n_examples / 1e12
        products, attention = (speed / 1e9 for speed in self.speed)
        peak, weights = self.peak_bytes / GIB, self.weight_bytes / GIB
        return (
            f"Estimate: {self.n_examples} x {self.n_tokens:,} tokens\n"
            f"  work    {each:,.2f} TFLOP an example\n"
            f"  time    about {duration(self.seconds)}, at {products:,.0f} GFLOP/s for products"
            f" and {attention:,.0f} for attention\n"
            f"  memory  {peak:,.2f} GiB, {weights:,.2f} of them weights"
        )


def estimate(
    model: Model,
    policy: AttentionPolicy,
    *,
    prompt_tokens: int,
    answer_tokens: int = 16,
    n_examples: int = 1,
    direction: Direction = "restore",
    base: Iterable[int] | None = None,
) -> Estimate:
    """Measure this machine for a second, and tell what `score_layers` would take.

    Args:
        model: loaded, or only planned (`swa.model.plan`).
        policy, direction, base: as for `score_layers`.
        prompt_tokens, answer_tokens: length of every example, P and A.

    Raises:
        InputError: a number below 1, more tokens than the model has positions; and as
            `score_layers`.
    """
    for name, value in (
        ("prompt_tokens", prompt_tokens),
        ("answer_tokens", answer_tokens),
        ("n_examples", n_examples),
    ):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    n_tokens = prompt_tokens + answer_tokens
    if n_tokens > model.max_position_embeddings:
        raise InputError(
            f"{n_tokens} tokens are more than the model's {model.max_position_embeddings} positions"
        )
    example = Example((0,) * prompt_tokens, (0,) * answer_tokens)
    (task,), _ = sweep_tasks(model, [example], policy, direction, base)
    parts = task.work(model.config)
    return Estimate(
        n_examples,
        n_tokens,
        Work(*(n_examples * sum(kind) for kind in zip(*parts, strict=True))),
        measure_speed(model),
        model.engine.weight_bytes,
        model.memory_required(n_tokens, "sweep", policy, task.flips),
    )


def measure_speed(model: Model) -> Work:
    """FLOP/s at products and attention of the model's shape, with its tier, dtype and threads."""
    config, engine = model.config, model.engine
    how: dict[str, Any] = {
        "dtype": engine.dtype,
        "tier": engine.tier,
        "num_threads": engine.num_threads,
        "timed": True,
    }
    # Slices of the real sizes: speed does not depend on the rest.
    rows = 192 * engine.num_threads
    x = np.ones((rows, min(config.hidden_size, 4096)), np.float32)
    w = np.ones((min(config.intermediate_size, 4096), x.shape[1]), np.float32)
    group = config.num_attention_heads // config.num_key_value_heads
    n_tokens, heads = 1024, max(group, 8 // group * group)
    q = np.ones((n_tokens, heads, config.head_dim), np.float32)
    k = np.ones((n_tokens, heads // group, config.head_dim), np.float32)
    pairs = n_tokens * (n_tokens + 1) // 2
    return Work(
        _fastest(2.0 * rows * w.size, lambda: _core.linear(x, w, **how)[1]),
        _fastest(
            4.0 * q[0].size * pairs, lambda: _core.attention(q, k, k, 0, 0, n_tokens, **how)[1]
        ),
    )


def _fastest(flops: float, run: Callable[[], float]) -> float:
    """FLOP/s of the fastest of several runs; `run` returns its seconds."""
    begun = time.monotonic()
    seconds = [run()]
    while time.monotonic() - begun < PROBE_SECONDS:
        seconds.append(run())
    return flops / min(seconds)


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
