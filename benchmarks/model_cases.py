"""Whole models: do the sides agree, prefill, sweep, decode, load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import swa
from benchmarks import agreement
from benchmarks.agreement import error, require
from benchmarks.harness import Call, Case, Row, Side
from benchmarks.kernel_cases import READ_BYTES
from benchmarks.rows import Medians, Results, Title, by_rate, by_seconds, share_of
from benchmarks.setting import DECODER, LLAMA_CPP, OURS, TRANSFORMERS, Setting, wakeful
from benchmarks.shapes import QWEN25_05B, SMOLLM2_135M
from swa import cost

WINDOW, SINKS = 512, 4
SMOLLM2 = SMOLLM2_135M.config()
ROWS_TOLD = {"n_rows": 16}  # one row's error depends too much on chance
LIMIT = "limit"


def agree(setting: Setting) -> Iterator[Case]:
    """SmolLM2's errors in bfloat16, and in float32, where a window one key off would show."""
    n_tokens = 768 if setting.quick else 1536
    work = {"path": setting.model_path, "ids": _ids(setting, n_tokens)}
    full = work | {"window": 0, "sinks": 0}
    sliding = work | {"window": n_tokens // 3, "sinks": SINKS}
    yield logits_in_both(f"full, T {n_tokens}", full, "transformers", TRANSFORMERS, work)
    yield logits_in_both(
        f"window {n_tokens // 3}, T {n_tokens}", sliding, "hand-written torch", DECODER, sliding
    )
    yield _llama_cpp_logits(full, work)
    yield _sweep_in_float32(setting)


def logits_in_both(
    what: str, work: dict[str, Any], peer: str, side: Side, arguments: dict[str, Any]
) -> Case:
    """The last rows' logits of a peer that has both dtypes, ours in float32 being the arbiter."""
    work, arguments, exact = work | ROWS_TOLD, arguments | ROWS_TOLD, {"dtype": "float32"}
    calls = {
        "exact": Call(OURS, "prefill", work | exact),
        "ours": Call(OURS, "prefill", work),
        "peer": Call(side, "prefill", arguments),
        "exact peer": Call(side, "prefill", arguments | exact),
    }

    def errors(result: Results) -> dict[str, float]:
        return {name: error(result[name], result["exact"]) for name in calls if name != "exact"}

    def same(result: Results) -> None:
        found = errors(result)
        where = f"logits of {{}} and ours in float32, {what},"
        require(found["exact peer"], agreement.FLOAT32, where.format(f"{peer} f32"))
        require(found["peer"], agreement.BFLOAT16, where.format(f"{peer} bf16"))
        require(found["ours"], 2 * found["peer"], where.format("ours bf16"))

    def rows(_: Medians, result: Results) -> list[Row]:
        found = errors(result)
        return [
            *_errors(
                f"bf16 logits, {what}", "%", found["ours"], f"{peer} bf16", found["peer"], 0.5
            ),
            *_errors(
                f"f32 logits against {peer}, {what}",
                "%",
                found["exact peer"],
                LIMIT,
                agreement.FLOAT32,
            ),
        ]

    return Case(f"logits {what}", calls, rows, same, is_timed=False)


def _errors(
    case: str, unit: str, ours: float, peer: str, theirs: float, target: float | None = 1.0
) -> list[Row]:
    return by_seconds(Title(case), ours, {peer: theirs}, {peer: target}, unit=unit)


def _llama_cpp_logits(full: dict[str, Any], work: dict[str, Any]) -> Case:
    """llama.cpp keeps more than bfloat16 between products, so its error is no bound for ours."""
    peers = _llama_cpp(work | ROWS_TOLD)
    calls = {
        "exact": Call(OURS, "prefill", {**full, **ROWS_TOLD, "dtype": "float32"}),
        "ours": Call(OURS, "prefill", {**full, **ROWS_TOLD}),
        **peers,
    }

    def same(result: Results) -> None:
        for name in peers.keys() & result.keys():
            found = error(result[name], result["exact"])
            require(found, agreement.BFLOAT16, f"logits of {name} and ours in float32")

    def rows(_: Medians, result: Results) -> list[Row]:
        found = {name: error(result[name], result["exact"]) for name in result}
        title = Title(f"bf16 logits, full, T {len(work['ids'])}")
        return by_seconds(title, found["ours"], found, dict.fromkeys(peers), unit="%")

    return Case("logits llama.cpp", calls, rows, same, is_timed=False)


def _sweep_in_float32(setting: Setting) -> Case:
    n_tokens, window = (192, 24) if setting.quick else (256, 32)
    work = _example(setting, n_tokens) | {"window": window, "dtype": "float32"}
    calls = {
        "ours": Call(OURS, "sweep", work),
        "hand-written torch f32": Call(DECODER, "sweep", work),
        "transformers f32": Call(TRANSFORMERS, "masked_run", work),
    }

    def differences(result: Results) -> dict[str, float]:
        return {name: _nats(result["ours"], result[name]) for name in calls if name != "ours"}

    def same(result: Results) -> None:
        for name, found in differences(result).items():
            require(found, agreement.FLOAT32_NATS, f"NLLs of a sweep, ours f32 and {name},")

    def rows(_: Medians, result: Results) -> list[Row]:
        return [
            row
            for name, found in differences(result).items()
            for row in _errors(
                f"NLLs of a sweep against {name}, T {n_tokens}, window {window}",
                "nats",
                found,
                LIMIT,
                agreement.FLOAT32_NATS,
            )
        ]

    return Case("sweep in float32", calls, rows, same, is_timed=False)


def _nats(ours: list[float], theirs: list[float] | float) -> float:
    """The largest difference of the runs' NLLs; a single number is of the base run."""
    expected = np.atleast_1d(theirs)
    return float(np.abs(np.array(ours)[: len(expected)] - expected).max())


def _ids(setting: Setting, n_tokens: int) -> list[int]:
    return [token for part in setting.prompt(n_tokens) for token in part]


def _example(setting: Setting, n_tokens: int) -> dict[str, Any]:
    """What a sweep's sides are told, but for the window."""
    prompt, answer = setting.prompt(n_tokens)
    return {"path": setting.model_path, "prompt": prompt, "answer": answer, "sinks": SINKS}


def prefill(setting: Setting) -> Iterator[Case]:
    """SmolLM2 to the logits of the last rows, with full attention and all layers sliding."""
    for n_tokens in (768,) if setting.quick else (6144, 3072, 1536):
        yield _prefill_full(setting, n_tokens)
        yield _prefill_sliding(setting, n_tokens)
        yield _prefill_llama_cpp(setting, n_tokens)


def _prefill_full(setting: Setting, n_tokens: int) -> Case:
    work = {"path": setting.model_path, "ids": _ids(setting, n_tokens), **ROWS_TOLD}
    calls = {
        "ours": Call(OURS, "prefill", {**work, "window": 0, "sinks": 0}),
        "transformers bf16": Call(TRANSFORMERS, "prefill", work),
        "peak": setting.peak(),
    }
    policy = swa.AttentionPolicy(sliding_window=n_tokens)
    flops = cost.nll_work(SMOLLM2, policy, (), n_tokens, 1).flops

    def rows(median: Medians, _: Results) -> list[Row]:
        return by_seconds(
            Title("SmolLM2, full", "T", n_tokens),
            median["ours"],
            median,
            {"transformers bf16": 2.3 if n_tokens == 6144 else None},
            share_of(flops / median["ours"], median["peak"]),
        )

    share = 4 if n_tokens == 6144 else 1
    return Case(f"full {n_tokens}", calls, rows, agreement.same_logits, share=share)


def _prefill_llama_cpp(setting: Setting, n_tokens: int) -> Case:
    """Apart from transformers, which need not wait for it."""
    work = {"path": setting.model_path, "ids": _ids(setting, n_tokens), **ROWS_TOLD}
    peers = _llama_cpp(work)
    calls = {"ours": Call(OURS, "prefill", {**work, "window": 0, "sinks": 0}), **peers}

    def rows(median: Medians, _: Results) -> list[Row]:
        title = Title("SmolLM2, full", "T", n_tokens)
        return by_seconds(title, median["ours"], median, dict.fromkeys(peers))

    return Case(f"llama.cpp {n_tokens}", calls, rows, agreement.same_logits)


def _llama_cpp(work: dict[str, Any]) -> dict[str, Call]:
    """Its prefill without and with flash attention, which is not always faster on a CPU."""
    return {
        name: Call(LLAMA_CPP, "prefill", {**work, "flash_attention": flash})
        for name, flash in (("llama.cpp bf16", False), ("llama.cpp bf16, flash attention", True))
    }


def _prefill_sliding(setting: Setting, n_tokens: int) -> Case:
    window = min(WINDOW, n_tokens // 3)
    work = {
        "path": setting.model_path,
        "ids": _ids(setting, n_tokens),
        "window": window,
        "sinks": SINKS,
        **ROWS_TOLD,
    }
    calls = {
        "ours": Call(OURS, "prefill", work),
        "hand-written torch": Call(DECODER, "prefill", work),
        "peak": setting.peak(),
    }
    policy = swa.AttentionPolicy(sliding_window=window, num_sink_tokens=SINKS)
    flops = cost.nll_work(SMOLLM2, policy, (), n_tokens, 1).flops

    def rows(median: Medians, _: Results) -> list[Row]:
        return by_seconds(
            Title(f"SmolLM2, window {window}", "T", n_tokens),
            median["ours"],
            median,
            {"hand-written torch": 4.0 if n_tokens == 6144 else None},
            share_of(flops / median["ours"], median["peak"]),
        )

    share = 4 if n_tokens == 6144 else 1
    return Case(f"sliding {n_tokens}", calls, rows, agreement.same_logits, share=share)


def sweep(setting: Setting) -> Iterator[Case]:
    """One example of SmolLM2: every layer restored in turn, all others sliding."""
    for n_tokens in (384,) if setting.quick else (6144, 1536, 3072):
        yield _sweep(setting, n_tokens)


def _sweep(setting: Setting, n_tokens: int) -> Case:
    window = min(WINDOW, n_tokens // 3)
    work = _example(setting, n_tokens) | {"window": window}
    n_prompt, n_answer = len(work["prompt"]), len(work["answer"])
    forks, one_run = "hand-written torch, forks", "one masked run of transformers"
    calls = {
        "ours": Call(OURS, "sweep", work),
        forks: Call(DECODER, "sweep", work),
        one_run: Call(TRANSFORMERS, "masked_run", work),
        "peak": setting.peak(),
    }
    policy = swa.AttentionPolicy(sliding_window=window, num_sink_tokens=SINKS)
    layers = range(SMOLLM2.num_hidden_layers)
    flops = cost.sweep_work(SMOLLM2, policy, (), layers, n_prompt, n_answer).flops
    naive = f"naive transformers ({len(layers) + 1} x one masked run)"

    def same(result: Results) -> None:
        """Every run's NLL, so the deltas, and the base run's by transformers."""
        for name in (forks, one_run):
            found = _nats(result["ours"], result[name])
            require(found, agreement.BFLOAT16_NATS, f"NLLs of a sweep, ours and {name},")

    def rows(median: Medians, _: Results) -> list[Row]:
        hand_written = 4.0 if setting.has_amx else 2.0
        targets = (hand_written, 18.0) if n_tokens == 6144 else (None, None)
        return by_seconds(
            Title(f"SmolLM2, {len(layers)} layers, window {window}", "T", n_tokens),
            median["ours"],
            {**median, naive: (len(layers) + 1) * median[one_run]},
            {forks: targets[0], naive: targets[1]},
            share_of(flops / median["ours"], median["peak"]),
        )

    return Case(f"sweep {n_tokens}", calls, rows, same)


def gradient(setting: Setting) -> Iterator[Case]:
    """The loss and its gradient over the gates of all layers, in the place of a sweep."""
    for n_tokens in (384,) if setting.quick else (3072, 1536):
        yield _gradient(setting, n_tokens)


def _gradient(setting: Setting, n_tokens: int) -> Case:
    window = n_tokens // 12
    work = _example(setting, n_tokens) | {"window": window}
    full = {"path": work["path"], "ids": [*work["prompt"], *work["answer"]]}
    prefill, exact = "ours, full prefill", "ours, exact sweep"
    ours = wakeful(OURS)
    calls = {
        "ours": Call(ours, "gradient", work),
        prefill: Call(ours, "prefill", {**full, "window": 0, "sinks": 0}),
        exact: Call(ours, "sweep", work),
        "peak": setting.peak(side=ours),
    }

    def same(result: Results) -> None:
        """At the base of a sweep, the loss is that of its base run."""
        require(abs(result["ours"][0] - result[exact][0]), 0, "loss of the gates and of the sweep")

    def rows(median: Medians, result: Results) -> list[Row]:
        return by_seconds(
            Title(f"SmolLM2, gate gradient, window {window}", "T", n_tokens),
            median["ours"],
            median,
            {prefill: 0.2, exact: 4.0},
            share_of(result["ours"][1] / median["ours"], median["peak"]),
        )

    return Case(f"gradient {n_tokens}", calls, rows, same)


def decode(setting: Setting) -> Iterator[Case]:
    """Greedy decoding of one sequence after 16 tokens: the speed of reading the weights."""
    work = {"path": setting.model_path, "ids": list(range(16))}
    llama_cpp = Call(wakeful(LLAMA_CPP), "generate", {**work, "flash_attention": False})
    yield _decode(setting, "SmolLM2", work, {"llama.cpp bf16": llama_cpp}, READ_BYTES // 4)
    if not setting.quick:
        random = {**work, "path": setting.checkpoint(QWEN25_05B)}
        yield _decode(setting, "random 0.5B", random, {}, READ_BYTES)


def _decode(
    setting: Setting, name: str, work: dict[str, Any], others: dict[str, Call], n_bytes: int
) -> Case:
    calls = {
        "ours": Call(wakeful(OURS), "decode", work),
        "transformers bf16": Call(wakeful(TRANSFORMERS), "generate", work),
        **others,
        # A buffer as large as the weights.
        "read": setting.peak("read", n_bytes=n_bytes, side=wakeful(OURS)),
    }

    def rows(median: Medians, result: Results) -> list[Row]:
        return by_rate(
            Title(f"{name}, one sequence"),
            "token/s",
            median["ours"],
            median,
            dict.fromkeys(("transformers bf16", *others)),
            share_of(median["ours"] * result["ours"], median["read"], 0.70),
        )

    return Case(f"decode {name}", calls, rows)


def load(setting: Setting) -> Iterator[Case]:
    """`swa.load` of a 1 GB checkpoint in fresh processes, the file in the page cache."""
    path = setting.checkpoint(QWEN25_05B.cut_to(2, 8192) if setting.quick else QWEN25_05B)
    calls = {
        what: Call(OURS, "load", {"path": path, "what": what}) for what in ("seconds", "peak_bytes")
    }

    def rows(median: Medians, result: Results) -> list[Row]:
        n_bytes = (Path(path()) / "model.safetensors").stat().st_size
        size = f"{n_bytes / 1e9:.2f} GB"
        time, room = "limit: 1.5 s a GB", "limit: packed weights + 0.5 GiB"
        return [
            *by_seconds(
                Title(f"load {size}"), median["seconds"], {time: 1.5 * n_bytes / 1e9}, {time: 1.0}
            ),
            *by_seconds(
                Title(f"peak memory, load {size}"),
                median["peak_bytes"],
                {room: result["seconds"] + 2**29},
                {room: 1.0},
                unit="B",
            ),
        ]

    yield Case("load", calls, rows)
