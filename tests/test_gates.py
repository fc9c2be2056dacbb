"""The gate gradients of the engine: against float64 autograd, and what must hold exactly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import THREADS, gates, nll, open_engine, sweep
from gate_cases import (
    ALPHAS,
    BETWEEN,
    CASES,
    EVEN,
    MODELS,
    PEAKED,
    SIZES,
    Case,
    L,
    taken,
    weights,
)
from gate_reference import GatedDecoder
from oracle import Decoder
from reference import Choices, Gated, Rows

import swa
from swa import _core
from swa.gates import gate_gradient

# Of the largest gradient of the call.
EVEN_TOLERANCE, PEAKED_TOLERANCE = 2e-5, 1e-4
MORE_CASES: dict[str, Case] = {
    **CASES,
    "one token each": Case.sliding(1, 1, window=1),
    "within the window": Case.sliding(9, 2, window=11),
    "many chunks": Case.sliding(590, 9, window=100, sinks=29, tail=5),
}
models = pytest.mark.parametrize("name", MODELS)
one_model = pytest.mark.parametrize("name", ["qwen3"])
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@pytest.fixture
def folder(tiny: Callable[..., Path], name: str) -> Path:
    return checkpoint(tiny, name, EVEN)


@pytest.fixture
def peaked(tiny: Callable[..., Path], name: str) -> Path:
    return checkpoint(tiny, name, PEAKED)


def checkpoint(tiny: Callable[..., Path], name: str, attention: dict[str, Any]) -> Path:
    """Its weights are the same in float32 and bfloat16."""
    family, settings = MODELS[name]
    return tiny(family, **SIZES | attention | {"dtype": "BF16"} | settings)


@functools.cache
def decoder(folder: Path, dtype: torch.dtype = torch.float64) -> GatedDecoder:
    return GatedDecoder(folder, dtype)


@functools.cache
def expected(
    folder: Path,
    case_name: str,
    alpha: float | None,
    divergence: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Gated:
    case = MORE_CASES[case_name]
    return decoder(folder, dtype).gates(
        case.ids,
        case.prompt_len,
        case.choices,
        weights(case.choices, alpha),
        other_logits(folder, case) if divergence else None,
    )


def other_logits(folder: Path, case: Case) -> np.ndarray:
    """float32 [A, V]: the distributions of a reference model."""
    shape = case.answer_len, decoder(folder).config["vocab_size"]
    return 2 * np.random.default_rng(case.n_tokens).standard_normal(shape).astype(np.float32)


def at(engine: _core.Engine, case: Case, shares: np.ndarray, reference: Any = None) -> Gated:
    return gates(engine, case.ids, case.prompt_len, case.choices, shares, reference)


def relative_error(actual: np.ndarray, exact: np.ndarray) -> float:
    """Largest error in units of the largest value; 0 where both are 0 throughout."""
    largest = abs(exact).max() or abs(actual).max() or 1
    return float(abs(actual - exact).max() / largest)


def autograd_case(i: int, model: str, j: int, case_name: str) -> Any:
    """Each model meets every case; the gates and what is minimised move on."""
    alpha, divergence = ALPHAS[(i + j) % 4], (i + j) % 3 == 0
    id = f"{model}-{case_name}-{alpha}-{'kl' if divergence else 'nll'}"
    return pytest.param(model, case_name, alpha, divergence, id=id)


class TestAgainstAutograd:
    @pytest.mark.parametrize(
        "name, case_name, alpha, divergence",
        [
            autograd_case(*model, *case)
            for model in enumerate(MODELS)
            for case in enumerate(MORE_CASES)
        ],
    )
    def test_float32(
        self, folder: Path, case_name: str, alpha: float | None, divergence: bool, tier: str
    ) -> None:
        case = MORE_CASES[case_name]
        exact = expected(folder, case_name, alpha, divergence)
        reference = other_logits(folder, case) if divergence else None
        engine = open_engine(folder, tier=tier)
        gated = at(engine, case, weights(case.choices, alpha), reference)
        assert gated.gradient.shape == exact.gradient.shape
        assert gated.gradient.dtype == gated.nll.dtype == np.float64
        assert relative_error(gated.nll, exact.nll) < EVEN_TOLERANCE
        assert relative_error(gated.gradient, exact.gradient) < EVEN_TOLERANCE
        assert np.array_equal(gated.greedy, exact.greedy)

    @models
    @pytest.mark.parametrize("case_name", ["three choices", "windowed decode"])
    def test_peaked_attention(self, peaked: Path, case_name: str, tier: str) -> None:
        case, exact = CASES[case_name], expected(peaked, case_name, 0.3)
        gated = at(open_engine(peaked, tier=tier), case, weights(case.choices, 0.3))
        assert relative_error(gated.nll, exact.nll) < PEAKED_TOLERANCE
        assert relative_error(gated.gradient, exact.gradient) < PEAKED_TOLERANCE

    @pytest.mark.parametrize(
        "name, attention",
        [
            ("llama", PEAKED),
            ("llama with biases", EVEN),
            ("mistral", PEAKED),
            ("qwen2", EVEN),
            ("qwen3", EVEN),
            ("qwen3", PEAKED),
        ],
    )
    def test_bfloat16(
        self, tiny: Callable[..., Path], name: str, attention: dict[str, Any], tier: str
    ) -> None:
        """Within twice the error of a naive implementation, over all cases together."""
        folder = checkpoint(tiny, name, attention)
        engine = open_engine(folder, dtype="bfloat16", tier=tier)
        exact, actual, naive = [], [], []
        for j, (case_name, case) in enumerate(CASES.items()):
            alpha, divergence = ALPHAS[j % 4], j % 3 == 0
            reference = other_logits(folder, case) if divergence else None
            gated = at(engine, case, weights(case.choices, alpha), reference)
            settings = folder, case_name, alpha, divergence
            exact.append(expected(*settings).gradient[:, 1:].ravel())
            naive.append(expected(*settings, torch.bfloat16).gradient[:, 1:].ravel())
            actual.append(gated.gradient[:, 1:].ravel())
        truth = np.concatenate(exact)
        error, naive_error = (abs(np.concatenate(x) - truth) for x in (actual, naive))
        assert error.max() <= 2 * naive_error.max()
        assert (error**2).mean() <= 4 * (naive_error**2).mean()
        assert np.median(error) <= np.median(naive_error)
        assert cosine(np.concatenate(actual), truth) > 0.99

    def test_wide_layers(self, tiny: Callable[..., Path], tier: str) -> None:
        """Wider than the blocks in which products are taken, on several threads."""
        wide = {"hidden_size": 400, "intermediate_size": 1030, "head_dim": 80, "vocab_size": 2100}
        folder = tiny("llama", **SIZES | EVEN | wide)
        case = CASES["a tile and one row"]
        exact = expected(folder, "a tile and one row", 0.3)
        engine = open_engine(folder, tier=tier, num_threads=3)
        gated = at(engine, case, weights(case.choices, 0.3))
        assert relative_error(gated.gradient, exact.gradient) < EVEN_TOLERANCE


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))


@pytest.mark.parametrize("case_name", ["a tile and one row", "windowed decode"])
class TestExactDifferences:
    """Of the engine's own NLLs, in float32: no other implementation has a say."""

    @pytest.fixture
    def engine(self, tiny: Callable[..., Path], tier: str) -> _core.Engine:
        return open_engine(checkpoint(tiny, "qwen3", BETWEEN), tier=tier)

    def test_finite_differences(self, engine: _core.Engine, case_name: str) -> None:
        """Along a random direction, with two steps: what they disagree by bounds the error."""
        case = CASES[case_name]
        start = weights(case.choices, 0.3)
        direction = np.random.default_rng(3).uniform(-1, 1, L)[:, None] * (-1, 1)

        def slope(step: float) -> float:
            ahead, behind = (at(engine, case, start + h * direction) for h in (step, -step))
            return (ahead.loss - behind.loss) / (2 * step)

        fine, coarse = slope(0.01), slope(0.02)
        actual = (at(engine, case, start).gradient.sum(axis=2) * direction).sum()
        assert abs(actual) > 0.03
        assert actual == pytest.approx((4 * fine - coarse) / 3, abs=abs(fine - coarse) / 3 + 1e-4)

    @staticmethod
    def integral(integrand: Callable[[float], np.ndarray]) -> float:
        """Of the sum of the integrand's values over [0, 1], by Gauss and Legendre."""
        nodes, shares = np.polynomial.legendre.leggauss(12)
        return sum(
            share / 2 * integrand((1 + x) / 2).sum() for x, share in zip(nodes, shares, strict=True)
        )

    def test_the_path_explains_the_whole_gap(self, engine: _core.Engine, case_name: str) -> None:
        """Completeness: from all layers sliding to all layers full."""
        case = CASES[case_name]

        def integrand(alpha: float) -> np.ndarray:
            return at(engine, case, weights(case.choices, alpha)).gradient[:, 1]

        sliding, full = (
            nll(engine, case.ids, case.prompt_len, case.choices.taken((choice,) * L))[0].mean()
            for choice in (0, 1)
        )
        assert abs(full - sliding) > 0.05
        assert self.integral(integrand) == pytest.approx(full - sliding, abs=3e-6)

    @pytest.mark.parametrize("layer", [0, L - 1])
    def test_one_gate_explains_its_delta(
        self, engine: _core.Engine, case_name: str, layer: int
    ) -> None:
        """The others at 0: what the sweep finds when it restores that layer."""
        case, sliding = CASES[case_name], (0,) * L

        def integrand(alpha: float) -> np.ndarray:
            shares = taken(case.choices, sliding)
            shares[layer] = 1 - alpha, alpha
            return at(engine, case, shares).gradient[layer, 1]

        swept = sweep(engine, case.ids, case.prompt_len, case.choices.taken(sliding), [0] * L)
        delta = (swept.run_nll[layer] - swept.base_nll).mean()
        assert abs(delta) > 3e-4
        assert self.integral(integrand) == pytest.approx(delta, abs=3e-6)


@dtypes
@one_model
class TestExactly:
    @pytest.mark.parametrize("case_name", MORE_CASES)
    def test_one_choice_a_layer_is_a_policy(
        self, folder: Path, tier: str, dtype: str, case_name: str
    ) -> None:
        """The NLL's bits are those of `nll`."""
        case, engine = MORE_CASES[case_name], open_engine(folder, dtype=dtype, tier=tier)
        n_choices = len(case.choices.window[0])
        rng = np.random.default_rng(0)
        for pick in ((0,) * L, (n_choices - 1,) * L, rng.integers(0, n_choices, L)):
            gated = at(engine, case, taken(case.choices, pick))
            rows = case.choices.taken(pick)
            values, greedy = nll(engine, case.ids, case.prompt_len, rows)
            assert np.array_equal(gated.nll, values)
            assert np.array_equal(gated.greedy, greedy)

    @pytest.mark.parametrize(
        "case_name, divergence",
        [("three choices", True), ("many chunks", False)],
    )
    def test_threads(
        self, folder: Path, tier: str, dtype: str, case_name: str, divergence: bool
    ) -> None:
        case, engine = MORE_CASES[case_name], open_engine(folder, dtype=dtype, tier=tier)
        reference = other_logits(folder, case) if divergence else None
        alone = at(engine, case, weights(case.choices, None), reference)
        assert alone.gradient.any()
        for n in THREADS:
            engine.num_threads = n
            gated = at(engine, case, weights(case.choices, None), reference)
            for mine, theirs in zip(gated, alone, strict=True):
                assert np.array_equal(mine, theirs)

    def test_where_nothing_can_change(self, folder: Path, tier: str, dtype: str) -> None:
        """Exactly 0: choice 0, a layer without a choice, one choice, rows that see the same."""
        engine = open_engine(folder, dtype=dtype, tier=tier)
        case = CASES["a layer without a choice"]
        for alpha in ALPHAS:
            gradient = at(engine, case, weights(case.choices, alpha)).gradient
            assert not gradient[:, 0].any() and not gradient[1].any()
            assert gradient[0, 1].all()
        one = CASES["one choice"]
        gated = at(engine, one, weights(one.choices, None))
        assert gated.gradient.shape[:2] == (L, 1) and not gated.gradient.any()
        rows = Rows.of(L, [], 120, 129, window=125, sinks=3, decode="window")
        same = Case(120, 9, Choices.of(rows, (0,) * L))  # 128 rows are read
        gated = at(engine, same, weights(same.choices, 0.3))
        assert not gated.gradient.any()
        narrower = same._replace(choices=Choices(((100, 0),) * L, (3,) * L, (129,) * L))
        assert at(engine, narrower, weights(same.choices, 0.3)).gradient[:, 1].all()

    def test_divergence_from_itself(self, folder: Path, tier: str, dtype: str) -> None:
        case = CASES["three choices"]
        engine, pick = open_engine(folder, dtype=dtype, tier=tier), (2, 0, 1)
        rows, ids = case.choices.taken(pick), np.array(case.ids, np.int32)
        own = engine.logits(ids, *rows.arrays, first_row=case.prompt_len - 1)[:-1]
        gated = at(engine, case, taken(case.choices, pick), own)
        assert abs(gated.nll).max() < 1e-6 and abs(gated.gradient).max() < 1e-6
        greedy = nll(engine, case.ids, case.prompt_len, rows)[1]
        assert np.array_equal(gated.greedy, greedy)
        other = at(engine, case, taken(case.choices, (0, 0, 0)), own)
        assert (other.nll > 1e-3).all() and abs(other.gradient).max() > 1e-3
        for shift in map(np.float32, (5, 100, -100)):
            shifted = at(engine, case, taken(case.choices, pick), own + shift)
            assert abs(shifted.nll).max() < 1e-7

    def test_divergence_does_not_depend_on_a_shift(
        self, folder: Path, tier: str, dtype: str
    ) -> None:
        """To the bit, where float32 holds the reference logits exactly with it and without."""
        case, engine = CASES["three choices"], open_engine(folder, dtype=dtype, tier=tier)
        reference = np.round(other_logits(folder, case) * 1024) / np.float32(1024)
        shares = weights(case.choices, 0.3)
        plain = at(engine, case, shares, reference)
        for shift in map(np.float32, (100, -100)):
            shifted = at(engine, case, shares, reference + shift)
            assert np.array_equal(shifted.nll, plain.nll)
            assert np.array_equal(shifted.gradient, plain.gradient)

    def test_weights_that_vanish_beside_one(self, folder: Path, tier: str, dtype: str) -> None:
        """1 - 1e-9 is 1 in float32: forward and backward must agree on what is left."""
        case, engine = CASES["a tile and one row"], open_engine(folder, dtype=dtype, tier=tier)
        for nearly, exactly in ((1e-9, 0.0), (1 - 1e-9, 1.0)):
            close, exact = (
                at(engine, case, weights(case.choices, alpha)) for alpha in (nearly, exactly)
            )
            np.testing.assert_allclose(close.nll, exact.nll, rtol=1e-6)
            assert relative_error(close.gradient, exact.gradient) < 1e-6

    def test_the_order_of_choices(self, folder: Path, tier: str, dtype: str) -> None:
        """Another choice 0 shifts the gradient, and the weights may come in any order."""
        case, engine = CASES["three choices"], open_engine(folder, dtype=dtype, tier=tier)
        shares, order = weights(case.choices, None), [2, 0, 1]
        windows = tuple(tuple(w[c] for c in order) for w in case.choices.window)
        turned = case._replace(choices=case.choices._replace(window=windows))
        first, second = at(engine, case, shares), at(engine, turned, shares[:, order])
        shifted = first.gradient[:, order] - first.gradient[:, order[:1]]
        tolerance = 1e-4 if dtype == "float32" else 5e-2
        assert relative_error(second.gradient, shifted) < tolerance


@models
class TestPython:
    """swa.gates.gate_gradient on policies."""

    policies = pytest.mark.parametrize(
        "settings",
        [
            {"window": 20, "sinks": 3},
            {"window": 9, "sinks": 0, "tail": 6},
            {"window": 70, "sinks": 2, "decode": "window"},
        ],
        ids=str,
    )

    @policies
    @pytest.mark.parametrize("objective", ["nll", "kl"])
    def test_against_autograd(self, peaked: Path, settings: dict[str, Any], objective: Any) -> None:
        case = Case.sliding(101, 7, **settings)
        ids, alpha = case.ids, np.array([0.2, 1.0, 0.6])
        full = Rows.of(L, range(L), 101, 108, window=0)
        reference = Decoder(peaked).logits(ids, full, 100)[:-1] if objective == "kl" else None
        shares = np.stack([1 - alpha, alpha], axis=1)
        exact = decoder(peaked).gates(ids, 101, case.choices, shares, reference)
        model = swa.load(peaked, dtype="float32", num_threads=1)
        policy = swa.AttentionPolicy(
            sliding_window=settings["window"],
            num_sink_tokens=settings["sinks"],
            num_tail_tokens=settings.get("tail", 0),
            decode=settings.get("decode", "full"),
        )
        example = swa.Example(tuple(ids[:101]), tuple(ids[101:]))
        found = gate_gradient(model, example, policy, alpha, objective=objective)
        assert found.loss == pytest.approx(exact.loss, rel=PEAKED_TOLERANCE)
        assert relative_error(found.per_kv_head, exact.gradient[:, 1]) < PEAKED_TOLERANCE
        assert found.gradient.tolist() == found.per_kv_head.sum(axis=1).tolist()

    def test_memory_is_told_beforehand(self, peaked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The copy of the reference included."""
        model, case = swa.load(peaked, num_threads=1), CASES["a tile and one row"]
        prompt, answer = case.ids[: case.prompt_len], case.ids[case.prompt_len :]
        example, policy = swa.Example(tuple(prompt), tuple(answer)), swa.AttentionPolicy(30)
        shares = np.full((L, 2), 0.5)
        reference = np.zeros((len(answer), model.config.vocab_size), np.float32)
        need = model.engine.gates_bytes(len(case.ids), 2)
        for given, room in ((None, need), (reference, need + reference.nbytes)):
            monkeypatch.setattr("swa.model.available_bytes", lambda room=room: room)
            model.gates_example(example, policy, shares, reference=given)
            monkeypatch.setattr("swa.model.available_bytes", lambda room=room: room - 1)
            with pytest.raises(MemoryError, match="no room for gates over .* shorten the input"):
                model.gates_example(example, policy, shares, reference=given)

    def test_a_selection_is_a_corner(self, peaked: Path) -> None:
        """Gates 0 and 1: the loss of those full layers, to the bit."""
        case = CASES["a tile and one row"]
        model = swa.load(peaked, num_threads=1)
        example = swa.Example(
            tuple(case.ids[: case.prompt_len]), tuple(case.ids[case.prompt_len :])
        )
        policy = swa.AttentionPolicy(sliding_window=30, num_sink_tokens=3)
        for full in ((), (1,), (0, 2), tuple(range(L))):
            alpha = np.isin(np.arange(L), full).astype(float)
            loss = gate_gradient(model, example, policy, alpha).loss
            assert loss == model.nll_example(example, policy, full).per_token.mean()


@one_model
class TestArguments:
    case = CASES["three choices"]

    @pytest.fixture
    def call(self, folder: Path) -> Callable[..., Gated]:
        """A valid call, but for the arguments given."""
        window, sinks, full_from = self.case.choices.arrays
        engine = open_engine(folder)
        arguments: dict[str, Any] = {
            "ids": np.array(self.case.ids, np.int32),
            "prompt_len": self.case.prompt_len,
            "window": window,
            "sinks": sinks,
            "full_from": full_from,
            "weights": weights(self.case.choices, 0.3),
        }
        return lambda **changes: Gated(*engine.gates(**arguments | changes))

    @pytest.mark.parametrize(
        "change, says",
        [
            ({"ids": np.array([3, 97, 5], np.int32), "prompt_len": 2}, "97"),
            ({"ids": np.array([3], np.int32), "prompt_len": 1}, "ids"),
            ({"prompt_len": 0}, "prompt_len"),
            ({"prompt_len": 200}, "prompt_len"),
            ({"window": np.zeros(L, np.int64)}, "window"),
            ({"window": np.zeros((L + 1, 3), np.int64)}, "window"),
            ({"window": np.zeros((L, 0), np.int64)}, "window"),
            ({"window": np.full((L, 3), -1)}, r"window\[0, 0\] is -1"),
            ({"window": np.zeros((L, 9), np.int64), "weights": np.eye(9)[:L]}, "window"),
            ({"sinks": np.zeros((L, 3), np.int64)}, "sinks"),
            ({"sinks": np.full(L, -1)}, "sinks"),
            ({"full_from": np.zeros(L - 1, np.int64)}, "full_from"),
            ({"full_from": np.full(L, -1)}, "full_from"),
            ({"weights": np.ones((L, 1))}, "weights"),
            ({"weights": np.full(L, 1.0)}, "weights"),
            ({"weights": np.zeros((L, 3))}, "must add up to 1"),
            ({"weights": np.full((L, 3), 0.334)}, "weights"),
            (
                {"weights": np.array([[1.0, 0, 0], [1.1, -0.1, 0], [1, 0, 0]])},
                r"weights\[1, 1\] is negative",
            ),
            (
                {"weights": np.array([[1.0, 0, 0], [1, 0, 0], [np.nan, 1, 0]])},
                r"weights\[2, 0\] is not a number",
            ),
            (
                {"weights": np.array([[np.inf, 0, 0], [1, 0, 0], [1, 0, 0]])},
                r"weights\[0\] must add up",
            ),
            ({"reference": np.zeros((9, 97), np.float32)}, "reference"),
            ({"reference": np.zeros((10, 96), np.float32)}, "reference"),
            ({"reference": np.zeros(97, np.float32)}, "reference"),
            ({"reference": np.full((10, 97), np.nan, np.float32)}, "reference"),
            ({"reference": np.full((10, 97), -np.inf, np.float32)}, "reference"),
        ],
    )
    def test_wrong_values(
        self, call: Callable[..., Gated], change: dict[str, Any], says: str
    ) -> None:
        with pytest.raises(ValueError, match=says):
            call(**change)

    @pytest.mark.parametrize(
        "change, says",
        [
            ({"window": np.zeros((L, 3))}, "window"),
            ({"weights": np.full((L, 3), 1 / 3, np.float32)}, "weights"),
            ({"weights": [[1.0, 0.0, 0.0]] * L}, "weights"),
            ({"reference": np.zeros((10, 97))}, "reference"),
            ({"progress": 3}, "progress"),
        ],
    )
    def test_wrong_types(
        self, call: Callable[..., Gated], change: dict[str, Any], says: str
    ) -> None:
        with pytest.raises(TypeError, match=says):
            call(**change)

    def test_a_reference_that_is_not_finite(self, call: Callable[..., Gated]) -> None:
        """Its first such row is named."""
        reference = np.zeros((10, 97), np.float32)
        reference[7, 96], reference[8, 0] = np.nan, np.inf
        with pytest.raises(ValueError, match="reference is not finite in row 7$"):
            call(reference=reference)

    def test_arrays_are_only_read(self, call: Callable[..., Gated]) -> None:
        """Strided and read-only arrays, and weights that add up to 1 but for rounding."""
        shares = np.full((2 * L, 6), 1 / 3)[::2, ::2]
        windows = np.asfortranarray(self.case.choices.arrays[0])
        reference = np.zeros((20, 97), np.float32)[::2]
        for array in (shares, windows, reference):
            array.flags.writeable = False
        spread = call(weights=shares, window=windows, reference=reference)
        plain = call(weights=np.full((L, 3), 1 / 3), reference=np.zeros((10, 97), np.float32))
        assert plain.gradient.any()
        for mine, theirs in zip(spread, plain, strict=True):
            assert np.array_equal(mine, theirs)

    def test_huge_windows_do_not_wrap(self, call: Callable[..., Gated]) -> None:
        full = call(window=np.zeros((L, 3), np.int64))
        for changes in (
            {"window": np.full((L, 3), 2**63 - 1), "sinks": np.full(L, 2**63 - 1)},
            {"window": np.full((L, 3), 2**63 - 1), "full_from": np.full(L, 2**63 - 1)},
            {"sinks": np.full(L, 2**63 - 1), "full_from": np.full(L, 2**63 - 1)},
        ):
            same = call(**changes)
            np.testing.assert_allclose(same.nll, full.nll, rtol=1e-5)
            assert not same.gradient.any()
