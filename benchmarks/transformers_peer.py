"""transformers' side: prefill, one masked run of a naive sweep, generation; bfloat16 and SDPA."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from benchmarks import operands
from benchmarks.ours import DECODED_TOKENS
from benchmarks.worker import Measured, Run


@cache
def load(path: str, dtype: str = "bfloat16") -> Any:
    """The model of a folder or of a GGUF file in one plain dtype.

    transformers can keep the weights of a GGUF file quantised, by kernels of its own: that is
    another computation, slower here than bfloat16, and must not be taken for it.
    """
    where = Path(path)
    source: dict[str, Any] = {"pretrained_model_name_or_path": where}
    if where.is_file():
        source = {"pretrained_model_name_or_path": where.parent, "gguf_file": where.name}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        **source, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()
    if model.config._attn_implementation != "sdpa":
        raise ValueError(f"attention is {model.config._attn_implementation}")
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dtype != getattr(torch, dtype):
            raise ValueError(f"{name} is not {dtype} but {weight.dtype}")
        if name.endswith(("_proj", "lm_head")) and type(module) is not torch.nn.Linear:
            raise ValueError(f"{name} is no plain matrix but {type(module).__name__}")
    return model


def prefill(path: str, ids: list[int], dtype: str = "bfloat16", n_rows: int = 1) -> Run:
    """Seconds to the logits of the last rows. Result: some of them."""
    model, tokens = load(path, dtype), torch.tensor([ids])

    def run() -> Measured:
        with torch.inference_mode():
            begun = time.perf_counter()
            logits = model(tokens, logits_to_keep=n_rows, use_cache=False).logits
            seconds = time.perf_counter() - begun
        return seconds, operands.some_logits(logits[0].float().numpy())

    return run


def masked_run(
    path: str,
    prompt: list[int],
    answer: list[int],
    window: int,
    sinks: int,
    dtype: str = "bfloat16",
) -> Run:
    """Seconds of one pass, all layers sliding by a dense mask. Result: the answer's mean NLL."""
    model, tokens = load(path, dtype), torch.tensor([[*prompt, *answer]])
    row = torch.arange(tokens.shape[1])
    near = (row[:, None] - row < window) | (row < sinks) | (row[:, None] >= len(prompt))
    mask = torch.zeros(near.shape, dtype=model.dtype)
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


def generate(path: str, ids: list[int]) -> Run:
    """Tokens/s of greedy generation after a short prompt."""
    model, tokens = load(path), torch.tensor([ids])

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
