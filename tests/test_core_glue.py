"""The Python side of the engine: arguments, interruption, threads, fork, references, shutdown."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import processes
import psutil
import pytest
from glue import inputs, large_engine, long_inputs, small_config, small_engine, tensors

from swa import _core

RESPONSE_SECONDS = 0.2  # within which Ctrl-C or an exception ends a call

run_python = partial(processes.run_python, seconds=60.0)


@pytest.fixture(scope="module")
def engine() -> _core.Engine:
    return small_engine()


@pytest.fixture(scope="module")
def slow_engine() -> _core.Engine:
    return large_engine()


def same(first: Any, second: Any) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


# ---- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(small_config()))
def test_config_needs_every_key(key: str) -> None:
    config = small_config()
    del config[key]
    with pytest.raises(ValueError, match=f"no {key}"):
        _core.Engine(config, dtype="float32")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size is 0"),
        ({"num_hidden_layers": -1}, ValueError, "num_hidden_layers is -1"),
        ({"vocab_size": 2**31}, ValueError, "2\\^31"),
        ({"vocab_size": 2**70}, OverflowError, "too big"),
        ({"vocab_size": 1.5}, TypeError, "float"),
        ({"head_dim": 7}, ValueError, "head_dim"),
        ({"num_key_value_heads": 3}, ValueError, "multiple"),
        ({"rms_norm_eps": float("nan")}, ValueError, "rms_norm_eps is nan"),
        ({"rope_scale": float("inf")}, ValueError, "rope_scale is inf"),
        ({"qk_norm": 1}, TypeError, "qk_norm must be True or False"),
        ({"inv_freq": np.ones(3, np.float32)}, ValueError, "inv_freq has length 3"),
        ({"inv_freq": np.ones(4)}, TypeError, "float32, not float64"),
        ({"inv_freq": [1.0] * 4}, TypeError, "float32, not <class 'list'>"),
    ],
)
def test_config_values_are_checked(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        _core.Engine(small_config(**changes), dtype="float32")


def test_a_config_value_may_leave_the_config_while_it_is_read() -> None:
    config = small_config()
    events: list[str] = []

    class Fleeting:
        def __float__(self) -> float:
            del config["rms_norm_eps"]
            return float("nan")

        def __repr__(self) -> str:
            events.append("shown")
            return "fleeting"

        def __del__(self) -> None:
            events.append("gone")

    config["rms_norm_eps"] = Fleeting()
    with pytest.raises(ValueError, match="rms_norm_eps is fleeting"):
        _core.Engine(config, dtype="float32")
    assert events == ["shown", "gone"]


def test_sizes_beyond_all_memory_are_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        _core.Engine(small_config(vocab_size=2**31 - 1, hidden_size=2**16), dtype="float32")


def test_dtype_tier_and_threads_are_checked() -> None:
    with pytest.raises(ValueError, match="dtype is 'float16'; it must be bfloat16 or float32"):
        _core.Engine(small_config(), dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype is 'none'"):
        _core.Engine(small_config())  # type: ignore[call-arg]
    supported = repr(_core.build_info()["tiers_supported"]).strip("()")
    with pytest.raises(ValueError, match="tier is 'mmx'; this machine supports") as caught:
        _core.Engine(small_config(), dtype="float32", tier="mmx")
    assert supported in str(caught.value)
    engine = small_engine()
    for bad in (-1, 1025):
        with pytest.raises(ValueError, match=f"num_threads is {bad}"):
            engine.num_threads = bad
    with pytest.raises(AttributeError):
        del engine.num_threads
    engine.num_threads = 3
    assert engine.num_threads == 3
    engine.num_threads = 0
    assert engine.num_threads == _core.build_info()["num_threads"]


def test_loading_is_checked() -> None:
    config = small_config()
    engine = _core.Engine(config, dtype="float32")
    matrix = np.zeros((config["vocab_size"], config["hidden_size"]), np.float32)
    with pytest.raises(ValueError, match="dtype is 'I8'"):
        engine.load_rows("embed_tokens", -1, 0, "I8", matrix)  # type: ignore[arg-type]
    for tensor, layer in [("lm_head", -1), ("q_proj.bias", 0), ("nonsense", 0), ("norm", 0)]:
        with pytest.raises(ValueError, match="no such tensor"):
            engine.load_rows(tensor, layer, 0, "F32", matrix)
    for tensor, layer in [("q_proj", 3), ("norm", -2), ("norm", -7), ("embed_tokens", -(2**63))]:
        with pytest.raises(ValueError, match=f"layer {layer} {tensor}: no such layer"):
            engine.load_rows(tensor, layer, 0, "F32", matrix)
    with pytest.raises(ValueError, match="whole rows"):
        engine.load_rows("embed_tokens", -1, 0, "F32", bytes(127))
    with pytest.raises(ValueError, match="in order"):
        engine.load_rows("embed_tokens", -1, 1, "F32", matrix[1:])
    with pytest.raises(ValueError, match="exact length"):
        engine.load_rows("norm", -1, 0, "F32", bytes(4))
    with pytest.raises((BufferError, ValueError), match="contiguous"):
        engine.load_rows("embed_tokens", -1, 0, "F32", matrix[:, ::2])
    with pytest.raises(ValueError, match="embed_tokens"):
        engine.finish()
    with pytest.raises(RuntimeError, match="finish"):
        engine.nll(*inputs(engine))


def test_nothing_loads_after_the_end() -> None:
    engine = small_engine()
    with pytest.raises(ValueError, match="every tensor is loaded"):
        engine.load_rows("norm", -1, 0, "F32", bytes(32 * 4))


def test_chunks_and_misaligned_bytes_give_the_same_model(engine: _core.Engine) -> None:
    config = small_config()
    other = _core.Engine(config, dtype="float32")
    for name, layer, values in tensors(config):
        rows = values.reshape(1, -1) if values.ndim == 1 else values
        for start in range(0, len(rows), 7):
            shifted = memoryview(b"x" + rows[start : start + 7].tobytes())[1:]
            other.load_rows(name, layer, start, "F32", shifted)
    other.finish()
    assert same(other.nll(*inputs(other)), engine.nll(*inputs(engine)))


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (0, np.zeros(24, np.int64), TypeError, "ids must be a NumPy array of int32, not int64"),
        (0, [1, 2, 3], TypeError, "ids must be a NumPy array of int32, not <class 'list'>"),
        (0, np.zeros((2, 12), np.int32), ValueError, "ids has 2 dimensions; it must have 1"),
        (0, np.zeros(0, np.int32), ValueError, "ids is empty"),
        (0, np.zeros(1, np.int32), ValueError, "prompt"),
        (0, np.full(24, 40, np.int32), ValueError, r"ids\[0\] is 40; .*\[0, 40\)"),
        (0, np.array([3, -1, 0], np.int32), ValueError, r"ids\[1\] is -1"),
        (1, 0, ValueError, "prompt_len is 0; it must be at least 1 and at most 23"),
        (1, 24, ValueError, "prompt_len is 24"),
        (1, -(2**62), ValueError, "prompt_len is"),
        (2, np.zeros(2, np.int64), ValueError, "window has length 2; it must have 3"),
        (2, np.array([0, -1, 0]), ValueError, r"window\[1\] is -1; it must be at least 0"),
        (2, np.zeros(3, np.int32), TypeError, "window must be a NumPy array of int64"),
        (3, np.array([0, 0, -5]), ValueError, r"sinks\[2\] is -5"),
        (4, np.array([-1, 0, 0]), ValueError, r"full_from\[0\] is -1"),
    ],
)
def test_arguments_of_a_run_are_checked(
    engine: _core.Engine, place: int, value: Any, error: type[Exception], message: str
) -> None:
    arguments: list[Any] = list(inputs(engine))
    arguments[place] = value
    with pytest.raises(error, match=message):
        engine.nll(*arguments)


def test_arguments_of_the_other_calls_are_checked(engine: _core.Engine) -> None:
    ids, prompt_len, *rows = inputs(engine)
    none = np.full(3, _core.NO_FLIP, np.int64)
    with pytest.raises(ValueError, match=r"flip_window\[0\] is -2; it must be at least -1"):
        engine.sweep(ids, prompt_len, *rows, none - 1)
    for bad in (-1, 24):
        with pytest.raises(ValueError, match=f"first_row is {bad}"):
            engine.logits(ids, *rows, first_row=bad)
    with pytest.raises(ValueError, match="capacity is 23; it must be at least 24"):
        engine.start(ids, *rows, *rows[:2], 23)
    with pytest.raises(ValueError, match=r"decode_window\[0\] is -1"):
        engine.start(ids, *rows, none, rows[1], 30)
    with pytest.raises(ValueError, match=r"decode_sinks\[0\] is -1"):
        engine.start(ids, *rows, rows[0], none, 30)
    with pytest.raises(ValueError, match="kind is 'train'"):
        engine.workspace_bytes("train", 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_tokens is 0"):
        engine.workspace_bytes("nll", 0)
    with pytest.raises(ValueError, match="n_prefix is 6"):
        engine.workspace_bytes("sweep", 5, 6)
    with pytest.raises(ValueError, match="n_reference is 6"):
        engine.gates_bytes(5, 2, 6)
    with pytest.raises(TypeError, match="progress must be None or a callable"):
        engine.nll(ids, prompt_len, *rows, progress=3)  # type: ignore[arg-type]


def test_absurd_outputs_are_a_memory_error(engine: _core.Engine) -> None:
    ids, _, *rows = inputs(engine)
    with pytest.raises(MemoryError):
        engine.start(ids, *rows, np.zeros(3, np.int64), rows[1], 2**31 - 1)


def test_huge_windows_are_whole_sequences(engine: _core.Engine) -> None:
    ids, prompt_len, window, sinks, full_from = inputs(engine)
    full = engine.nll(ids, prompt_len, window * 0, sinks, full_from)
    huge = np.full(3, 2**63 - 1, np.int64)
    assert same(engine.nll(ids, prompt_len, huge, sinks, full_from), full)
    assert same(engine.nll(ids, prompt_len, window, huge, full_from), full)
    assert same(engine.nll(ids, prompt_len, window * 0, sinks, huge), full)


def test_any_memory_layout_gives_the_same(engine: _core.Engine) -> None:
    arguments = inputs(engine)
    before = [np.array(value) for value in arguments]
    expected = engine.nll(*arguments)
    ids, prompt_len, *rows = arguments
    spread = np.repeat(ids, 2)[::2]
    swapped = [value.astype(value.dtype.newbyteorder()) for value in rows]
    assert not spread.flags.c_contiguous
    assert same(engine.nll(spread, prompt_len, *swapped), expected)
    frozen = ids.copy()
    frozen.flags.writeable = False
    assert same(engine.nll(frozen, prompt_len, *rows), expected)
    assert all(np.array_equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_inputs_may_change_while_a_call_runs(slow_engine: _core.Engine) -> None:
    """What was checked is what is used: an id written during the run cannot reach the engine."""
    ids, prompt_len, *rows = inputs(slow_engine, 2000)
    expected = slow_engine.nll(ids, prompt_len, *rows)

    def scribble(done: float, total: float) -> None:
        ids.fill(2**31 - 1)
        rows[0].fill(-7)

    assert same(slow_engine.nll(ids, prompt_len, *rows, progress=scribble), expected)


def test_sessions_are_made_by_engines_alone() -> None:
    with pytest.raises(TypeError, match="cannot create"):
        _core.Session()


def test_repr_and_attributes(engine: _core.Engine) -> None:
    tier = _core.build_info()["tier"]
    assert repr(engine) == f"<swa._core.Engine: 3 layers, float32, {tier} kernels, 1 threads>"
    assert (engine.dtype, engine.tier) == ("float32", tier)
    assert (engine.num_hidden_layers, engine.vocab_size) == (3, 40)
    smallest = 4 * sum(values.size for _, _, values in tensors(small_config()))
    assert smallest <= engine.weight_bytes <= 8 * smallest


# ---- sessions -----------------------------------------------------------------------------------


def start(engine: _core.Engine, capacity: int = 30) -> _core.Session:
    ids, _, *rows = inputs(engine)
    return engine.start(ids, *rows, rows[0] * 0, rows[1], capacity)


def test_a_session_is_checked_and_keeps_its_engine() -> None:
    session = start(small_engine())
    assert (session.n_tokens, session.logits().shape) == (24, (40,))
    for bad in (-1, 40, 2**40):
        with pytest.raises(ValueError, match=f"token is {bad}"):
            session.step(bad)
    with pytest.raises(TypeError):
        session.step(1.5)  # type: ignore[arg-type]
    for n_tokens in range(25, 31):
        fed = session.step(3)
        assert session.n_tokens == n_tokens
        assert same([fed], [session.logits()])
    with pytest.raises(ValueError, match="the session is full: its capacity is 30 tokens"):
        session.step(3)
    assert session.n_tokens == 30
    assert session.kv_bytes > 0


def test_a_session_takes_other_thread_counts(engine: _core.Engine) -> None:
    expected = start(engine).step(1)
    session = start(engine)
    engine.num_threads = 4
    try:
        assert same([session.step(1)], [expected])
    finally:
        engine.num_threads = 1


def test_steps_of_many_threads_queue(engine: _core.Engine) -> None:
    session = start(engine, 24 + 64)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: session.step(5), range(64)))
    assert session.n_tokens == 24 + 64
    alone = start(engine, 24 + 64)
    expected = {alone.step(5).tobytes() for _ in range(64)}
    assert {result.tobytes() for result in results} == expected


# ---- interruption -------------------------------------------------------------------------------


@contextmanager
def interrupt_after(seconds: float) -> Iterator[list[float]]:
    """Send SIGINT to this process later; the list then holds the time it was sent."""
    sent: list[float] = []

    def send() -> None:
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(seconds, send)
    timer.start()
    try:
        yield sent
    finally:
        timer.cancel()
        timer.join()


def long_calls(engine: _core.Engine) -> dict[str, Callable[[], object]]:
    ids, prompt_len, *rows = long_inputs(engine)
    flips = np.full(engine.num_hidden_layers, 5, np.int64)
    return {
        "nll": lambda: engine.nll(ids, prompt_len, *rows),
        "sweep": lambda: engine.sweep(ids, prompt_len, *rows, flips),
        "logits": lambda: engine.logits(ids, *rows, first_row=len(ids) - 1),
        "start": lambda: engine.start(ids, *rows, *rows[:2], len(ids)),
    }


@pytest.mark.parametrize("name", ["nll", "sweep", "logits", "start"])
def test_ctrl_c_is_answered_at_once(slow_engine: _core.Engine, name: str) -> None:
    call = long_calls(slow_engine)[name]
    waits = []
    for _ in range(3):  # the best of three: the machine may be busy with something else
        with interrupt_after(0.3) as sent, pytest.raises(KeyboardInterrupt):
            call()
        waits.append(time.perf_counter() - sent[0])
        if waits[-1] <= RESPONSE_SECONDS:
            break
    assert min(waits) <= RESPONSE_SECONDS
    arguments = inputs(slow_engine)
    assert same(slow_engine.nll(*arguments), slow_engine.nll(*arguments))


def test_ctrl_c_ends_a_call_that_still_queues(
    engine: _core.Engine, slow_engine: _core.Engine
) -> None:
    stop = threading.Event()

    def give_up(done: float, total: float) -> None:
        if stop.is_set():
            raise InterruptedError

    def occupy() -> None:
        with pytest.raises(InterruptedError):
            slow_engine.nll(*long_inputs(slow_engine), progress=give_up)

    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(occupy)
        time.sleep(0.2)
        try:
            with interrupt_after(0.1) as sent, pytest.raises(KeyboardInterrupt):
                engine.nll(*inputs(engine))
            assert time.perf_counter() - sent[0] <= RESPONSE_SECONDS
            assert not busy.done()
        finally:
            stop.set()
        busy.result()


def test_other_signals_are_handled_while_a_call_runs(slow_engine: _core.Engine) -> None:
    arguments = inputs(slow_engine, 6000)
    expected = slow_engine.nll(*arguments)
    heard: list[int] = []
    previous = signal.signal(signal.SIGALRM, lambda number, frame: heard.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        found = slow_engine.nll(*arguments)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert heard
    assert same(found, expected)


# ---- progress -----------------------------------------------------------------------------------


def test_progress_rises_to_its_total(slow_engine: _core.Engine) -> None:
    seen: list[tuple[float, float]] = []
    slow_engine.nll(*inputs(slow_engine, 6000), progress=lambda *state: seen.append(state))
    done = [state[0] for state in seen]
    assert len(seen) > 1
    assert len({state[1] for state in seen}) == 1
    assert done == sorted(done)
    assert all(0 <= d <= total for d, total in seen)
    assert seen[-1][0] == seen[-1][1] > 0


def test_a_short_call_reports_its_end(engine: _core.Engine) -> None:
    seen: list[tuple[float, float]] = []
    engine.nll(*inputs(engine), progress=lambda *state: seen.append(state))
    assert seen[-1][0] == seen[-1][1] > 0


def test_an_exception_in_progress_cancels(slow_engine: _core.Engine) -> None:
    raised: list[float] = []

    def stop(done: float, total: float) -> None:
        raised.append(time.perf_counter())
        raise ZeroDivisionError("enough")

    with pytest.raises(ZeroDivisionError, match="enough"):
        slow_engine.nll(*long_inputs(slow_engine), progress=stop)
    assert time.perf_counter() - raised[0] <= RESPONSE_SECONDS
    assert len(raised) == 1


def test_many_heads_over_many_keys_do_not_delay_it() -> None:
    """All heads of a block of rows take seconds; one head, some milliseconds."""
    heads = {"num_attention_heads": 512, "num_key_value_heads": 1, "head_dim": 2}
    engine = small_engine(tier="portable", num_hidden_layers=1, hidden_size=8, **heads)
    ids, _, *rows = inputs(engine, 16_000, window=0)
    seen: list[float] = []
    raised: list[float] = []

    def stop_in_attention(done: float, total: float) -> None:
        seen.append(done)
        if seen.count(done) == 3:  # what comes before attention goes on in small steps
            raised.append(time.perf_counter())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine.logits(ids, *rows, progress=stop_in_attention)
    assert seen[-1] > 0
    assert time.perf_counter() - raised[0] <= RESPONSE_SECONDS


def test_an_exception_at_the_end_is_raised_too(engine: _core.Engine) -> None:
    def stop(done: float, total: float) -> None:
        if done == total:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine.nll(*inputs(engine), progress=stop)


def test_progress_cannot_use_its_own_engine(
    engine: _core.Engine, slow_engine: _core.Engine
) -> None:
    own: list[Exception] = []

    def again(done: float, total: float) -> None:
        try:
            slow_engine.nll(*inputs(slow_engine))
        except RuntimeError as error:
            own.append(error)

    slow_engine.nll(*inputs(slow_engine, 2000), progress=again)
    assert own
    assert "progress callback" in str(own[0])
    # Another engine is fine: its call runs when this one is done.
    expected = engine.nll(*inputs(engine))
    others: list[Any] = []
    slow_engine.nll(
        *inputs(slow_engine, 2000),
        progress=lambda done, total: others.append(engine.nll(*inputs(engine))),
    )
    assert others
    assert all(same(other, expected) for other in others)


@pytest.mark.parametrize("between", ["another engine", "a hook"])
def test_nor_can_what_is_called_inside_it(
    engine: _core.Engine, slow_engine: _core.Engine, between: str
) -> None:
    """The outermost call is known through calls on something else."""
    refused: list[str] = []

    def use_the_outer(*_: object) -> None:
        try:
            slow_engine.nll(*inputs(slow_engine))
        except RuntimeError as error:
            refused.append(str(error))

    def inside(done: float, total: float) -> None:
        if between == "another engine":
            engine.nll(*inputs(engine), progress=use_the_outer)
        elif not refused:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            _core.peak("f32")  # some tenths of a second: the signal comes while it runs or queues

    previous = signal.signal(signal.SIGALRM, use_the_outer)
    try:
        slow_engine.nll(*inputs(slow_engine, 2000), progress=inside)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert refused and "progress callback" in refused[0]
    slow_engine.nll(*inputs(slow_engine))  # afterwards it is free again


# ---- threads ------------------------------------------------------------------------------------


def test_the_gil_is_released(slow_engine: _core.Engine) -> None:
    beats: list[float] = []
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.005):
            beats.append(time.perf_counter())

    thread = threading.Thread(target=beat)
    thread.start()
    begin = time.perf_counter()
    slow_engine.nll(*inputs(slow_engine, 6000))
    seconds = time.perf_counter() - begin
    stop.set()
    thread.join()
    inside = [beat for beat in beats if begin <= beat <= begin + seconds]
    assert seconds > 0.1
    assert len(inside) >= 0.2 * seconds / 0.005


def test_calls_of_many_threads_queue(engine: _core.Engine) -> None:
    other = small_engine(dtype="bfloat16", num_threads=2)
    expected = {id(e): e.nll(*inputs(e)) for e in (engine, other)}

    def run(number: int) -> bool:
        chosen = (engine, other)[number % 2]
        return same(chosen.nll(*inputs(chosen)), expected[id(chosen)])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(200)))


# ---- fork ---------------------------------------------------------------------------------------

FORK = """
import os, sys, threading, time
import numpy as np
from glue import inputs, large_engine, long_inputs, small_engine

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 3)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(4)
    return pid

def ends_well(pid, seconds=30.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.01)
    os.kill(pid, 9)
    return False

def same(a, b):
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b))
"""


def test_a_forked_child_computes_like_its_parent() -> None:
    run_python(
        FORK
        + """
engine = small_engine(num_threads=3)
expected = engine.nll(*inputs(engine))
def generations(depth):
    good = same(engine.nll(*inputs(engine)), expected)
    return good and (depth == 0 or ends_well(child(lambda: generations(depth - 1))))
assert ends_well(child(lambda: generations(2)))
assert same(engine.nll(*inputs(engine)), expected)
"""
    )


def test_a_child_forked_during_a_call_computes() -> None:
    run_python(
        FORK
        + """
engine = large_engine(num_threads=3)
expected = engine.nll(*inputs(engine, 200))
stop = threading.Event()
class Stop(Exception): pass
def progress(done, total):
    if stop.is_set(): raise Stop
def run():
    try: engine.nll(*long_inputs(engine), progress=progress)
    except Stop: pass
thread = threading.Thread(target=run)
thread.start()
for _ in range(3):
    time.sleep(0.1)
    assert thread.is_alive()
    assert ends_well(child(lambda: same(engine.nll(*inputs(engine, 200)), expected)))
stop.set()
thread.join()
assert same(engine.nll(*inputs(engine, 200)), expected)
"""
    )


def test_a_fork_in_a_progress_callback_ends_the_call_of_the_child() -> None:
    run_python(
        FORK
        + """
engine = large_engine()
me, children = os.getpid(), []
def progress(done, total):
    if os.getpid() == me and not children:
        children.append(os.fork())
try:
    found = engine.nll(*inputs(engine, 4000), progress=progress)
    assert os.getpid() == me
except RuntimeError as error:
    good = os.getpid() != me and "forked" in str(error)
    good = good and same(engine.nll(*inputs(engine, 200)), engine.nll(*inputs(engine, 200)))
    os._exit(0 if good else 5)
assert children and ends_well(children[0])
assert same(found, engine.nll(*inputs(engine, 4000)))
"""
    )


# ---- shutdown, environment ----------------------------------------------------------------------


def test_the_interpreter_ends_while_a_call_runs() -> None:
    begin = time.perf_counter()
    run_python(
        """
import threading, time
from glue import large_engine, long_inputs
engine = large_engine()
threading.Thread(target=lambda: engine.nll(*long_inputs(engine)), daemon=True).start()
threading.Thread(target=lambda: engine.nll(*long_inputs(engine)), daemon=True).start()
time.sleep(0.3)
"""
    )
    assert time.perf_counter() - begin < 20


def test_a_handler_at_exit_may_still_compute() -> None:
    code = """
import atexit
from glue import inputs, small_engine
atexit.register(lambda: print(len(engine.nll(*inputs(engine))[0])))  # runs after the worker's end
import swa._core
engine = small_engine()
engine.nll(*inputs(engine))
"""
    assert run_python(code) == "4\n"


def test_the_environment_chooses_tier_and_threads() -> None:
    code = "from swa import _core; i = _core.build_info(); print(i['tier'], i['num_threads'])"
    assert run_python(code, SWA_TIER="portable", OMP_NUM_THREADS="3") == "portable 3\n"
    code = """
from swa import _core
try: _core.build_info()
except ValueError as error: print(error)
"""
    assert "SWA_TIER is 'mmx'; this machine supports" in run_python(code, SWA_TIER="mmx")


# ---- references and memory ----------------------------------------------------------------------


def every_call(engine: _core.Engine, arguments: tuple[Any, ...]) -> None:
    """Each call once as it should be, and as it should not."""
    ids, prompt_len, *rows = arguments
    flips = np.array([0, 4, _core.NO_FLIP])
    engine.nll(*arguments, progress=lambda done, total: None)
    engine.sweep(*arguments, flips)
    engine.logits(ids, *rows)
    session = engine.start(ids, *rows, *rows[:2], 26)
    session.step(1)
    session.logits()
    repr(engine)
    engine.workspace_bytes("sweep", 10, 4)
    _core.build_info()
    other = _core.Engine(small_config(), dtype="float32")
    for wrong in (
        lambda: engine.nll(ids, 0, *rows),
        lambda: engine.nll(ids + 50, prompt_len, *rows),
        lambda: engine.sweep(*arguments, flips - 1),
        lambda: engine.sweep(*arguments, flips[:2]),
        lambda: engine.logits(ids, *rows, first_row=-1),
        lambda: engine.nll(*arguments, progress=lambda done, total: 1 / 0),
        lambda: engine.start(ids, *rows, *rows[:2], 5),
        lambda: session.step(-1),
        lambda: [session.step(1), session.step(1)],
        lambda: _core.Engine(small_config(head_dim=7), dtype="float32"),
        lambda: _core.Engine({}, dtype="float32"),
        lambda: _core.Engine(small_config(), dtype="float32", tier="mmx"),
        lambda: other.finish(),
        lambda: other.load_rows("q_proj", 0, 0, "F32", b"x"),
        lambda: other.load_rows("q_proj", 0, 0, "X", b"x"),
    ):
        with pytest.raises((ValueError, ZeroDivisionError)):
            wrong()


def test_no_reference_and_no_memory_leaks() -> None:
    engine = small_engine()
    arguments = inputs(engine)
    watched = [engine, _core.Engine, _core.Session, _core.build_info, None]
    watched += [array for array in arguments if isinstance(array, np.ndarray)]

    def counts() -> list[int]:
        return [sys.getrefcount(thing) for thing in watched]

    for _ in range(3):
        every_call(engine, arguments)
    before = counts()
    tracemalloc.start()
    every_call(engine, arguments)
    gc.collect()  # the exceptions that were caught are cycles
    traced = tracemalloc.get_traced_memory()[0]
    for _ in range(100):
        every_call(engine, arguments)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - traced
    tracemalloc.stop()
    assert max(after - at_first for at_first, after in zip(before, counts(), strict=True)) < 50
    assert grown < 5_000


def test_no_leaks_outside_of_python() -> None:
    """Weights, workspaces and KV caches are the engine's own allocations: watch the process."""
    sizes = {"vocab_size": 4096, "hidden_size": 256}
    process = psutil.Process()

    def once() -> None:
        engine = small_engine(**sizes)
        ids, prompt_len, *rows = inputs(engine, 300)
        engine.nll(ids, prompt_len, *rows)
        engine.start(ids, *rows, *rows[:2], 4000).step(1)
        unfinished = _core.Engine(small_config(**sizes), dtype="float32")
        assert unfinished.weight_bytes > 4_000_000

    for _ in range(3):
        once()
    before = process.memory_info().rss
    for _ in range(30):
        once()
    assert process.memory_info().rss - before < 30_000_000
