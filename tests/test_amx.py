"""The AMX tier, which few machines have: on all x86-64 its instructions are emulated in C (a build
of its own, SWA_EMULATE_AMX=1), where the CPU has them the real ones run, too."""

from __future__ import annotations

import os
import re
import shlex
import signal
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
    names = ("kernels", "attention", "sweep", "gates")
    suites = [str(TESTS / f"test_{name}.py") for name in names]
    bitwise = "(TestBitwise and not threads and not windowed and not many and not wide)"
    wanted = f"bfloat16 and (inear or nan_value or {bitwise}) or head_dims or grouped"
    wanted += " or test_bfloat16"  # of gates
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


# ---- permission ---------------------------------------------------------------------------------

ENGINE = """
import os, sys, warnings
import numpy as np
from swa import _core
from glue import inputs, small_engine
from refusing import refuse_tiles

sizes = {"hidden_size": 96, "intermediate_size": 200, "head_dim": 64, "dtype": "bfloat16"}

def bits(tier=None):
    engine = small_engine(num_threads=2, tier=tier, **sizes)
    return engine.tier, engine.nll(*inputs(engine, 70))[0].tobytes()

def supported():
    return _core.build_info()["tiers_supported"]
"""


@pytest.mark.parametrize("kind", KINDS)
class TestPermission:
    def test_without_it_the_next_tier_serves(self, kind: str, emulated: Path) -> None:
        code = """
refuse_tiles()
assert "amx_bf16" in _core.build_info()["tiers_built"] and "amx_bf16" not in supported()
assert bits() == bits("avx512_bf16")
try:
    bits("amx_bf16")
except ValueError as error:
    print(error)
"""
        said = run_with(kind, emulated, ENGINE + code)
        assert "tier is 'amx_bf16'; this machine supports" in said

    def test_it_is_asked_for_when_needed(self, kind: str, emulated: Path) -> None:
        """Forced to another tier, an engine never asks."""
        code = """
refuse_tiles(kill=True)
print(bits("avx512_bf16")[0], bits("portable")[0], flush=True)
child = os.fork()
if child == 0:
    bits("amx_bf16")
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
        said = run_with(kind, emulated, ENGINE + code).split()
        assert said == ["avx512_bf16", "portable", str(-signal.SIGSYS)]

    def test_it_is_asked_for_once_and_forks_inherit_it(self, kind: str, emulated: Path) -> None:
        code = """
warnings.simplefilter("ignore", DeprecationWarning)  # fork beside a thread
engine = small_engine(num_threads=2, tier="amx_bf16", **sizes)
expected = engine.nll(*inputs(engine, 70))[0].tobytes()
refuse_tiles()
child = os.fork()
if child == 0:
    again = engine.nll(*inputs(engine, 70))[0].tobytes()
    os._exit(0 if again == expected and bits() == ("amx_bf16", expected) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert bits() == ("amx_bf16", expected)
print("well")
"""
        assert run_with(kind, emulated, ENGINE + code) == "well\n"

    def test_exec_asks_anew(self, kind: str, emulated: Path) -> None:
        """A process replaced after it had the permission loses it, and may be refused."""
        code = """
assert bits()[0] == "amx_bf16"
refuse_tiles()
after = "import other_core; from swa import _core; print(_core.build_info()['tier'])"
os.execv(sys.executable, [sys.executable, "-c", after])
"""
        assert run_with(kind, emulated, ENGINE + code) == "avx512_bf16\n"


@needs_amx
def test_a_small_signal_stack_refuses_tiles() -> None:
    """Linux does, where a thread's alternate signal stack could not hold them."""
    code = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))
memory = ctypes.create_string_buffer(8192)
stack = Stack(ctypes.addressof(memory), 0, 8192)
assert not ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None)
assert bits() == bits("avx512_bf16")
print("well")
"""
    assert run_python(ENGINE + code) == "well\n"


@needs_amx
def test_torch_multiplies_on_tiles_in_the_same_process() -> None:
    code = """
import threading
import torch
a = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
product, expected = a @ a, bits("amx_bf16")
same = []
def multiply():
    for _ in range(200):
        same.append(torch.equal(a @ a, product))
for _ in range(5):
    assert torch.equal(a @ a, product) and bits("amx_bf16") == expected
beside = threading.Thread(target=multiply)
beside.start()
while beside.is_alive():
    assert bits("amx_bf16") == expected
beside.join()
assert len(same) == 200 and all(same)
print("well")
"""
    assert run_python(ENGINE + code) == "well\n"
