"""Medians to rows of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.harness import Row

Medians = Mapping[str, float]
Results = Mapping[str, Any]
Targets = Mapping[str, float | None]
"""The ratio to reach against each peer, by its name; peers that are absent have no median."""


@dataclass(frozen=True)
class Title:
    """What a row is about."""

    case: str
    axis: str = ""
    at: int | None = None


@dataclass(frozen=True)
class Share:
    """Of the peak measured beside it."""

    of: float | None
    """None where the machine has no such unit."""
    to_reach: float | None = None


def share_of(rate: float, peak: float, to_reach: float | None = None) -> Share:
    return Share(rate / peak if peak else None, to_reach)


def by_seconds(
    title: Title,
    ours: float,
    medians: Medians,
    targets: Targets,
    share: Share | None = None,
    *,
    unit: str = "s",
) -> list[Row]:
    """A row for each peer that is there, in a unit of which less is better."""
    theirs = {name: medians[name] for name in targets if name in medians}
    return _rows(title, unit, ours, theirs, targets, share, lambda theirs: theirs / ours)


def by_flops(
    title: Title,
    flops: float,
    ours: float,
    medians: Medians,
    targets: Targets,
    share: Share | None = None,
) -> list[Row]:
    """The same seconds, shown as the rate of `flops`."""
    rates = {name: flops / medians[name] for name in targets if name in medians}
    return by_rate(title, "FLOP/s", flops / ours, rates, targets, share)


def by_rate(
    title: Title,
    unit: str,
    ours: float,
    medians: Medians,
    targets: Targets,
    share: Share | None = None,
) -> list[Row]:
    """A row for each peer that is there, in a unit of which more is better."""
    theirs = {name: medians[name] for name in targets if name in medians}
    return _rows(title, unit, ours, theirs, targets, share, lambda theirs: ours / theirs)


def _rows(
    title: Title,
    unit: str,
    ours: float,
    theirs: Medians,
    targets: Targets,
    share: Share | None,
    ratio: Callable[[float], float],
) -> list[Row]:
    bare = Row(title.case, unit, ours, axis=title.axis, at=title.at)
    rows = [  # one without a peer if there is none
        replace(bare, peer=name, theirs=value, ratio=ratio(value), target=targets[name])
        for name, value in theirs.items()
    ] or [bare]
    if share is not None and share.of is not None:  # said once
        rows[0] = replace(rows[0], share=share.of, share_target=share.to_reach)
    return rows
