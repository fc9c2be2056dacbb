"""The command line: `swa COMMAND`, where `swa --help` lists the commands.

Results go to stdout (as JSON alone with --json), everything else to stderr. Exit codes: 0; 1 for a
failure that is not the input's fault; 2 for bad input; 130 after Ctrl-C. Errors are one line, or
the traceback with --debug, which may stand anywhere on the line.

A family of commands is a module of plain functions; `entry.COMMANDS` names them.
"""

from swa.cli.entry import main

__all__ = ["main"]
