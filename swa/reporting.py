"""The report: one self-contained HTML file with charts, tables, and the command that repeats it."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from swa.budget import Budget
from swa.evaluation import Evaluation, gap_closed
from swa.files import write_text
from swa.layer_scores import LayerScores, mean
from swa.pages import nice_ticks, render_page, shorten
from swa.policy import AttentionPolicy, format_layers
from swa.stability import selection_stability
from swa.strategies import STRATEGIES, Move
from swa.windows import chosen_among

if TYPE_CHECKING:
    from swa.selection import Selection

WIDTH, LEFT = 1000, 78  # of both charts, in SVG units; LEFT holds the axis labels
BARS_TOP, BARS_PLOT, BARS_BELOW = 8, 250, 44
SHARES_PLOT = 100
HEAT_HEIGHT, HEAT_ROWS = 640, (3.0, 20.0)  # wanted height, and bounds of one row's
BUDGET_OPTIONS = {
    "full_attention_layers": "--layers",
    "fraction": "--fraction",
    "prefill_flops": "--prefill-flops",
    "kv_bytes": "--kv-bytes",
    "nll_increase": "--nll-increase",
    "prompt_tokens": "--at-tokens",
}
LONGEST_TASK = 12  # characters of a row's label
COLUMN_LABEL = 22  # SVG units that a column's number needs


def report(
    scores: LayerScores,
    selection: Selection | AttentionPolicy | None = None,
    path: str | os.PathLike[str] = "report.html",
    *,
    evaluations: Mapping[str, Evaluation] | None = None,
    command: str | None = None,
    title: str | None = None,
) -> None:
    """Write what was scored, chosen and measured as one HTML file, atomically.

    The page needs nothing beside it: no script, no network, light and dark display.

    Args:
        scores: the layer scores.
        selection: the chosen layers: a `Selection`, or a policy with its `layer_types`.
        path: the file to write; an older one is replaced.
        evaluations: measured variants by name, in the order of the table. Those under the policy
            scored with no layer full, and with all full, are the ends of the gap.
        command: the exact command that repeats the run; the default is what the scores tell of it.
        title: of the page.

    Raises:
        OSError: the file cannot be written.
    """
    write_text(
        path,
        render(scores, selection, evaluations=evaluations, command=command, title=title),
    )


def render(
    scores: LayerScores,
    selection: Selection | AttentionPolicy | None = None,
    *,
    evaluations: Mapping[str, Evaluation] | None = None,
    command: str | None = None,
    title: str | None = None,
) -> str:
    """The page that `report` writes, as text."""
    policy = selection if isinstance(selection, AttentionPolicy | None) else selection.policy
    chosen = (policy.full_attention_layers or ()) if policy else ()
    evaluations = evaluations or {}
    table = _table(scores, evaluations, chosen)
    return render_page(
        "report.html.jinja",
        title=title or f"Layer selection for {scores.model_name}",
        subtitle=_subtitle(scores, chosen, selection),
        warnings=_warnings(scores, policy, evaluations),
        figures=_figures(scores, chosen, table),
        bars=_bars(scores, chosen),
        search=_search(selection),
        stability=_stability(scores, chosen),
        heat=_heat(scores, chosen),
        table=table,
        details=_details(scores),
        command=command or _repeat(scores, selection, chosen),
    )


def score_command(
    scores: LayerScores,
    source: str | None = None,
    options: Sequence[str] = ("--examples", "EXAMPLES.jsonl"),
) -> str:
    """The `swa score` command line that takes these scores.

    `source` is the model as it was given (default: its name), `options` are those that the scores
    do not tell: where the examples come from, above all.
    """
    words = ["swa", "score", source or scores.model_name, *options, *_policy_words(scores.policy)]
    words += ["--direction", scores.direction]
    if scores.base != _default_base(scores):
        words += ["--base", ",".join(map(str, scores.base))]
    if stop := scores.adaptive:
        words += ["--stop-at-confidence", str(stop.confidence), "--layers", str(stop.size)]
        words += ["--tolerance", str(stop.tolerance)]
    return shlex.join([*words, "--seed", str(scores.seed), "--dtype", scores.dtype])


def _policy_words(policy: AttentionPolicy) -> list[str]:
    window = policy.sliding_window
    windows = [window] if isinstance(window, int) else window
    words = ["--sliding-window", ",".join(map(str, windows))]
    if policy.consumer:
        return [*words, "--consumer", policy.consumer]
    words += ["--sink-tokens", str(policy.num_sink_tokens)]
    return [*words, "--tail-tokens", str(policy.num_tail_tokens), "--decode", policy.decode]


def _repeat(
    scores: LayerScores, selection: Selection | AttentionPolicy | None, chosen: Collection[int]
) -> str:
    """The commands that take the scores and choose as many layers."""
    lines = [scores.command or score_command(scores)]
    search = None if isinstance(selection, AttentionPolicy | None) else selection.search
    if isinstance(selection, AttentionPolicy | None) or search is None:
        if chosen:
            lines.append(f"swa select scores.json --layers {len(chosen)}")
        return "\n".join(lines)
    windows = chosen_among(selection.strategy)
    if not windows and selection.strategy.partition(":")[0] not in STRATEGIES:
        lines.append(f"# then, in Python: swa.select by {selection.strategy}")
    else:
        words = ["swa", "select", search.model_name, "--examples", "EXAMPLES.jsonl"]
        if windows:  # the policy has what was chosen: a window for each layer
            words += _policy_words(replace(search.policy, sliding_window=windows[0]))
            words += ["--windows", ",".join(map(str, windows[1:]))]
        else:
            words += [*_policy_words(search.policy), "--strategy", selection.strategy]
        words += ["--objective", search.objective]
        for name, value in selection.budget.to_dict().items():
            words += [BUDGET_OPTIONS[name], str(value)]
        if selection.scores is not None:
            words += ["--scores", "scores.json"]
        lines.append(shlex.join([*words, "--dtype", search.dtype]))
    return "\n".join(lines)


def _default_base(scores: LayerScores) -> tuple[int, ...]:
    return scores.selectable_layers if scores.direction == "ablate" else ()


def _subtitle(
    scores: LayerScores, chosen: Collection[int], selection: Selection | AttentionPolicy | None
) -> str:
    examples = _count(len(scores.tasks), "example")
    if not chosen:
        return f"{scores.num_hidden_layers} layers scored on {examples}; none chosen yet"
    kept = f"{len(chosen)} of {scores.num_hidden_layers} layers keep full attention"
    if not isinstance(selection, AttentionPolicy | None) and (search := selection.search):
        searched = _count(len(search.tasks), "example")
        return f"{kept}, by the strategy {selection.strategy} on {searched}"
    how = "restoring" if scores.direction == "restore" else "ablating"
    return f"{kept}, by {how} one layer at a time on {examples}"


def _warnings(
    scores: LayerScores, policy: AttentionPolicy | None, evaluations: Mapping[str, Evaluation]
) -> list[str]:
    warnings = list(scores.notes)
    if policy and (difference := policy.differs_from(scores.policy)):
        warnings.append(f"The policy chosen is not the one scored: {difference}.")
    elsewhere: dict[str, list[str]] = {}
    for name, evaluation in evaluations.items():
        applied = evaluation.policy
        if evaluation.model_fingerprint != scores.model_fingerprint:
            warnings.append(f'"{name}" was measured on another model than the scores.')
        elif evaluation.dtype != scores.dtype:
            warnings.append(f'"{name}" was measured in {evaluation.dtype}, not in {scores.dtype}.')
        if applied and (difference := applied.differs_from(scores.policy)):
            elsewhere.setdefault(difference, []).append(name)
    for difference, names in elsewhere.items():
        warnings.append(
            f"Measured under another policy than was scored ({difference}): {'; '.join(names)}."
        )
    if len({evaluation.examples_hash for evaluation in evaluations.values()}) > 1:
        warnings.append("The evaluations are of different examples: do not compare their NLL.")
    return warnings


def _search(selection: Selection | AttentionPolicy | None) -> _Table | None:
    """What a search tried, and what that was worth; None where there was no search."""
    if isinstance(selection, AttentionPolicy | None) or selection.search is None:
        return None
    search = selection.search
    table = _Table(
        f"Mean {search.objective} on {_count(len(search.tasks), 'calibration example')}, in nats"
        f" per answer token. Budget: {selection.budget}. It took {search.cost}.",
        ["step", "layers", "estimated change", "measured"],
    )
    moves = [
        Move("all sliding", (), loss=mean(search.loss_sliding)),
        Move("full attention", search.selectable_layers, loss=mean(search.loss_full)),
        *search.trace,
        Move(f"chosen by {selection.strategy}", selection.layers, loss=mean(search.loss_chosen)),
    ]
    for move in moves:
        estimate = "" if move.estimate is None else f"{move.estimate:+.4f}"
        loss = "" if move.loss is None else f"{move.loss:.4f}"
        cells = [move.what, format_layers(move.layers) or "none", estimate, loss]
        table.rows.append({"cells": cells, "chosen": move is moves[-1]})
    return table


@dataclass
class _Table:
    caption: str
    columns: list[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    full: float | None = None
    sliding: float | None = None
    chosen: float | None = None


def _table(
    scores: LayerScores, evaluations: Mapping[str, Evaluation], chosen: Collection[int]
) -> _Table:
    if not evaluations:
        return _scored_table(scores, chosen)
    selectable = set(scores.selectable_layers)

    def measured(layers: Collection[int]) -> float | None:
        """NLL with these layers full, under the very policy that was scored."""
        for evaluation in evaluations.values():
            policy = evaluation.policy
            if policy is None:
                same = set(layers) == selectable
            else:
                full = set(policy.full_attention_layers or ())
                same = full == set(layers) and not policy.differs_from(scores.policy)
            if same:
                return evaluation.nll
        return None

    tasks = list(dict.fromkeys(task for e in evaluations.values() for task in e.tasks))
    first = next(iter(evaluations.values()))
    held_out = "other examples than" if first.examples_hash != scores.examples_hash else "the"
    table = _Table(
        f"Mean over {_count(len(first.tasks), 'example')} ({held_out} those scored), "
        "in nats per answer token; lower is better.",
        ["attention", "NLL", "gap closed", "greedy match", *(tasks if len(tasks) > 1 else [])],
        full=measured(selectable),
        sliding=measured(()),
        chosen=measured(chosen) if chosen else None,
    )
    for name, evaluation in evaluations.items():
        by_task = evaluation.by_task
        cells = [
            name,
            f"{evaluation.nll:.3f}",
            _share(evaluation.nll, table),
            f"{evaluation.greedy_match:.0%}",
        ]
        if len(tasks) > 1:
            cells += [f"{by_task[task]:.3f}" if task in by_task else "" for task in tasks]
        policy = evaluation.policy
        full = set(policy.full_attention_layers or ()) if policy else set()
        table.rows.append({"cells": cells, "chosen": bool(full) and full == set(chosen)})
    return table


def _scored_table(scores: LayerScores, chosen: Collection[int]) -> _Table:
    """What the scores alone can tell: both ends of the gap, on the scored examples."""
    full, sliding = mean(scores.nll_full), mean(scores.nll_swa)
    unknown = " The chosen layers together have not been evaluated: see swa eval." if chosen else ""
    table = _Table(
        f"Mean over the {_count(len(scores.tasks), 'scored example')}, in nats per answer token."
        + unknown,
        ["attention", "NLL", "gap closed"],
        full=full,
        sliding=sliding,
    )
    for name, nll in (("full attention", full), ("all sliding", sliding)):
        cells = [name, f"{nll:.3f}", _share(nll, table)]
        table.rows.append({"cells": cells, "chosen": False})
    return table


def _share(nll: float, table: _Table) -> str:
    if table.full is None or table.sliding is None:
        return ""
    share = gap_closed(nll, full=table.full, sliding=table.sliding)
    return "" if share is None else f"{share:.0%}"


def _figures(scores: LayerScores, chosen: Collection[int], table: _Table) -> list[dict[str, str]]:
    def figure(label: str, nll: float | None, note: str) -> dict[str, str]:
        return {"label": label, "value": "?" if nll is None else f"{nll:.3f}", "note": note}

    figures = [
        figure("Full attention", table.full, "NLL, nats per token"),
        figure("All sliding", table.sliding, "NLL, nats per token"),
    ]
    if chosen:
        share = "" if table.chosen is None else _share(table.chosen, table)
        note = f"NLL; {share} of the gap closed" if share else "not evaluated together"
        figures.append(figure(f"Chosen {len(chosen)}", table.chosen, note))
        figures.append(
            {
                "label": "Full-attention layers",
                "value": format_layers(chosen),
                "note": f"of {scores.num_hidden_layers}, counted from 0",
            }
        )
    return figures


def _bars(scores: LayerScores, chosen: Collection[int]) -> dict[str, Any]:
    values = [value for value in scores.delta if value is not None]
    bounds = [bound for interval in scores.interval if interval for bound in interval]
    ticks, decimals = nice_ticks(min(0.0, *values, *bounds), max(0.0, *values, *bounds))
    low, high = ticks[0], ticks[-1]

    def y(value: float) -> float:
        return BARS_TOP + BARS_PLOT * (high - value) / (high - low)

    cell = (WIDTH - LEFT) / scores.num_hidden_layers
    every = math.ceil(COLUMN_LABEL / cell)
    bars = []
    for layer, delta in enumerate(scores.delta):
        left = LEFT + cell * layer
        interval = scores.interval[layer]
        bar: dict[str, Any] = {
            "cell_x": left,
            "cell_width": cell,
            "x": left + 0.14 * cell,
            "width": 0.72 * cell,
            "middle": left + cell / 2,
            "label": layer if layer % every == 0 or layer in chosen else "",
            "chosen": layer in chosen,
            "missing": delta is None,
            "below_noise": layer in scores.below_noise,
            "tip": _tip(scores, layer),
        }
        if delta is not None:
            bar |= {"y": y(max(delta, 0)), "height": abs(y(0) - y(delta))}
            bar |= {"low": y(interval[0]), "high": y(interval[1])} if interval else {"low": None}
        bars.append(bar)
    return {
        "width": WIDTH,
        "height": BARS_TOP + BARS_PLOT + BARS_BELOW,
        "left": LEFT,
        "top": BARS_TOP,
        "plot_height": BARS_PLOT,
        "label_y": BARS_TOP + BARS_PLOT + 18,
        "meaning": _MEANING[scores.direction],
        "has_chosen": bool(chosen),
        "has_missing": None in scores.delta,
        "has_intervals": bool(bounds),
        "noise": _noise(scores, y),
        "ticks": [
            {"y": y(tick), "label": f"{tick:.{decimals}f}", "zero": tick == 0} for tick in ticks
        ],
        "bars": bars,
    }


def _noise(scores: LayerScores, y: Callable[[float], float]) -> dict[str, Any] | None:
    """The band of what rounding alone does, cut to the chart."""
    if scores.noise_band is None:
        return None
    top = max(y(scores.noise_band), BARS_TOP)
    bottom = min(y(-scores.noise_band), BARS_TOP + BARS_PLOT)
    return {"y": top, "height": bottom - top, "size": f"{scores.noise_band:.2g}"}


_MEANING = {
    "restore": (
        "How far the NLL of the answers falls, in nats per token, when this layer alone gets full "
        "attention back."
    ),
    "ablate": (
        "How far the NLL of the answers rises, in nats per token, when this layer alone becomes "
        "sliding."
    ),
}


def _tip(scores: LayerScores, layer: int) -> str:
    delta, interval = scores.delta[layer], scores.interval[layer]
    if delta is not None:
        within = f" ({interval[0]:+.4f} to {interval[1]:+.4f})" if interval else ""
        few = ", of too few examples to be trusted" if layer in scores.few_examples else ""
        noise = ", no more than rounding" if layer in scores.below_noise else ""
        return f"layer {layer}: {delta:+.4f}{within}{few}{noise}"
    if layer not in scores.selectable_layers:
        return f"layer {layer}: the checkpoint itself makes it sliding"
    return f"layer {layer}: not scored from this base"


def _stability(scores: LayerScores, chosen: Collection[int]) -> dict[str, Any] | None:
    """How often resampled examples choose each layer; None where there is nothing to tell."""
    size = len(chosen)
    sizes = range(len(scores.fixed_layers), len(scores.fixed_layers) + len(scores.ranking) + 1)
    if not chosen or size not in sizes or len(scores.tasks) == 1:
        return None
    if scores.adaptive and scores.adaptive.settled and scores.adaptive.size != size:
        return None
    found = selection_stability(scores, Budget(full_attention_layers=size))
    cell = (WIDTH - LEFT) / scores.num_hidden_layers
    every = math.ceil(COLUMN_LABEL / cell)
    bars = [
        {
            "x": LEFT + cell * (layer + 0.14),
            "width": 0.72 * cell,
            "middle": LEFT + cell * (layer + 0.5),
            "y": BARS_TOP + SHARES_PLOT * (1 - (share or 0)),
            "height": SHARES_PLOT * (share or 0),
            "label": layer if layer % every == 0 or layer in chosen else "",
            "chosen": layer in chosen,
            "tip": f"layer {layer}: " + ("not scored" if share is None else f"{share:.0%}"),
        }
        for layer, share in enumerate(found.frequency)
    ]
    caption = (
        f"Share of {found.n_bootstrap} resamples of the {_count(found.n_examples, 'example')} in"
        f" which a layer is among the {size} highest deltas. A resample chooses"
        f" {found.overlap:.1f} of the same {size} on average."
    )
    if found.spearman is not None:
        low, median, high = found.spearman
        caption += f" Rank correlation: {median:.2f} (90% within {low:.2f} to {high:.2f})."
    return {
        "width": WIDTH,
        "height": BARS_TOP + SHARES_PLOT + BARS_BELOW,
        "left": LEFT,
        "label_y": BARS_TOP + SHARES_PLOT + 18,
        "caption": caption,
        "ticks": [
            {"y": BARS_TOP + SHARES_PLOT * (1 - share / 100), "label": f"{share}%"}
            for share in (0, 50, 100)
        ],
        "bars": bars,
    }


def _heat(scores: LayerScores, chosen: Collection[int]) -> dict[str, Any]:
    order = sorted(
        range(len(scores.tasks)), key=lambda index: scores.tasks.index(scores.tasks[index])
    )
    values = [abs(v) for row in scores.delta_per_example for v in row if v is not None]
    scale = max(values)
    low, high = HEAT_ROWS
    height = min(high, max(low, HEAT_HEIGHT / len(order)))
    width = (WIDTH - LEFT) / scores.num_hidden_layers
    rows = []
    for row, index in enumerate(order):
        task = scores.tasks[index]
        starts = row == 0 or scores.tasks[order[row - 1]] != task
        cells = []
        for layer, delta in enumerate(scores.delta_per_example[index]):
            cell: dict[str, Any] = {"x": LEFT + width * layer, "missing": delta is None}
            if delta is None and layer in scores.scored_layers:
                cell["tip"] = f"layer {layer}: settled before this example"
            elif delta is None:
                cell["tip"] = _tip(scores, layer)
            else:
                cell["colour"] = "--chosen" if delta >= 0 else "--negative"
                cell["opacity"] = abs(delta) / scale if scale else 0.0
                cell["tip"] = f"example {index}, {task}, layer {layer}: {delta:+.4f}"
            cells.append(cell)
        rows.append(
            {
                "y": row * height,
                "label": shorten(task, LONGEST_TASK) if starts else "",
                "label_y": row * height + min(height, 16) / 2 + 4,
                "cells": cells,
            }
        )
    every = math.ceil(COLUMN_LABEL / width)
    body = len(order) * height
    return {
        "width": WIDTH,
        "height": body + 24,
        "left": LEFT,
        "body_height": body,
        "label_y": body + 16,
        "cell_width": width,
        "cell_height": height,
        "scale": f"{scale:.3g} nats",
        "positive": "full attention helps here",
        "negative": "full attention hurts here",
        "rows": rows,
        "boundaries": [row["y"] for row in rows[1:] if row["label"]],
        "columns": [
            {"x": LEFT + width * (layer + 0.5), "label": layer, "chosen": layer in chosen}
            for layer in range(scores.num_hidden_layers)
            if layer % every == 0 or layer in chosen
        ],
    }


def _details(scores: LayerScores) -> list[tuple[str, str]]:
    policy = scores.policy
    window = policy.sliding_window
    windows = str(window) if isinstance(window, int) else ", ".join(map(str, window))
    return [
        ("Model", scores.model_name),
        ("Fingerprint", scores.model_fingerprint),
        ("Sliding window", f"{windows} keys, the query's own included"),
        ("Sink tokens", str(policy.num_sink_tokens)),
        ("Full-attention tail", f"{policy.num_tail_tokens} prompt tokens"),
        ("Decode", policy.decode + (f" (as {policy.consumer} serves)" if policy.consumer else "")),
        ("Direction", scores.direction),
        ("Full in the base", format_layers(scores.base) or "none"),
        ("Examples", f"{len(scores.tasks)}; SHA-256 of their token ids: {scores.examples_hash}"),
        *([("Stopping", str(scores.adaptive))] if scores.adaptive else []),
        ("Compute", f"{scores.dtype}, kernels for {scores.tier}"),
        ("Version", f"swa {scores.version}"),
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
