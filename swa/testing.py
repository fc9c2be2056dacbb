"""Regression tests for scores and selections, to use in your own pytest suite.

    def test_layers_have_not_moved():
        scores = swa.score_layers(model, examples, policy)
        swa.testing.assert_scores_match(scores, "tests/golden/scores.json", noise_floor=2e-4)
        chosen = swa.select(scores, swa.Budget(fraction=0.25))
        swa.testing.assert_selection_matches(chosen, "tests/golden/selection.json")

Write the golden files once, and again after a change that is meant to move them, with
`SWA_UPDATE_GOLDEN=1 pytest` (or `update=True`), and review what changed in them before committing.
Rounding alone moves deltas when kernels, tiers or dtypes change: `noise_floor` measures by how
much, and tolerances are multiples of it.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

from swa.errors import ScoresError
from swa.layer_scores import LayerScores, LayerValues, mean
from swa.policy import format_layers
from swa.selection import Selection

UPDATE_VARIABLE = "SWA_UPDATE_GOLDEN"
TOLERANCE = 4.0  # noise floors: the floor is one standard deviation


def noise_floor(scores: LayerScores, reference: LayerScores) -> float:
    """What rounding does to `delta`, as a standard deviation in nats per answer token.

    It is the root mean square, over examples and layers, of what rounding does to one example's
    delta, divided by the square root of the number of examples, since `delta` is their mean. The
    layers of one example share the error of its base run: take several examples.

    Args:
        scores: of a bfloat16 model.
        reference: of the same model in float32, with the same examples, policy, direction and base.

    Raises:
        ScoresError: the two differ in more than rounding.
    """
    if problems := _differences(scores, reference, ("model_fingerprint",)):
        raise ScoresError(f"a noise floor needs two runs of one thing: {'; '.join(problems)}")
    rows = list(zip(scores.delta_per_example, reference.delta_per_example, strict=True))
    squares = [(a - b) ** 2 for row in rows for _, a, b in _paired(*row)]
    return math.sqrt(mean(squares) / len(rows))


def assert_scores_match(
    scores: LayerScores,
    golden: str | os.PathLike[str],
    *,
    tolerance: float = TOLERANCE,
    noise_floor: float | None = None,
    update: bool | None = None,
) -> None:
    """Fail unless `scores` are those of the golden file, up to noise.

    Compared are the mean delta of every layer, and the mean NLLs of the base, of full attention and
    of all layers sliding, each within `tolerance` noise floors; and exactly, what was run:
    direction, base, policy, examples, layers. The weights, dtype, tier and version may differ.

    Args:
        golden: a file that `LayerScores.save` wrote, or that an update writes.
        tolerance: in noise floors.
        noise_floor: in nats per answer token; None: the golden file's own. 0 asks for equality.
        update: write `scores` to `golden`, with the noise floor, instead of comparing;
            None: if the environment variable SWA_UPDATE_GOLDEN is 1.

    Raises:
        AssertionError: they differ (with a table of what does), or there is no golden file.
        ScoresError: the golden file is damaged, or no noise floor is known.
    """
    __tracebackhide__ = True
    if _updating(update):
        floor = scores.noise_floor if noise_floor is None else noise_floor
        replace(scores, noise_floor=floor).save(_writable(golden))
        return
    expected = LayerScores.load(_existing(golden))
    floor = expected.noise_floor if noise_floor is None else noise_floor
    if floor is None:
        raise ScoresError(
            f"{os.fspath(golden)}: no noise floor is known: pass noise_floor= (see"
            " swa.testing.noise_floor), 0 if the scores must be equal"
        )
    difference = compare_scores(scores, expected, allowed=tolerance * floor)
    if difference is not None:
        raise AssertionError(
            f"the scores differ from {os.fspath(golden)} by more than {tolerance:g} noise floors of"
            f" {floor:.3g}:\n{difference}\n{_how_to_update()}"
        )


def assert_selection_matches(
    selection: Selection,
    golden: str | os.PathLike[str],
    *,
    tolerance: float = TOLERANCE,
    noise_floor: float = 0.0,
    update: bool | None = None,
) -> None:
    """Fail unless `selection` has the layers, and the policy, of the golden file.

    Args:
        golden: a file that `Selection.save` wrote, or that an update writes.
        tolerance: in noise floors.
        noise_floor: in nats per answer token. Above 0, layers may change places if the golden file
            has scores, and the deltas of all that did lie within 2 `tolerance` noise floors, as
            each may have moved by half of that.
        update: as for `assert_scores_match`.

    Raises:
        AssertionError: they differ (with the layers lost and gained, and their deltas), or there
            is no golden file.
        ScoresError: the golden file is damaged.
    """
    __tracebackhide__ = True
    if _updating(update):
        selection.save(_writable(golden))
        return
    expected = Selection.load(_existing(golden))
    difference = compare_selections(selection, expected, allowed=2 * tolerance * noise_floor)
    if difference is not None:
        raise AssertionError(
            f"the selection differs from {os.fspath(golden)}:\n{difference}\n{_how_to_update()}"
        )


def compare_scores(actual: LayerScores, expected: LayerScores, allowed: float) -> str | None:
    """What differs, as a table for people; None if every mean is within `allowed` nats."""
    if problems := _differences(actual, expected):
        return "\n".join(problems)
    rows = [
        (f"nll {end}", mean(getattr(actual, name)), mean(getattr(expected, name)))
        for end, name in (("base", "nll_base"), ("full", "nll_full"), ("sliding", "nll_swa"))
    ]
    rows += [(f"layer {layer}", a, b) for layer, a, b in _paired(actual.delta, expected.delta)]
    wrong = [row for row in rows if abs(row[1] - row[2]) > allowed]
    if not wrong:
        return None
    table = [f"{'':12}{'expected':>13}{'actual':>13}{'difference':>13}{'allowed':>11}"]
    for name, ours, theirs in wrong:
        table.append(f"{name:12}{theirs:+13.6f}{ours:+13.6f}{ours - theirs:+13.6f}{allowed:11.2e}")
    table.append(f"{len(rows) - len(wrong)} of {len(rows)} values agree")
    table += [
        f"{name} was {getattr(expected, name)}, is {getattr(actual, name)}"
        for name in ("model_fingerprint", "dtype", "tier", "version")
        if getattr(expected, name) != getattr(actual, name)
    ]
    return "\n".join(table)


def compare_selections(actual: Selection, expected: Selection, allowed: float = 0.0) -> str | None:
    """What differs, for people; None if nothing does but ties: expected deltas `allowed` apart."""
    difference = actual.policy.differs_from(expected.policy)
    if difference:
        return f"policy: {difference}"
    n_actual, n_expected = (s.num_hidden_layers for s in (actual, expected))
    if n_actual != n_expected:
        return f"num_hidden_layers: {n_actual} against {n_expected}"
    lost = sorted(set(expected.layers) - set(actual.layers))
    gained = sorted(set(actual.layers) - set(expected.layers))
    deltas = [_delta(expected, layer) for layer in lost + gained]
    known = [delta for delta in deltas if delta is not None]
    tied = len(lost) == len(gained) and len(known) == len(deltas)
    if not deltas or (tied and max(known) - min(known) <= allowed):
        return None
    return "\n".join(
        [
            f"expected {len(expected.layers)} layers: [{format_layers(expected.layers)}]",
            f"actual   {len(actual.layers)} layers: [{format_layers(actual.layers)}]",
            f"{'':7}{'layer':>6}{'expected delta':>17}{'actual delta':>15}",
            *(_moved("lost", layer, actual, expected) for layer in lost),
            *(_moved("gained", layer, actual, expected) for layer in gained),
        ]
    )


def _moved(verb: str, layer: int, actual: Selection, expected: Selection) -> str:
    deltas = [_delta(selection, layer) for selection in (expected, actual)]
    shown = ["none" if delta is None else f"{delta:+.6f}" for delta in deltas]
    return f"{verb:7}{layer:6d}{shown[0]:>17}{shown[1]:>15}"


def _delta(selection: Selection, layer: int) -> float | None:
    return selection.scores.delta[layer] if selection.scores else None


def _paired(actual: LayerValues, expected: LayerValues) -> list[tuple[int, float, float]]:
    """(layer, actual, expected) of the layers that have a delta."""
    pairs = enumerate(zip(actual, expected, strict=True))
    return [(layer, a, b) for layer, (a, b) in pairs if a is not None and b is not None]


def _differences(
    actual: LayerScores, expected: LayerScores, extra: tuple[str, ...] = ()
) -> list[str]:
    """What was run differently, for people."""
    names = ("direction", "base", "selectable_layers", "num_hidden_layers", "examples_hash", *extra)
    found = [
        f"{name}: {getattr(actual, name)!r} against {getattr(expected, name)!r}"
        for name in names
        if getattr(actual, name) != getattr(expected, name)
    ]
    policy = actual.policy.differs_from(expected.policy)
    return found + ([f"policy: {policy}"] if policy else [])


def _updating(update: bool | None) -> bool:
    return os.environ.get(UPDATE_VARIABLE) == "1" if update is None else update


def _writable(golden: str | os.PathLike[str]) -> Path:
    """The path, its folder made: the first update of a suite finds none."""
    path = Path(golden)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _existing(golden: str | os.PathLike[str]) -> Path:
    path = Path(golden)
    if not path.exists():
        raise AssertionError(f"there is no golden file {path}: {_how_to_update()}")
    return path


def _how_to_update() -> str:
    return f"to write it anew, run with {UPDATE_VARIABLE}=1, and review the change"
