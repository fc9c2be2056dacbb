"""The engine as a guest in someone's process: memory, signals, threads, forks, bad arguments."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import TIERS, nll, open_engine, sweep
from processes import run_python
from reference import Choices, Rows

from swa import _core
from swa.checkpoint import open_checkpoint

L = 4


def tokens(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 258, n).astype(np.int32)


def rows(n_tokens: int, full_from: int | None = None, **policy: Any) -> Rows:
    policy = {"window": 16, "sinks": 2} | policy
    return Rows.of(L, [], n_tokens if full_from is None else full_from, n_tokens, **policy)


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Path]) -> Path:
    return tiny("llama")


@pytest.fixture(scope="module")
def engine(folder: Path) -> _core.Engine:
    return open_engine(folder, num_threads=2)


@pytest.fixture
def long_run(engine: _core.Engine) -> Callable[..., Any]:
    """A call of many seconds, on every kind of whole-sequence work."""
    ids, policy = tokens(40_000), rows(40_000, window=0, sinks=0).arrays
    choices = Choices.of(rows(40_000), (0,) * L).arrays
    calls = {
        "nll": lambda **how: engine.nll(ids, 39_000, *policy, **how),
        "sweep": lambda **how: engine.sweep(ids, 39_000, *policy, np.full(L, 9), **how),
        "gates": lambda **how: engine.gates(ids, 39_000, *choices, np.full((L, 2), 0.5), **how),
        "logits": lambda **how: engine.logits(ids, *policy, first_row=39_999, **how),
        "start": lambda **how: engine.start(ids, *policy, policy[0], policy[1], 40_001, **how),
    }
    return lambda kind, **how: calls[kind](**how)


class TestMemory:
    def test_attention_is_linear_in_tokens(self) -> None:
        """T = 32,768: one T x T buffer of floats would be 4 GiB."""
        code = """
            import numpy as np
            from processes import peak_bytes
            from swa import _core
            x = np.random.default_rng(0).standard_normal((32768, 1, 8)).astype(np.float32)
            _core.attention(x[:64], x[:64], x[:64], 0, 0, 0)
            before = peak_bytes()
            _core.attention(x, x, x, 128, 4, 32700)
            print(peak_bytes() - before)
        """
        assert 1 << 20 < int(run_python(code)) < 64 << 20

    @pytest.mark.parametrize(
        "kind", ["every row", "nll", "sweep", "gates", "divergence", "logits", "decode"]
    )
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_workspace_is_told_truthfully(self, folder: Path, kind: str, dtype: str) -> None:
        """The peak of a call's memory is what workspace_bytes says, and O(T)."""
        code = """
            import sys
            import numpy as np
            from pathlib import Path
            from engines import open_engine
            from processes import peak_bytes
            from reference import Choices, Rows
            kind = sys.argv[2]
            n = 40_000 if kind in ("gates", "divergence") else 100_000
            engine = open_engine(Path(sys.argv[1]), dtype=sys.argv[3], num_threads=2)
            ids = np.random.default_rng(0).integers(0, 258, n).astype(np.int32)
            reference = np.ones((n - 1, 258), np.float32)
            def run(n):
                rows = Rows.of(4, [], n, n, window=100, sinks=28)
                policy = rows.arrays
                if kind in ("nll", "every row"):
                    return engine.nll(ids[:n], n - 9 if kind == "nll" else 1, *policy)
                if kind == "sweep":
                    flips = np.array([90, 90, 90, -1])
                    return engine.sweep(ids[:n], n - 9, *policy, flips)
                if kind in ("gates", "divergence"):
                    gates = *Choices.of(rows, (60,) * 4).arrays, np.full((4, 2), 0.5)
                    if kind == "gates":
                        return engine.gates(ids[:n], n - 9, *gates)
                    return engine.gates(ids[:n], 1, *gates, reference=reference[: n - 1])
                if kind == "logits":
                    return engine.logits(ids[:n], *policy, first_row=n - 1)
                return engine.start(ids[:n], *policy, *np.zeros((2, 4), np.int64), n)
            kept = run(64)
            before = peak_bytes()
            kept = run(n)
            peak = peak_bytes() - before
            told = {
                "sweep": lambda: engine.workspace_bytes(kind, n, 118),
                "gates": lambda: engine.gates_bytes(n, 2),
                "divergence": lambda: engine.gates_bytes(n, 2, n - 1),
                "every row": lambda: engine.workspace_bytes("nll", n),
            }.get(kind, lambda: engine.workspace_bytes(kind, n))()
            print(peak, told)
        """
        peak, told = map(int, run_python(code, folder, kind, dtype).split())
        assert peak <= told + (8 << 20)
        assert told <= 1.5 * peak + (32 << 20)  # what loading took and gave back hides some

    def test_lack_of_memory_is_an_error(self, folder: Path) -> None:
        """MemoryError, in every kind of call; afterwards the engine works as before."""
        code = """
            import resource, sys
            import numpy as np
            from pathlib import Path
            from engines import open_engine
            from reference import Rows
            engine = open_engine(Path(sys.argv[1]), num_threads=2)
            few, many = (np.zeros(n, np.int32) for n in (50, 2_000_000))
            def policy(n):
                return Rows.of(4, [], n, n, window=8).arrays
            expected = engine.nll(few, 40, *policy(50))[0]
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20),) * 2)
            n = len(many)
            choices = policy(n)[0][:, None], *policy(n)[1:]
            calls = [
                lambda: engine.nll(many, n - 9, *policy(n)),
                lambda: engine.sweep(many, n - 9, *policy(n), np.zeros(4, np.int64)),
                lambda: engine.gates(many, n - 9, *choices, np.ones((4, 1))),
                lambda: engine.logits(many, *policy(n), first_row=n - 1),
                lambda: engine.start(many, *policy(n), *np.zeros((2, 4), np.int64), n),
            ]
            for call in calls:
                try:
                    call()
                except MemoryError:
                    print("MemoryError")
            assert (engine.nll(few, 40, *policy(50))[0] == expected).all()
        """
        assert run_python(code, folder).split() == ["MemoryError"] * 5

    @pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD")
    @pytest.mark.parametrize(
        "kind", ["load", "nll", "sweep", "gates", "logits", "start", "attention"]
    )
    def test_every_failing_allocation(self, folder: Path, tmp_path: Path, kind: str) -> None:
        """The k-th allocation of a call fails, for every k: MemoryError, and no harm done."""
        source, library = tmp_path / "failing.c", tmp_path / "failing.so"
        source.write_text(
            """
            #include <stdlib.h>
            int allocations_left = -1; /* -1: all succeed */
            void *aligned_alloc(size_t alignment, size_t size)
            {
                void *memory;
                if (allocations_left == 0)
                    return NULL;
                if (allocations_left > 0)
                    allocations_left--;
                return posix_memalign(&memory, alignment, size) ? NULL : memory;
            }
            """
        )
        compiler = (sysconfig.get_config_var("CC") or "cc").split()
        subprocess.run([*compiler, "-shared", "-fPIC", "-o", library, source], check=True)
        code = """
            import ctypes, sys
            from pathlib import Path
            import numpy as np
            from engines import nll, open_engine
            from reference import Choices, Rows
            from swa import _core
            left = ctypes.c_int.in_dll(ctypes.CDLL(sys.argv[2]), "allocations_left")
            folder, kind = Path(sys.argv[1]), sys.argv[3]
            engine, ids = open_engine(folder, num_threads=2), np.arange(200, dtype=np.int32)
            rows = Rows.of(4, [], 190, 200, window=8)
            zeros, x = np.zeros((2, 4), np.int64), np.ones((100, 2, 16), np.float32)
            choices, half = Choices.of(rows, (0,) * 4).arrays, np.full((4, 2), 0.5)
            call = {
                "load": lambda: open_engine(folder),
                "nll": lambda: engine.nll(ids, 190, *rows.arrays),
                "sweep": lambda: engine.sweep(ids, 190, *rows.arrays, zeros[0]),
                "gates": lambda: engine.gates(ids, 190, *choices, half),
                "logits": lambda: engine.logits(ids, *rows.arrays),
                "start": lambda: engine.start(ids, *rows.arrays, *zeros, 300),
                "attention": lambda: _core.attention(x, x, x, 9, 1, 100),
            }[kind]
            expected = nll(engine, list(ids), 190, rows)[0]
            for failures in range(1000):
                left.value = failures
                try:
                    call()
                except MemoryError:
                    continue
                finally:
                    left.value = -1
                break
            assert np.array_equal(nll(engine, list(ids), 190, rows)[0], expected)
            print(failures)
        """
        failures = int(run_python(code, folder, library, kind, LD_PRELOAD=str(library)))
        assert 1 <= failures < 999

    def test_calls_leave_nothing_behind(self, engine: _core.Engine) -> None:
        ids, policy = tokens(2000), rows(2000).arrays
        choices, half = Choices.of(rows(200), (0,) * L).arrays, np.full((L, 2), 0.5)
        arrays = [ids, *policy, *choices, half]
        counts = [sys.getrefcount(x) for x in arrays]

        def resident() -> int:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE")

        def call() -> None:
            engine.nll(ids, 1990, *policy)
            engine.sweep(ids[:200], 190, *rows(200).arrays, np.zeros(L, np.int64))
            engine.gates(ids[:100], 90, *choices, half)
            engine.start(ids[:300], *policy, *policy[:2], 400).step(3)
            with pytest.raises(ValueError):
                engine.nll(ids, 0, *policy)

        for _ in range(5):
            call()
        before = resident()
        for _ in range(40):
            call()
        assert resident() - before < 4 << 20
        assert [sys.getrefcount(x) for x in arrays] == counts


class TestInterrupts:
    @pytest.mark.parametrize("kind", ["nll", "sweep", "gates", "logits", "start"])
    def test_ctrl_c(self, engine: _core.Engine, long_run: Callable[..., Any], kind: str) -> None:
        """Answered within 200 ms; the next call is right."""
        ids, policy = tokens(60), rows(60).arrays
        expected = engine.nll(ids, 50, *policy)[0]
        pressed: list[float] = []

        def press() -> None:
            pressed.append(time.perf_counter())
            os.kill(os.getpid(), 2)

        timer = threading.Timer(0.3, press)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            long_run(kind)
        answered = time.perf_counter() - pressed[0]
        timer.join()
        assert answered < 0.2
        assert np.array_equal(engine.nll(ids, 50, *policy)[0], expected)

    @pytest.mark.parametrize("kind", ["nll", "sweep", "gates", "logits", "start"])
    def test_an_exception_in_progress_cancels(
        self, long_run: Callable[..., Any], kind: str
    ) -> None:
        calls: list[float] = []

        def progress(done: float, total: float) -> None:
            calls.append(time.perf_counter())
            assert 0 <= done <= total
            if len(calls) == 3:
                raise LookupError("enough")

        with pytest.raises(LookupError, match="enough"):
            long_run(kind, progress=progress)
        assert len(calls) == 3 and time.perf_counter() - calls[-1] < 0.2

    def test_an_interrupted_step_leaves_the_session_as_it_was(
        self, tiny: Callable[..., Path]
    ) -> None:
        """Most of the time goes into the vocabulary: logits are being written when it comes."""
        checkpoint = open_checkpoint(tiny("llama", hidden_size=512, num_hidden_layers=1, tied=True))
        some = np.random.default_rng(0).standard_normal((5000, 512)).astype(np.float32).tobytes()
        zero, after = np.zeros(1, np.int64), np.full(1, 10, np.int64)
        ids = np.array([1, 2, 3], np.int32)

        def with_vocabulary(size: int) -> _core.Engine:
            config = checkpoint.config.engine_dict() | {"vocab_size": size}
            engine = _core.Engine(config, dtype="bfloat16", num_threads=1, tier="portable")
            for p in checkpoint.parameters():
                if p.tensor != "embed_tokens":
                    engine.load_rows(p.tensor, p.layer, p.row_start, p.dtype, p.data)
            for start in range(0, size, 5000):
                engine.load_rows("embed_tokens", -1, start, "F32", some)
            engine.finish()
            return engine

        for size in (400_000, 800_000, 1_600_000, 3_200_000):
            engine = with_vocabulary(size)
            session = engine.start(ids, zero, zero, after, zero, zero, 10)
            expected, begun = {3: session.logits()}, time.perf_counter()
            expected[4] = session.step(7)
            if time.perf_counter() - begun > 0.15:  # a signal is answered within 50 ms
                break

        class Enough(Exception):
            pass

        def stop(*_: object) -> None:
            raise Enough

        interrupted, previous = 0, signal.signal(signal.SIGALRM, stop)
        try:
            for attempt in range(100):
                session = engine.start(ids, zero, zero, after, zero, zero, 10)
                signal.setitimer(signal.ITIMER_REAL, 0.01 * (1 + attempt % 10))
                try:
                    session.step(7)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except Enough:  # if it came after the last block, the step was made
                    interrupted += session.n_tokens == 3
                    assert np.array_equal(session.logits(), expected[session.n_tokens])
                if interrupted == 3:
                    break
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        assert interrupted

    @pytest.mark.parametrize("kind", ["sweep", "gates"])
    def test_progress_rises_to_the_total(self, engine: _core.Engine, kind: str) -> None:
        for n in (4000, 16_000, 64_000, 256_000):  # until the machine is busy for a while
            seen: list[tuple[float, float]] = []

            def progress(done: float, total: float, seen: list[Any] = seen) -> None:
                seen.append((done, total))

            if kind == "sweep":
                flips = np.zeros(L, np.int64)
                engine.sweep(tokens(n), n - 100, *rows(n).arrays, flips, progress=progress)
            else:
                choices, half = Choices.of(rows(n), (40,) * L).arrays, np.full((L, 2), 0.5)
                engine.gates(tokens(n), n - 100, *choices, half, progress=progress)
            if len(seen) > 3:
                break
        assert len(seen) > 3
        assert seen == sorted(seen) and len({total for _, total in seen}) == 1
        assert seen[-1][0] == seen[-1][1] > 0
        fractions = [done / total for done, total in seen]
        assert fractions[0] < 0.9  # the work counted is the work done, as it is done

    def test_the_gil_is_released(self, engine: _core.Engine) -> None:
        beats = 0
        over = threading.Event()

        def beat() -> None:
            nonlocal beats
            while not over.wait(0.005):
                beats += 1

        heart = threading.Thread(target=beat)
        heart.start()
        start = time.perf_counter()
        engine.nll(tokens(20_000), 19_990, *rows(20_000, window=0, sinks=0).arrays)
        seconds = time.perf_counter() - start
        over.set()
        heart.join()
        assert seconds > 0.05
        assert beats > 0.2 * seconds / 0.005


class TestThreads:
    def test_concurrent_calls(self, engine: _core.Engine) -> None:
        """Calls from many threads queue, and give the bits that they give alone."""
        ids = tokens(200)
        policies = [rows(200, window=w) for w in range(1, 25)]
        expected = [nll(engine, ids, 190, policy)[0] for policy in policies]
        with ThreadPoolExecutor(6) as pool:
            actual = list(pool.map(lambda policy: nll(engine, ids, 190, policy)[0], policies))
        assert all(np.array_equal(x, y) for x, y in zip(actual, expected, strict=True))

    def test_interrupting_one_call_leaves_the_others(
        self, engine: _core.Engine, long_run: Callable[..., Any]
    ) -> None:
        ids, policy = tokens(300), rows(300)
        expected = nll(engine, ids, 290, policy)[0]

        def stop(done: float, total: float) -> None:
            raise LookupError

        with ThreadPoolExecutor(2) as pool:
            cancelled = pool.submit(long_run, "nll", progress=stop)
            other = pool.submit(nll, engine, ids, 290, policy)
            with pytest.raises(LookupError):
                cancelled.result(timeout=30)
            assert np.array_equal(other.result(timeout=30)[0], expected)

    def test_torch_in_one_process(self, folder: Path) -> None:
        """Two OpenMP users, either import order: neither hangs, crashes or changes results."""
        code = """
            import sys
            from pathlib import Path
            if sys.argv[2] == "torch first":
                import torch
            from engines import nll, open_engine
            from reference import Rows
            if sys.argv[2] == "swa first":
                import torch
            engine = open_engine(Path(sys.argv[1]), num_threads=2)
            a, b = torch.ones(300, 300), torch.ones(300, 300)
            for _ in range(3):
                assert (a @ b == 300).all()
                result = nll(engine, list(range(200)), 190, Rows.of(4, [], 190, 200, window=8))
            print(result[0].tobytes().hex())
        """
        orders = [run_python(code, folder, order) for order in ("torch first", "swa first")]
        assert orders[0] == orders[1]

    @pytest.mark.skipif(sys.platform != "linux", reason="/proc")
    def test_only_faults_are_raised_on_the_engines_own_threads(self) -> None:
        """A crash there is faulthandler's to report; other signals are for Python's threads."""
        code = """
            import signal
            from pathlib import Path
            from glue import inputs, small_engine
            before = set(Path("/proc/self/task").iterdir())
            engine = small_engine(num_threads=3)
            engine.nll(*inputs(engine, 2000))
            own = set(Path("/proc/self/task").iterdir()) - before
            for task in own:
                states = dict(line.split(":") for line in (task / "status").open())
                blocked = int(states["SigBlk"], 16)
                heard = {s.name for s in signal.valid_signals() if not blocked >> (s - 1) & 1}
                print(*sorted(heard - {"SIGKILL", "SIGSTOP"}))
            assert len(own) >= 3
        """
        faults = "SIGABRT SIGBUS SIGFPE SIGILL SIGSEGV SIGTRAP"
        assert set(run_python(code).splitlines()) == {faults}


class TestForks:
    def child_of(self, folder: Path, busy: bool) -> str:
        code = """
            import os, sys, threading, time, warnings
            from pathlib import Path
            import numpy as np
            from engines import nll, open_engine
            from reference import Rows
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside a thread
            engine = open_engine(Path(sys.argv[1]), num_threads=2)
            ids, policy = list(range(200)), Rows.of(4, [], 190, 200, window=8)
            expected = nll(engine, ids, 190, policy)[0]
            if sys.argv[2] == "True":
                n = 20_000
                work = threading.Thread(
                    target=nll, args=(engine, [1] * n, n - 1, Rows.of(4, range(4), n, n, window=1))
                )
                work.start()
                time.sleep(0.1)
                assert work.is_alive()
            child = os.fork()
            if child == 0:
                same = np.array_equal(nll(engine, ids, 190, policy)[0], expected)
                os._exit(0 if same else 1)
            for _ in range(300):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    break
                time.sleep(0.1)
            else:
                os.kill(child, 9)
                sys.exit("the child hangs")
            assert os.waitstatus_to_exitcode(status) == 0
            if sys.argv[2] == "True":
                work.join()
            assert np.array_equal(nll(engine, ids, 190, policy)[0], expected)
            print("well")
        """
        return run_python(code, folder, busy).strip()

    def test_after_a_run(self, folder: Path) -> None:
        assert self.child_of(folder, busy=False) == "well"

    def test_during_a_run(self, folder: Path) -> None:
        assert self.child_of(folder, busy=True) == "well"


class TestMachine:
    @pytest.mark.parametrize("wanted", TIERS)
    def test_the_environment_forces_a_tier(self, wanted: str) -> None:
        code = "from swa import _core; print(_core.build_info()['tier'])"
        assert run_python(code, SWA_TIER=wanted).strip() == wanted

    def test_an_unknown_tier_is_refused(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="tier"):
            open_engine(folder, tier="abacus")
        code = """
            from swa import _core
            try:
                _core.build_info()
            except ValueError as error:
                print(error)
        """
        assert "abacus" in run_python(code, SWA_TIER="abacus")

    def test_tiers(self, folder: Path) -> None:
        info = _core.build_info()
        assert "portable" in info["tiers_supported"]
        assert set(info["tiers_supported"]) <= set(info["tiers_built"])
        for tier in info["tiers_supported"]:
            assert open_engine(folder, tier=tier).tier == tier

    def test_the_fpu_is_left_alone(self, engine: _core.Engine) -> None:
        """No flush to zero, on any thread that Python sees, before and after a run."""
        nll(engine, tokens(100), 90, rows(100))
        tiny = np.float32(1e-40)
        assert tiny * np.float32(0.5) > 0 and float(tiny) > 0
        assert np.float64(5e-324) / 1 > 0

    def test_thread_limits(self, folder: Path, engine: _core.Engine) -> None:
        assert open_engine(folder, num_threads=3).num_threads == 3
        code = "from swa import _core; print(_core.build_info()['num_threads'])"
        assert run_python(code, OMP_NUM_THREADS="1").strip() == "1"
        for bad in (-1, 10**9):
            with pytest.raises(ValueError, match="thread"):
                open_engine(folder, num_threads=bad)


class TestArguments:
    ids, policy = tokens(30), rows(30).arrays

    @pytest.mark.parametrize("bad", [-1, 258, 2**31 - 1])
    def test_tokens_out_of_range(self, engine: _core.Engine, bad: int) -> None:
        ids = self.ids.copy()
        ids[7] = bad
        with pytest.raises(ValueError, match=str(bad)):
            engine.nll(ids, 20, *self.policy)
        with pytest.raises(ValueError, match=str(bad)):
            engine.logits(ids, *self.policy)

    @pytest.mark.parametrize("prompt_len", [0, -1, 30, 31, 2**40])
    def test_prompts_that_leave_no_answer(self, engine: _core.Engine, prompt_len: int) -> None:
        with pytest.raises(ValueError, match="prompt_len"):
            engine.nll(self.ids, prompt_len, *self.policy)

    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_policies_that_do_not_fit(self, engine: _core.Engine, which: int) -> None:
        for value in (np.zeros(L + 1, np.int64), np.zeros((L, 1), np.int64), np.full(L, -2)):
            policy = list(self.policy)
            policy[which] = value
            with pytest.raises(ValueError, match=("window", "sinks", "full_from")[which]):
                engine.nll(self.ids, 20, *policy)
        policy = list(self.policy)
        policy[which] = self.policy[which].astype(np.float64)
        with pytest.raises(TypeError):
            engine.nll(self.ids, 20, *policy)

    def test_huge_windows_do_not_wrap(self, engine: _core.Engine) -> None:
        full = engine.nll(self.ids, 20, *rows(30, window=0, sinks=0).arrays)[0]
        most = np.full(L, 2**63 - 1)
        for window, sinks, full_from in (
            (most, 0 * most, most),
            (0 * most + 1, most, most),
            (0 * most + 1, 0 * most, 0 * most),
        ):
            assert np.array_equal(engine.nll(self.ids, 20, window, sinks, full_from)[0], full)

    def test_empty_and_wrong_ids(self, engine: _core.Engine) -> None:
        for ids in (self.ids[:0], self.ids[None], self.ids.astype(np.int64), [1, 2, 3]):
            with pytest.raises((ValueError, TypeError)):
                engine.logits(ids, *self.policy)  # type: ignore[arg-type]

    def test_strided_arrays(self, engine: _core.Engine) -> None:
        expected = engine.nll(self.ids, 20, *self.policy)[0]
        spread = np.zeros(60, np.int32)
        spread[::2] = self.ids
        assert np.array_equal(engine.nll(spread[::2], 20, *self.policy)[0], expected)

    def test_flips(self, engine: _core.Engine) -> None:
        for flips in (np.zeros(L - 1, np.int64), np.full(L, -2)):
            with pytest.raises(ValueError, match="flip_window"):
                sweep(engine, self.ids, 20, rows(30), flips)


class TestLoading:
    @staticmethod
    def empty(folder: Path, **changes: Any) -> tuple[_core.Engine, list[Any]]:
        checkpoint = open_checkpoint(folder)
        config = checkpoint.config.engine_dict() | changes
        return _core.Engine(config, dtype="float32", num_threads=1), list(checkpoint.parameters())

    def test_a_missing_tensor_is_named(self, folder: Path) -> None:
        for missing in (0, 5, -1):
            engine, parameters = self.empty(folder)
            left_out = parameters.pop(missing)
            for p in parameters:
                engine.load_rows(p.tensor, p.layer, p.row_start, p.dtype, p.data)
            with pytest.raises(ValueError, match=left_out.tensor):
                engine.finish()

    def test_an_unfinished_engine_does_not_run(self, folder: Path) -> None:
        engine, _ = self.empty(folder)
        with pytest.raises(RuntimeError, match="finish"):
            nll(engine, [1, 2, 3], 2, rows(3))

    @pytest.mark.parametrize(
        "arguments, says",
        [
            (("q_proj", 0, 0, "F32", bytes(64 * 4 - 1)), "q_proj"),  # not a whole row
            (("q_proj", 0, 1, "F32", bytes(64 * 4)), "q_proj"),  # not the next row
            (("q_proj", 0, 0, "F32", bytes(65 * 64 * 4)), "q_proj"),  # too many rows
            (("q_proj", 4, 0, "F32", bytes(64 * 4)), "layer"),
            (("q_proj", -1, 0, "F32", bytes(64 * 4)), "q_proj"),  # not outside the layers
            (("embed_tokens", 0, 0, "F32", bytes(64 * 4)), "layer"),
            (("norm", -1, 0, "F32", bytes(63 * 4)), "norm"),
            (("wq", 0, 0, "F32", bytes(64 * 4)), "wq"),
            (("q_norm", 0, 0, "F32", bytes(16 * 4)), "q_norm"),  # not in this family
            (("q_proj", 0, 0, "I8", bytes(64)), "I8"),
        ],
    )
    def test_rows_that_do_not_fit(self, folder: Path, arguments: Any, says: str) -> None:
        engine, _ = self.empty(folder)
        with pytest.raises(ValueError, match=says):
            engine.load_rows(*arguments)

    def test_misaligned_bytes(self, folder: Path) -> None:
        engine, parameters = self.empty(folder)
        for p in parameters:
            shifted = memoryview(b"x" + bytes(p.data))[1:]
            engine.load_rows(p.tensor, p.layer, p.row_start, p.dtype, shifted)
        engine.finish()
        expected = nll(open_engine(folder), [5, 6, 7, 8], 2, rows(4))[0]
        assert np.array_equal(nll(engine, [5, 6, 7, 8], 2, rows(4))[0], expected)

    @pytest.mark.parametrize(
        "change",
        [
            {"num_key_value_heads": 3},
            {"head_dim": 15},
            {"hidden_size": 0},
            {"vocab_size": -5},
            {"hidden_size": 2**62},
            {"rms_norm_eps": float("nan")},
            {"inv_freq": np.ones(3, np.float32)},
        ],
        ids=str,
    )
    def test_configs_that_cannot_be(self, folder: Path, change: dict[str, Any]) -> None:
        with pytest.raises((ValueError, MemoryError)):
            self.empty(folder, **change)


class TestSession:
    def test_steps_equal_whole_runs(self, engine: _core.Engine) -> None:
        ids, n_prompt = tokens(90), 60
        policy = rows(n_prompt)  # prompt rows slide, later ones are full
        start = engine.start(ids[:n_prompt], *policy.arrays, *np.zeros((2, L), np.int64), 90)
        stepped = [start.logits()] + [start.step(int(token)) for token in ids[n_prompt:]]
        whole = engine.logits(ids, *policy.arrays, first_row=n_prompt - 1)
        np.testing.assert_allclose(stepped, whole, atol=1e-4)
        assert start.n_tokens == 90
        with pytest.raises(ValueError, match="capacity"):
            start.step(1)

    def test_windowed_steps_evict(self, engine: _core.Engine) -> None:
        ids, n_prompt = tokens(900), 300
        policy = rows(n_prompt, decode="window")._replace(full_from=(900,) * L)
        window, sinks, _ = policy.arrays
        start = engine.start(ids[:n_prompt], *policy.arrays, window, sinks, 900)
        small = start.kv_bytes
        stepped = [start.logits()] + [start.step(int(token)) for token in ids[n_prompt:]]
        whole = engine.logits(ids, *policy.arrays, first_row=n_prompt - 1)
        np.testing.assert_allclose(stepped, whole, atol=1e-4)
        zeros = np.zeros((2, L), np.int64)
        everything = engine.start(ids[:n_prompt], *policy.arrays, *zeros, 900).kv_bytes
        assert start.kv_bytes == small < 0.5 * everything
