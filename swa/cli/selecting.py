"""`swa select`: which layers keep full attention."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swa.cli.helpers import budget_of, load_examples, load_model, note, policy_fields, print_json
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
    NllIncrease,
    ObjectiveOption,
    PerTask,
    PrefillFlops,
    PromptTokens,
    Revision,
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
        bool, typer.Option("--list", help="Name the strategies, and do nothing else.")
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
    scores: Annotated[
        Path | None,
        typer.Option(help="With MODEL: what `swa score` wrote for it, to be taken into account."),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the built-in mix and of strategies that draw.")
    ] = 0,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    revision: Revision = None,
    local_files_only: LocalOnly = False,
    tokenizer: TokenizerPath = None,
    max_position_embeddings: MaxPositions = None,
    out: Annotated[Path, typer.Option(help="Policy file; an older one is replaced.")] = Path(
        "policy.json"
    ),
    as_json: Json = False,
) -> None:
    """Choose the layers that keep full attention.

    From scores, those that score highest, each on its own. From a model, by measuring whole
    selections on examples; the budget is then an upper bound.
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
    if source.endswith(".json"):
        if fields or examples or scores:
            raise InputError(
                "a scores file has its policy and examples already: leave out the options that"
                " describe them, or give the model"
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
        selection = choose(
            loaded,
            load_examples(loaded, examples, examples_per_task, prompt_tokens, seed, "calibration"),
            policy,
            budget,
            strategy=strategy or "joint",
            objective=objective,
            scores=known,
            seed=seed,
            progress=True,
        )
    selection.save(out)
    if as_json:
        print_json(_summary(selection))
    else:
        print(selection)
    note(f"wrote {out}")


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
    from swa.strategies import STRATEGIES, summary

    width = max(map(len, STRATEGIES))
    for name in STRATEGIES:
        print(f"{name:<{width}}  {summary(name)}")
