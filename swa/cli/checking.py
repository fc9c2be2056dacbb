"""`swa stability | agree | control | transfer`: how far scores, and choices, can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swa.cli.helpers import (
    budget_of,
    check_outputs,
    floats,
    load_model,
    policy_of,
    print_json,
    show,
    tokenizer_of,
)
from swa.cli.options import (
    PROMPT_TOKENS,
    Consumer,
    Decode,
    Dtype,
    FractionOfLayers,
    Json,
    Layers,
    LocalOnly,
    MaxPositions,
    ModelArgument,
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
    from swa.model import Model
    from swa.transfer import Domain


def stability(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="What `swa score` wrote.")],
    layers: Layers = None,
    fraction: FractionOfLayers = None,
    resamples: Annotated[int, typer.Option(min=1, help="Of the examples.")] = 2000,
    seed: Seed = 0,
    plot: PlotFile = None,
    as_json: Json = False,
) -> None:
    """Say how often other examples would choose the same layers.

    The scored examples are resampled; a layer that is chosen in nearly all resamples is sure, one
    that is chosen in some could be swapped by more examples.
    """
    from swa.layer_scores import LayerScores
    from swa.stability import selection_stability

    check_outputs(plot=plot)
    found = selection_stability(
        LayerScores.load(scores), budget_of(layers, fraction), n_bootstrap=resamples, seed=seed
    )
    show(found, as_json, plot)


def agree(
    first: Annotated[Path, typer.Argument(metavar="SCORES", help="What `swa score` wrote.")],
    second: Annotated[Path, typer.Argument(metavar="OTHER", help="Scores to compare it with.")],
    layers: Layers = None,
    fraction: FractionOfLayers = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Say whether two sets of scores rank the layers alike.

    They may be of other lengths, windows, domains or dtypes, but of the same model.
    """
    from dataclasses import asdict

    from swa.layer_scores import LayerScores
    from swa.stability import rank_agreement

    found = rank_agreement(
        LayerScores.load(first), LayerScores.load(second), budget_of(layers, fraction), seed=seed
    )
    if as_json:
        print_json(asdict(found))
    else:
        print(found)


def control(
    model: ModelArgument,
    sliding_window: Window,
    layers: Layers = None,
    fraction: FractionOfLayers = None,
    scales: Annotated[
        str, typer.Option(metavar="S[,S...]", help="Shares of the prompt's length.")
    ] = "0.5,0.25",
    sink_tokens: SinkTokens = None,
    tail_tokens: TailTokens = None,
    decode: Decode = None,
    consumer: Consumer = None,
    examples_per_task: PerTask = None,
    prompt_tokens: PromptTokens = None,
    seed: Seed = 0,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    revision: Revision = None,
    local_files_only: LocalOnly = False,
    tokenizer: TokenizerPath = None,
    max_position_embeddings: MaxPositions = None,
    plot: PlotFile = None,
    as_json: Json = False,
) -> None:
    """Find out whether short prompts rank layers as long ones do.

    The built-in tasks are scored at full length, and shorter, with the window shrunk in proportion
    and with the window kept; a kept window that hides nothing gives zeros by construction.
    """
    from swa.controls import length_controls

    check_outputs(plot=plot)
    policy = policy_of(sliding_window, sink_tokens, tail_tokens, decode, consumer)
    budget = budget_of(layers, fraction)
    shares = floats(scales, "--scales")
    loaded = load_model(
        model, dtype, threads, revision, local_files_only, tokenizer, max_position_embeddings
    )
    found = length_controls(
        loaded,
        policy,
        budget,
        prompt_tokens=prompt_tokens or PROMPT_TOKENS,
        scales=shares,
        examples_per_task=examples_per_task or 1,
        seed=seed,
        progress=True,
    )
    show(found, as_json, plot, lambda: found.plot()[0])


def transfer(
    model: ModelArgument,
    sliding_window: Window,
    layers: Layers = None,
    fraction: FractionOfLayers = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=CALIBRATION,HELDOUT",
            help="Two files of examples; may be repeated.  [default: each built-in task]",
        ),
    ] = None,
    sink_tokens: SinkTokens = None,
    tail_tokens: TailTokens = None,
    decode: Decode = None,
    consumer: Consumer = None,
    examples_per_task: PerTask = None,
    prompt_tokens: PromptTokens = None,
    seed: Seed = 0,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    revision: Revision = None,
    local_files_only: LocalOnly = False,
    tokenizer: TokenizerPath = None,
    max_position_embeddings: MaxPositions = None,
    plot: PlotFile = None,
    as_json: Json = False,
) -> None:
    """Find out whether a choice serves other kinds of examples.

    Layers are chosen by the exact sweep on each domain, and on all together, and evaluated on the
    held-out examples of each.
    """
    from swa.transfer import transfer_matrix

    check_outputs(plot=plot)
    policy = policy_of(sliding_window, sink_tokens, tail_tokens, decode, consumer)
    budget = budget_of(layers, fraction)
    if domain and (examples_per_task is not None or prompt_tokens is not None):
        raise InputError(
            "--examples-per-task and --prompt-tokens shape the built-in tasks: leave them out"
        )
    files = _domain_files(domain or ())
    loaded = load_model(
        model, dtype, threads, revision, local_files_only, tokenizer, max_position_embeddings
    )
    if files:
        domains = {name: _domain(*paths, loaded) for name, paths in files.items()}
    else:
        domains = _built_in(loaded, examples_per_task or 1, prompt_tokens or PROMPT_TOKENS, seed)
    found = transfer_matrix(loaded, domains, policy, budget, seed=seed, progress=True)
    show(found, as_json, plot)


def _domain_files(items: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The two files of NAME=CALIBRATION,HELDOUT options by name."""
    files: dict[str, tuple[str, str]] = {}
    for item in items:
        name, _, paths = item.partition("=")
        calibration, _, heldout = paths.partition(",")
        if not (name and calibration and heldout):
            raise InputError(f"--domain takes NAME=CALIBRATION,HELDOUT, not {item!r}")
        if name in files:
            raise InputError(f"--domain: the name {name!r} is given twice")
        files[name] = (calibration, heldout)
    return files


def _domain(calibration: str, heldout: str, model: Model) -> Domain:
    from swa.examples import from_jsonl
    from swa.transfer import Domain

    tokenizer = tokenizer_of(model)
    return Domain(from_jsonl(calibration, tokenizer), from_jsonl(heldout, tokenizer))


def _built_in(model: Model, per_task: int, prompt_tokens: int, seed: int) -> dict[str, Domain]:
    from swa.examples import synthetic
    from swa.tasks import TASKS
    from swa.transfer import Domain

    def make(task: str, split: Any) -> Any:
        return synthetic(
            model.tokenizer,
            tasks=(task,),
            examples_per_task=per_task,
            prompt_tokens=prompt_tokens,
            seed=seed,
            split=split,
        )

    return {task: Domain(make(task, "calibration"), make(task, "heldout")) for task in TASKS}
