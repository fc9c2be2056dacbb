"""transformers (torch, CPU) with an explicit attention mask in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from reference import Reference, Rows, visible
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "swa_reference"


def masked_attention(module: torch.nn.Module, *args: Any, **settings: Any) -> tuple[Any, None]:
    """transformers' own SDPA under the mask that `Transformers.logits` left in the module."""
    query, key, value = args[:3]
    mask: Any = module.reference_mask
    out, _ = sdpa_attention_forward(
        module, query, key, value, mask, scaling=settings["scaling"], is_causal=False
    )
    return out, None


transformers.AttentionInterface.register(ATTENTION, masked_attention)
transformers.AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)


class Transformers(Reference):
    """A checkpoint folder, or a GGUF file in it, as transformers runs it."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        *,
        gguf_file: str | None = None,
    ) -> None:
        transformers.utils.logging.disable_progress_bar()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, gguf_file=gguf_file, attn_implementation=ATTENTION
        ).eval()

    @torch.no_grad()
    def logits(self, ids: Sequence[int], rows: Rows, first_row: int = 0) -> np.ndarray:
        masks = {key: torch.from_numpy(visible(len(ids), *key)) for key in set(rows.per_layer)}
        for layer, key in zip(self.model.model.layers, rows.per_layer, strict=True):
            layer.self_attn.reference_mask = masks[key][None, None]
        return self._run(ids, first_row)

    @torch.no_grad()
    def own_logits(self, ids: Sequence[int]) -> np.ndarray:
        """[T, V] with transformers' own masks: the attention that config.json asks for."""
        self.model.set_attn_implementation("eager")
        try:
            return self._run(ids, 0)
        finally:
            self.model.set_attn_implementation(ATTENTION)

    def _run(self, ids: Sequence[int], first_row: int) -> np.ndarray:
        hidden = self.model.model(torch.tensor([list(ids)]), use_cache=False).last_hidden_state
        out: np.ndarray = self.model.lm_head(hidden[0, first_row:]).float().numpy()
        return out
