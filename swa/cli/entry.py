"""The entry point: the commands, and what their errors become."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, TextIO

import typer

from swa.cli import (
    checking,
    comparing,
    evaluating,
    reports,
    running,
    scoring,
    selecting,
    showing,
    sweeping,
)
from swa.cli.helpers import Interrupted, note
from swa.errors import JudgeError, SwaError, SwaWarning

INTERRUPTED = 130  # exit code after Ctrl-C, as shells count it

COMMANDS: dict[str, Callable[..., None]] = {  # in the order of --help
    "estimate": scoring.estimate,
    "score": scoring.score,
    "gates": scoring.gates,
    "stability": checking.stability,
    "agree": checking.agree,
    "control": checking.control,
    "transfer": checking.transfer,
    "select": selecting.select,
    "pareto": selecting.pareto,
    "answer": evaluating.answer,
    "eval": evaluating.evaluate,
    "compare": comparing.compare,
    "generate": running.generate,
    "sweep": sweeping.sweep,
    "report": reports.report,
    "info": showing.info,
    "demo": showing.demo,
}

_BAD_PATHS = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


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
            note(message)
            return code


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    code = command.main(arguments, prog_name="swa", standalone_mode=False)
    sys.stdout.flush()
    if code == INTERRUPTED:  # what typer makes of Ctrl-C
        raise Interrupted("interrupted")
    return int(code or 0)


def _explain(error: Exception) -> tuple[int, str]:
    """The exit code and the line for an error that ended a command."""
    if isinstance(error, (Interrupted, typer.Abort)):
        return INTERRUPTED, str(error) or "interrupted"
    if isinstance(error, _UsageError):
        return 2, f"error: {error.format_message()} (see swa --help)"  # type: ignore[attr-defined]
    if isinstance(error, JudgeError):
        return 1, f"error: {error}"
    if isinstance(error, SwaError):
        return 2, f"error: {error}"
    if isinstance(error, _BAD_PATHS):
        # Of two names the second is the target, the first may be a temporary one.
        return 2, f"error: {error.filename2 or error.filename}: {error.strerror}"
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
    note(f"warning: {message}")
