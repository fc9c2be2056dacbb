"""`swa select` and `swa pareto`: which layers keep full attention, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from swa.cli.helpers import (
    budget_of,
    check_outputs,
    given_beside,
    going_on_from,
    integers,
    journal_of,
    load_examples,
    load_model,
    note,
    policy_fields,
    print_json,
)
from swa.cli.options import (
    AtTokens,
    Consumer,
    Decode,
    Dtype,
    ExamplesFile,
    FractionOfLayers,
    Json,
    KvBytes,
    Layers,
    LocalOnly,
    MaxPositions,
    ModelArgument,
    NllIncrease,
    ObjectiveOption,
    PerTask,
    PlotFile,
    PrefillFlops,
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
    from swa.selection import Selection


def select(
    context: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|SCORES",
            help="Hub id, folder of safetensors or .gguf file; or .json that `swa score` wrote.",
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:SETTING=N,...]",
            help="How to choose, see --list.  [default: joint; from scores: topk]",
        ),
    ] = None,
    list_strategies: Annotated[
        bool,
        typer.Option("--list", help="Name the strategies and their settings, and do nothing else."),
    ] = False,
    layers: Layers = None,
    fraction: FractionOfLayers = None,
    prefill_flops: PrefillFlops = None,
    kv_bytes: KvBytes = None,
    at_tokens: AtTokens = None,
    nll_increase: NllIncrease = None,
    sliding_window: Window = None,
    sink_tokens: SinkTokens = None,
    tail_tokens: TailTokens = None,
    decode: Decode = None,
    consumer: Consumer = None,
    examples: ExamplesFile = None,
    examples_per_task: PerTask = None,
    prompt_tokens: PromptTokens = None,
    objective: ObjectiveOption = "nll",
    windows: Annotated[
        str | None,
        typer.Option(
            metavar="W[,W...]",
            help="Each layer gets --sliding-window's, one of these, or full attention: needs"
            " --prefill-flops or --kv-bytes.",
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="With MODEL: what `swa score` wrote for it, to be taken into account."),
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    revision: Revision = None,
    local_files_only: LocalOnly = False,
    tokenizer: TokenizerPath = None,
    max_position_embeddings: MaxPositions = None,
    out: Annotated[Path, typer.Option(help="Policy file; an older one is replaced.")] = Path(
        "policy.json"
    ),
    journal: Annotated[
        Path | None,
        typer.Option(
            help="What was run, also for later searches on this model."
            "  [default: OUT.journal, removed at the end]"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose the layers that keep full attention.

    From scores, those that score highest, each on its own. From a model, by measuring whole
    selections on examples; the budget is then an upper bound. What was run is journaled: after
    Ctrl-C or a crash, the same command goes on where it stopped.
    """
    from swa.layer_scores import LayerScores
    from swa.policy import AttentionPolicy
    from swa.selection import select as choose

    if list_strategies:
        _list()
        return
    if source is None:
        raise InputError("give a MODEL, or a SCORES file (or --list)")
    budget = budget_of(layers, fraction, prefill_flops, kv_bytes, at_tokens, nll_increase)
    fields = policy_fields(sliding_window, sink_tokens, tail_tokens, decode, consumer)
    check_outputs(out, journal)
    kept: Path | None = None
    if source.endswith(".json"):
        if unused := given_beside(_OF_SCORES, context):
            raise InputError(
                "a scores file has its policy, examples and objective already: leave out"
                f" {', '.join(unused)}, or give the model"
            )
        selection = choose(LayerScores.load(source), budget, strategy=strategy or "topk", seed=seed)
    else:
        if sliding_window is None:
            raise InputError("with a model, give --sliding-window")
        policy = AttentionPolicy(**fields)
        known = LayerScores.load(scores) if scores else None
        loaded = load_model(
            source, dtype, threads, revision, local_files_only, tokenizer, max_position_embeddings
        )
        used = load_examples(
            loaded, examples, examples_per_task, prompt_tokens, seed, "calibration"
        )
        kept = journal_of(out, journal)
        with going_on_from(kept):
            selection = choose(
                loaded,
                used,
                policy,
                budget,
                strategy=strategy,
                objective=objective,
                scores=known,
                windows=None if windows is None else integers(windows, "--windows"),
                seed=seed,
                progress=True,
                journal=kept,
            )
    selection.save(out)
    if kept is not None and journal is None:
        kept.unlink()
    if as_json:
        print_json(_summary(selection))
    else:
        print(selection)
    note(f"wrote {out}")


# What is used with a scores file, or changes no result.
_OF_SCORES = {
    *("source", "strategy", "seed", "out", "as_json", "threads", "local_files_only"),
    *("layers", "fraction", "prefill_flops", "kv_bytes", "at_tokens", "nll_increase"),
}


def pareto(
    model: ModelArgument,
    sliding_window: Window,
    examples: ExamplesFile = None,
    sink_tokens: SinkTokens = None,
    tail_tokens: Annotated[
        str | None,
        typer.Option(metavar="N[,N...]", help="Tails: each is selected under.  [default: 0]"),
    ] = None,
    decode: Decode = None,
    consumer: Consumer = None,
    beside: Annotated[
        Literal["vllm", "transformers"] | None,
        typer.Option(help="Also measure what this stock server can run."),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(metavar="K[,K...]", help="Numbers of full layers.  [default: all]"),
    ] = None,
    strategy: Annotated[
        str, typer.Option(metavar="NAME[:SETTING=N,...]", help="See `swa select --list`.")
    ] = "path",
    objective: ObjectiveOption = "nll",
    at_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Length at which costs are told.  [default: the longest prompt]"),
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
    plot: PlotFile = None,
    journal: Annotated[
        Path | None,
        typer.Option(help="What was run, to go on from; also of `swa select` on this model."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure quality against cost: selections of every size.

    Under every tail, too. Layers are chosen anew under each policy, and each selection's loss is
    measured.
    """
    from swa.frontier import pareto as measure
    from swa.policy import AttentionPolicy

    check_outputs(journal, plot=plot)
    tails = None if tail_tokens is None else integers(tail_tokens, "--tail-tokens")
    longest = max(tails or (), default=None)  # refused where `swa score` refuses it
    fields = policy_fields(sliding_window, sink_tokens, longest, decode, consumer)
    policies = [AttentionPolicy(**fields)]
    if beside:
        policies.append(
            AttentionPolicy.for_consumer(beside, sliding_window=fields["sliding_window"])
        )
    wanted = None if sizes is None else integers(sizes, "--sizes")
    loaded = load_model(
        model, dtype, threads, revision, local_files_only, tokenizer, max_position_embeddings
    )
    used = load_examples(loaded, examples, examples_per_task, prompt_tokens, seed, "calibration")
    with going_on_from(journal):
        found = measure(
            loaded,
            used,
            policies,
            tail_tokens=tails,
            sizes=wanted,
            strategy=strategy,
            objective=objective,
            prompt_tokens=at_tokens,
            seed=seed,
            progress=True,
            journal=journal,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        from rich.console import Console

        Console().print(found.table())
    if plot is not None:
        found.plot().figure.savefig(plot)  # type: ignore[union-attr]
        note(f"wrote {plot}")


def _summary(selection: Selection) -> dict[str, object]:
    """What --json prints."""
    found: dict[str, object] = {
        "layers": list(selection.layers),
        "policy": selection.policy.to_dict(),
        "strategy": selection.strategy,
        "budget": selection.budget.to_dict(),
    }
    if selection.search is not None:
        found["search"] = selection.search.to_dict()
    return found


def _list() -> None:
    from swa.strategies import STRATEGIES, settings, summary

    width = max(map(len, STRATEGIES))
    for name in STRATEGIES:
        known = [
            key if default is None else f"{key}={default}"
            for key, default in settings(name).items()
        ]
        with_them = f" [{', '.join(known)}]" if known else ""
        print(f"{name:<{width}}  {summary(name)}{with_them}")
