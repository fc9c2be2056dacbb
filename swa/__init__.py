"""swa: turn a pretrained full-attention language model into a hybrid, without training.

The usual path: `load` a model, collect `examples`, `score_layers`, `select` the layers that keep
full attention, `Model.patch`, then `evaluate`, generate, save or `report`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from swa import errors
from swa.errors import CheckpointError, SwaError, SwaWarning

if TYPE_CHECKING:
    from swa import examples, suites, testing
    from swa.budget import Budget
    from swa.comparison import Comparison, compare
    from swa.controls import length_controls
    from swa.elimination import AdaptiveStop
    from swa.evaluation import Evaluation, evaluate
    from swa.examples import Example
    from swa.frontier import Pareto, pareto
    from swa.gate_scores import GateScores, score_gates
    from swa.layer_scores import LayerScores
    from swa.model import Model, load
    from swa.policy import AttentionPolicy
    from swa.reporting import report
    from swa.score import score_layers
    from swa.selection import Selection, select
    from swa.stability import rank_agreement, selection_stability
    from swa.statistics import paired_bootstrap
    from swa.sweeps import SweepTable, sweep
    from swa.transfer import transfer_matrix

__version__ = "0.1.0"

__all__ = [
    "AdaptiveStop",
    "AttentionPolicy",
    "Budget",
    "CheckpointError",
    "Comparison",
    "Evaluation",
    "Example",
    "GateScores",
    "LayerScores",
    "Model",
    "Pareto",
    "Selection",
    "SwaError",
    "SwaWarning",
    "SweepTable",
    "__version__",
    "compare",
    "errors",
    "evaluate",
    "examples",
    "length_controls",
    "load",
    "paired_bootstrap",
    "pareto",
    "rank_agreement",
    "report",
    "score_gates",
    "score_layers",
    "select",
    "selection_stability",
    "suites",
    "sweep",
    "testing",
    "transfer_matrix",
]

_HOME = {
    "AdaptiveStop": "elimination",
    "AttentionPolicy": "policy",
    "Budget": "budget",
    "Comparison": "comparison",
    "Evaluation": "evaluation",
    "Example": "examples",
    "GateScores": "gate_scores",
    "LayerScores": "layer_scores",
    "Model": "model",
    "Pareto": "frontier",
    "Selection": "selection",
    "SweepTable": "sweeps",
    "compare": "comparison",
    "evaluate": "evaluation",
    "length_controls": "controls",
    "load": "model",
    "pareto": "frontier",
    "paired_bootstrap": "statistics",
    "rank_agreement": "stability",
    "report": "reporting",
    "score_gates": "gate_scores",
    "score_layers": "score",
    "select": "selection",
    "selection_stability": "stability",
    "sweep": "sweeps",
    "transfer_matrix": "transfer",
}


def __getattr__(name: str) -> object:
    """Import a public name's module when it is first used, so that `import swa` stays instant."""
    if name in ("examples", "suites", "testing"):
        return importlib.import_module(f"swa.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'swa' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"swa.{_HOME[name]}"), name)
    globals()[name] = value
    return value
