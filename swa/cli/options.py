"""The options that several commands share, as annotated types for their signatures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

PROMPT_TOKENS = 3072  # of the built-in examples

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id, folder of safetensors, or .gguf file.")
]
Dtype = Annotated[Literal["bfloat16", "float32"], typer.Option(help="Compute type.")]
Threads = Annotated[int, typer.Option(min=0, help="0: all cores allowed to this process.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
LocalOnly = Annotated[bool, typer.Option("--local-files-only", help="Never ask the hub.")]
TokenizerPath = Annotated[
    Path | None, typer.Option("--tokenizer", help="Folder or tokenizer.json, if not the model's.")
]
MaxPositions = Annotated[
    int | None, typer.Option(min=1, help="Allow more positions than the checkpoint says.")
]
ExamplesFile = Annotated[
    Path | None, typer.Option("--examples", help="JSONL file; without it: the built-in mix.")
]
PerTask = Annotated[
    int | None, typer.Option(min=1, help="Built-in mix: examples of each task.  [default: 1]")
]
PromptTokens = Annotated[
    int | None,
    typer.Option(min=1, help=f"Built-in mix: prompt length.  [default: {PROMPT_TOKENS}]"),
]
Seed = Annotated[
    int,
    typer.Option(min=0, help="Of what is drawn: the built-in mix, resamples, some strategies."),
]
Window = Annotated[
    str | None,
    typer.Option("--sliding-window", metavar="W[,W...]", help="Keys a row sees, its own included."),
]
SinkTokens = Annotated[
    int | None, typer.Option(min=0, help="Leading tokens that stay visible.  [default: 0]")
]
TailTokens = Annotated[
    int | None,
    typer.Option(min=0, help="Last prompt tokens that attend to everything.  [default: 0]"),
]
Decode = Annotated[
    Literal["full", "window"] | None,
    typer.Option(help="How answer tokens attend.  [default: full]"),
]
Consumer = Annotated[
    Literal["vllm", "transformers"] | None,
    typer.Option(help="What a stock server can run: no sinks, no tail, windowed decode."),
]
DirectionOption = Annotated[
    Literal["restore", "ablate"],
    typer.Option(help="Give one layer full attention back, or take it from one."),
]
BaseLayers = Annotated[
    str | None, typer.Option(metavar="I,J,...", help="Layers that are full in the base run.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Layers = Annotated[int | None, typer.Option(metavar="K", min=0, help="Keep K layers full.")]
FractionOfLayers = Annotated[
    float | None, typer.Option("--fraction", help="Keep this share of the layers full.")
]
PrefillFlops = Annotated[
    float | None,
    typer.Option(help="Share of full attention's prefill work, at --at-tokens."),
]
KvBytes = Annotated[
    int | None,
    typer.Option(min=1, help="Bytes of KV cache at --at-tokens, with windowed decode."),
]
AtTokens = Annotated[
    int | None, typer.Option(min=1, help="Length at which --prefill-flops or --kv-bytes holds.")
]
NllIncrease = Annotated[
    float | None,
    typer.Option(help="As few layers as stay within so many nats a token of full attention."),
]
ObjectiveOption = Annotated[
    Literal["nll", "kl"],
    typer.Option(help="NLL of the answers, or divergence from full attention's."),
]
PolicyFile = Annotated[Path | None, typer.Option("--policy", help="What `swa select` wrote.")]
PlotFile = Annotated[
    Path | None, typer.Option("--plot", help="Draw it into this file (needs the extra `plot`).")
]
