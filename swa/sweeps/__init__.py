"""Sweeps: a grid of policies, strategies and budgets, on any executor, resumable to the point."""

from swa.sweeps.estimate import SweepEstimate, estimate_sweep
from swa.sweeps.run import sweep
from swa.sweeps.table import SweepTable

__all__ = ["SweepEstimate", "SweepTable", "estimate_sweep", "sweep"]
