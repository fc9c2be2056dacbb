"""The sweep: its deltas against L + 1 masked transformers runs, its bits against lone nll runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import THREADS, nll, open_engine, sweep
from hf_reference import Transformers
from reference import NO_FLIP, Rows

import swa

L, WINDOW, SINKS = 5, 12, 3
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": {"rope": "llama3", "tied": True},
    "qwen3": {"num_key_value_heads": 4},
}
# (decode, tail)
MODES = [("full", 0), ("full", 9), ("window", 0)]


def tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 258, n).tolist()


@pytest.fixture(params=list(CHECKPOINTS))
def folder(request: pytest.FixtureRequest, tiny: Callable[..., Path]) -> Path:
    return tiny(request.param, num_hidden_layers=L, **CHECKPOINTS[request.param])


class TestDeltas:
    """swa.score_layers in float32 against transformers."""

    prompt_len, answer_len = 97, 6

    def expected(
        self, folder: Path, decode: str, tail: int, direction: str, base: tuple[int, ...]
    ) -> np.ndarray:
        """float64 [L], NaN where not scored."""
        reference = Transformers(folder)
        ids = tokens(self.prompt_len + self.answer_len)

        def mean_nll(full_layers: set[int]) -> float:
            rows = Rows.of(
                L,
                sorted(full_layers),
                self.prompt_len,
                len(ids),
                window=WINDOW,
                sinks=SINKS,
                tail=tail,
                decode=decode,
            )
            return float(reference.nll(ids, self.prompt_len, rows)[0].mean())

        full = set(base)
        at_base = mean_nll(full)
        deltas = np.full(L, np.nan)
        for layer in range(L):
            if (layer in full) == (direction == "ablate"):
                sign = 1 if direction == "ablate" else -1
                deltas[layer] = sign * (mean_nll(full ^ {layer}) - at_base)
        return deltas

    @pytest.mark.parametrize("decode, tail", MODES)
    @pytest.mark.parametrize(
        "direction, base",
        [("restore", None), ("restore", (1, 3)), ("ablate", None), ("ablate", (0, 2, 4))],
    )
    def test_against_transformers(
        self, folder: Path, decode: Any, tail: int, direction: Any, base: tuple[int, ...] | None
    ) -> None:
        model = swa.load(folder, dtype="float32", num_threads=1)
        ids = tokens(self.prompt_len + self.answer_len)
        one = swa.Example(tuple(ids[: self.prompt_len]), tuple(ids[self.prompt_len :]))
        policy = swa.AttentionPolicy(
            sliding_window=WINDOW, num_sink_tokens=SINKS, num_tail_tokens=tail, decode=decode
        )
        scores = swa.score_layers(model, [one], policy, direction=direction, base=base)
        default_base = tuple(range(L)) if direction == "ablate" else ()
        expected = self.expected(
            folder, decode, tail, direction, default_base if base is None else base
        )
        actual = [np.nan if delta is None else delta for delta in scores.delta]
        np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-5)
        assert np.nanmax(abs(expected)) > 0.05  # a test of deltas, not of zeros
        if tail and scores.delta[L - 1] is not None:
            assert scores.delta[L - 1] == 0


def full_rows_as(rows: Rows) -> Rows:
    return rows._replace(window=(0,) * L)


# name: (prompt_len, answer_len, rows, flip_window)
def sweep_cases() -> dict[str, tuple[int, int, Rows, list[int]]]:
    def rows(prompt_len: int, n_tokens: int, full: tuple[int, ...] = (), **policy: Any) -> Rows:
        policy = {"window": WINDOW, "sinks": SINKS} | policy
        return Rows.of(L, full, prompt_len, n_tokens, **policy)

    everywhere = Rows((WINDOW,) * L, (SINKS,) * L, (201,) * L)
    return {
        "restore": (201, 7, rows(201, 208), [0] * L),
        "restore, tail": (201, 7, rows(201, 208, tail=70), [0] * L),
        "restore, tail beyond the prompt": (60, 7, rows(60, 67, tail=60), [0] * L),
        "restore, windowed decode": (201, 7, rows(201, 208, decode="window"), [0] * L),
        "restore from a base": (
            201,
            7,
            rows(201, 208, (0, 3)),
            [NO_FLIP, 0, 0, NO_FLIP, 0],
        ),
        "ablate": (201, 7, full_rows_as(everywhere), [WINDOW] * L),
        "ablate from a base": (
            201,
            7,
            everywhere._replace(window=(0, 0, WINDOW, WINDOW, 0)),
            [WINDOW, WINDOW, NO_FLIP, NO_FLIP, WINDOW],
        ),
        "a window per layer and a native layer": (
            150,
            3,
            Rows((5, 70, 9, 1, 33), (0, 2, 0, 70, 1), (150, 150, 153, 140, 150)),
            [0, 0, NO_FLIP, 0, 0],
        ),
        "one token each": (1, 1, rows(1, 2), [0] * L),
        "within the window": (9, 2, rows(9, 11), [0] * L),
        "the scored rows in the prefix": (70, 5, rows(70, 75, window=64, sinks=16), [0] * L),
        "the prefix ends inside the answer": (
            70,
            9,
            rows(70, 79, window=64, sinks=10, decode="window"),
            [0] * L,
        ),
        "a long answer": (20, 190, rows(20, 210), [0] * L),
        "many chunks": (850, 12, rows(850, 862, window=100, sinks=29, tail=5), [0] * L),
        "one run": (130, 4, rows(130, 134), [NO_FLIP, NO_FLIP, 0, NO_FLIP, NO_FLIP]),
        "no run": (130, 4, rows(130, 134), [NO_FLIP] * L),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
class TestBitwise:
    @pytest.mark.parametrize("name", list(sweep_cases()))
    def test_equals_independent_runs(
        self, tiny: Callable[..., Path], tier: str, dtype: str, name: str
    ) -> None:
        prompt_len, answer_len, rows, flips = sweep_cases()[name]
        engine = open_engine(tiny("qwen3", num_hidden_layers=L), dtype=dtype, tier=tier)
        ids = tokens(prompt_len + answer_len)
        result = sweep(engine, ids, prompt_len, rows, flips)
        base_nll, base_greedy = nll(engine, ids, prompt_len, rows)
        assert np.array_equal(result.base_nll, base_nll)
        assert np.array_equal(result.base_greedy, base_greedy)
        for layer, window in enumerate(flips):
            if window == NO_FLIP:
                assert np.isnan(result.run_nll[layer]).all()
                assert not result.run_greedy[layer].any()
                continue
            run_nll, run_greedy = nll(engine, ids, prompt_len, rows.flipped(layer, window))
            assert np.array_equal(result.run_nll[layer], run_nll), layer
            assert np.array_equal(result.run_greedy[layer], run_greedy), layer

    @pytest.mark.parametrize("name", ["restore, windowed decode", "ablate", "many chunks"])
    def test_threads(self, tiny: Callable[..., Path], tier: str, dtype: str, name: str) -> None:
        prompt_len, answer_len, rows, flips = sweep_cases()[name]
        engine = open_engine(tiny("llama", num_hidden_layers=L), dtype=dtype, tier=tier)
        ids = tokens(prompt_len + answer_len)
        expected = sweep(engine, ids, prompt_len, rows, flips)
        alone = nll(engine, ids, prompt_len, rows)
        for n in THREADS:
            engine.num_threads = n
            result = sweep(engine, ids, prompt_len, rows, flips)
            for mine, theirs in zip(result, expected, strict=True):
                assert np.array_equal(mine, theirs, equal_nan=mine.dtype.kind == "f")
            assert np.array_equal(nll(engine, ids, prompt_len, rows)[0], alone[0])

    def test_wide_layers(self, tiny: Callable[..., Path], tier: str, dtype: str) -> None:
        prompt_len, answer_len, rows, flips = sweep_cases()["restore"]
        wide = {"hidden_size": 400, "intermediate_size": 1030, "head_dim": 80}
        engine = open_engine(tiny("llama", num_hidden_layers=L, **wide), dtype=dtype, tier=tier)
        ids = tokens(prompt_len + answer_len)
        engine.num_threads = 3
        result = sweep(engine, ids, prompt_len, rows, flips)
        engine.num_threads = 1
        for layer in range(L):
            alone = nll(engine, ids, prompt_len, rows.flipped(layer, 0))[0]
            assert np.array_equal(result.run_nll[layer], alone), layer

    def test_logits_and_nll_agree(self, tiny: Callable[..., Path], tier: str, dtype: str) -> None:
        prompt_len, answer_len, rows, _ = sweep_cases()["restore"]
        engine = open_engine(tiny("llama", num_hidden_layers=L), dtype=dtype, tier=tier)
        ids = np.array(tokens(prompt_len + answer_len), np.int32)
        rows_logits = engine.logits(ids, *rows.arrays, first_row=prompt_len - 1)[:-1]
        whole = engine.logits(ids, *rows.arrays)
        assert np.array_equal(whole[prompt_len - 1 : -1], rows_logits)
        exact = rows_logits.astype(np.float64)
        log_sum = np.log(np.exp(exact).sum(axis=1))
        expected = log_sum - exact[np.arange(answer_len), ids[prompt_len:]]
        per_token, greedy = engine.nll(ids, prompt_len, *rows.arrays)
        np.testing.assert_allclose(per_token, expected, atol=1e-6)
        assert np.array_equal(greedy, exact.argmax(axis=1) == ids[prompt_len:])
