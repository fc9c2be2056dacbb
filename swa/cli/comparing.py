"""`swa compare`: policies side by side on the same examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swa.cli.helpers import (
    budget_of,
    check_outputs,
    given_beside,
    going_on_from,
    load_examples,
    load_model,
    named_files,
    note,
    policy_fields,
    print_json,
    print_table,
)
from swa.cli.options import (
    Consumer,
    Decode,
    Dtype,
    ExamplesFile,
    FractionOfLayers,
    Json,
    Layers,
    LocalOnly,
    MaxPositions,
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

if TYPE_CHECKING:
    from swa.budget import Budget
    from swa.model import Model
    from swa.policy import AttentionPolicy


def compare(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Hub id, folder of safetensors, or .gguf file; not needed with --evaluation.",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="What `swa select` wrote; may be repeated."),
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:SETTING=N,...]",
            help="Select so, see `swa select --list`; may be repeated.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="JSONL file of examples that strategies select on.")
    ] = None,
    layers: Layers = None,
    fraction: FractionOfLayers = None,
    sliding_window: Window = None,
    sink_tokens: SinkTokens = None,
    tail_tokens: TailTokens = None,
    decode: Decode = None,
    consumer: Consumer = None,
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
    journal: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Finished examples, and in FILE.search what strategies ran: the same command goes"
            " on from there.",
        ),
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
) -> None:
    """Measure several policies on the same examples, in pairs.

    The table is by task, with intervals. Policies come from files, or each --strategy selects one
    on --calibration, within --layers or --fraction, under the policy that the other options
    describe. Without --examples or --suite it is the built-in mix, held out. From five examples a
    task on, its intervals are to be trusted.
    """
    from swa import comparison
    from swa.journal import open_journal
    from swa.policy import AttentionPolicy

    check_outputs(report, journal, plot=plot)
    check_plot(suite, plot)
    if evaluation:
        if unused := given_beside(_OF_EVALUATIONS, context):
            raise InputError(f"--evaluation is measured already: leave out {', '.join(unused)}")
        from swa.evaluation import Evaluation

        measured = {
            name: Evaluation.load(path)
            for name, path in named_files(evaluation, "--evaluation").items()
        }
        found = comparison.Comparison(measured, baseline or next(iter(measured)), seed=seed)
    elif model is None or not (policy or strategy):
        raise InputError(
            "give MODEL and a --policy or --strategy, or the --evaluation of each policy"
        )
    else:
        fields = policy_fields(sliding_window, sink_tokens, tail_tokens, decode, consumer)
        choose = None
        if strategy:
            if sliding_window is None or calibration is None:
                raise InputError("a --strategy needs --sliding-window and --calibration")
            choose = _Choice(
                strategy, calibration, budget_of(layers, fraction), AttentionPolicy(**fields), seed
            )
        elif fields or calibration or layers is not None or fraction is not None:
            raise InputError(
                "files of --policy say it all: --calibration, a budget and the options that"
                " describe a policy are for --strategy"
            )
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
        policies = {
            name: AttentionPolicy.load(path)
            for name, path in named_files(policy or (), "--policy").items()
        }
        names = [*policies, *(strategy or ())]
        if len(set(names)) < len(names):
            raise InputError(f"two policies have the same name: {', '.join(names)}")
        if baseline not in (None, *names, *((comparison.FULL, comparison.SLIDING) if ends else ())):
            raise InputError(f"--baseline {baseline!r} is none of {', '.join(names)}")
        loaded = load_model(
            model, dtype, threads, revision, local_files_only, tokenizer, max_position_embeddings
        )
        used = source.read(loaded)
        # Before anything is searched for, with policies in the place of those to be found.
        expected = choose.expected(loaded) if choose else {}
        how: dict[str, Any] = {
            "baseline": baseline,
            "ends": ends,
            "suite": suite,
            "generate": generate,
            "scorer": scorer,
            "judge": judge,
            "journal": journal,
        }
        comparison.check(loaded, policies | expected, used, **how)
        with open_journal(journal, loaded, "evaluation"):
            pass  # refuses another run's
        with going_on_from(journal):
            if choose:
                policies |= choose.policies(loaded, journal)
            found = comparison.compare(loaded, policies, used, seed=seed, progress=True, **how)
    for warning in found.warnings():
        note(f"warning: {warning}")
    if as_json:
        print_json(found.to_dict())
    else:
        for measure in found.measures:
            print_table(found.table(measure))
    if report is not None:
        found.report(report)
        note(f"wrote {report}")
    if plot is not None:
        draw(suite, found.evaluations, plot)


# What is used where everything is measured.
_OF_EVALUATIONS = {"evaluation", "baseline", "suite", "report", "plot", "seed", "as_json"}


@dataclass(frozen=True)
class _Choice:
    """Strategies, and what they select on."""

    strategies: Sequence[str]
    calibration: Path
    budget: Budget
    policy: AttentionPolicy
    seed: int

    def expected(self, model: Model) -> dict[str, AttentionPolicy]:
        """Policies like those that will be found, by name: with full layers, whichever they are."""
        some = self.policy.with_full_layers(
            model.selectable_layers[:1], model.config.num_hidden_layers
        )
        return dict.fromkeys(self.strategies, some)

    def policies(self, model: Model, journal: Path | None) -> dict[str, AttentionPolicy]:
        """What each strategy selects, by its name; the searches' journal lies beside `journal`."""
        from swa.policy import format_layers
        from swa.selection import select

        searched = None if journal is None else journal.with_name(journal.name + ".search")
        examples = load_examples(model, self.calibration, None, None, self.seed, "calibration")
        found = {}
        for name in self.strategies:
            note(f"selecting by {name}")
            selection = select(
                model,
                examples,
                self.policy,
                self.budget,
                strategy=name,
                seed=self.seed,
                progress=True,
                journal=searched,
            )
            note(f"{name}: layers {format_layers(selection.layers)}")
            found[name] = selection.policy
        return found
