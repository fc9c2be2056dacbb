"""`swa estimate` and `swa score`: what full attention is worth in each layer."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from swa.cli.helpers import (
    budget_of,
    check_outputs,
    going_on_from,
    integers,
    journal_of,
    load_examples,
    load_model,
    note,
    policy_of,
    refuse_existing,
    show,
    words,
)
from swa.cli.options import (
    BaseLayers,
    Consumer,
    Decode,
    DirectionOption,
    Dtype,
    ExamplesFile,
    FractionOfLayers,
    Json,
    Layers,
    LocalOnly,
    MaxPositions,
    ModelArgument,
    ObjectiveOption,
    PerTask,
    PlotFile,
    PromptTokens,
    Revision,
    Seed,
    SinkTokens,
    TailTokens,
    Threads,
    TokenizerPath,
    Window,
)
from swa.errors import InputError

if TYPE_CHECKING:
    from swa.elimination import AdaptiveStop
    from swa.examples import Example
    from swa.model import Model
    from swa.policy import AttentionPolicy


def estimate(
    model: ModelArgument,
    sliding_window: Window,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt length.")],
    answer_tokens: Annotated[int, typer.Option(min=1, help="Answer length.")] = 16,
    examples: Annotated[int, typer.Option("--examples", min=1, help="How many.")] = 1,
    sink_tokens: SinkTokens = None,
    tail_tokens: TailTokens = None,
    decode: Decode = None,
    consumer: Consumer = None,
    direction: DirectionOption = "restore",
    base: BaseLayers = None,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    revision: Revision = None,
    local_files_only: LocalOnly = False,
    max_position_embeddings: MaxPositions = None,
    as_json: Json = False,
) -> None:
    """Say what `swa score` would take: work, time and memory.

    The weights are not loaded, but a model on the hub is downloaded.
    """
    from swa.estimate import estimate as measure
    from swa.model import plan

    policy = policy_of(sliding_window, sink_tokens, tail_tokens, decode, consumer)
    planned = plan(
        model,
        revision=revision,
        local_files_only=local_files_only,
        dtype=dtype,
        num_threads=threads,
        max_position_embeddings=max_position_embeddings,
    )
    found = measure(
        planned,
        policy,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        n_examples=examples,
        direction=direction,
        base=None if base is None else integers(base, "--base"),
    )
    show(found, as_json)


def score(
    model: ModelArgument,
    sliding_window: Window,
    examples: ExamplesFile = None,
    sink_tokens: SinkTokens = None,
    tail_tokens: TailTokens = None,
    decode: Decode = None,
    consumer: Consumer = None,
    direction: DirectionOption = "restore",
    base: BaseLayers = None,
    out: Annotated[Path, typer.Option(help="Scores file.")] = Path("scores.json"),
    force: Annotated[bool, typer.Option("--force", help="Replace an older one.")] = False,
    journal: Annotated[
        Path | None,
        typer.Option(
            help="Finished examples, for --resume.  [default: OUT.journal, removed at the end]"
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the journal.")] = False,
    stop_at_confidence: Annotated[
        float | None,
        typer.Option(
            metavar="C",
            help="Stop once the top layers (--layers or --fraction) are known this surely.",
        ),
    ] = None,
    layers: Layers = None,
    fraction: FractionOfLayers = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="How much more the best layers may be worth than those found.  [default: 0.05]",
        ),
    ] = None,
    noise_floor: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Measure what rounding does, by N examples in float32."
        ),
    ] = None,
    examples_per_task: PerTask = None,
    prompt_tokens: PromptTokens = None,
    seed: Seed = 0,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    revision: Revision = None,
    local_files_only: LocalOnly = False,
    tokenizer: TokenizerPath = None,
    max_position_embeddings: MaxPositions = None,
    as_json: Json = False,
) -> None:
    """Measure what full attention is worth in each layer."""
    from swa.noise import measure_noise_floor
    from swa.reporting import score_command
    from swa.score import score_layers

    policy = policy_of(sliding_window, sink_tokens, tail_tokens, decode, consumer)
    base_layers = None if base is None else integers(base, "--base")
    check_outputs(out, journal)
    if not force:
        refuse_existing(out)
    stop = _stop(stop_at_confidence, layers, fraction, tolerance)
    if noise_floor is not None and dtype == "float32":
        raise InputError("--noise-floor is what bfloat16 does: leave out --dtype float32")
    kept = journal_of(out, journal)
    if kept is not None and kept.exists() and not resume:
        raise InputError(
            f"{kept} is there from another run: --resume goes on; delete it to start anew"
        )
    loaded = load_model(
        model, dtype, threads, revision, local_files_only, tokenizer, max_position_embeddings
    )
    used = load_examples(loaded, examples, examples_per_task, prompt_tokens, seed, "calibration")
    _announce(loaded, used, policy, direction, base_layers, stop)
    with going_on_from(kept, "finished examples are", "repeat the command with --resume"):
        scores = score_layers(
            loaded,
            used,
            policy,
            direction=direction,
            base=base_layers,
            progress=True,
            journal=kept,
            stop=stop,
            seed=seed,
        )
    if noise_floor is not None:
        del loaded  # so that only one set of weights is in memory
        note(f"scoring {min(noise_floor, len(scores.tasks))} of the examples again, in float32")
        loaded = load_model(
            model,
            "float32",
            threads,
            revision,
            local_files_only,
            tokenizer,
            max_position_embeddings,
        )
        floor = measure_noise_floor(scores, used, loaded, n_examples=noise_floor, progress=True)
        scores = replace(scores, noise_floor=floor)
    options = {
        "--examples": examples,
        "--examples-per-task": examples_per_task,
        "--prompt-tokens": prompt_tokens,
        "--noise-floor": noise_floor,
        "--revision": revision,
        "--tokenizer": tokenizer,
        "--max-position-embeddings": max_position_embeddings,
    }
    scores = replace(scores, command=score_command(scores, model, words(options)))
    try:
        scores.save(out)
        if kept is not None and journal is None:
            kept.unlink()
    finally:  # what was measured is shown even where it cannot be written
        show(scores, as_json)
    note(f"wrote {out}; next: swa select {shlex.quote(str(out))} --fraction 0.25")


def _stop(
    confidence: float | None, layers: int | None, fraction: float | None, tolerance: float | None
) -> AdaptiveStop | None:
    from swa.elimination import AdaptiveStop

    if confidence is None:
        if (layers, fraction, tolerance) != (None, None, None):
            raise InputError(
                "--layers, --fraction and --tolerance say when to stop: give --stop-at-confidence"
                " too (swa select chooses layers afterwards)"
            )
        return None
    chosen = {} if tolerance is None else {"tolerance": tolerance}
    return AdaptiveStop(budget_of(layers, fraction), confidence, **chosen)


def _announce(
    model: Model,
    examples: Sequence[Example],
    policy: AttentionPolicy,
    direction: Literal["restore", "ablate"],
    base: Sequence[int] | None,
    stop: AdaptiveStop | None,
) -> None:
    """Say what a sweep will take, before it starts."""
    from swa.layer_scores import scored_layers

    selectable = model.selectable_layers
    full = base if base is not None else selectable if direction == "ablate" else ()
    flips = scored_layers(direction, full, selectable)
    # The runs share all below the layer they flip: half a pass each, and base, all full, none full.
    passes = len(examples) * (len(flips) / 2 + 3)
    longest = max(example.prompt_len + example.answer_len for example in examples)
    # Where layers are settled on the way, the one with the widest window may be left alone.
    sweeps = [flips] if stop is None else [(layer,) for layer in flips]
    memory = max(
        (model.memory_required(longest, "sweep", policy, each) for each in sweeps), default=0
    )
    note(
        f"{len(examples)} examples of up to {longest} tokens, {len(flips)} layers: the work of"
        f" about {passes:.0f} forward passes, {memory / 2**20:,.0f} MiB of memory"
    )


def gates(
    model: ModelArgument,
    sliding_window: Window,
    examples: ExamplesFile = None,
    sink_tokens: SinkTokens = None,
    tail_tokens: TailTokens = None,
    decode: Decode = None,
    consumer: Consumer = None,
    at: Annotated[
        float, typer.Option(min=0, max=1, help="Where: 0 all layers slide, 1 all are full.")
    ] = 0.0,
    objective: ObjectiveOption = "nll",
    out: Annotated[Path | None, typer.Option(help="JSON file; an older one is replaced.")] = None,
    plot: PlotFile = None,
    examples_per_task: PerTask = None,
    prompt_tokens: PromptTokens = None,
    seed: Seed = 0,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    revision: Revision = None,
    local_files_only: LocalOnly = False,
    tokenizer: TokenizerPath = None,
    max_position_embeddings: MaxPositions = None,
    as_json: Json = False,
) -> None:
    """First-order scores by layer and KV head: a cheap forecast."""
    import numpy as np

    from swa.gate_scores import score_gates

    check_outputs(out, plot=plot)
    policy = policy_of(sliding_window, sink_tokens, tail_tokens, decode, consumer)
    loaded = load_model(
        model, dtype, threads, revision, local_files_only, tokenizer, max_position_embeddings
    )
    used = load_examples(loaded, examples, examples_per_task, prompt_tokens, seed, "calibration")
    alpha = np.zeros(loaded.config.num_hidden_layers)
    alpha[list(loaded.selectable_layers)] = at
    scores = score_gates(loaded, used, policy, alpha=alpha, objective=objective, progress=True)
    try:
        if out is not None:
            scores.save(out)
            note(f"wrote {out}")
    finally:  # what was measured is shown even where it cannot be written
        show(scores, as_json, plot)
