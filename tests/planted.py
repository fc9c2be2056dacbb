"""A checkpoint whose long-range layers, and what each is worth, are known by construction.

Prompts hold facts about keys, far from the end, and close with a question:

    <bos> w3 w17 k4 A6 w0 ... k4 B1 w9 ... k4 C0 ... (more than a window of filler) ... k4 ?

A fact is a key followed by a value of one attribute (A, B or C). The answer is the one token that
names the values of all attributes of the key in question, "A6.B1.C0", then <eos>.

Layer 0 is local: it copies the key of the previous token (a sharp sum of RoPE's fast cosines), so
that values and the question mark know their key. Each *planted* layer answers for one attribute:
the question mark looks up the value that has its key, by content, in RoPE pairs too slow to notice
a distance. If the layer sees only its window it finds nothing, and all values of that attribute
stay equally likely. As the attributes are independent, a planted layer of n values is worth exactly
ln n nats of the answer's first token, whatever the other layers do: the truth of restoring and of
ablating alike. All other layers are worth nothing: they are local, or decoys that read the far
values as the planted ones do and write them where the head does not look, so that layers cannot be
told by how far they attend.

On request layers interact. A copy looks up the attribute of another layer as well: either of the
two will do. A chain is two layers that are useful only together: the first looks up, far away, the
key that the key in question points to ("k4 P7" points to k7), the second looks up that key's value;
without the first it attends to <bos> and finds nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from checkpoint_files import write_checkpoint, write_tokenizer

N_KEYS, N_FILLERS = 8, 20
HEADS, KV_HEADS, HEAD_DIM, INNER = 4, 2, 64, 32
FUNCTION_HEAD, FUNCTION_KV_HEAD = 2, 1  # the head that works; the others are noise
THETA = 1e7  # pairs 23 to 31 turn by less than 0.04 rad in 4,096 positions
SLOW_PAIRS, FAST_PAIRS = slice(23, 32), slice(0, 8)
SHARPNESS = 16.0  # of queries and of keys: a match is worth 16 * 16 / sqrt(64) = 32 nats
CONSTANT = 10.0  # dominates every row's norm, so that RMSNorm is nearly the identity
CONFIDENCE = 30.0  # logit of a value that was found
HOP = 4.0  # a quarter of a pointer is enough to follow it


class PlantedExample(NamedTuple):
    prompt: str
    answer: str
    prompt_ids: list[int]
    answer_ids: list[int]


@dataclass(frozen=True)
class Planted:
    """`n_values[l]` is the number of values of the attribute that layer l looks up."""

    folder: Path
    num_hidden_layers: int
    n_values: Mapping[int, int]
    """The second layer of a chain included."""
    vocabulary: Mapping[str, int]
    chain: tuple[int, int] | None = None
    copies: Mapping[int, int] = field(default_factory=dict)
    """copy -> the layer that it repeats."""

    @property
    def ranked_layers(self) -> list[int]:
        """The planted layers, the most valuable first."""
        return sorted(self.n_values, key=lambda layer: -self.n_values[layer])

    @property
    def deltas(self) -> np.ndarray:
        """float64 [L]: true delta in mean answer NLL (of two tokens, the second is certain)."""
        n_values = {copy: self.n_values[layer] for copy, layer in self.copies.items()}
        n_values |= self.n_values
        for layer in self.chain or ():  # nothing alone
            n_values[layer] = 1
        worth = [math.log(n_values.get(i, 1)) for i in range(self.num_hidden_layers)]
        return np.array(worth) / 2

    def example(
        self,
        prompt_tokens: int,
        *,
        near: int,
        seed: int = 0,
        within: Mapping[int, int] | None = None,
    ) -> PlantedExample:
        """A prompt of that many tokens whose last `near` tokens hold no fact (choose near > W).

        within: planted layer -> the last tokens among which all facts of its attribute stand.
        """
        rng = np.random.default_rng(seed)
        words = [f"w{i}" for i in rng.integers(0, N_FILLERS, prompt_tokens)]
        facts = list(itertools.product(range(N_KEYS), range(len(self.n_values))))
        n_slots = (prompt_tokens - near - 12) // 2
        slots = rng.choice(n_slots, len(facts), replace=False)
        for layer, reach in (within or {}).items():
            own = [i for i, (_, a) in enumerate(facts) if a == list(self.n_values).index(layer)]
            late = range(max(0, (prompt_tokens - reach - 9) // 2), n_slots)
            free = sorted({*late} - {*np.delete(slots, own).tolist()})
            slots[own] = rng.choice(free, len(own), replace=False)
        values = [list(rng.integers(0, n, N_KEYS)) for n in self.n_values.values()]
        for slot, (key, attribute) in zip(slots, facts, strict=True):
            at = 10 + 2 * slot  # out of reach of attention sinks
            words[at : at + 2] = [f"k{key}", f"{chr(65 + attribute)}{values[attribute][key]}"]
        asked = rng.integers(N_KEYS)
        keys = dict.fromkeys(self.n_values, asked)
        if self.chain is not None:
            pointers = rng.integers(0, N_KEYS, N_KEYS)
            free = [at for at in range(10, prompt_tokens - near - 2) if words[at][0] == "w"]
            pairs = [at for at in free[::3] if words[at + 1][0] == "w"]
            for key, at in enumerate(rng.choice(pairs, N_KEYS, replace=False)):
                words[at : at + 2] = [f"k{key}", f"P{pointers[key]}"]
            keys[self.chain[1]] = pointers[asked]
        words[0] = "<bos>"
        words[-2:] = [f"k{asked}", "?"]
        found = [of_key[key] for of_key, key in zip(values, keys.values(), strict=True)]
        answer = [answer_token(found), "<eos>"]
        ids = [[self.vocabulary[word] for word in text] for text in (words, answer)]
        return PlantedExample(" ".join(words[1:]), " ".join(answer), *ids)


def answer_token(values: list[int] | tuple[int, ...]) -> str:
    return ".".join(f"{chr(65 + i)}{value}" for i, value in enumerate(values))


class Space:
    """Names for ranges of hidden dimensions."""

    def __init__(self, n_values: list[int]) -> None:
        self.size = 0
        self.constant = self._take(1)
        self.key, self.previous_key = self._take(N_KEYS), self._take(N_KEYS)
        self.is_question, self.is_answer = self._take(1), self._take(1)
        self.is_value = [self._take(1) for _ in n_values]
        self.value = [self._take(n) for n in n_values]  # the value that a token is
        self.found = [self._take(n) for n in n_values]  # the value that a lookup brought
        self.scratch = self._take(sum(n_values))  # no one reads it
        self.is_bos, self.is_pointer = self._take(1), self._take(1)
        self.pointer, self.hop = self._take(N_KEYS), self._take(N_KEYS)  # that it is; that was read

    def _take(self, n: int) -> slice:
        self.size += n
        return slice(self.size - n, self.size)


def planted_checkpoint(
    folder: Path,
    *,
    num_hidden_layers: int = 9,
    n_values: Mapping[int, int] | None = None,
    chain: tuple[int, int] | None = None,
    copies: Mapping[int, int] | None = None,
    dtype: str = "F32",
    seed: int = 0,
) -> Planted:
    """Write the model and its tokenizer.

    n_values: planted layer -> values of its attribute, for a chain of its second layer.
    chain: the layer that follows the pointer, and the one above that looks up the value.
    copies: copy -> the layer of `n_values` that it repeats.
    """
    n_values, copies = dict(n_values or {2: 4, 5: 8, 7: 2}), dict(copies or {})
    counts = list(n_values.values())
    space = Space(counts)
    rng = np.random.default_rng(seed)
    vocabulary = [
        *("<bos>", "<eos>", "<unk>", "?"),
        *(f"w{i}" for i in range(N_FILLERS)),
        *(f"k{i}" for i in range(N_KEYS)),
        *(f"P{i}" for i in range(N_KEYS if chain else 0)),
        *(f"{chr(65 + a)}{i}" for a, n in enumerate(counts) for i in range(n)),
        *map(answer_token, itertools.product(*map(range, counts))),
    ]
    tensors = {"model.embed_tokens.weight": embeddings(vocabulary, space)}
    for i in range(num_hidden_layers):
        if chain is not None and i == chain[0]:
            function = follow(space)
        elif i in n_values or i in copies:
            attribute = list(n_values).index(copies.get(i, i))
            function = lookup(space, [attribute], space.found[attribute])
            if chain is not None and i == chain[1]:
                from_hop(function, space)
        elif i == 0:
            function = previous_token(space, space.previous_key)
        elif i % 2:
            function = lookup(space, list(range(len(counts))), space.scratch)
        else:
            function = previous_token(space, space.scratch)
        tensors |= layer_tensors(f"model.layers.{i}", function, space, rng)
    tensors["model.norm.weight"] = np.ones(space.size, np.float32)
    tensors["lm_head.weight"] = head(vocabulary, space)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(vocabulary),
        "hidden_size": space.size,
        "intermediate_size": INNER,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    write_checkpoint(folder, config, tensors, dtype=dtype)
    write_tokenizer(folder, word_tokenizer(vocabulary))
    ids = {word: i for i, word in enumerate(vocabulary)}
    return Planted(folder, num_hidden_layers, n_values, ids, chain, copies)


def embeddings(vocabulary: list[str], space: Space) -> np.ndarray:
    table = np.zeros((len(vocabulary), space.size), np.float32)
    table[:, space.constant] = CONSTANT
    for row, word in zip(table, vocabulary, strict=True):
        attribute = ord(word[0]) - 65
        if word == "?":
            row[space.is_question] = 1
        elif word == "<bos>":
            row[space.is_bos] = 1
        elif word[0] == "P":
            row[space.is_pointer] = 1
            row[space.pointer][int(word[1:])] = 1
        elif "." in word:
            row[space.is_answer] = 1
        elif word[0] == "k":
            row[space.key][int(word[1:])] = 1
        elif 0 <= attribute < len(space.value):
            row[space.is_value[attribute]] = 1
            row[space.value[attribute]][int(word[1:])] = 1
    return table


def head(vocabulary: list[str], space: Space) -> np.ndarray:
    """Answers compete by the values found; <eos> wins after an answer; nothing else is likely."""
    table = np.zeros((len(vocabulary), space.size), np.float32)
    for row, word in zip(table, vocabulary, strict=True):
        if "." in word:
            for attribute, value in enumerate(word.split(".")):
                row[space.found[attribute]][int(value[1:])] = CONFIDENCE
        else:
            row[space.constant] = -60 / CONSTANT
        if word == "<eos>":
            row[space.is_answer] = 150
    return table


class Function(NamedTuple):
    """What a layer's working head does: q, k and v [HEAD_DIM, hidden], out [hidden, HEAD_DIM]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    out: np.ndarray

    @classmethod
    def zeros(cls, hidden: int) -> Function:
        return cls(*np.zeros((3, HEAD_DIM, hidden)), np.zeros((hidden, HEAD_DIM)))

    def copy(self, source: slice, target: slice, at: int = 0) -> None:
        """The head reads `source` as its value elements from `at` on and writes it to `target`."""
        n = source.stop - source.start
        self.v[at : at + n, source] = np.eye(n)
        self.out[target.start + at : target.start + at + n, at : at + n] = np.eye(n)


def previous_token(space: Space, target: slice) -> Function:
    """Copy the key of the token before: scores are a sum of cosines that peaks at distance 1."""
    function = Function.zeros(space.size)
    pairs = np.arange(HEAD_DIM // 2)[FAST_PAIRS]
    angle = THETA ** (-2.0 * pairs / HEAD_DIM)  # of one position
    function.q[pairs, space.constant] = SHARPNESS / CONSTANT
    function.k[pairs, space.constant] = SHARPNESS / CONSTANT * np.cos(angle)[:, None]
    function.k[pairs + HEAD_DIM // 2, space.constant] = (
        SHARPNESS / CONSTANT * np.sin(angle)[:, None]
    )
    function.copy(space.key, target)
    return function


def lookup(space: Space, attributes: list[int], target: slice) -> Function:
    """The question mark reads the values of these attributes that have its key."""
    function = Function.zeros(space.size)
    *key_pairs, value_pair = np.arange(HEAD_DIM // 2)[SLOW_PAIRS]
    function.q[key_pairs, space.previous_key] = SHARPNESS * np.eye(N_KEYS)
    function.k[key_pairs, space.previous_key] = SHARPNESS * np.eye(N_KEYS)
    function.q[value_pair, space.is_question] = SHARPNESS
    at = 0
    for attribute in attributes:
        function.k[value_pair, space.is_value[attribute]] = SHARPNESS
        function.copy(space.value[attribute], target, at)
        at += space.value[attribute].stop - space.value[attribute].start
    return function


def follow(space: Space) -> Function:
    """The question mark reads which key its own points to."""
    function = Function.zeros(space.size)
    *key_pairs, pointer_pair = np.arange(HEAD_DIM // 2)[SLOW_PAIRS]
    function.q[key_pairs, space.previous_key] = SHARPNESS * np.eye(N_KEYS)
    function.k[key_pairs, space.previous_key] = SHARPNESS * np.eye(N_KEYS)
    function.q[pointer_pair, space.is_question] = SHARPNESS
    function.k[pointer_pair, space.is_pointer] = SHARPNESS
    function.copy(space.pointer, space.hop)
    return function


def from_hop(function: Function, space: Space) -> None:
    """Look up by the key that was pointed to; where there is none, <bos> wins, and says nothing."""
    *key_pairs, value_pair = np.arange(HEAD_DIM // 2)[SLOW_PAIRS]
    function.q[key_pairs, space.previous_key] = 0
    function.q[key_pairs, space.hop] = HOP * SHARPNESS * np.eye(N_KEYS)
    function.k[value_pair, space.is_bos] = 1.5 * SHARPNESS


def layer_tensors(
    layer: str, function: Function, space: Space, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """The function in its head; in the other heads and the MLP noise, written to the scratch."""
    hidden = space.size

    def noise(outputs: int, inputs: int) -> np.ndarray:
        x = rng.standard_normal((outputs, inputs)) / math.sqrt(inputs)
        if inputs == hidden:
            x[:, space.constant] = 0
        return x

    def to_scratch(inputs: int) -> np.ndarray:
        x = np.zeros((hidden, inputs))
        x[space.scratch] = 0.5 * noise(space.scratch.stop - space.scratch.start, inputs)
        return x

    q, k, v = (noise(n * HEAD_DIM, hidden) for n in (HEADS, KV_HEADS, KV_HEADS))
    out = to_scratch(HEADS * HEAD_DIM)
    own = slice(FUNCTION_HEAD * HEAD_DIM, (FUNCTION_HEAD + 1) * HEAD_DIM)
    own_kv = slice(FUNCTION_KV_HEAD * HEAD_DIM, (FUNCTION_KV_HEAD + 1) * HEAD_DIM)
    q[own], k[own_kv], v[own_kv], out[:, own] = function
    tensors = {
        "input_layernorm": np.ones(hidden),
        "self_attn.q_proj": q,
        "self_attn.k_proj": k,
        "self_attn.v_proj": v,
        "self_attn.o_proj": out,
        "post_attention_layernorm": np.ones(hidden),
        "mlp.gate_proj": noise(INNER, hidden),
        "mlp.up_proj": noise(INNER, hidden),
        "mlp.down_proj": to_scratch(INNER),
    }
    return {f"{layer}.{name}.weight": x.astype(np.float32) for name, x in tensors.items()}


def word_tokenizer(vocabulary: list[str]) -> tokenizers.Tokenizer:
    """One token a word; a text starts with <bos>."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return backend
