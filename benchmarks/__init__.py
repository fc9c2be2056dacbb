"""Measures swa and its peers in the same run: `python -m benchmarks --help`."""
