"""Between the command line and the library: what options mean, and where output goes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from swa.cli.options import PROMPT_TOKENS
from swa.errors import InputError
from swa.files import is_special

if TYPE_CHECKING:
    import typer
    from rich.table import Table

    from swa.budget import Budget
    from swa.examples import Example
    from swa.model import Model
    from swa.policy import AttentionPolicy
    from swa.tokenizer import Tokenizer


class Interrupted(Exception):
    """Ctrl-C, with the one line that says how to go on."""


@contextmanager
def going_on_from(
    journal: Path | None,
    done: str = "what is done is",
    again: str = "repeat the command to go on",
) -> Iterator[None]:
    """Say, after Ctrl-C, how to go on from the journal, if there is one."""
    try:
        yield
    except KeyboardInterrupt:
        if journal is None:
            raise
        raise Interrupted(f"interrupted; {done} in {journal}: {again}") from None


def load_model(
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


def policy_fields(
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
        windows = integers(window, "--sliding-window")
        changes["sliding_window"] = windows[0] if len(windows) == 1 else tuple(windows)
    return changes


def policy_of(
    window: str | None,
    sinks: int | None,
    tail: int | None,
    decode: str | None,
    consumer: str | None,
) -> AttentionPolicy:
    """The policy that the options describe, whose layers are not chosen yet."""
    from swa.policy import AttentionPolicy

    return AttentionPolicy(**policy_fields(window, sinks, tail, decode, consumer))


def check_outputs(*paths: Path | None, plot: Path | None = None) -> None:
    """Refuse files that cannot be written, or drawn into, before anything runs."""
    seen: set[str] = set()
    for path in (*paths, plot):
        if path is None:
            continue
        if path.is_dir():  # so is the empty path
            raise InputError(f"{path} is a directory: give the name of a file")
        if not path.absolute().parent.is_dir():
            raise InputError(f"{path}: its directory does not exist")
        if (resolved := os.path.realpath(path)) in seen:
            raise InputError(f"{path} is given for two outputs: give each a file of its own")
        seen.add(resolved)
    if plot is not None:
        from swa.plots import check_file

        check_file(plot)


def refuse_existing(path: Path, option: str = "--out") -> None:
    """Refuse to replace a file; what is written into, as a device is, is not replaced."""
    if path.is_file():
        raise InputError(f"{path} exists: --force replaces it, {option} names another file")


def journal_of(out: Path, journal: Path | None) -> Path | None:
    """The one that was named, else one beside `out`; none beside a device such as /dev/null."""
    if journal is None and not is_special(out):
        return out.with_name(out.name + ".journal")
    return journal


def tokenizer_of(model: Model) -> Tokenizer | None:
    return model.tokenizer if model.has_tokenizer else None


def given_beside(names: Container[str], context: typer.Context) -> list[str]:
    """The options that were given, other than those of these parameters."""
    return [
        parameter.opts[0] if parameter.opts[0].startswith("-") else str(parameter.name).upper()
        for parameter in context.command.params
        if parameter.name not in names
        and getattr(context.get_parameter_source(str(parameter.name)), "name", "") == "COMMANDLINE"
    ]


def words(options: Mapping[str, object]) -> list[str]:
    """The options that were given, as the words of a command line."""
    given = {name: value for name, value in options.items() if value is not None}
    return [word for name, value in given.items() for word in (name, str(value))]


def budget_of(
    layers: int | None,
    fraction: float | None,
    prefill_flops: float | None = None,
    kv_bytes: int | None = None,
    at_tokens: int | None = None,
    nll_increase: float | None = None,
) -> Budget:
    from swa.budget import Budget

    given = {
        "full_attention_layers": layers,
        "fraction": fraction,
        "prefill_flops": prefill_flops,
        "kv_bytes": kv_bytes,
        "nll_increase": nll_increase,
    }
    if len([value for value in given.values() if value is not None]) != 1:
        raise InputError(
            "give one budget: --layers K, --fraction F, or in `swa select` --prefill-flops F or"
            " --kv-bytes N with --at-tokens, or --nll-increase X"
        )
    return Budget(prompt_tokens=at_tokens, **given)  # type: ignore[arg-type]


def load_examples(
    model: Model,
    path: Path | None,
    per_task: int | None,
    prompt_tokens: int | None,
    seed: int,
    split: Literal["calibration", "heldout"],
    tasks: Sequence[str] | None = None,
) -> list[Example]:
    from swa import examples
    from swa.tasks import TASKS

    if path is not None:
        if per_task is not None or prompt_tokens is not None:
            raise InputError(
                "--examples-per-task and --prompt-tokens shape the built-in mix: leave them out"
            )
        return examples.from_jsonl(path, tokenizer_of(model))
    length = prompt_tokens or PROMPT_TOKENS
    if length >= model.max_position_embeddings:  # before texts of such a length are made
        raise InputError(
            f"prompts of {length:,} tokens do not fit this model's"
            f" {model.max_position_embeddings:,} positions: give --prompt-tokens"
        )
    mix = examples.synthetic(
        model.tokenizer,
        tasks=tasks or tuple(TASKS),
        examples_per_task=per_task or 1,
        prompt_tokens=length,
        seed=seed,
        split=split,
    )
    names = ", ".join(dict.fromkeys(example.task for example in mix))
    note(f"no --examples: using the built-in retrieval tasks ({names}; {split}, seed {seed})")
    return mix


def integers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise InputError(f"{option} takes integers separated by commas, not {text!r}") from None


def floats(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} takes numbers separated by commas, not {text!r}") from None


def print_json(value: dict[str, Any]) -> None:
    from swa import jsonio

    print(jsonio.dumps_document(value), end="")


def named_files(items: Sequence[str], option: str) -> dict[str, Path]:
    """The paths of NAME=FILE options by name."""
    files: dict[str, Path] = {}
    for item in items:
        name, _, path = item.partition("=")
        if not (name and path):
            raise InputError(f"{option} takes NAME=FILE, not {item!r}")
        if name in files:
            raise InputError(f"{option}: the name {name!r} is given twice")
        files[name] = Path(path)
    return files


def show(
    found: Any, as_json: bool, plot: Path | None = None, draw: Callable[[], Any] | None = None
) -> None:
    """Print a result that has `plot`, `to_dict` and a repr, and then draw it, if asked to."""
    if as_json:
        print_json(found.to_dict())
    else:
        print(found)
    if plot is not None:  # afterwards: if drawing fails, the result is not lost
        (draw or found.plot)().figure.savefig(plot)
        note(f"wrote {plot}")


def print_table(table: Table) -> None:
    """A rich table on stdout, whole where nobody watches."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 1000).print(table)


def note(message: str) -> None:
    """One line on stderr, whatever a message taken from elsewhere holds."""
    print("swa:", " ".join(message.split()), file=sys.stderr, flush=True)
