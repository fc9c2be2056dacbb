"""Import first: puts the extension named by SWA_TEST_CORE, if any, in the place of swa._core."""

from __future__ import annotations

import importlib.util
import os
import sys

if path := os.environ.get("SWA_TEST_CORE"):
    spec = importlib.util.spec_from_file_location("swa._core", path)
    assert spec is not None and spec.loader is not None
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    sys.modules["swa._core"] = core
