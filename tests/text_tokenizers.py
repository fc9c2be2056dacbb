"""Tokenizers as models have them, trained on the shipped text."""

from __future__ import annotations

import json
from functools import lru_cache

import tokenizers
from checkpoint_files import byte_tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from swa.haystack import read_haystack
from swa.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
KINDS = ("byte", "bpe", "metaspace")


def text_tokenizer(kind: str, chat_template: str | None = None) -> Tokenizer:
    """Of `KINDS`; a new one at each call."""
    if kind == "byte":
        return Tokenizer(
            byte_tokenizer(), bos_token="<bos>", eos_token="<eos>", chat_template=chat_template
        )
    bos, eos = ("<|im_start|>", "<|im_end|>") if kind == "bpe" else ("<s>", "</s>")
    return Tokenizer(
        tokenizers.Tokenizer.from_str(_trained(kind)),
        bos_token=bos,
        eos_token=eos,
        chat_template=chat_template,
    )


@lru_cache
def _trained(kind: str) -> str:
    if kind == "bpe":  # in the manner of GPT-2, SmolLM2 and Qwen: no BOS before a text
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=2000,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:  # in the manner of Llama 2 and Mistral: words begin with "▁", BOS before a text
        backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=2000,
            special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
            show_progress=False,
        )
    haystack = read_haystack("calibration")
    backend.train_from_iterator(["".join(haystack.words[:20_000])], trainer)
    if kind == "metaspace":
        backend.pre_tokenizer = None
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    description = json.loads(backend.to_str())
    added = description["added_tokens"]  # bytes are common tokens
    description["added_tokens"] = [token for token in added if "<0x" not in token["content"]]
    return json.dumps(description)
