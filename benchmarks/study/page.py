"""The page: tables, plots and sentences from whatever cells are done, and what is not done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

from benchmarks.study import plots
from benchmarks.study.cells import ALL_PERIODIC, DEFAULT, TOPK, Cell, Selected
from benchmarks.study.results import CellResults, FirstOrder, Measured
from benchmarks.study.runner import Study
from swa.policy import format_layers
from swa.stability import spearman
from swa.statistics import PairedDifference
from swa.sweeps.graph import FULL, SLIDING

TITLES = {
    "headline": "Every strategy, at the headline setting",
    "tail": "With a full-attention tail",
    "budget": "Other budgets",
    "examples": "How many examples are enough?",
    "window": "Does the choice survive another window?",
    "consumer": "What a stock server can run",
    "domain": "Does the choice survive another domain?",
    "short": "Can short prompts stand in for long ones?",
    "length": "Does the choice survive another length?",
}


def render(study: Study, folder: Path | None) -> str:
    """The page as Markdown.

    Its plots are written to `folder`, and linked to from beside it; None: it has none.
    """
    results = [CellResults(study, cell) for cell in study.cells]
    groups = {
        group: [of for of in results if of.cell.group == group]
        for group in dict.fromkeys(cell.group for cell in study.cells)
    }
    parts = [_introduction(study), _answers(study, groups), _progress(groups)]
    for group, own in groups.items():
        done = [of for of in own if of.n_done and of.of(FULL) and of.of(SLIDING)]
        if done:
            parts.append("\n\n".join([f"## {TITLES[group]}", *_section(study, group, done)]))
    if folder is not None:
        parts += plots.draw(groups, folder)
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(study: Study) -> str:
    scale, model = study.scale, study.model
    n_layers = model.config.num_hidden_layers
    return (
        f"# The study: choosing layers of {model.name}\n\n"
        "Written by `python -m benchmarks.study`, which repeats it; `--model PATH` does so for"
        " another checkpoint.\n\n"
        f"{n_layers} layers, {model.config.num_attention_heads} query and"
        f" {model.config.num_key_value_heads} KV heads; bfloat16. One factor at a time is varied"
        f" around the headline setting: {scale.setting}, {_share(scale.share)} of the layers full,"
        f" {scale.per_task * len(scale.tasks)} calibration examples"
        f" ({', '.join(scale.tasks)}, {scale.per_task} of each). Held-out examples share neither"
        " text nor needles with them. NLL is in nats per answer token, the mean over an example's"
        " answer and then over examples; *gap closed* is the share of the way from all layers"
        " sliding to all layers full, in the same cell. Differences are paired, with 95% bootstrap"
        " intervals; **bold** where the interval excludes zero. Costs are in *prefills*, FLOPs over"
        " those of a pass with full attention: the study may be done in pieces on several machines,"
        " which have these in common; the numbers of one cell come from kernels of one instruction"
        " set."
    )


def _progress(groups: dict[str, list[CellResults]]) -> str:
    rows = []
    for group, own in groups.items():
        total, done = sum(len(of.cell.choices) for of in own), sum(of.n_done for of in own)
        state = "done" if done == total else f"{done} of {total} choices" if done else "not run yet"
        tiers = dict.fromkeys(of.tier for of in own if of.n_done)
        rows.append((TITLES[group], str(len(own)), state, ", ".join(tiers)))
    return "## What is done\n\n" + _table(("question", "cells", "state", "kernels for"), rows)


# ---- sections -----------------------------------------------------------------------------------


def _section(study: Study, group: str, done: list[CellResults]) -> Iterator[str]:
    if group == "domain":
        yield from _domain(study, done[0])
    elif group == "examples":
        yield _examples(done[0])
    elif group == "short":
        yield from _short(study, done[0])
    else:
        for of in done:
            if group == "budget":
                yield f"### {_share(of.cell.choices[0].share)} of the layers"
            elif group != "headline":
                yield f"### {of.cell.setting}"
            yield _choices(of)


def _choices(of: CellResults) -> str:
    """A cell's choices, each against the paper's top-k made there within the same share."""
    full, sliding = of.of(FULL), of.of(SLIDING)
    lines = [
        [end, *_values(of, measured), "", "", ""]
        for end, measured in ((FULL, full), (SLIDING, sliding))
        if measured is not None
    ]
    for choice, measured in of.done():
        reference = of.made_here(TOPK, choice.share)
        compared = reference is not None and measured is not reference
        is_new = choice.at == of.cell.setting  # not one from another cell
        lines.append(
            [
                _name(choice, of.cell),
                *_values(of, measured),
                _difference(measured.against(reference)) if compared and reference else "",
                "" if full is None else _difference(measured.against(full)),
                f"{measured.prefills:.1f}" if is_new else "",
            ]
        )
    headings = ("choice", "full layers", "NLL", "gap closed", "exact", "NLL less top-k's")
    table = _table((*headings, "less full attention's", "prefills an example"), lines)
    note = f"{of.n_heldout} held-out examples."
    if of.has_gap() is False:
        note += " Sliding costs nothing here that they could show: shares of it mean nothing."
    return f"{table}\n\n{note}"


def _examples(of: CellResults) -> str:
    rows = []
    for strategy in dict.fromkeys(choice.strategy for choice, _ in of.done()):
        known = of.done(strategy)
        most, best = known[-1]
        for choice, measured in known:
            same = len(set(measured.layers) & set(best.layers))
            rows.append(
                [
                    f"`{strategy}`",
                    str(choice.n_examples),
                    f"{measured.nll:.3f}",
                    _percent(of.gap(measured)),
                    _difference(measured.against(best)) if choice != most else "",
                    f"{same} of {len(best.layers)}",
                    f"{measured.passes:.0f}",
                ]
            )
    headings = ("strategy", "examples", "NLL", "gap closed", "NLL less that with the most")
    return _table((*headings, "layers shared with it", "prefills, all examples"), rows)


def _domain(study: Study, of: CellResults) -> Iterator[str]:
    yield (
        "Gap closed on the held-out examples of each task (columns) by layers chosen on"
        f" {of.done()[0][0].n_examples} calibration examples, of all tasks or of one alone (rows);"
        f" {of.n_heldout} held-out examples in all."
    )
    tasks = study.scale.tasks
    for strategy in (TOPK, DEFAULT):
        rows = [
            [
                choice.tasks[0] if len(choice.tasks) == 1 < len(tasks) else "all",
                *(_percent(of.gap(measured, task)) for task in (*tasks, None)),
            ]
            for choice, measured in of.done(strategy)
        ]
        if rows:
            yield _table((f"`{strategy}`, chosen on", *tasks, "all"), rows)


def _short(study: Study, of: CellResults) -> Iterator[str]:
    yield (
        "Layers chosen on shorter prompts, with the window shrunk in proportion or as it is, and"
        f" measured at the headline setting on {of.n_heldout} held-out examples."
    )
    rows = []
    for strategy in (TOPK, DEFAULT):
        long = of.made_here(strategy)
        for choice, measured in of.done(strategy):
            row = [f"`{strategy}`", str(choice.at), "", "", _percent(of.gap(measured)), ""]
            if long is not None and measured is not long:
                same = len(set(measured.layers) & set(long.layers))
                row[2] = _agreement(of, choice) if strategy == TOPK else ""
                row[3] = f"{same} of {len(long.layers)}"
                row[5] = _difference(measured.against(long))
            rows.append([*row, f"{measured.passes:.0f}"])
    headings = ("strategy", "chosen at", "rank correlation of deltas", "layers shared")
    yield _table((*headings, "gap closed", "NLL less that of long ones", "long prefills"), rows)


def _agreement(of: CellResults, choice: Selected) -> str:
    """How alike exact deltas rank the layers at a choice's setting and at the cell's."""
    long = next(c for c, _ in of.done(TOPK) if c.at == of.cell.setting)
    here, there = of.deltas(choice), of.deltas(long)
    found = None if here is None or there is None else spearman(here, there)
    return "" if found is None else f"{found:.2f}"


# ---- answers ------------------------------------------------------------------------------------


def _answers(study: Study, groups: dict[str, list[CellResults]]) -> str:
    """One sentence a question, as far as what is done answers it."""

    def of_each(group: str, answer: Callable[[CellResults], Iterator[str]]) -> Iterator[str]:
        return (sentence for of in groups.get(group, []) for sentence in answer(of))

    found = [
        *of_each("headline", _transfer),
        *of_each("headline", _joint),
        *of_each("tail", _tail),
        *of_each("budget", _budget),
        *_first_order([*groups.get("headline", []), *groups.get("examples", [])]),
        *of_each("examples", _enough),
        *of_each("domain", _alone),
        *of_each("short", _stand_in),
        *(s for group in ("window", "length", "consumer") for s in of_each(group, _survives)),
    ]
    if not found:
        return ""
    return "## In short\n\n" + "\n".join(f"- {sentence}" for sentence in found)


def _transfer(of: CellResults) -> Iterator[str]:
    topk = of.made_here(TOPK)
    offsets = [m for choice, m in of.done() if choice.strategy.startswith(ALL_PERIODIC)]
    if topk is None or not offsets:
        return
    best, worst = (pick(offsets, key=lambda m: m.nll) for pick in (min, max))
    yield (
        f"**Does NLL guidance transfer to this model?** The paper's top-k closes"
        f" {_percent(of.gap(topk))} of the gap; evenly spaced layers, as many, between"
        f" {_percent(of.gap(worst))} and {_percent(of.gap(best))}, by their offset. Top-k less the"
        f" best offset: {_difference(topk.against(best))} nats."
    )


def _joint(of: CellResults) -> Iterator[str]:
    topk, joint = of.made_here(TOPK), of.made_here(DEFAULT)
    if topk is None or joint is None:
        return
    yield (
        f"**What does joint selection add?** {_beside(of, joint, topk, 'top-k')}, for"
        f" {joint.prefills:.0f} prefills an example instead of {topk.prefills:.0f}."
    )
    better = ", ".join(
        f"`{choice.strategy}` ({_difference(measured.against(joint))})"
        for choice, measured in of.done()
        if measured.nll < joint.nll
    )
    if better:
        yield f"Better than `{DEFAULT}` on these examples: {better}."


def _tail(of: CellResults) -> Iterator[str]:
    full = of.of(FULL)
    for share in sorted({choice.share for choice in of.cell.choices}, reverse=True):
        joint = of.made_here(DEFAULT, share)
        if joint is not None and full is not None:
            yield (
                f"**With a tail of {of.cell.setting.tail} tokens**, chosen under it:"
                f" `{DEFAULT}` within {_share(share)} of the layers less full attention:"
                f" {_difference(joint.against(full))} nats."
            )


def _budget(of: CellResults) -> Iterator[str]:
    topk, joint = of.made_here(TOPK), of.made_here(DEFAULT)
    if topk is not None and joint is not None:
        share = _share(of.cell.choices[0].share)
        yield f"**Within {share} of the layers** {_beside(of, joint, topk, 'top-k')}."


def _first_order(cells: list[CellResults]) -> Iterator[str]:
    known = [found for of in cells if (found := of.first_order()) is not None]
    if not known:
        return
    best: FirstOrder = max(known, key=lambda found: found.n_examples)
    timed = known[0]  # the headline's, which one machine does in a row
    correlation = "none" if best.spearman is None else f"{best.spearman:.2f}"
    if best.reliability is not None:
        correlation += (
            f" (exact deltas of as many other examples would have about {best.reliability:.2f})"
        )
    yield (
        f"**Are gradients as good as the sweep?** Rank correlation of first-order scores with exact"
        f" deltas, means over {best.n_examples} examples: {correlation}; of the {best.size} layers"
        f" that each ranks highest {best.overlap} are the same. One example's gradient took"
        f" {timed.gradient_seconds:.1f} s, its exact sweep {timed.exact_seconds:.1f} s, one pass of"
        f" full attention {timed.prefill_seconds:.1f} s."
    )


def _enough(of: CellResults) -> Iterator[str]:
    for strategy in (TOPK, DEFAULT):
        known = of.done(strategy)
        if len(known) < 2:
            continue
        most, reference = known[-1]
        compared = ((choice, measured.against(reference)) for choice, measured in known)
        enough, less = next(
            (choice, less)
            for choice, less in compared
            if choice is most or not less.excludes_zero or less.difference < 0
        )
        sentence = (
            f"**How many examples are enough for `{strategy}`?** {enough.n_examples}: with"
            f" so many the held-out NLL is not worse than with {most.n_examples}"
        )
        if less.excludes_zero:
            sentence += f", but lower: {_difference(less)} nats"
        yield sentence + "."


def _alone(of: CellResults) -> Iterator[str]:
    for strategy in (TOPK, DEFAULT):
        known = of.done(strategy)
        mixed = next((one for choice, one in known if len(choice.tasks) > 1), None)
        alone = [(one, choice.tasks[0]) for choice, one in known if len(choice.tasks) == 1]
        if mixed is None or not alone:
            continue
        best, worst = (pick(alone, key=lambda one: one[0].nll) for pick in (min, max))
        yield (
            f"**Another domain**: chosen on one task alone, `{strategy}` closes between"
            f" {_percent(of.gap(worst[0]))} (`{worst[1]}`) and {_percent(of.gap(best[0]))}"
            f" (`{best[1]}`) of the gap over all tasks, on as many examples of all of them"
            f" {_percent(of.gap(mixed))}. The worst less that:"
            f" {_difference(worst[0].against(mixed))} nats."
        )


def _stand_in(of: CellResults) -> Iterator[str]:
    long = of.made_here(DEFAULT)
    for choice, measured in of.done(DEFAULT):
        if long is not None and measured is not long:
            yield (
                f"**Short prompts for long ones** ({choice.at}):"
                f" {_beside(of, measured, long, 'chosen on long ones')}, for"
                f" {measured.passes:.0f} long prefills instead of {long.passes:.0f}."
            )


def _survives(of: CellResults) -> Iterator[str]:
    for strategy in (TOPK, DEFAULT):
        here = of.made_here(strategy)
        for choice, there in of.done(strategy):
            if here is not None and choice.at != of.cell.setting:
                yield (
                    f"**Another {of.cell.group}** ({of.cell.setting}): `{strategy}`'s headline"
                    f" choice closes {_percent(of.gap(there))}, one made there"
                    f" {_percent(of.gap(here))}; carried over less made there:"
                    f" {_difference(there.against(here))} nats."
                )


def _beside(of: CellResults, joint: Measured, other: Measured, name: str) -> str:
    """What the default closes of the gap, and another choice, in words."""
    return (
        f"`{DEFAULT}` closes {_percent(of.gap(joint))}, {name} {_percent(of.gap(other))}:"
        f" {_difference(joint.against(other))} nats"
    )


# ---- texts --------------------------------------------------------------------------------------


def _values(of: CellResults, measured: Measured) -> list[str]:
    layers = format_layers(measured.layers) if len(measured.layers) < 20 else "all"
    return [
        layers or "none",
        f"{measured.nll:.3f}",
        _percent(of.gap(measured)),
        _percent(measured.greedy_match),
    ]


def _name(choice: Selected, cell: Cell) -> str:
    name = f"`{choice.strategy}`"
    if choice.at != cell.setting:
        return f"{name}, chosen at {choice.at}"
    shares = {other.share for other in cell.choices}
    return name if len(shares) == 1 else f"{name}, {_share(choice.share)} of the layers"


def _difference(difference: PairedDifference) -> str:
    text = f"{difference.difference:+.3f}"
    if difference.interval is not None:
        low, high = difference.interval
        text += f" [{low:+.3f}, {high:+.3f}]"
        if not difference.is_trusted:
            text += " (too few examples)"
    return f"**{text}**" if difference.excludes_zero else text


def _share(share: float) -> str:
    return str(Fraction(share).limit_denominator(100))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
