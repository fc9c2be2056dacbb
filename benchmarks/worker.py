"""The process of one side: requests and answers are JSON lines on stdin and stdout.

    {"prepare": NAME, "function": F, "arguments": {...}}  ->  {}
    {"measure": NAME}  ->  {"value": seconds or a rate, "result": what was computed, or null}
    {"forget": NAME}   ->  {}

Anything that fails is answered by {"error": traceback}.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

Measured = tuple[float, Any]  # the value, and a result that JSON can hold, to compare sides by
Run = Callable[[], Measured]


def main() -> None:
    # What libraries print goes to stderr: stdout belongs to the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module = importlib.import_module(f"benchmarks.{sys.argv[1]}")
    prepared: dict[str, Run] = {}
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line), module, prepared)
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(
    request: dict[str, Any], module: ModuleType, prepared: dict[str, Run]
) -> dict[str, Any]:
    if "prepare" in request:
        function = getattr(module, request["function"])
        prepared[request["prepare"]] = function(**request["arguments"])
        return {}
    if "measure" in request:
        value, result = prepared[request["measure"]]()
        return {"value": value, "result": result}
    prepared.pop(request["forget"], None)
    gc.collect()
    return {}


if __name__ == "__main__":
    main()
