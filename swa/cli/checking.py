"""`swa stability`: how far scores can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swa.cli.helpers import budget_of, note, print_json
from swa.cli.options import FractionOfLayers, Json, Layers, PlotFile, Seed


def stability(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="What `swa score` wrote.")],
    layers: Layers = None,
    fraction: FractionOfLayers = None,
    resamples: Annotated[int, typer.Option(min=1, help="Of the examples.")] = 2000,
    seed: Seed = 0,
    plot: PlotFile = None,
    as_json: Json = False,
) -> None:
    """Say how often other examples would choose the same layers.

    The scored examples are resampled; a layer that is chosen in nearly all resamples is sure, one
    that is chosen in some could be swapped by more examples.
    """
    from swa.layer_scores import LayerScores
    from swa.stability import selection_stability

    found = selection_stability(
        LayerScores.load(scores), budget_of(layers, fraction), n_bootstrap=resamples, seed=seed
    )
    if plot is not None:
        found.plot().figure.savefig(plot)  # type: ignore[union-attr]
        note(f"wrote {plot}")
    if as_json:
        print_json(found.to_dict())
    else:
        print(found)
