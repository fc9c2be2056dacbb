"""Sweeps: a grid of policies, strategies and budgets, on any executor, resumable to the point."""

from swa.sweeps.driver import WorkerError
from swa.sweeps.run import sweep
from swa.sweeps.table import SweepTable

__all__ = ["SweepTable", "WorkerError", "sweep"]
