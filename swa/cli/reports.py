"""`swa report`: a page about scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swa.cli.helpers import budget_of, check_outputs, named_files, note
from swa.cli.options import (
    FractionOfLayers,
    Layers,
    PolicyFile,
)
from swa.errors import InputError

if TYPE_CHECKING:
    from swa.policy import AttentionPolicy
    from swa.selection import Selection


def report(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="What `swa score` wrote.")],
    policy: PolicyFile = None,
    layers: Layers = None,
    fraction: FractionOfLayers = None,
    evaluation: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Output of `swa eval --json`; may be repeated."),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
    out: Annotated[Path, typer.Option(help="HTML file; an older one is replaced.")] = Path(
        "report.html"
    ),
) -> None:
    """Write one self-contained HTML page about scores.

    It has the deltas by layer and by example, the chosen layers, the NLL of what was evaluated, and
    the command that repeats it.
    """
    from swa.evaluation import Evaluation
    from swa.layer_scores import LayerScores
    from swa.reporting import report as write_report
    from swa.selection import load_chosen
    from swa.selection import select as choose

    check_outputs(out)
    loaded = LayerScores.load(scores)
    selection: Selection | AttentionPolicy | None = None
    if policy:
        if layers is not None or fraction is not None:
            raise InputError("--policy has its layers already: leave out --layers and --fraction")
        selection = load_chosen(policy)
    elif layers is not None or fraction is not None:
        selection = choose(loaded, budget_of(layers, fraction))
    files = named_files(evaluation or (), "--evaluation")
    evaluations = {name: Evaluation.load(path) for name, path in files.items()}
    write_report(loaded, selection, out, evaluations=evaluations, title=title)
    note(f"wrote {out}")
