"""`swa select`: which layers keep full attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swa.cli.helpers import budget_of, note, print_json
from swa.cli.options import (
    FractionOfLayers,
    Json,
    Layers,
)


def select(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="What `swa score` wrote.")],
    layers: Layers = None,
    fraction: FractionOfLayers = None,
    out: Annotated[Path, typer.Option(help="Policy file; an older one is replaced.")] = Path(
        "policy.json"
    ),
    as_json: Json = False,
) -> None:
    """Choose the layers that keep full attention."""
    from swa.layer_scores import LayerScores
    from swa.selection import select as choose

    budget = budget_of(layers, fraction)
    selection = choose(LayerScores.load(scores), budget)
    selection.save(out)
    if as_json:
        print_json({"layers": list(selection.layers), "policy": selection.policy.to_dict()})
    else:
        print(selection)
    note(f"wrote {out}")
