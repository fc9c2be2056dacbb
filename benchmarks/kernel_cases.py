"""Single kernels: the machine's peaks, matrix products, attention."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.agreement import same_numbers
from benchmarks.harness import Call, Case, Row, Side
from benchmarks.rows import (
    Medians,
    Results,
    Targets,
    Title,
    by_flops,
    by_rate,
    by_seconds,
    share_of,
)
from benchmarks.setting import FLEX, OURS, TORCH, Setting

READ_BYTES = 1 << 30  # as large as the weights of a model of 0.5B parameters

QWEN3_4B = {
    "q": (4096, 2560),
    "k, v": (1024, 2560),
    "o": (2560, 4096),
    "gate, up": (9728, 2560),
    "down": (2560, 9728),
}
SMOLLM2 = {
    "q, o": (576, 576),
    "k, v": (192, 576),
    "gate, up": (1536, 576),
    "down": (576, 1536),
}
HELD_TO = {  # torch held to an instruction set that one of our tiers stands for
    "avx2": ("AVX2", "AVX2", "avx2"),
    "avx512": ("AVX512_CORE", "AVX512", "avx512"),
    "avx512_bf16": ("AVX512_CORE_BF16", "AVX512", "avx512"),
}
SMALL, LARGE = (9, 3, 64), (32, 8, 128)  # query heads, KV heads, head_dim
WINDOW = 1024


def peaks(setting: Setting) -> Iterator[Case]:
    """FLOP/s from registers in every tier, and the bandwidth of reading memory."""
    read_bytes = READ_BYTES // 8 if setting.quick else READ_BYTES
    loops = {
        f"{kind}, {tier}": setting.peak(kind, tier)
        for tier in setting.tiers
        for kind in ("f32", "bf16")
    }
    loops["read"] = setting.peak("read", n_bytes=read_bytes)

    def rows(median: Medians, _: Results) -> list[Row]:
        return [
            row
            for name, rate in median.items()
            if rate  # 0: the tier has no such unit
            for row in by_rate(Title(name), "B/s" if name == "read" else "FLOP/s", rate, {}, {})
        ]

    yield Case("peaks", loops, rows)


def gemm(setting: Setting) -> Iterator[Case]:
    """bfloat16 and float32 in the best tier; forced tiers against torch held to their ISA."""
    for model, shapes, m in (("Qwen3-4B", QWEN3_4B, 4096), ("SmolLM2", SMOLLM2, 3072)):
        for name, (n, k) in shapes.items():
            yield _gemm_bf16(setting, f"{model} {name}", m // (4 if setting.quick else 1), n, k)
    for model, name, m, n, k in (
        ("Qwen3-4B", "gate, up", 4096, *QWEN3_4B["gate, up"]),
        ("SmolLM2", "gate, up", 3072, *SMOLLM2["gate, up"]),
    ):
        m = m // (4 if setting.quick else 2)
        yield _gemm_held(setting, f"{model} {name}", m, n, k, None)
        for tier in (tier for tier in ("avx2", "avx512") if tier in setting.tiers):
            yield _gemm_held(setting, f"{model} {name}", m, n, k, tier)
        if setting.has_amx:  # what machines without it would do
            yield _gemm_bf16_held(setting, f"{model} {name}", m, n, k, "avx512_bf16")


def _gemm_bf16(setting: Setting, name: str, m: int, n: int, k: int) -> Case:
    shape = {"m": m, "n": n, "k": k}
    flops = 2.0 * m * n * k
    calls = {
        "ours": Call(OURS, "linear", {**shape, "dtype": "bfloat16"}),
        "torch bf16": Call(TORCH, "linear", {**shape, "dtype": "bfloat16"}),
        "torch f32": Call(TORCH, "linear", {**shape, "dtype": "float32"}),
        "peak": setting.peak(),
    }

    def rows(median: Medians, _: Results) -> list[Row]:
        of_torch, of_f32, of_peak = (1.4, None, 0.70) if setting.has_amx else (2.0, 1.3, 0.65)
        return by_flops(
            Title(f"bf16, {name}, M {m}"),
            flops,
            median["ours"],
            median,
            {"torch bf16": of_torch, "torch f32": of_f32},
            share_of(flops / median["ours"], median["peak"], of_peak),
        )

    return Case(f"bf16 {name}", calls, rows, same_numbers)


def _gemm_held(setting: Setting, name: str, m: int, n: int, k: int, tier: str | None) -> Case:
    """Ours in both dtypes on `tier`, against torch float32 held to the same instructions."""
    shape = {"m": m, "n": n, "k": k}
    flops = 2.0 * m * n * k
    peer = "torch f32" if tier is None else f"torch f32 held to {tier}"
    side = TORCH if tier is None else held_to(tier)
    calls = {
        "bf16": Call(OURS, "linear", {**shape, "dtype": "bfloat16", "tier": tier}),
        "f32": Call(OURS, "linear", {**shape, "dtype": "float32", "tier": tier}),
        peer: Call(side, "linear", {**shape, "dtype": "float32"}),
        "peak": setting.peak("f32", tier),
    }
    if tier is None:
        del calls["bf16"]  # is among the cases above

    def rows(median: Medians, _: Results) -> list[Row]:
        where = "" if tier is None else f", {tier} tier"
        targets = {peer: 0.9 if tier else None}
        return [
            row
            for dtype in ("bf16", "f32")
            if (ours := median.get(dtype))
            for row in by_flops(
                Title(f"{dtype}{where}, {name}, M {m}"),
                flops,
                ours,
                median,
                targets,
                share_of(flops / ours, median["peak"]),
            )
        ]

    return Case(f"held {name} {tier}", calls, rows, same_numbers)


def _gemm_bf16_held(setting: Setting, name: str, m: int, n: int, k: int, tier: str) -> Case:
    """Ours in bfloat16 on `tier`, against torch in both dtypes held to the same instructions."""
    shape = {"m": m, "n": n, "k": k}
    flops = 2.0 * m * n * k
    peers = {f"torch bf16 held to {tier}": 2.0, f"torch f32 held to {tier}": 1.3}
    calls = {
        "ours": Call(OURS, "linear", {**shape, "dtype": "bfloat16", "tier": tier}),
        **{
            peer: Call(held_to(tier), "linear", {**shape, "dtype": dtype})
            for peer, dtype in zip(peers, ("bfloat16", "float32"), strict=True)
        },
        "peak": setting.peak("bf16", tier),
    }

    def rows(median: Medians, _: Results) -> list[Row]:
        share = share_of(flops / median["ours"], median["peak"], 0.65)
        title = Title(f"bf16, {tier} tier, {name}, M {m}")
        return by_flops(title, flops, median["ours"], median, peers, share)

    return Case(f"held {name} {tier}", calls, rows, same_numbers)


def held_to(tier: str) -> Side:
    onednn, mkl, aten = HELD_TO[tier]
    return Side(
        TORCH.module,
        (
            ("ONEDNN_MAX_CPU_ISA", onednn),
            ("MKL_ENABLE_INSTRUCTIONS", mkl),
            ("ATEN_CPU_CAPABILITY", aten),
        ),
    )


def attention(setting: Setting) -> Iterator[Case]:
    """Full against SDPA; windows against SDPA with a mask and by blocks; flatness."""
    if setting.quick:
        yield from (_full(setting, heads, 2048) for heads in (SMALL, LARGE))
        yield _windowed(setting, SMALL, 4096)
        yield _flatness(setting, 4096, 8192)
        return
    for heads in (SMALL, LARGE):
        yield _full(setting, heads, 8192)
        yield _windowed(setting, heads, 8192)
    yield _flatness(setting, 8192, 32_768)
    for n_tokens in (1024, 2048, 4096, 16_384, 32_768):
        yield _full(setting, SMALL, n_tokens)
        yield _windowed(setting, SMALL, n_tokens)
    for n_tokens in (2048, 4096):
        yield _full(setting, LARGE, n_tokens)


def _attention(side: Side, function: str, heads: tuple[int, int, int], **settings: object) -> Call:
    names = ("n_heads", "n_kv_heads", "head_dim")
    return Call(side, function, {**dict(zip(names, heads, strict=True)), **settings})


def _title(heads: tuple[int, int, int]) -> str:
    return f"{heads[0]}/{heads[1]} heads, d {heads[2]}"


def _full(setting: Setting, heads: tuple[int, int, int], n_tokens: int) -> Case:
    flops = 4.0 * heads[0] * heads[2] * n_tokens * (n_tokens + 1) / 2
    shape = {"n_tokens": n_tokens}
    calls = {
        "ours": _attention(OURS, "attention", heads, dtype="bfloat16", **shape),
        "torch SDPA bf16": _attention(TORCH, "causal", heads, dtype="bfloat16", **shape),
        "torch SDPA f32": _attention(TORCH, "causal", heads, dtype="float32", **shape),
        "peak": setting.peak(),
    }
    if n_tokens > 8192:  # takes long, and says what the shorter ones say
        del calls["torch SDPA f32"]

    def rows(median: Medians, _: Results) -> list[Row]:
        target = (2.2 if heads == SMALL else 1.8) if n_tokens == 8192 else None
        return by_seconds(
            Title(f"full, {_title(heads)}", "T", n_tokens),
            median["ours"],
            median,
            {"torch SDPA bf16": target, "torch SDPA f32": None},
            share_of(flops / median["ours"], median["peak"]),
        )

    share = 3 if n_tokens == 8192 else 1
    return Case(f"full {heads} {n_tokens}", calls, rows, same_numbers, share=share)


def _windowed(setting: Setting, heads: tuple[int, int, int], n_tokens: int) -> Case:
    shape = {"n_tokens": n_tokens, "window": WINDOW}
    # A row t sees min(t + 1, W) keys.
    flops = 4.0 * heads[0] * heads[2] * (WINDOW * n_tokens - WINDOW * (WINDOW - 1) / 2)
    calls = {
        "ours": _attention(OURS, "attention", heads, dtype="bfloat16", **shape),
        "torch SDPA, dense mask": _attention(TORCH, "dense_mask", heads, dtype="bfloat16", **shape),
        "torch, block-wise": _attention(TORCH, "blockwise", heads, dtype="bfloat16", **shape),
        "torch flex_attention": _attention(FLEX, "window", heads, **shape),
        "peak": setting.peak(),
    }
    if n_tokens > 16_384:  # the mask alone has 2 GiB
        del calls["torch SDPA, dense mask"]
    if n_tokens != 8192:  # each length is compiled anew
        del calls["torch flex_attention"]

    def rows(median: Medians, _: Results) -> list[Row]:
        has_target = n_tokens == 8192
        targets: Targets = {
            "torch SDPA, dense mask": 15.0 if has_target else None,
            "torch, block-wise": 2.5 if has_target else None,
            "torch flex_attention": None,
        }
        return by_seconds(
            Title(f"window {WINDOW}, {_title(heads)}", "T", n_tokens),
            median["ours"],
            median,
            targets,
            share_of(flops / median["ours"], median["peak"]),
        )

    share = 3 if n_tokens == 8192 else 1
    return Case(f"windowed {heads} {n_tokens}", calls, rows, same_numbers, share=share)


def _flatness(setting: Setting, short: int, long: int) -> Case:
    """Cost per token of a window: the same however long the prompt."""
    peer = f"ours, T {short}"
    calls = {
        name: _attention(OURS, "attention", SMALL, n_tokens=n, window=WINDOW, dtype="bfloat16")
        for name, n in ((peer, short), ("ours", long))
    }

    def rows(median: Medians, _: Results) -> list[Row]:
        title = Title(f"window {WINDOW}, {_title(SMALL)}, per token, T {long}")
        return by_seconds(title, median["ours"] / long, {peer: median[peer] / short}, {peer: 0.9})

    return Case("flatness", calls, rows)
