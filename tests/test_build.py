"""Compilers that lack what the build would like: instruction sets, OpenMP."""

from __future__ import annotations

import json
import os
import sysconfig
from pathlib import Path

import pytest
from processes import build_core, run_python

from swa import _core


@pytest.fixture
def poor_compiler(tmp_path: Path) -> Path:
    """The real one, but for AVX-512 and OpenMP."""
    compiler = sysconfig.get_config_var("CC") or "cc"
    script = tmp_path / "poor-cc"
    script.write_text(
        "#!/bin/sh\n"
        'case " $* " in *" -mavx512"*|*" -fopenmp "*) echo "unknown flag" >&2; exit 1;; esac\n'
        f'exec {os.environ.get("CC", compiler)} "$@"\n'
    )
    script.chmod(0o755)
    return script


def test_a_compiler_without_avx512_and_openmp(poor_compiler: Path, tmp_path: Path) -> None:
    extension = build_core(tmp_path, CC=str(poor_compiler), LDSHARED=f"{poor_compiler} -shared")
    code = """
        import importlib.util, json, sys
        import numpy as np
        spec = importlib.util.spec_from_file_location("swa._core", sys.argv[1])
        core = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(core)
        x = np.random.default_rng(0).standard_normal((700, 33)).astype(np.float32)
        product = core.linear(x, x, tier="portable", num_threads=3)
        assert np.allclose(product, x @ x.T, atol=1e-3)
        info = core.build_info()
        print(json.dumps([info["openmp"], info["tiers_built"], product.tobytes().hex()[:4000]]))
    """
    openmp, tiers, product = json.loads(run_python(code, extension))
    assert not openmp
    assert "portable" in tiers and not any("avx512" in tier for tier in tiers)
    reference = run_python(code, _core.__file__)
    assert json.loads(reference)[2] == product  # the same bits as with OpenMP
