"""transformers' side: prefill, one masked run of a naive sweep, generation; bfloat16 and SDPA."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from benchmarks import memory_32k
from benchmarks.ours import DECODED_TOKENS
from benchmarks.worker import Measured

Run = Callable[[], Measured]


def load_gguf(path: str) -> Any:
    """The model of a GGUF file in plain bfloat16.

    transformers can keep such weights quantised, by kernels of its own: that is another
    computation, slower here than bfloat16, and must not be taken for it.
    """
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        Path(path).parent,
        gguf_file=Path(path).name,
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
    ).eval()
    if model.config._attn_implementation != "sdpa":
        raise ValueError(f"attention is {model.config._attn_implementation}")
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dtype != torch.bfloat16:
            raise ValueError(f"{name} is not bfloat16 but {weight.dtype}")
        if name.endswith(("_proj", "lm_head")) and type(module) is not torch.nn.Linear:
            raise ValueError(f"{name} is no plain matrix but {type(module).__name__}")
    return model


_model = cache(load_gguf)


@cache
def _random_model() -> Any:
    """Of the shape of `memory_32k.random_engine`."""
    config = transformers.Qwen2Config(
        vocab_size=memory_32k.VOCAB,
        hidden_size=memory_32k.HIDDEN,
        intermediate_size=memory_32k.INNER,
        num_hidden_layers=memory_32k.LAYERS,
        num_attention_heads=memory_32k.HEADS,
        num_key_value_heads=memory_32k.KV_HEADS,
        tie_word_embeddings=True,
    )
    return transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()


def prefill(path: str, ids: list[int]) -> Run:
    """Seconds to the logits of the last row. Result: the logits."""
    model, tokens = _model(path), torch.tensor([ids])

    def run() -> Measured:
        with torch.inference_mode():
            begun = time.perf_counter()
            logits = model(tokens, logits_to_keep=1, use_cache=False).logits
            return time.perf_counter() - begun, logits[0, 0].float().tolist()

    return run


def masked_run(path: str, prompt: list[int], answer: list[int], window: int, sinks: int) -> Run:
    """Seconds of one pass, all layers sliding by a dense mask. Result: the answer's mean NLL."""
    model, tokens = _model(path), torch.tensor([[*prompt, *answer]])
    row = torch.arange(tokens.shape[1])
    near = (row[:, None] - row < window) | (row < sinks) | (row[:, None] >= len(prompt))
    mask = torch.zeros(near.shape, dtype=torch.bfloat16)
    mask.masked_fill_(~(near & (row[:, None] >= row)), -torch.inf)

    def run() -> Measured:
        with torch.inference_mode():
            begun = time.perf_counter()
            logits = model(
                tokens,
                attention_mask=mask[None, None],
                logits_to_keep=len(answer) + 1,
                use_cache=False,
            ).logits[0, :-1]
            nll = float(F.cross_entropy(logits.float(), torch.tensor(answer)))
            return time.perf_counter() - begun, nll

    return run


def generate(path: str | None, ids: list[int]) -> Run:
    """Tokens/s of greedy generation after a short prompt; no path: the random 0.5B model."""
    model, tokens = _model(path) if path else _random_model(), torch.tensor([ids])

    def seconds(new_tokens: int) -> float:
        begun = time.perf_counter()
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )
        return time.perf_counter() - begun

    def run() -> Measured:
        with torch.inference_mode():  # the first token comes with the prompt: not decoding
            first = seconds(1)
            return DECODED_TOKENS / (seconds(1 + DECODED_TOKENS) - first), None

    return run
