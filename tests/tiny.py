"""Small checkpoints that transformers writes, with a byte tokenizer: all parameters random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

WORDS = 256
BOS, EOS = 256, 257
VOCAB = 258
CHAT = (
    "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_model(model_type: str = "llama", seed: int = 0, **settings: Any) -> Any:
    """A float32 transformers model on which attention is peaked and no parameter is trivial."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    if model_type == "mistral":
        values["sliding_window"] = None
    config = transformers.AutoConfig.for_model(model_type, **values | settings)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * noise)
            else:
                peaked = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                parameter.copy_(peaked * noise / parameter.shape[1] ** 0.5)
    return model


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Token i < 256 is one byte; a text starts with <bos>."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", chat_template=CHAT
    )


def tiny_checkpoint(
    folder: Path,
    model_type: str = "llama",
    *,
    dtype: str = "float32",
    seed: int = 0,
    **settings: Any,
) -> Path:
    """Write the model of `tiny_model` and its tokenizer to `folder`."""
    tiny_model(model_type, seed, **settings).to(getattr(torch, dtype)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
