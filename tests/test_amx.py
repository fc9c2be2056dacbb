"""The AMX tier, which few machines have: on all x86-64 its instructions are emulated in C (a build
of its own, SWA_EMULATE_AMX=1), where the CPU has them the real ones run, too."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from engines import TIERS
from processes import TESTS, build_core, run_python

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or "avx512_bf16" not in TIERS,
    reason="needs Linux and a CPU with AVX512_BF16, on which the tier builds",
)
TIER = "amx_bf16"
KINDS = ("emulated", "instructions") if TIER in TIERS else ("emulated",)
needs_amx = pytest.mark.skipif(TIER not in TIERS, reason="needs a CPU with AMX")

VECTORS = ["f", "bw", "dq", "vl", "bf16"]
FLAGS = [f"-mavx512{name}" for name in VECTORS] + ["-mfma", "-mf16c"]
EMULATED, TILES = ["-DSWA_EMULATE_AMX"], ["-mamx-tile", "-mamx-bf16"]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_core(tmp_path_factory.mktemp("emulated"), SWA_EMULATE_AMX="1")


def run_with(kind: str, emulated: Path, code: str, **environment: str) -> str:
    """`code` in a fresh process, after `import other_core`, with that kind of tiles."""
    core = {"SWA_TEST_CORE": str(emulated)} if kind == "emulated" else {}
    return run_python("import other_core\n" + code, **core, **environment)


# ---- the kernel ---------------------------------------------------------------------------------


def panels(folder: Path, *flags: str) -> str:
    """What tile_panels.c prints; it ends with an error where a product is wrong."""
    compiler = shlex.split(os.environ.get("CC", sysconfig.get_config_var("CC") or "cc"))
    program, csrc = folder / "panels", TESTS.parent / "csrc"
    sources = [TESTS / "tile_panels.c", csrc / "dispatch.c", csrc / "kernels_portable.c"]
    switches = ["-std=c11", "-O1", "-ffp-contract=off", "-DSWA_HAVE_AMX_BF16", *FLAGS, *flags]
    command = [*compiler, *switches, "-I", csrc, *sources, "-lm", "-o", program]
    subprocess.run(command, check=True, timeout=120)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_panels_on_emulated_tiles(tmp_path: Path) -> None:
    assert "for 1 to 49 rows" in panels(tmp_path, *EMULATED)


@needs_amx
def test_panels_on_the_instructions_give_the_same_bits(tmp_path: Path) -> None:
    assert panels(tmp_path, *TILES) == panels(tmp_path, *EMULATED)


# ---- the engine ---------------------------------------------------------------------------------


def test_the_suites_of_every_tier_on_emulated_tiles(emulated: Path) -> None:
    suites = [str(TESTS / f"test_{name}.py") for name in ("kernels", "attention", "sweep")]
    bitwise = "(TestBitwise and not threads and not windowed and not many and not wide)"
    wanted = f"bfloat16 and (inear or nan or {bitwise}) or head_dims or grouped"
    code = f"""
import pytest
pytest.main([*{suites}, "--rootdir={TESTS.parent}", "-q", "-k", "{TIER} and ({wanted})"])
"""
    output = run_with("emulated", emulated, code)
    passed = re.search(r"^(\d+) passed, \d+ deselected", output, re.MULTILINE)
    assert passed is not None and int(passed[1]) > 80, output


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_gives_the_bits_of_a_whole_run(kind: str, emulated: Path) -> None:
    """One row at a time or all at once: every row goes through tiles in the same order."""
    code = """
import numpy as np
from glue import inputs, small_engine
sizes = {"hidden_size": 96, "intermediate_size": 200, "head_dim": 64, "dtype": "bfloat16"}
engine = small_engine(tier="amx_bf16", **sizes)
ids, _, *rows = inputs(engine, 70)
rows[2][:] = 40  # rows of the prompt slide, later ones are full
whole = engine.logits(ids, *rows, first_row=39)
session = engine.start(ids[:40], *rows, rows[0] * 0, rows[1], 70)
stepped = [session.logits()] + [session.step(int(token)) for token in ids[40:]]
vectors = small_engine(tier="avx512_bf16", **sizes).logits(ids, *rows, first_row=39)
print(np.array_equal(stepped, whole), abs(vectors - whole).max() / abs(whole).max())
"""
    same, difference = run_with(kind, emulated, code).split()
    assert same == "True"
    assert 0 < float(difference) < 0.02  # another order of summation, and nothing else
