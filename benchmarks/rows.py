"""Medians to rows of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from benchmarks.harness import Row

Peers = Mapping[str, tuple[float, float | None]]  # name: (value, the ratio to reach)


def share_of(rate: float, peak: float) -> float | None:
    """None where the machine has no such unit."""
    return rate / peak if peak else None


def by_seconds(
    case: str,
    ours: float,
    peers: Peers,
    share: float | None = None,
    share_target: float | None = None,
) -> list[Row]:
    """A row for each peer, all in seconds; one without a peer if there is none."""
    return _rows(case, "s", ours, peers, share, share_target, lambda theirs: theirs / ours)


def by_flops(
    case: str,
    flops: float,
    ours: float,
    peers: Peers,
    share: float | None = None,
    share_target: float | None = None,
) -> list[Row]:
    """The same seconds, shown as the rate of `flops`."""
    rates = {name: (flops / seconds, target) for name, (seconds, target) in peers.items()}
    return by_rate(case, "FLOP/s", flops / ours, rates, share, share_target)


def by_rate(
    case: str,
    unit: str,
    ours: float,
    peers: Peers,
    share: float | None = None,
    share_target: float | None = None,
) -> list[Row]:
    """A row for each peer, where more is better."""
    return _rows(case, unit, ours, peers, share, share_target, lambda theirs: ours / theirs)


def _rows(
    case: str,
    unit: str,
    ours: float,
    peers: Peers,
    share: float | None,
    share_target: float | None,
    ratio: Callable[[float], float],
) -> list[Row]:
    first = Row(case, unit, ours, share=share, share_target=None if share is None else share_target)
    rows = [
        replace(first, peer=name, theirs=theirs, ratio=ratio(theirs), target=target)
        for name, (theirs, target) in peers.items()
    ]
    # The share is said once.
    return [*rows[:1], *(replace(row, share=None, share_target=None) for row in rows[1:])] or [
        first
    ]
