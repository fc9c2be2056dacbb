"""`swa compare`: policies side by side on the same examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swa.cli.helpers import load_model, named_files, note, print_json, print_table
from swa.cli.options import (
    Dtype,
    ExamplesFile,
    Json,
    LocalOnly,
    MaxPositions,
    PerTask,
    PlotFile,
    PromptTokens,
    Revision,
    Seed,
    Threads,
    TokenizerPath,
)
from swa.cli.suites import (
    DataFiles,
    Depths,
    Generate,
    JudgeKey,
    JudgeModel,
    JudgeUrl,
    Lengths,
    Scorer,
    Source,
    SuiteName,
    TaskNames,
    check_plot,
    draw,
    judge_of,
)
from swa.errors import InputError


def compare(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="As elsewhere; not needed with --evaluation."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="What `swa select` wrote; may be repeated."),
    ] = None,
    evaluation: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE", help="Instead: output of `swa eval --json`; may be repeated."
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Compare with this one.  [default: the first]")
    ] = None,
    ends: Annotated[
        bool,
        typer.Option("--ends/--no-ends", help="Measure full attention and all sliding, too."),
    ] = True,
    report: Annotated[
        Path | None, typer.Option(help="HTML page; an older one is replaced.")
    ] = None,
    examples: ExamplesFile = None,
    suite: SuiteName = None,
    file: DataFiles = None,
    lengths: Lengths = None,
    depths: Depths = None,
    tasks: TaskNames = None,
    examples_per_task: PerTask = None,
    prompt_tokens: PromptTokens = None,
    generate: Generate = False,
    scorer: Scorer = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge_key: JudgeKey = None,
    plot: PlotFile = None,
    seed: Seed = 0,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    revision: Revision = None,
    local_files_only: LocalOnly = False,
    tokenizer: TokenizerPath = None,
    max_position_embeddings: MaxPositions = None,
    as_json: Json = False,
) -> None:
    """Measure several policies on the same examples: a table by task, with paired intervals.

    Without --examples or --suite it is the built-in mix, held out. From five examples a task on,
    its intervals are to be trusted.
    """
    from swa import comparison
    from swa.policy import AttentionPolicy

    for path in (report, plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"{path}: its directory does not exist")
    check_plot(suite, plot)
    if evaluation:
        if model is not None or policy:
            raise InputError("--evaluation is measured already: leave out MODEL and --policy")
        from swa.evaluation import Evaluation

        measured = {
            name: Evaluation.load(path)
            for name, path in named_files(evaluation, "--evaluation").items()
        }
        found = comparison.Comparison(measured, baseline or next(iter(measured)), seed=seed)
    elif model is None or not policy:
        raise InputError("give MODEL and a --policy, or the --evaluation of each policy")
    else:
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
        judge = judge_of(judge_url, judge_model, judge_key)
        policies = {
            name: AttentionPolicy.load(path)
            for name, path in named_files(policy, "--policy").items()
        }
        loaded = load_model(
            model, dtype, threads, revision, local_files_only, tokenizer, max_position_embeddings
        )
        found = comparison.compare(
            loaded,
            policies,
            source.read(loaded),
            baseline=baseline,
            ends=ends,
            suite=suite,
            generate=generate,
            scorer=scorer,
            judge=judge,
            seed=seed,
            progress=True,
        )
    if report is not None:
        found.report(report)
        note(f"wrote {report}")
    if plot is not None:
        draw(suite, found.evaluations, plot)
    for warning in found.warnings():
        note(f"warning: {warning}")
    if as_json:
        print_json(found.to_dict())
    else:
        for measure in found.measures:
            print_table(found.table(measure))
