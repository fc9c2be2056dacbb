"""Single kernels: the machine's peaks, matrix products, attention."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import Call, Case, Row, Side
from benchmarks.rows import by_flops, by_rate, by_seconds, share_of
from benchmarks.setting import OURS, TORCH, Setting

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

    def rows(median: dict[str, float]) -> list[Row]:
        return [
            row
            for name, rate in median.items()
            if rate  # 0: the tier has no such unit
            for row in by_rate(name, "B/s" if name == "read" else "FLOP/s", rate, {})
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
        for tier in (tier for tier in HELD_TO if tier in setting.tiers):
            yield _gemm_held(setting, f"{model} {name}", m, n, k, tier)


def _gemm_bf16(setting: Setting, name: str, m: int, n: int, k: int) -> Case:
    shape = {"m": m, "n": n, "k": k}
    flops = 2.0 * m * n * k
    calls = {
        "ours": Call(OURS, "linear", {**shape, "dtype": "bfloat16"}),
        "bf16": Call(TORCH, "linear", {**shape, "dtype": "bfloat16"}),
        "f32": Call(TORCH, "linear", {**shape, "dtype": "float32"}),
        "peak": setting.peak(),
    }

    def rows(median: dict[str, float]) -> list[Row]:
        targets = (1.4, None, 0.70) if setting.has_amx else (2.0, 1.3, 0.65)
        return by_flops(
            f"bf16, {name}, M {m}",
            flops,
            median["ours"],
            {"torch bf16": (median["bf16"], targets[0]), "torch f32": (median["f32"], targets[1])},
            share_of(flops / median["ours"], median["peak"]),
            targets[2],
        )

    return Case(f"bf16 {name}", calls, rows)


def _gemm_held(setting: Setting, name: str, m: int, n: int, k: int, tier: str | None) -> Case:
    """Ours in both dtypes on `tier`, against torch float32 held to the same instructions."""
    shape = {"m": m, "n": n, "k": k}
    flops = 2.0 * m * n * k
    peer = TORCH if tier is None else held_to(tier)
    calls = {
        "ours bf16": Call(OURS, "linear", {**shape, "dtype": "bfloat16", "tier": tier}),
        "ours f32": Call(OURS, "linear", {**shape, "dtype": "float32", "tier": tier}),
        "torch": Call(peer, "linear", {**shape, "dtype": "float32"}),
        "peak": setting.peak("f32", tier),
    }
    if tier is None:
        del calls["ours bf16"]  # is among the cases above

    def rows(median: dict[str, float]) -> list[Row]:
        where = "" if tier is None else f", {tier} tier"
        peers = {
            "torch f32" + (f" held to {tier}" if tier else ""): (
                median["torch"],
                0.9 if tier else None,
            )
        }
        return [
            row
            for dtype in ("bf16", "f32")
            if (ours := median.get(f"ours {dtype}"))
            for row in by_flops(
                f"{dtype}{where}, {name}, M {m}",
                flops,
                ours,
                peers,
                share_of(flops / ours, median["peak"]),
            )
        ]

    return Case(f"held {name} {tier}", calls, rows)


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
    lengths = (2048, 4096) if setting.quick else (2048, 4096, 8192)
    for heads in (SMALL, LARGE):
        for n_tokens in lengths:
            yield _full(setting, heads, n_tokens)
        if not setting.quick:
            yield _windowed(setting, heads, 8192)
    if setting.quick:
        yield _windowed(setting, SMALL, 4096)
    else:
        yield _full(setting, SMALL, 32_768)
    yield _flatness(setting)


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
        "bf16": _attention(TORCH, "causal", heads, dtype="bfloat16", **shape),
        "f32": _attention(TORCH, "causal", heads, dtype="float32", **shape),
        "peak": setting.peak(),
    }
    if n_tokens > 8192:
        del calls["f32"]  # a minute for a figure that says what the shorter ones say

    def rows(median: dict[str, float]) -> list[Row]:
        target = (2.2 if heads == SMALL else 1.8) if n_tokens == 8192 else None
        peers = {"torch SDPA bf16": (median["bf16"], target)}
        if "f32" in median:
            peers["torch SDPA f32"] = (median["f32"], None)
        share = share_of(flops / median["ours"], median["peak"])
        return by_seconds(f"full, {_title(heads)}, T {n_tokens}", median["ours"], peers, share)

    return Case(f"full {heads} {n_tokens}", calls, rows, warm_up=n_tokens <= 8192)


def _windowed(setting: Setting, heads: tuple[int, int, int], n_tokens: int) -> Case:
    shape = {"n_tokens": n_tokens, "window": WINDOW, "dtype": "bfloat16"}
    # A row t sees min(t + 1, W) keys.
    flops = 4.0 * heads[0] * heads[2] * (WINDOW * n_tokens - WINDOW * (WINDOW - 1) / 2)
    calls = {
        "ours": _attention(OURS, "attention", heads, **shape),
        "dense": _attention(TORCH, "dense_mask", heads, **shape),
        "blocks": _attention(TORCH, "blockwise", heads, **shape),
        "peak": setting.peak(),
    }

    def rows(median: dict[str, float]) -> list[Row]:
        targets = (15.0, 2.5) if n_tokens == 8192 else (None, None)
        return by_seconds(
            f"window {WINDOW}, {_title(heads)}, T {n_tokens}",
            median["ours"],
            {
                "torch SDPA, dense mask": (median["dense"], targets[0]),
                "torch, block-wise": (median["blocks"], targets[1]),
            },
            share_of(flops / median["ours"], median["peak"]),
        )

    return Case(f"windowed {heads} {n_tokens}", calls, rows)


def _flatness(setting: Setting) -> Case:
    """Cost per token of a window: the same however long the prompt."""
    lengths = (4096, 8192) if setting.quick else (8192, 32_768)
    calls = {
        str(n): _attention(OURS, "attention", SMALL, n_tokens=n, window=WINDOW, dtype="bfloat16")
        for n in lengths
    }

    def rows(median: dict[str, float]) -> list[Row]:
        short, long = (median[str(n)] / n for n in lengths)
        return by_seconds(
            f"window {WINDOW}, {_title(SMALL)}, per token, T {lengths[1]}",
            long,
            {f"ours, T {lengths[0]}": (short, 0.9)},
        )

    return Case("flatness", calls, rows)
