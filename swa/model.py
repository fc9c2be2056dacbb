"""A loaded model: answer NLL, logits, the layer sweep of one example, generation, patching."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from swa import _core, cost, examples, jsonio
from swa.checkpoint import Checkpoint, open_checkpoint
from swa.config import ModelConfig
from swa.errors import CheckpointError, InputError, PolicyError, SwaWarning, TokenizerError
from swa.examples import Example
from swa.export import Export, read_export, write_export
from swa.generation import Generation, Sampler, TextStream, continue_text
from swa.memory import GIB, available_bytes
from swa.policy import AttentionPolicy, Rows, format_layers, selectable_layers
from swa.selection import Selection
from swa.tokenizer import Tokenizer, is_chat

DEFAULT_NEW_TOKENS = 256

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Sequence[Message] | Sequence[int] | npt.NDArray[np.integer[Any]]
Answer: TypeAlias = str | Sequence[int] | npt.NDArray[np.integer[Any]]
Dtype: TypeAlias = Literal["bfloat16", "float32"]
Work: TypeAlias = Literal["nll", "sweep", "logits", "decode"]
Progress: TypeAlias = Callable[[float, float], None]


@dataclass(frozen=True, eq=False, repr=False)
class NllResult:
    """Negative log-likelihood of an answer, teacher forced."""

    per_token: npt.NDArray[np.float64]
    """float64 [A], nats."""
    is_greedy: npt.NDArray[np.bool_]
    """bool [A]: the token was the most likely one."""

    @property
    def mean(self) -> float:
        """Mean over the answer's tokens, nats."""
        return float(self.per_token.mean())

    def __repr__(self) -> str:
        greedy, n = int(self.is_greedy.sum()), len(self.per_token)
        return f"NllResult(mean={self.mean:.6g} nats, tokens={n}, greedy={greedy})"


@dataclass(frozen=True, eq=False)
class GatesResult:
    """One example's loss with several windows a layer; A answer tokens, L layers, C choices."""

    loss: npt.NDArray[np.float64]
    """float64 [A], nats: NLL of each answer token, or the divergence from reference logits."""
    is_greedy: npt.NDArray[np.bool_]
    """bool [A]: the token was the most likely one."""
    gradient: npt.NDArray[np.float64]
    """float64 [L, C, G]: of the mean loss with respect to each choice's weight, through the query
    heads of each of the G KV heads, relative to choice 0."""


@dataclass(frozen=True, eq=False)
class SweepResult:
    """One example's base run and one run per flipped layer; A answer tokens, L layers."""

    base_nll: npt.NDArray[np.float64]
    """float64 [A], nats."""
    run_nll: npt.NDArray[np.float64]
    """float64 [L, A], nats; NaN for layers without a run."""
    base_greedy: npt.NDArray[np.bool_]
    """bool [A]."""
    run_greedy: npt.NDArray[np.bool_]
    """bool [L, A]; False for layers without a run."""


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A checkpoint in the engine, with a tokenizer and an attention policy; `load` makes one.

    Models made by `patch` share weights. Calls from several threads queue on the engine.
    """

    source: str
    """The path or hub id given to `load`."""
    checkpoint: Checkpoint
    engine: _core.Engine
    policy: AttentionPolicy | None
    """None: attention as the checkpoint defines it."""
    max_position_embeddings: int
    """Longest prompt plus answer that is not refused, in tokens."""
    stop_ids: frozenset[int]
    """Tokens that end a generation."""
    _tokenizer: Tokenizer | None

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises TokenizerError if neither the checkpoint nor the user gave one."""
        if self._tokenizer is None:
            raise TokenizerError(
                f"{self.name} has no tokenizer: give token ids, or swa.load(..., tokenizer=PATH)"
            )
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can be given, not only token ids."""
        return self._tokenizer is not None

    @property
    def config(self) -> ModelConfig:
        """The checkpoint's architecture."""
        return self.checkpoint.config

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) that tells checkpoints apart."""
        return self.checkpoint.fingerprint

    @property
    def dtype(self) -> str:
        """The engine's compute type, "bfloat16" or "float32"."""
        return self.engine.dtype

    @property
    def name(self) -> str:
        """The hub id, or the last part of the path."""
        return Path(self.source).resolve().name if os.path.exists(self.source) else self.source

    @property
    def selectable_layers(self) -> tuple[int, ...]:
        """Layers that a policy decides about: those the checkpoint did not make sliding."""
        return selectable_layers(self.config)

    @property
    def precision_note(self) -> str | None:
        """What loading cost: a float16 or float32 checkpoint in bfloat16 loses mantissa bits."""
        wider = sorted(self.checkpoint.dtypes - {"BF16"})
        if self.dtype != "bfloat16" or not wider:
            return None
        return f'{"/".join(wider)} rounded to bfloat16; dtype="float32" keeps the values'

    def nll(self, prompt: Prompt, answer: Answer) -> NllResult:
        """NLL of each answer token given the prompt and the answer before it.

        Args:
            prompt: text (special tokens are added once), chat messages (the chat template adds
                them), or token ids.
            answer: text (no special tokens) or token ids. Where the prompt ends, a token ends.

        Raises:
            InputError: an empty prompt or answer, an id outside the vocabulary, or more tokens than
                `max_position_embeddings`.
            TokenizerError: text without a tokenizer, messages without a chat template.
            MemoryError: the run needs more memory than there is.
        """
        prompt_ids = self._prompt_ids(prompt)
        return self.nll_example(Example(prompt_ids, self._answer_ids(answer)))

    def nll_example(
        self,
        example: Example,
        policy: AttentionPolicy | None = None,
        full_layers: Collection[int] | None = None,
    ) -> NllResult:
        """`nll` of an Example's tokens, under another policy if one is given.

        `full_layers` are the layers that keep full attention; None: those of the policy's
        `layer_types`, or no layer. Raises as `nll`, and PolicyError if the policy does not fit.
        """
        ids = self._checked((*example.prompt_ids, *example.answer_ids), "the example")
        rows = self._rows(policy, full_layers, example.prompt_len, len(ids))
        self._require_memory("nll", len(ids))
        return NllResult(*self.engine.nll(ids, example.prompt_len, *rows))

    def logits(self, prompt: Prompt, answer: Answer | None = None) -> npt.NDArray[np.float32]:
        """float32 [T, V]: logits after each token of the prompt, and of the answer if given.

        Raises as `nll`.
        """
        prompt_ids = self._prompt_ids(prompt)
        answer_ids = () if answer is None else self._answer_ids(answer)
        ids = self._checked((*prompt_ids, *answer_ids), "the input")
        rows = self._rows(None, None, len(prompt_ids), len(ids))
        self._require_memory("logits", len(ids))
        return self.engine.logits(ids, *rows)

    def full_logits(self, ids: Sequence[int], first_row: int = 0) -> npt.NDArray[np.float32]:
        """float32 [T - first_row, V]: logits from `first_row` on with full attention.

        A patched model's own policy is left aside. Raises as `nll`.
        """
        checked = self._checked(tuple(ids), "the input")
        rows = AttentionPolicy(1).rows(self.config, self.selectable_layers, len(ids), len(ids))
        n_rows = len(ids) - first_row
        need = self.engine.workspace_bytes("nll", len(ids)) + 4 * n_rows * self.config.vocab_size
        _require_memory(f"logits over {len(ids)} tokens", need, "shorten the input")
        return self.engine.logits(checked, *rows, first_row=first_row)

    def attention_mass(
        self, ids: Sequence[int], *, near_window: int, near_sinks: int = 0, num_last_tokens: int = 1
    ) -> npt.NDArray[np.float64]:
        """float64 [L, H]: the share of attention that the last tokens give to keys near them.

        Near are the last `near_window` keys, the query's own included, and the first `near_sinks`;
        the model attends fully (a patched model's own policy is left aside). A mean over the last
        `num_last_tokens` tokens; 1 where there is nothing else to attend to. With a mean over heads
        this is the lazy ratio of LightTransfer (arXiv 2410.13846), its numerator causal.

        Raises as `nll`; ValueError: a number out of range.
        """
        checked = self._checked(tuple(ids), "the input")
        window = AttentionPolicy(1).rows(self.config, self.selectable_layers, 1, len(ids)).window
        self._require_memory("nll", len(ids))
        return self.engine.attention_mass(checked, window, near_window, near_sinks, num_last_tokens)

    def sweep_example(
        self,
        example: Example,
        policy: AttentionPolicy,
        base_full: Collection[int],
        flips: Sequence[int],
        to_full: bool,
        progress: Progress | None = None,
    ) -> SweepResult:
        """The base run (`base_full` full, others sliding) and one run per layer in `flips`.

        In run l, layer l alone differs from the base: it gets full attention if `to_full`, else the
        policy's window. `progress` is called with (done, total) in FLOPs. Raises as `nll_example`;
        InputError if a flip would change nothing.
        """
        n_layers = self.config.num_hidden_layers
        useless = sorted(set(flips) & set(base_full) if to_full else set(flips) - set(base_full))
        if useless:
            state = "full" if to_full else "sliding"
            raise InputError(f"layers {format_layers(useless)} are {state} in the base already")
        ids = self._checked((*example.prompt_ids, *example.answer_ids), "the example")
        policy.rows(self.config, {*base_full, *flips}, example.prompt_len, len(ids))  # may refuse
        # Sinks and exempt rows as if every layer slid: where a layer is full they change nothing.
        sliding = policy.rows(self.config, (), example.prompt_len, len(ids))
        window, flip_window = sliding.window.copy(), np.full(n_layers, _core.NO_FLIP, np.int64)
        window[list(base_full)] = 0
        flip_window[list(flips)] = 0 if to_full else sliding.window[list(flips)]
        self._require_memory("sweep", len(ids), policy, flips)
        base_nll, run_nll, base_greedy, run_greedy = self.engine.sweep(
            ids,
            example.prompt_len,
            window,
            sliding.sinks,
            sliding.full_from,
            flip_window,
            progress=progress,
        )
        return SweepResult(base_nll, run_nll, base_greedy, run_greedy)

    def gates_example(
        self,
        example: Example,
        policy: AttentionPolicy,
        weights: npt.NDArray[np.float64],
        windows: Sequence[int] = (0,),
        *,
        reference: npt.NDArray[np.float32] | None = None,
        progress: Progress | None = None,
    ) -> GatesResult:
        """The loss where every layer mixes attention under several windows, and its gradient.

        Layer l's attention output, before the output projection, is the sum over c of weights[l, c]
        times attention under window c: first the policy's own, then `windows` (0: full). One
        forward and one backward, for activations only, that keeps each layer's input and computes
        the rest again. With one weight 1 in every layer the loss is that of `nll_example`, bit for
        bit. In layers that cannot be selected all choices are the checkpoint's own window.

        Args:
            example: prompt and answer.
            policy: how sliding layers attend. Choice 0 of the layers that its `layer_types` name
                full is full attention.
            weights: float64 [L, 1 + len(windows)], >= 0, each row adding up to 1.
            windows: the other choices; at most 7.
            reference: float32 [A, V], logits of the rows that predict the answer: then the loss is
                KL(reference || this model) of each row instead of the NLL of its token.
            progress: called with (done, total) in FLOPs.

        Raises as `nll_example`; ValueError, TypeError: arrays that are not as above.
        """
        ids = self._checked((*example.prompt_ids, *example.answer_ids), "the example")
        sliding = policy.rows(self.config, (), example.prompt_len, len(ids))
        own = policy.rows(
            self.config, policy.full_attention_layers or (), example.prompt_len, len(ids)
        )
        window = np.repeat(own.window[:, None], 1 + len(windows), axis=1)
        window[list(self.selectable_layers), 1:] = windows
        n_reference = 0 if reference is None else len(example.answer_ids)
        need = self.engine.gates_bytes(len(ids), 1 + len(windows), n_reference)
        _require_memory(f"gates over {len(ids)} tokens", need, "shorten the input")
        found = self.engine.gates(
            ids,
            example.prompt_len,
            window,
            sliding.sinks,
            sliding.full_from,
            np.ascontiguousarray(weights, dtype=np.float64),
            reference=reference,
            progress=progress,
        )
        return GatesResult(*found)

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = ...,
        do_sample: bool = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int | None = ...,
        stop: str | Iterable[str] | None = ...,
        stream: Literal[False] = ...,
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = ...,
        do_sample: bool = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int | None = ...,
        stop: str | Iterable[str] | None = ...,
        stream: Literal[True],
    ) -> Generator[str, None, Generation]: ...

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Iterable[str] | None = None,
        stream: bool = False,
    ) -> Generation | Generator[str, None, Generation]:
        """Continue a prompt under the model's policy.

        Args:
            prompt: as in `nll`.
            max_new_tokens: at most this many; with the prompt they must fit the model's positions.
                None: 256, or what fits if that is less.
            do_sample: draw from softmax(logits / temperature), among the fewest tokens whose mass
                reaches `top_p`; otherwise the most likely token is taken.
            seed: makes draws repeatable.
            stop: texts that end the generation; they are not part of it.
            stream: return an iterator over pieces of text, each of whole characters. Closing it
                frees the KV cache; run to its end, its return value is the Generation.

        Raises:
            InputError, TokenizerError, MemoryError: as `nll`; bad settings. Before any text.
        """
        sampler = Sampler(do_sample, temperature, top_p, seed)
        ids = self._checked(self._prompt_ids(prompt), "the prompt")
        room = self.max_position_embeddings - len(ids)
        if max_new_tokens is None:
            max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, room))
        if operator.index(max_new_tokens) < 1:
            raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        if max_new_tokens > room:
            raise InputError(
                f"the prompt's {len(ids)} tokens leave {room} of the model's"
                f" {self.max_position_embeddings} positions, fewer than max_new_tokens="
                f"{max_new_tokens}: lower it, or load with max_position_embeddings="
            )
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if "" in stops:
            raise InputError("a stop text is empty")
        if stream or stops:
            _ = self.tokenizer  # text is asked for: refuse now if there can be none
        capacity = len(ids) + max_new_tokens
        self._require_memory("decode", capacity)
        policy, full_layers = self._resolve(None, None)
        pieces = continue_text(
            self.engine.start(
                ids,
                *policy.rows(self.config, full_layers, len(ids), len(ids)),
                *policy.decode_rows(self.config, full_layers),
                capacity,
            ),
            sampler,
            TextStream(self._tokenizer, stops),
            stop_ids=self.stop_ids,
            max_new_tokens=max_new_tokens,
        )
        return pieces if stream else _result(pieces)

    def patch(
        self,
        chosen: AttentionPolicy | Selection,
        *,
        full_attention_layers: Iterable[int] | None = None,
    ) -> Model:
        """A Model that shares these weights and attends by a selection or a policy.

        `full_attention_layers` takes the place of the policy's `layer_types`; with neither, every
        layer that can slide does. Layers that the checkpoint made sliding keep their own window.

        Raises:
            PolicyError: it was written for another number of layers, or asks full attention of a
                layer that the checkpoint made sliding.
        """
        policy = chosen.policy if isinstance(chosen, Selection) else chosen
        if not isinstance(policy, AttentionPolicy):
            raise PolicyError(f"patch takes a Selection or an AttentionPolicy, not {chosen!r}")
        policy.windows(self.config.num_hidden_layers)  # refuses another number of layers
        if full_attention_layers is None:
            full_attention_layers = policy.full_attention_layers or ()
        policy = policy.with_full_layers(full_attention_layers, self.config.num_hidden_layers)
        policy.decode_rows(
            self.config, policy.full_attention_layers or ()
        )  # refuses what cannot be
        return replace(self, policy=policy)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Save weights, tokenizer and policy to a new folder that `swa.load` gives back.

        Weights are copied from the source files, byte for byte; the policy is in `swa.json`. Stock
        libraries read the original `config.json` beside it and run full attention. The folder
        appears whole or not at all; a killed save leaves at most a hidden `.NAME.*.tmp` beside it.

        Raises:
            InputError: `directory` is a file, or a folder that is not empty (its own source, say).
            CheckpointError: the source files changed since loading.
            OSError: the disk is full, or not writable.
        """
        write_export(self, Path(directory))

    def memory_required(
        self,
        n_tokens: int,
        kind: Work = "nll",
        policy: AttentionPolicy | None = None,
        flips: Collection[int] | None = None,
    ) -> int:
        """Bytes that a run over `n_tokens` tokens needs at its peak, weights included.

        `kind`: "nll", "sweep", "logits" (of every row) or "decode" (prompt and new tokens in one).
        A sweep also keeps the rows that all its runs share, which depend on `policy` (the model's
        own if None) and on the layers that it flips (all that can be selected if None).

        Raises PolicyError: the policy is for another number of layers.
        """
        policy = policy or self.policy
        n_prefix = 0
        if kind == "sweep":
            n_prefix = n_tokens
            if policy is not None:
                flips = self.selectable_layers if flips is None else flips
                n_layers = self.config.num_hidden_layers
                n_prefix = cost.shared_rows(policy, n_layers, flips, n_tokens)
        output = 4 * n_tokens * self.config.vocab_size if kind == "logits" else 0
        return (
            self.engine.weight_bytes
            + self.engine.workspace_bytes(kind, n_tokens, n_prefix)
            + output
        )

    def __repr__(self) -> str:
        config = self.config
        n_layers = config.num_hidden_layers
        native = n_layers - len(self.selectable_layers)
        note = f" ({self.precision_note})" if self.precision_note else ""
        lines = [
            f"Model {self.name} ({config.model_type}, {n_layers} layers)",
            f"  weights    {self.dtype}, {self.engine.weight_bytes / 2**20:,.0f} MiB{note}",
            f"  attention  {self.policy or 'full'}",
            f"  engine     {self.engine.tier}, {self.engine.num_threads} threads,"
            f" up to {self.max_position_embeddings:,} tokens",
        ]
        if native:
            lines.insert(3, f"             {native} layers keep the checkpoint's own window")
        return "\n".join(lines)

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        text = isinstance(prompt, str) or is_chat(prompt)
        return _token_ids(self.tokenizer.encode_prompt(prompt) if text else prompt, "prompt")

    def _answer_ids(self, answer: Answer) -> tuple[int, ...]:
        ids = self.tokenizer.encode_answer(answer) if isinstance(answer, str) else answer
        return _token_ids(ids, "answer")

    def check_examples(self, examples: Sequence[Example | examples.Prompt]) -> None:
        """Refuse examples, or prompts, that this model cannot run, before a long run reaches them.

        Raises:
            InputError: one has more tokens than the model has positions, or an id outside its
                vocabulary.
        """
        for index, example in enumerate(examples):
            answer = example.answer_ids if isinstance(example, Example) else ()
            self._checked((*example.prompt_ids, *answer), f"example {index}")

    def _checked(self, ids: tuple[int, ...], what: str) -> npt.NDArray[np.int32]:
        """int32 [T], every id in the vocabulary, no more than the model has positions for."""
        if len(ids) > self.max_position_embeddings:
            raise InputError(
                f"{what} has {len(ids)} tokens, the model {self.max_position_embeddings}"
                " positions: shorten it, or load with max_position_embeddings="
            )
        vocabulary = range(self.config.vocab_size)
        if ids and not (min(ids) in vocabulary and max(ids) in vocabulary):
            place, token = next((i, t) for i, t in enumerate(ids) if t not in vocabulary)
            raise InputError(
                f"token {place} of {what} is {token}: ids go from 0 to {vocabulary[-1]}"
            )
        return np.array(ids, dtype=np.int32)

    def _resolve(
        self, policy: AttentionPolicy | None, full_layers: Collection[int] | None
    ) -> tuple[AttentionPolicy, Collection[int]]:
        """The policy to run and its full layers."""
        policy = policy or self.policy
        if policy is None:  # every layer is full, so that no window of the policy counts
            return AttentionPolicy(1), self.selectable_layers
        if full_layers is None:
            full_layers = policy.full_attention_layers or ()
        return policy, full_layers

    def _rows(
        self,
        policy: AttentionPolicy | None,
        full_layers: Collection[int] | None,
        prompt_len: int,
        n_tokens: int,
    ) -> Rows:
        policy, full_layers = self._resolve(policy, full_layers)
        return policy.rows(self.config, full_layers, prompt_len, n_tokens)

    def _require_memory(
        self,
        kind: Work,
        n_tokens: int,
        policy: AttentionPolicy | None = None,
        flips: Collection[int] | None = None,
    ) -> None:
        need = self.memory_required(n_tokens, kind, policy, flips) - self.engine.weight_bytes
        _require_memory(f"{kind} over {n_tokens} tokens", need, "shorten the input")


def load(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    dtype: Dtype = "bfloat16",
    num_threads: int = 0,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    max_position_embeddings: int | None = None,
    progress: bool = False,
) -> Model:
    """Load a model: a folder of safetensors, a GGUF file, or a Hugging Face hub id.

    A folder that `Model.save_pretrained` wrote gives its patched model back.

    Args:
        revision, token, local_files_only: for a hub id, as in huggingface_hub.
        dtype: "bfloat16", or "float32" as the exact reference.
        num_threads: 0 = one per core that this process may use. Results do not depend on it.
        tokenizer: a Tokenizer, or a folder with `tokenizer.json`, in place of the checkpoint's own.
        max_position_embeddings: accept inputs up to this length, whatever the checkpoint was
            trained for.
        progress: show a progress bar.

    Raises:
        CheckpointError: a file is missing, malformed or unsupported (UnsupportedModelError).
        TokenizerError: `tokenizer.json` cannot be read; `tokenizer=` helps. A GGUF file's own that
            cannot be rebuilt is a warning, since token ids need none.
        InputError: an argument is out of range.
        MemoryError: the weights do not fit.
    """
    checkpoint, export = _open(
        path_or_id, revision, token, local_files_only, dtype, num_threads, max_position_embeddings
    )
    if tokenizer is None:
        tokenizer = _find_tokenizer(checkpoint, export)
    elif not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_folder(tokenizer)
    engine = _load_engine(checkpoint, dtype, num_threads, progress)
    return _model(path_or_id, checkpoint, export, engine, tokenizer, max_position_embeddings)


def plan(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    dtype: Dtype = "bfloat16",
    num_threads: int = 0,
    max_position_embeddings: int | None = None,
    with_tokenizer: bool = False,
) -> Model:
    """The Model that `load` would give, without its weights: it tells costs, and runs nothing.

    It has the policy of an export, too. Other arguments, and errors, are those of `load`.

    Args:
        with_tokenizer: build the tokenizer, too, which takes its time.
    """
    checkpoint, export = _open(
        path_or_id, revision, token, local_files_only, dtype, num_threads, max_position_embeddings
    )
    tokenizer = _find_tokenizer(checkpoint, export) if with_tokenizer else None
    engine = _planned_engine(checkpoint, dtype, num_threads)
    return _model(path_or_id, checkpoint, export, engine, tokenizer, max_position_embeddings)


def _open(
    path_or_id: str | os.PathLike[str],
    revision: str | None,
    token: str | bool | None,
    local_files_only: bool,
    dtype: str,
    num_threads: int,
    max_position_embeddings: int | None,
) -> tuple[Checkpoint, Export | None]:
    """The checkpoint, and what was exported with it, if anything; checks the arguments of `load`.

    Raises CheckpointError, InputError: as `load`.
    """
    if dtype not in ("bfloat16", "float32"):
        raise InputError(f'dtype must be "bfloat16" or "float32", not {dtype!r}')
    if num_threads < 0:
        raise InputError(f"num_threads must be 0 (automatic) or more, not {num_threads}")
    if max_position_embeddings is not None and operator.index(max_position_embeddings) < 1:
        raise InputError(f"max_position_embeddings must be >= 1, not {max_position_embeddings}")
    export = read_export(Path(path_or_id))
    checkpoint = open_checkpoint(
        export.weights if export else path_or_id,
        revision=revision,
        token=token,
        local_files_only=local_files_only,
    )
    if export is None and checkpoint.folder is not None:
        export = read_export(checkpoint.folder)  # a hub id
    if export is not None:
        export.check(checkpoint.fingerprint)
    return checkpoint, export


def _model(
    path_or_id: str | os.PathLike[str],
    checkpoint: Checkpoint,
    export: Export | None,
    engine: _core.Engine,
    tokenizer: Tokenizer | None,
    max_position_embeddings: int | None,
) -> Model:
    """The model of an engine, under the policy that was exported, if any."""
    model = Model(
        source=os.fspath(path_or_id),
        checkpoint=checkpoint,
        engine=engine,
        policy=None,
        max_position_embeddings=max_position_embeddings
        or checkpoint.config.max_position_embeddings,
        stop_ids=_stop_ids(checkpoint, tokenizer),
        _tokenizer=tokenizer,
    )
    return model.patch(export.policy) if export and export.policy else model


def _planned_engine(checkpoint: Checkpoint, dtype: Dtype, num_threads: int) -> _core.Engine:
    return _core.Engine(
        checkpoint.config.engine_dict(), dtype=dtype, num_threads=num_threads, planned=True
    )


def _load_engine(
    checkpoint: Checkpoint, dtype: Dtype, num_threads: int, progress: bool
) -> _core.Engine:
    planned = _planned_engine(checkpoint, dtype, num_threads)
    _require_memory("the weights", planned.weight_bytes, 'load with dtype="bfloat16"')
    engine = _core.Engine(checkpoint.config.engine_dict(), dtype=dtype, num_threads=num_threads)
    with tqdm(
        total=checkpoint.n_bytes,
        desc=f"loading {os.path.basename(checkpoint.source)}",
        unit="B",
        unit_scale=True,
        disable=not progress,
        leave=False,
    ) as bar:
        for chunk in checkpoint.parameters():
            engine.load_rows(chunk.tensor, chunk.layer, chunk.row_start, chunk.dtype, chunk.data)
            bar.update(len(chunk.data))
    try:
        engine.finish()
    except ValueError as error:
        raise CheckpointError(str(error), file=checkpoint.source) from error
    return engine


def _find_tokenizer(checkpoint: Checkpoint, export: Export | None) -> Tokenizer | None:
    """The tokenizer beside the weights, or the one inside a GGUF file; None if there is none.

    Warns if the file has one that swa does not rebuild.
    """
    folder = export.folder if export else checkpoint.folder
    if folder is not None and (folder / "tokenizer.json").exists():
        return Tokenizer.from_folder(folder)
    try:
        return checkpoint.build_tokenizer()
    except TokenizerError as error:  # token ids can do without
        warnings.warn(f"{error}; until then, only token ids can be given", SwaWarning, stacklevel=3)
        return None


def _stop_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Tokens that end a text: chat models name them in config, generation config or tokenizer."""
    stop = {*checkpoint.config.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())}
    path = checkpoint.folder / "generation_config.json" if checkpoint.folder else None
    if path is None or not path.exists():
        return frozenset(stop)
    try:
        ids = jsonio.loads(path.read_bytes()).get("eos_token_id")
        stop.update(
            map(operator.index, ids if isinstance(ids, list) else [] if ids is None else [ids])
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"eos_token_id cannot be read: {error}", file=str(path)) from error
    return frozenset(stop)


def _token_ids(ids: Iterable[Any], what: str) -> tuple[int, ...]:
    try:
        checked = tuple(operator.index(token) for token in ids)
    except TypeError:
        raise InputError(
            f"the {what} must be text, chat messages (a prompt) or integer token ids"
        ) from None
    if not checked:
        raise InputError(f"the {what} is empty: it needs at least one token")
    return checked


def _require_memory(what: str, need: int, remedy: str) -> None:
    available = available_bytes()
    if available is not None and need > available:
        raise MemoryError(
            f"no room for {what}: {need / GIB:.2f} GiB needed, {available / GIB:.2f} GiB free;"
            f" {remedy}, or free memory"
        )


def _result(pieces: Generator[str, None, Generation]) -> Generation:
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            result: Generation = end.value
            return result
