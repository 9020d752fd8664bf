"""The table of commands, help, and how errors of every kind end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from fledge import __version__
from fledge.cli.main import COMMANDS
from fledge.core.errors import CheckpointError, UsageError
from fledge.core.interrupts import Interrupted

REPO = Path(__file__).resolve().parents[2]


def test_help_names_every_command(fledge: Any) -> None:
    result = fledge("--help")
    assert result.code == 0 and all(f" {name} " in result.text for name in COMMANDS)
    assert fledge() == result and fledge("-h") == result


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(fledge: Any, name: str) -> None:
    result = fledge(name, "--help")
    assert result.code == 0 and f"Usage: fledge {name}" in result.text and result.messages == ""


def test_version(fledge: Any) -> None:
    assert fledge("--version").output == f"fledge {__version__}\n".encode()


def test_help_and_world_tokens_need_no_torch() -> None:
    code = (
        "import sys, json; from fledge.cli.main import main, COMMANDS\n"
        "codes = [main([*name, '--help']) for name in ([], *([name] for name in COMMANDS))]\n"
        "codes += [main(['tokenize', 'Hello'])]\n"
        "print(json.dumps([codes, sorted({'torch', 'numpy', 'safetensors'} & set(sys.modules))]))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout.splitlines()[-1]) == [[0] * (len(COMMANDS) + 2), []]


def test_the_module_is_the_command() -> None:
    run = subprocess.run([sys.executable, "-m", "fledge", "--version"], cwd=REPO, capture_output=True, check=True)
    assert run.stdout == f"fledge {__version__}\n".encode()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gnerate"], ["No such command 'gnerate'", "see fledge --help"]),
        (["--unknown"], ["No such option", "see fledge --help"]),
        (["generate", "--top-k", "x"], ["--top-k", "see fledge generate --help"]),
        (["generate", "one", "two"], ["two", "see fledge generate --help"]),
        (["convert", "only-one"], ["see fledge convert --help"]),
        (["bench"], ["see fledge bench --help"]),
    ],
)
def test_mistakes_in_arguments(fledge: Any, arguments: list[str], words: list[str]) -> None:
    fledge(*arguments).check_error(2, *words)


@pytest.fixture
def broken(fledge: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run `fledge tokenize x` with a tokenizer that raises the given error."""

    def run(error: BaseException, *before: str) -> Any:
        def fail(_model: str | None) -> None:
            raise error

        monkeypatch.setattr(import_module("fledge.cli.commands.tokenize"), "_load_tokenizer", fail)
        return fledge(*before, "tokenize", "a b")

    return run


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (CheckpointError("m.pth is odd\n  in two\r\nlines \x1b[31m"), 1, ["m.pth is odd in two lines ␛[31m"]),
        (UsageError("top_p is 2"), 2, ["top_p is 2"]),
        (PermissionError(13, "Permission denied", "m.pth"), 1, ["m.pth: Permission denied"]),
        (OSError(28, "No space left on device"), 1, ["No space left on device; free some space and run"]),
        (OSError(28, "No space left on device", "a/b.pth"), 1, ["the disk of a is full", "a/b.pth cannot be written"]),
        (MemoryError(), 1, ["more memory than is available"]),
        (
            RuntimeError("[x] DefaultCPUAllocator: can't allocate memory: you tried"),
            1,
            ["more memory than is available"],
        ),
        (ValueError("odd"), 1, ["ValueError: odd", "a bug", "`fledge --traceback tokenize 'a b'`"]),
        (OSError("odd"), 1, ["OSError: odd", "a bug"]),
    ],
)
def test_an_error_is_one_line(broken: Any, error: Exception, code: int, words: list[str]) -> None:
    broken(error).check_error(code, *words)


def test_traceback_shows_where(broken: Any) -> None:
    with pytest.raises(ValueError, match="odd"):
        broken(ValueError("odd"), "--traceback")


def test_interrupts_and_readers_that_leave_are_quiet(broken: Any) -> None:
    result = broken(KeyboardInterrupt())
    assert (result.code, result.output, result.messages) == (130, b"", "")


def test_signal_with_unsaved_progress_saves_it(broken: Any) -> None:
    result = broken(Interrupted(15, "saved at step 3"))
    assert (result.code, result.output, result.messages) == (143, b"", "saved at step 3\n")
    assert broken(Interrupted(2)).messages == ""


def test_closed_pipe_ends_the_command_silently(byte_model: Path) -> None:
    command = [sys.executable, "-m", "fledge", "generate", "x", "-m", str(byte_model), "--max-tokens", "100000"]
    run = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout is not None and run.stderr is not None
    assert len(run.stdout.read(1)) == 1
    run.stdout.close()
    messages = run.stderr.read()
    run.stderr.close()
    assert run.wait() == 1 and messages == b""
