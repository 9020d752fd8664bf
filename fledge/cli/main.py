"""The command `fledge`: the table of commands, and the conversion of errors to one line and an exit code.

Exit codes: 0 success; 1 an error (or, from `doctor`, a failed check); 2 a usage error; 130 Ctrl-C; 143 SIGTERM during a
command that saves something first. Tracebacks are printed only with `--traceback`.
"""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from fledge import __version__
from fledge.cli.terminal import to_one_line
from fledge.core.errors import FledgeError
from fledge.core.files import DISK_FULL, describe_disk_error
from fledge.core.interrupts import Interrupted

COMMANDS = {
    "generate": "fledge.cli.commands.generate",
    "chat": "fledge.cli.commands.chat",
    "ask": "fledge.cli.commands.ask",
    "state": "fledge.cli.commands.state",
    "serve": "fledge.cli.commands.serve",
    "info": "fledge.cli.commands.info",
    "tokenize": "fledge.cli.commands.tokenize",
    "convert": "fledge.cli.commands.convert",
    "quantize": "fledge.cli.commands.quantize",
    "data": "fledge.cli.commands.data",
    "train": "fledge.cli.commands.train",
    "tune": "fledge.cli.commands.tune",
    "doctor": "fledge.cli.commands.doctor",
    "bench": "fledge.cli.bench.app",
}
"""Command -> the module with its `app`, in the order of the help text."""

INTERRUPTED = 130
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "Unable to allocate", "size calculation overflowed")
"""Phrases in the errors of torch and numpy."""


class CommandTable(TyperGroup):
    """The commands of the table, each imported when it is used."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = dict.fromkeys(COMMANDS)  # the names, for "did you mean"

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, or None if the table does not have it."""
        return get_command(import_module(COMMANDS[cmd_name]).app) if cmd_name in COMMANDS else None

    def invoke(self, ctx: Any) -> Any:
        """Run the command. This method handles interrupts, because typer always turns them into exit code 130."""
        try:
            return super().invoke(ctx)
        except Interrupted as stopped:
            if str(stopped):
                _print_message(str(stopped))
            raise typer.Exit(stopped.exit_code) from None


@dataclass
class CliSettings:
    """The options before the command. The callback sets them, `main` reads them."""

    traceback: bool = False


app = typer.Typer(
    cls=CommandTable,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(f"fledge {__version__}")
        raise typer.Exit


@app.callback()
def fledge(
    context: typer.Context,
    traceback: Annotated[bool, typer.Option("--traceback", help="Print the traceback of an error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Run RWKV-5 Eagle and RWKV-6 Finch language models."""
    context.obj.traceback = traceback


def run() -> None:
    """The entry point. Output is UTF-8 on every platform; input with invalid bytes is not an error."""
    if sys.stdout is None:  # closed by the shell, as in `fledge generate hi >&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process exits
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream, encoding in ((sys.stdin, None), (sys.stdout, "utf-8"), (sys.stderr, "utf-8")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=encoding, errors="replace")
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. With `--traceback`, raises the error itself."""
    settings = CliSettings()
    try:
        code = get_command(app)(
            args=list(arguments) or ["--help"], prog_name="fledge", standalone_mode=False, obj=settings
        )
        sys.stdout.flush()
        return code or 0
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return 1
    except Exception as error:
        if settings.traceback:
            raise
        message, code = _describe_error(error, arguments)
        _print_message(f"error: {message}")
        return code


def _print_message(message: str) -> None:
    with suppress(BrokenPipeError):
        print(to_one_line(message), file=sys.stderr)


def _describe_error(error: Exception, arguments: Sequence[str]) -> tuple[str, int]:
    """One line for the user, and the exit code."""
    if isinstance(error, FledgeError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        if not error.filename:  # the disk is not known
            return f"{error.strerror}; free some space and run the same command again", 1
        return describe_disk_error(error, Path(error.filename).parent), 1
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror, 1
    # typer's own errors have click's base class, which later versions of typer contain under a private name.
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "fledge"
        return f"{error.format_message().rstrip('.')}; see {path} --help", error.exit_code
    if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
        return "this needs more memory than is available; use a smaller model, batch or length, or a larger machine", 1
    command = shlex.join(["fledge", "--traceback", *arguments])
    kind = type(error).__name__
    return f"{kind}: {error} (a bug in Fledge; please report it with the output of `{command}`)", 1


def _discard_output() -> None:
    """The reader of standard output has closed it (`| head`): buffered text must not be written at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
