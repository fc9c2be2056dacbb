"""Measures swa and its peers in the same run: `python -m benchmarks --help`."""

import sys
from pathlib import Path

# `python -m` puts the checkout first, whose `swa` has no compiled core: prefer the installed one.
_ROOT = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [entry for entry in sys.path if str(Path(entry).resolve()) != _ROOT] + [_ROOT]
