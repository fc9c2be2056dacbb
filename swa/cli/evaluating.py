"""`swa eval` and `swa answer`: how well a model answers, and answers that it writes itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from swa.cli.helpers import (
    check_outputs,
    going_on_from,
    load_model,
    note,
    policy_fields,
    print_json,
    print_table,
    refuse_existing,
    tokenizer_of,
)
from swa.cli.options import (
    Consumer,
    Decode,
    Dtype,
    ExamplesFile,
    Json,
    LocalOnly,
    MaxPositions,
    ModelArgument,
    PerTask,
    PlotFile,
    PolicyFile,
    PromptTokens,
    Revision,
    Seed,
    SinkTokens,
    TailTokens,
    Threads,
    TokenizerPath,
    Window,
)
from swa.cli.suites import (
    DataFiles,
    Depths,
    Generate,
    JudgeKey,
    JudgeModel,
    JudgeUrl,
    Lengths,
    ListSuites,
    Scorer,
    Source,
    SuiteName,
    TaskNames,
    check_plot,
    draw,
    judge_of,
)
from swa.errors import InputError


def evaluate(
    model: ModelArgument,
    policy: PolicyFile = None,
    examples: ExamplesFile = None,
    suite: SuiteName = None,
    file: DataFiles = None,
    lengths: Lengths = None,
    depths: Depths = None,
    tasks: TaskNames = None,
    sliding_window: Window = None,
    sink_tokens: SinkTokens = None,
    tail_tokens: TailTokens = None,
    decode: Decode = None,
    consumer: Consumer = None,
    examples_per_task: PerTask = None,
    prompt_tokens: PromptTokens = None,
    generate: Generate = False,
    scorer: Scorer = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge_key: JudgeKey = None,
    journal: Annotated[
        Path | None, typer.Option(help="Finished examples: the same command goes on from there.")
    ] = None,
    plot: PlotFile = None,
    seed: Seed = 0,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    revision: Revision = None,
    local_files_only: LocalOnly = False,
    tokenizer: TokenizerPath = None,
    max_position_embeddings: MaxPositions = None,
    as_json: Json = False,
    list_suites: ListSuites = False,
) -> None:
    """Measure answers under a policy, or under full attention.

    Their NLL, and scores of replies. The options that describe a policy change what the policy
    file says, or, without a file, make a policy in which every layer slides. Without --examples or
    --suite it is the built-in mix.
    """
    from swa import suites
    from swa.policy import AttentionPolicy

    check_plot(suite, plot)
    check_outputs(journal, plot=plot)
    source = Source(
        suite,
        examples,
        file or (),
        tasks,
        lengths,
        depths,
        examples_per_task,
        prompt_tokens,
        seed,
    )
    judge = judge_of(judge_url, judge_model, judge_key, scorer, generate)
    changes = policy_fields(sliding_window, sink_tokens, tail_tokens, decode, consumer)
    applied = None
    if policy:
        scored = AttentionPolicy.load(policy)
        applied = replace(scored, **changes)
        if difference := applied.differs_from(scored):
            note(f"warning: this is not the policy that was scored: {difference}")
    elif changes:
        if sliding_window is None:
            raise InputError("these options describe a policy: give its --sliding-window too")
        applied = AttentionPolicy(**changes)
    loaded = load_model(
        model, dtype, threads, revision, local_files_only, tokenizer, max_position_embeddings
    )
    used = source.read(loaded)
    with going_on_from(journal):
        evaluation = suites.evaluate(
            suite,
            loaded,
            used,
            policy=applied,
            generate=generate,
            scorer=scorer,
            judge=judge,
            progress=True,
            journal=journal,
        )
    if as_json:
        print_json(evaluation.to_dict())
    else:
        print_table(evaluation.table())
    if plot is not None:
        draw(suite, {loaded.name: evaluation}, plot)


def answer(
    model: ModelArgument,
    prompts: Annotated[
        Path, typer.Option(help="JSONL file: prompt or prompt_ids a line, answers are not needed.")
    ],
    out: Annotated[Path, typer.Option(help="Examples file (JSONL).")] = Path("calibration.jsonl"),
    force: Annotated[bool, typer.Option("--force", help="Replace an older one.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    revision: Revision = None,
    local_files_only: LocalOnly = False,
    tokenizer: TokenizerPath = None,
    max_position_embeddings: MaxPositions = None,
    as_json: Json = False,
) -> None:
    """Let the model answer prompts: examples for `swa score`.

    The answers are those of full attention, greedy, and end where the model ends them or after
    --max-new-tokens.
    """
    from swa.examples import prompts_from_jsonl, self_answered, write_jsonl

    check_outputs(out)
    if not force:
        refuse_existing(out)
    loaded = load_model(
        model, dtype, threads, revision, local_files_only, tokenizer, max_position_embeddings
    )
    asked = prompts_from_jsonl(prompts, tokenizer_of(loaded))
    examples = self_answered(loaded, asked, max_new_tokens=max_new_tokens, progress=True)
    write_jsonl(out, examples)
    n_tokens = sum(example.answer_len for example in examples)
    summary: dict[str, Any] = {
        "examples": len(examples),
        "left_out": len(asked) - len(examples),
        "answer_tokens": n_tokens,
        "out": str(out),
    }
    if as_json:
        print_json(summary)
    else:
        print(f"{len(examples)} of {len(asked)} prompts answered, {n_tokens} tokens")
    note(f"wrote {out}; next: swa score {model} --examples {out} --sliding-window W")
