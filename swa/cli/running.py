"""`swa generate`: a model under a policy answers."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from swa.cli.helpers import load_model, print_json
from swa.cli.options import (
    Dtype,
    Json,
    LocalOnly,
    MaxPositions,
    ModelArgument,
    PolicyFile,
    Revision,
    Threads,
    TokenizerPath,
)


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text; - reads stdin.")],
    policy: PolicyFile = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text; no chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="Sample at this temperature; without: greedy.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this much mass.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.")] = None,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    revision: Revision = None,
    local_files_only: LocalOnly = False,
    tokenizer: TokenizerPath = None,
    max_position_embeddings: MaxPositions = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt.

    A model with a chat template gets it as a chat message, unless --raw.
    """
    from swa.policy import AttentionPolicy

    applied = AttentionPolicy.load(policy) if policy else None
    text = sys.stdin.read() if prompt == "-" else prompt
    loaded = load_model(
        model, dtype, threads, revision, local_files_only, tokenizer, max_position_embeddings
    )
    hybrid = loaded.patch(applied) if applied else loaded
    chat = loaded.tokenizer.has_chat_template and not raw
    request: Any = [{"role": "user", "content": text}] if chat else text
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
    if temperature is not None or top_p is not None:
        settings |= {
            "do_sample": True,
            "temperature": 1.0 if temperature is None else temperature,
            "top_p": 1.0 if top_p is None else top_p,
        }
    if as_json:
        reply = hybrid.generate(request, **settings)
        print_json(
            {"text": reply.text, "ids": list(reply.ids), "finish_reason": reply.finish_reason}
        )
        return
    for piece in hybrid.generate(request, stream=True, **settings):
        print(piece, end="", flush=True)
    print()
