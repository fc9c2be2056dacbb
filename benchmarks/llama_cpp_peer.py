"""llama.cpp's side, through the C functions of llama-cpp-python: prefill and decoding."""

from __future__ import annotations

import ctypes
import os
import time
from functools import cache
from typing import Any

import llama_cpp
import numpy as np

from benchmarks import operands
from benchmarks.ours import DECODED_TOKENS
from benchmarks.worker import Measured, Run

_silent = llama_cpp.llama_log_callback(lambda level, text, data: None)


@cache
def _model(path: str) -> Any:
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.use_mmap = False
    settings.use_extra_bufts = False  # for quantised weights; the AMX one of them has crashed
    model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
    if not model:
        raise ValueError(f"llama.cpp cannot load {path}")
    return model


class _Context:
    """A sequence of up to `n_tokens` tokens."""

    def __init__(self, path: str, n_tokens: int, flash_attention: bool) -> None:
        self._model = _model(path)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = n_tokens
        settings.n_threads = settings.n_threads_batch = int(os.environ["OMP_NUM_THREADS"])
        settings.flash_attn_type = int(flash_attention)
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise ValueError(f"llama.cpp cannot start a context of {n_tokens} tokens")

    def __del__(self) -> None:
        llama_cpp.llama_free(self._context)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def feed(self, ids: list[int], n_rows: int = 1) -> np.ndarray:
        """float32 [n_rows, vocabulary]: the logits of the last of the tokens."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        batch = llama_cpp.llama_batch_get_one(tokens, len(ids))
        wanted = (ctypes.c_int8 * len(ids))(*([0] * (len(ids) - n_rows) + [1] * n_rows))
        batch.logits = ctypes.cast(wanted, type(batch.logits))
        if status := llama_cpp.llama_decode(self._context, batch):
            raise ValueError(f"llama_decode returned {status}")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        n_words = llama_cpp.llama_vocab_n_tokens(vocabulary)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (n_rows, n_words))


def prefill(path: str, ids: list[int], flash_attention: bool, n_rows: int = 1) -> Run:
    """Seconds to the logits of the last rows. Result: some of them."""
    context = _Context(path, len(ids), flash_attention)

    def run() -> Measured:
        context.clear()
        begun = time.perf_counter()
        logits = context.feed(ids, n_rows)
        return time.perf_counter() - begun, operands.some_logits(logits)

    return run


def generate(path: str, ids: list[int], flash_attention: bool) -> Run:
    """Tokens/s of greedy generation after a short prompt."""
    context = _Context(path, len(ids) + DECODED_TOKENS, flash_attention)

    def run() -> Measured:
        context.clear()
        token = int(context.feed(ids).argmax())
        begun = time.perf_counter()
        for _ in range(DECODED_TOKENS):
            token = int(context.feed([token]).argmax())
        return DECODED_TOKENS / (time.perf_counter() - begun), None

    return run
