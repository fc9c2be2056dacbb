"""Whether sides computed the same thing: times of different things cannot be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import Disagreement

SINGLE_KERNEL = 0.01
"""Of the numbers' size. bfloat16 operands differ from float32 ones by 0.3%, in a window of 1,024
keys a key too many makes 3%."""
BFLOAT16 = 0.05
"""Of the logits' spread over some rows: rounding makes 1 to 3% (of a single row up to 7%), missing
sinks 60%; a window one key off, 0.3%, is found in float32 alone."""
FLOAT32 = 1e-4
"""Of the logits' spread; rounding makes 5e-6."""
FLOAT32_NATS = 1e-3
BFLOAT16_NATS = 0.1
"""Most that any NLL of a sweep may differ: peers with a residual stream in bfloat16 were
0.05 off at 6,144 tokens. Here, too, float32 is what finds faults."""


def error(of: Any, reference: Any) -> float:
    """Root mean square of the difference over that of the reference about its mean."""
    expected = np.asarray(reference, np.float64)
    return float(_rms(np.asarray(of, np.float64) - expected) / _rms(expected - expected.mean()))


def same_numbers(results: Mapping[str, Any]) -> None:
    """Outputs of a single kernel, in whatever dtype."""
    told = {name: result for name, result in results.items() if result is not None}
    _, *others = told
    first, reference = next(iter(told.items()))
    for name in others:
        require(error(told[name], reference), SINGLE_KERNEL, f"outputs of {first} and {name}")


def same_logits(results: Mapping[str, Any]) -> None:
    """Logits of the last rows in bfloat16: of ours, and of every other that has a result."""
    for name, result in results.items():
        if name != "ours" and result is not None:
            require(error(result, results["ours"]), BFLOAT16, f"logits of ours and {name}")


def require(found: float, limit: float, what: str) -> None:
    """Raises Disagreement; NaN is one."""
    if not found <= limit:
        raise Disagreement(f"{what} differ by {found:.2g}, where {limit:g} is allowed")


def _rms(x: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt((x**2).mean()))
