"""`swa sweep`: a grid of windows, strategies and budgets, as one table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from swa.cli.helpers import (
    check_outputs,
    going_on_from,
    integers,
    load_examples,
    note,
    print_json,
    refuse_existing,
    show,
)
from swa.cli.options import (
    Json,
    LocalOnly,
    MaxPositions,
    ObjectiveOption,
    PerTask,
    PromptTokens,
    Revision,
    Seed,
)
from swa.errors import InputError

if TYPE_CHECKING:
    from swa.examples import Example
    from swa.model import Model
    from swa.sweeps import SweepTable

Split = Literal["calibration", "heldout"]


def sweep(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="Hub ids, folders of safetensors, .gguf files."),
    ],
    sliding_window: Annotated[
        str, typer.Option(metavar="W[,W...]", help="Keys a row sees: one point each.")
    ],
    sink_tokens: Annotated[
        str, typer.Option(metavar="S[,S...]", help="Leading tokens that stay visible.")
    ] = "0",
    tail_tokens: Annotated[
        str,
        typer.Option(metavar="N[,N...]", help="Last prompt tokens that attend to everything."),
    ] = "0",
    consumer: Annotated[
        str,
        typer.Option(
            metavar="NAME[,...]",
            help="full: the policies above; vllm, transformers: what these can run.",
        ),
    ] = "full",
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:SETTING=N,...]",
            help="May be repeated; see `swa select --list`.  [default: topk]",
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option(metavar="B[,B...]", help="Shares of the layers (0.25) or numbers (8).")
    ] = "0.25",
    dtype: Annotated[
        str, typer.Option(metavar="TYPE[,TYPE]", help="bfloat16, float32.")
    ] = "bfloat16",
    objective: ObjectiveOption = "nll",
    calibration: Annotated[
        Path | None, typer.Option(help="JSONL file to select on; without it: the built-in mix.")
    ] = None,
    heldout: Annotated[
        Path | None, typer.Option(help="JSONL file to evaluate on; without it: the built-in mix.")
    ] = None,
    examples_per_task: PerTask = None,
    heldout_per_task: Annotated[
        int | None,
        typer.Option(min=1, help="Of those held out.  [default: as --examples-per-task]"),
    ] = None,
    prompt_tokens: PromptTokens = None,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Table, .csv or .parquet.")] = Path("sweep.csv"),
    per_example: Annotated[
        Path | None, typer.Option(help="Table of every held-out example, too.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an older table.")] = False,
    journal: Annotated[
        Path | None,
        typer.Option(help="Finished tasks.  [default: OUT.journal, removed when all is done]"),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes on this machine; 0: this one.")
    ] = 0,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Of a Dask cluster, whose workers do it.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=0, help="Of a task; 0: all cores.  [default: cores / workers; Dask: must be given]"
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Begin nothing after that; go on another time.")
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only say what it takes: time, memory of a worker.")
    ] = False,
    revision: Revision = None,
    local_files_only: LocalOnly = False,
    max_position_embeddings: MaxPositions = None,
    as_json: Json = False,
) -> None:
    """Score, select and evaluate over a grid.

    Every task is journaled when done: after Ctrl-C, a crash or --minutes, the same command goes on
    where it stopped (with --force where its table is there and the journal was named).
    """
    from swa.sweeps import estimate_sweep
    from swa.sweeps import sweep as run
    from swa.sweeps.table import writer_of

    consumers = [None if name == "full" else name for name in consumer.split(",")]
    sinks = integers(sink_tokens, "--sink-tokens")
    tails = integers(tail_tokens, "--tail-tokens")
    if None not in consumers and any([*sinks, *tails]):
        raise InputError(
            "--consumer says what stock servers can run: leave out --sink-tokens and"
            " --tail-tokens, or add full to it"
        )
    _check_shapes(calibration, heldout, examples_per_task, heldout_per_task, prompt_tokens)
    arguments: dict[str, Any] = {
        "models": models,
        "calibration": _source(calibration, examples_per_task, prompt_tokens, seed, "calibration"),
        "heldout": _source(
            heldout, heldout_per_task or examples_per_task, prompt_tokens, seed, "heldout"
        ),
        "windows": integers(sliding_window, "--sliding-window"),
        "sinks": sinks,
        "tails": tails,
        "consumers": consumers,
        "strategies": strategy or ["topk"],
        "budgets": [_budget(text) for text in budget.split(",")],
        "dtypes": dtype.split(","),
        "objective": objective,
        "workers": workers,
        "threads": threads,
        "revision": revision,
        "local_files_only": local_files_only,
        "max_position_embeddings": max_position_embeddings,
    }
    if estimate:
        found = estimate_sweep(**arguments)
        show(found, as_json)
        return
    if scheduler is not None and threads is None:
        raise InputError("--scheduler needs --threads: how many a task may use of its worker")
    check_outputs(out, per_example, journal)
    kept = journal or out.with_name(out.name + ".journal")
    # The default journal is of this very table; one that was named may be of any.
    goes_on = journal is None and kept.exists()
    for path, option in ((out, "--out"), (per_example, "--per-example")):
        if path is not None:
            writer_of(path)  # a wrong name is found now
            if not (goes_on or force):
                refuse_existing(path, option)
    with going_on_from(kept), _executor(scheduler) as executor:
        table = run(
            **arguments,
            executor=executor,
            journal=kept,
            max_seconds=None if minutes is None else 60 * minutes,
            progress=True,
        )
    _report(table, out, per_example, as_json)
    if table.unfinished:
        again = "repeat the command" if journal is None else "repeat the command with --force"
        note(f"{table.unfinished} points are not done: {again} to go on from {kept}")
    elif journal is None:
        kept.unlink()
    if table.failures:
        raise typer.Exit(1)


def _report(table: SweepTable, out: Path, per_example: Path | None, as_json: bool) -> None:
    table.save(out)
    if per_example is not None:
        table.save(per_example, examples=True)
    if as_json:
        print_json(
            {
                "schema": "swa.sweep/1",
                "rows": list(table.rows),
                "timings": list(table.timings),
                "unfinished": table.unfinished,
                "failures": dict(table.failures),
            }
        )
    else:
        print(table)
    note(f"wrote {out}")


def _check_shapes(
    calibration: Path | None,
    heldout: Path | None,
    examples_per_task: int | None,
    heldout_per_task: int | None,
    prompt_tokens: int | None,
) -> None:
    """Refuse what shapes the built-in mix where files replace it on every side that it shapes."""
    both = calibration is not None and heldout is not None
    counted = heldout is not None or heldout_per_task is not None  # without --examples-per-task
    idle = {
        "--examples-per-task": calibration is not None and counted and examples_per_task,
        "--heldout-per-task": heldout is not None and heldout_per_task,
        "--prompt-tokens": both and prompt_tokens,
    }
    for option, given in idle.items():
        if given:
            raise InputError(
                f"{option} shapes the built-in mix, which the given file replaces: leave it out"
            )


def _source(
    path: Path | None, per_task: int | None, prompt_tokens: int | None, seed: int, split: Split
) -> Any:
    """What makes the examples of one side, of a model."""

    def examples(model: Model) -> Sequence[Example]:
        if path is not None:  # then these shape the other side
            return load_examples(model, path, None, None, seed, split)
        return load_examples(model, None, per_task, prompt_tokens, seed, split)

    return examples


def _budget(text: str) -> float | int:
    try:
        return int(text) if text.strip().lstrip("-").isdigit() else float(text)
    except ValueError:
        raise InputError(f"--budget takes shares and numbers of layers, not {text!r}") from None


@contextmanager
def _executor(scheduler: str | None) -> Iterator[Any]:
    """A client of the Dask cluster at that address, or None."""
    if scheduler is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError:
        raise ImportError("--scheduler needs Dask: pip install 'swa[sweep]'") from None
    connect: Any = Client  # which has no types
    try:
        client = connect(scheduler, timeout="10s")
    except ValueError as error:
        raise InputError(f"--scheduler {scheduler}: {error}") from error
    with client:
        yield client
