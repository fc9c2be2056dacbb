"""The C engine. Arrays must have exactly the dtypes given here; they are copied before a call.

L: layers, T: tokens, P: `prompt_len`, A = T - P: answer tokens, V: vocabulary.

A policy is three int64 [L] arrays. Row t < full_from[l] of layer l sees the keys j <= t with
window[l] == 0, or j > t - window[l] (so a window counts the row itself), or j < sinks[l]; rows
from full_from[l] on see every key j <= t.

Calls on any engine of the process queue, first come, first served; the GIL is released. Ctrl-C,
or an exception in `progress`, cancels the call. `progress(done, total)`, in FLOPs, is called about
every 50 ms from the calling thread, and at the end with done == total; it must not use the same
engine (RuntimeError). Errors: TypeError for a wrong type or dtype, ValueError for a wrong value or
shape, MemoryError, RuntimeError for a call at the wrong time.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypedDict, final, overload

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

_Bool: TypeAlias = npt.NDArray[np.bool_]
_F32: TypeAlias = npt.NDArray[np.float32]
_F64: TypeAlias = npt.NDArray[np.float64]
_I32: TypeAlias = npt.NDArray[np.int32]
_I64: TypeAlias = npt.NDArray[np.int64]
_U16: TypeAlias = npt.NDArray[np.uint16]
_Dtype: TypeAlias = Literal["bfloat16", "float32"]
_Progress: TypeAlias = Callable[[float, float], object] | None

NO_FLIP: int

class _BuildInfo(TypedDict):
    version: str
    compiler: str
    flags: str
    openmp: bool
    tiers_built: tuple[str, ...]
    tiers_supported: tuple[str, ...]
    tier: str
    num_threads: int

def build_info() -> _BuildInfo:
    """How the extension was built; the tiers this machine supports, and the one it would take.

    ValueError: the environment variable SWA_TIER names a tier that is not supported.
    """

@final
class Engine:
    """The weights of one model, packed for one ISA tier and one compute type.

    config: ints vocab_size, hidden_size, intermediate_size, num_hidden_layers,
    num_attention_heads, num_key_value_heads, head_dim; floats rms_norm_eps, rope_scale (multiplies
    cos and sin); bools tie_word_embeddings, qk_norm, q_bias, k_bias, v_bias, o_bias, gate_bias,
    up_bias, down_bias; inv_freq: float32 [head_dim / 2].
    num_threads: 0 takes OMP_NUM_THREADS, else the CPUs that this process may use.
    tier: None takes the environment variable SWA_TIER, else the best that is supported.
    planned: take no memory for weights, and load none: to ask weight_bytes and workspace_bytes.
    """

    def __new__(
        cls,
        config: dict[str, Any],
        *,
        dtype: _Dtype,
        num_threads: int = 0,
        tier: str | None = None,
        planned: bool = False,
    ) -> Engine: ...
    @property
    def dtype(self) -> _Dtype: ...
    @property
    def tier(self) -> str: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_threads(self) -> int: ...
    @num_threads.setter
    def num_threads(self, value: int) -> None: ...
    def load_rows(
        self,
        tensor: str,
        layer: int,
        row_start: int,
        dtype: Literal["F32", "F16", "BF16"],
        data: Buffer,
    ) -> None:
        """Load whole rows of a tensor from contiguous, possibly misaligned bytes.

        layer -1: embed_tokens, lm_head, norm. Others: input_layernorm, post_attention_layernorm,
        q_norm, k_norm; q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, and these
        with ".bias". Matrices are row-major [outputs, inputs], and their rows arrive in order, in
        any chunks; vectors arrive whole.
        """

    def finish(self) -> None:
        """End loading. ValueError names the first tensor that is missing or incomplete."""

    def nll(
        self,
        ids: _I32,
        prompt_len: int,
        window: _I64,
        sinks: _I64,
        full_from: _I64,
        *,
        progress: _Progress = None,
    ) -> tuple[_F64, _Bool]:
        """NLL [A] in nats of every answer token ids[prompt_len:], and whether it is the argmax."""

    def sweep(
        self,
        ids: _I32,
        prompt_len: int,
        window: _I64,
        sinks: _I64,
        full_from: _I64,
        flip_window: _I64,
        *,
        progress: _Progress = None,
    ) -> tuple[_F64, _F64, _Bool, _Bool]:
        """`nll` of the base policy and of L runs; run l replaces window[l] by flip_window[l].

        Returns base NLL [A], run NLL [L, A], base greedy [A], run greedy [L, A], bit for bit what
        separate `nll` calls return. flip_window[l] == NO_FLIP: no run; its row is NaN and False.
        """

    def gates(
        self,
        ids: _I32,
        prompt_len: int,
        window: _I64,
        sinks: _I64,
        full_from: _I64,
        weights: _F64,
        *,
        reference: _F32 | None = None,
        progress: _Progress = None,
    ) -> tuple[_F64, _Bool, _F64]:
        """The loss with several windows a layer, and its gradient with respect to their weights.

        Layer l's attention output, before the output projection, is the sum over c of
        weights[l, c] times attention under window[l, c] (0: full); window and weights are [L, C],
        sinks and full_from [L]. The loss of an answer row is the NLL of its token or, with
        `reference` (logits [A, V]), KL(reference || model).

        Returns loss [A] in nats, greedy [A], and the gradient [L, C, G] of the mean loss with
        respect to weights[l, c], through the query heads of each KV head, relative to choice 0.
        Rows that see the same under every choice contribute nothing.
        """

    def attention_mass(
        self,
        ids: _I32,
        window: _I64,
        near_window: int,
        near_sinks: int,
        n_last: int,
        *,
        progress: _Progress = None,
    ) -> _F64:
        """Share of attention [L, H] that stays near, a mean over the last n_last rows.

        Near are the last near_window keys of a row, its own included, and the first near_sinks; in
        a layer whose `window` (0: full) is not 0, only what it sees counts, and it has no sinks.
        """

    def gates_bytes(self, n_tokens: int, n_choices: int, n_reference: int = 0, /) -> int:
        """Bytes that `gates` allocates beside the weights and its outputs.

        n_reference: rows of `reference`, of which it takes a copy.
        """

    def logits(
        self,
        ids: _I32,
        window: _I64,
        sinks: _I64,
        full_from: _I64,
        *,
        first_row: int = 0,
        progress: _Progress = None,
    ) -> _F32:
        """Logits [T - first_row, V]."""

    def start(
        self,
        ids: _I32,
        window: _I64,
        sinks: _I64,
        full_from: _I64,
        decode_window: _I64,
        decode_sinks: _I64,
        capacity: int,
        *,
        progress: _Progress = None,
    ) -> Session:
        """Prefill the tokens; every later one sees decode_window (0: all) and decode_sinks.

        capacity: the most tokens that the session will ever hold.
        """

    def workspace_bytes(
        self, kind: Literal["nll", "sweep", "logits", "decode"], n_tokens: int, n_prefix: int = 0
    ) -> int:
        """Bytes that a call allocates beside the weights and its outputs.

        n_tokens: for "decode" the capacity. n_prefix: rows that all runs of a sweep share.
        """

@final
class Session:
    """A sequence being generated: its KV cache. `Engine.start` makes one."""

    @property
    def n_tokens(self) -> int: ...
    @property
    def kv_bytes(self) -> int: ...
    def logits(self) -> _F32:
        """Logits [V] after the last token."""

    def step(self, token: int) -> _F32:
        """Feed one token; logits [V] after it. ValueError: the session is at its capacity."""

# Test hooks: one kernel or driver at a time. With `timed`, also the seconds that the driver took:
# with packing keys and values, without packing weights or copying arrays.

@overload
def attention(
    q: _F32,
    k: _F32,
    v: _F32,
    window: int,
    sinks: int,
    full_from: int,
    *,
    dtype: _Dtype = "float32",
    tier: str | None = None,
    num_threads: int = 1,
    timed: Literal[True],
) -> tuple[_F32, float]: ...
@overload
def attention(
    q: _F32,
    k: _F32,
    v: _F32,
    window: int,
    sinks: int,
    full_from: int,
    *,
    dtype: _Dtype = "float32",
    tier: str | None = None,
    num_threads: int = 1,
    timed: Literal[False] = False,
) -> _F32:
    """Attention [T, H, d] of q [T, H, d] over k and v [T, G, d], scaled by d ** -0.5."""

@overload
def linear(
    x: _F32,
    w: _F32,
    *,
    dtype: _Dtype = "float32",
    tier: str | None = None,
    num_threads: int = 1,
    timed: Literal[True],
) -> tuple[_F32, float]: ...
@overload
def linear(
    x: _F32,
    w: _F32,
    *,
    dtype: _Dtype = "float32",
    tier: str | None = None,
    num_threads: int = 1,
    timed: Literal[False] = False,
) -> _F32:
    """x [M, K] times the transpose of w [N, K], packed as weights are: [M, N]."""

def rms_norm(x: _F32, weight: _F32, eps: float, *, tier: str | None = None) -> _F32:
    """RMSNorm of every row of x [M, N] with weight [N]."""

def silu_mul(gate: _F32, up: _F32, *, tier: str | None = None) -> _F32:
    """silu(gate) * up, each [N]."""

def peak(
    kind: Literal["f32", "bf16", "read"],
    *,
    tier: str | None = None,
    num_threads: int = 0,
    n_bytes: int = 2**30,
) -> float:
    """What this machine reaches at most, measured in a few tenths of a second.

    "f32" and "bf16": FLOP/s of multiply-adds in registers, 0 where the tier has none. "read":
    bytes/s, from a buffer of `n_bytes`.
    """

def log_prob(logits: _F32, targets: _I64, *, tier: str | None = None) -> tuple[_F64, _Bool]:
    """NLL [M] in nats of targets [M] under logits [M, V], and whether each is the argmax."""

def bf16_round_trip(x: _U16, /) -> _U16:
    """BF16 bits [N] as they are after loading."""
