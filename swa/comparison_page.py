"""The page of a comparison: differences with their intervals, drawn and by task."""

from __future__ import annotations

from typing import Any

from swa.comparison import (
    MEASURES,
    Comparison,
    format_cell,
    format_difference,
    format_value,
)
from swa.evaluation import Measure
from swa.pages import nice_ticks, render_page, shorten
from swa.policy import format_layers

WIDTH, LABELS = 1000, 190  # of the chart, in SVG units; LABELS holds the names
ROW, AXIS = 26, 50
_LONGEST_LABEL = 26  # characters

_MEANINGS: dict[Measure, str] = {
    "nll": "Negative log-likelihood of the answers, in nats per token; lower is better.",
    "greedy_match": "Share of examples whose whole answer is the greedy one; higher is better.",
    "score": "How right the generated replies are; higher is better.",
}


def render(comparison: Comparison, *, title: str | None = None) -> str:
    """The page that `Comparison.report` writes, as text."""
    base = comparison.evaluations[comparison.baseline]
    names = len(comparison.evaluations)
    return render_page(
        "comparison.html.jinja",
        title=title or f"Comparison on {base.model_name}",
        subtitle=(
            f"{names} policies on the same {len(base.tasks)} examples of"
            f" {len(comparison.tasks)} tasks; differences are from “{comparison.baseline}”"
        ),
        warnings=comparison.warnings(),
        figures=_figures(comparison),
        measures=[
            {
                "name": name,
                "meaning": _MEANINGS[measure],
                "caption": comparison.caption,
                "chart": _chart(comparison, measure) if names > 1 else None,
                "table": _table(comparison, measure),
            }
            for measure, name in MEASURES.items()
            if measure in comparison.measures
        ],
        details=_details(comparison),
    )


def _figures(comparison: Comparison) -> list[dict[str, str]]:
    """What every policy reaches: its NLL, the share of the gap it closes, its replies."""
    figures = []
    for name, evaluation in comparison.evaluations.items():
        share = comparison.gap_closed(name)
        notes = ["NLL, nats per token"]
        if share is not None and share not in (0.0, 1.0):
            notes = [f"NLL; {share:.0%} of the gap closed"]
        if evaluation.score is not None:
            notes.append(f"replies {evaluation.score:.0%} right")
        figures.append(
            {"label": name, "value": format_value(evaluation.nll, "nll"), "note": "; ".join(notes)}
        )
    return figures


def _chart(comparison: Comparison, measure: Measure) -> dict[str, Any]:
    """Differences over all tasks, a row for each policy, on one axis around zero."""
    others = [name for name in comparison.evaluations if name != comparison.baseline]
    found = {name: comparison.difference(name, measure) for name in others}
    scale = 1 if measure == "nll" else 100
    ends = [
        scale * value
        for difference in found.values()
        for value in (difference.difference, *(difference.interval or ()))
    ]
    ticks, decimals = nice_ticks(min(0.0, *ends), max(0.0, *ends), 7)

    def x(value: float) -> float:
        return LABELS + (WIDTH - LABELS - 20) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    rows = []
    for i, (name, difference) in enumerate(found.items()):
        low, high = difference.interval or (difference.difference, difference.difference)
        rows.append(
            {
                "label": shorten(name, _LONGEST_LABEL),
                "y": ROW * (i + 0.5) + 4,
                "x": x(scale * difference.difference),
                "low": x(scale * low),
                "high": x(scale * high),
                "verdict": comparison.verdict(name, measure),
                "tip": f"{name}: {format_difference(difference, measure)}",
            }
        )
    return {
        "width": WIDTH,
        "height": ROW * len(rows) + AXIS,
        "bottom": ROW * len(rows) + 8,
        "labels": LABELS,
        "unit": "nats per token" if measure == "nll" else "percentage points",
        "ticks": [
            {"x": x(tick), "label": f"{tick:+.{decimals}f}" if tick else "0", "zero": tick == 0}
            for tick in ticks
        ],
        "rows": rows,
    }


def _table(comparison: Comparison, measure: Measure) -> dict[str, Any]:
    tasks = (*comparison.tasks, None) if len(comparison.tasks) > 1 else comparison.tasks
    counts = comparison.evaluations[comparison.baseline].tasks
    rows = []
    for task in tasks:
        cells = []
        for name in comparison.evaluations:
            found = comparison.difference(name, measure, task)
            is_baseline = name == comparison.baseline
            cells.append(
                {
                    "value": format_value(comparison.value(name, measure, task), measure),
                    "below": "" if is_baseline else format_cell(found, measure),
                    "tip": "" if is_baseline else format_difference(found, measure),
                    "verdict": comparison.verdict(name, measure, task),
                }
            )
        rows.append(
            {
                "task": "all" if task is None else task,
                "count": len(counts) if task is None else counts.count(task),
                "cells": cells,
                "all": task is None,
            }
        )
    return {"names": list(comparison.evaluations), "rows": rows}


def _details(comparison: Comparison) -> list[tuple[str, str]]:
    base = comparison.evaluations[comparison.baseline]
    details = [("Model", base.model_name), ("Fingerprint", base.model_fingerprint)]
    for name, evaluation in comparison.evaluations.items():
        policy = evaluation.policy
        if policy is None:
            text = "full attention, as the checkpoint defines it"
        else:
            full = policy.full_attention_layers or ()
            text = f"{policy!r}; full: {format_layers(full) or 'none'}"
        details.append((name, text))
    details += [
        ("Examples", f"{len(base.tasks)}; SHA-256 of what they are: {base.examples_hash}"),
        ("Compute", base.dtype),
        (
            "Intervals",
            f"paired bootstrap, {comparison.confidence:.0%}, {comparison.n_bootstrap} resamples,"
            f" seed {comparison.seed}",
        ),
    ]
    if base.judge is not None:
        details.append(("Judge", base.judge))
    return details
