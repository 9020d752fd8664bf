"""The documentation works: its Python blocks and its `fledge` command lines run.

Command lines that need another checkpoint or that do not end are only parsed: every command and option must exist.
A guide runs from top to bottom in one folder. Its blocks with a file name (```jsonl chats.jsonl) become files there.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

from fledge.cli.main import app, main
from fledge.core.files import get_asset_path

REPO = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/quickstart.md", "docs/quantization.md")
GUIDES = ("docs/guides/tuning.md", "docs/guides/training.md", "docs/guides/states.md")
BUNDLED = "tiny-finch.safetensors"
LONG_RUNNING = {"serve"}  # tests/server runs the commands of the serving guide


class Line(NamedTuple):
    """One command line of a page: `fledge ARGUMENTS`, and what it reads."""

    page: str
    arguments: list[str]
    stdin: bytes


def blocks(markdown: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", markdown, re.M | re.S)


def text_of(page: str) -> str:
    return (REPO / page).read_text(encoding="utf-8")


def parse(page: str, line: str) -> Line | None:
    """What a line of a shell block asks `fledge` to do; None for other programs. Knows `echo X |` and `< FILE`."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words, stdin = list(lexer), b""
    if words[:1] == ["echo"] and words[2:3] == ["|"]:
        stdin, words = words[1].encode() + b"\n", words[3:]
    if words[-2:-1] == ["<"]:
        stdin, words = (REPO / words[-1]).read_bytes(), words[:-2]
    if words[:1] != ["fledge"]:
        assert "fledge" not in words, f"{page}: cannot tell what this line runs: {line}"
        return None
    assert not {"|", "<", ">", "&&", ";"} & set(words), f"{page}: cannot tell what this line runs: {line}"
    return Line(page, words[1:], stdin)


def lines() -> list[Line]:
    """Every `fledge` command line in the shell blocks of the pages."""
    every = [
        parse(page, line) for page in PAGES for block in blocks(text_of(page), "sh") for line in block.splitlines()
    ]
    return [line for line in every if line is not None]


def names_a_checkpoint(arguments: list[str]) -> bool:
    """Whether a command line needs a file or a hub model that does not come with Fledge."""
    values = [word for flag, word in pairwise(arguments) if flag in ("--model", "-m")]
    return bool(values) or any(re.search(r"\.(pth|safetensors)$", word) for word in arguments)


def check_options(arguments: list[str]) -> None:
    """Parse a command line as `fledge` would, without running it. Raises for an option that does not exist."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("fledge", list(arguments), obj=None)
    while hasattr(command, "resolve_command"):
        rest = [*getattr(context, "_protected_args", ()), *context.args]  # where click keeps a group's words varies
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


def need_the_bundled_model() -> None:
    if not get_asset_path(BUNDLED).is_file():
        pytest.skip(f"the bundled model {BUNDLED} is not in this checkout")


def run_python(code: str, folder: Path) -> None:
    """Run code in a process of its own, in which warnings are errors; it must print something."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=folder, env=environment, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert done.stdout.strip()


@pytest.mark.parametrize("page", PAGES)
def test_the_python_blocks_of_a_page_run_one_after_the_other(page: str, tmp_path: Path) -> None:
    code = "\n".join(blocks(text_of(page), "python"))
    assert "fledge.load(" in code
    need_the_bundled_model()
    run_python(code, tmp_path)


@pytest.mark.parametrize("line", lines(), ids=lambda line: f"{line.page}: fledge {shlex.join(line.arguments)}")
def test_a_command_line_runs(
    line: Line, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> None:
    check_options(line.arguments)
    if names_a_checkpoint(line.arguments) or line.arguments[0] in LONG_RUNNING:
        return
    if line.arguments[0] in ("generate", "chat"):
        need_the_bundled_model()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(line.stdin), encoding="utf-8"))
    code = main(line.arguments)
    output, messages = capsysbinary.readouterr()
    assert code == 0, messages.decode(errors="replace")
    assert output or line.arguments[0] == "chat", "nothing was printed"


@pytest.mark.parametrize("page", GUIDES)
def test_a_guide_runs_from_top_to_bottom(
    page: str, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> None:
    need_the_bundled_model()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    steps = re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```", text_of(page), re.M | re.S)
    assert {"sh", "python"} <= {language for language, _, _ in steps}
    for language, name, block in steps:
        if name:
            (tmp_path / name).write_text(block, encoding="utf-8")
        elif language == "python":
            run_python(block, tmp_path)
        for line in block.splitlines() if language == "sh" else ():
            parsed = parse(page, line)
            if parsed is None:
                continue
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(parsed.stdin), encoding="utf-8"))
            assert main(parsed.arguments) == 0, (line, capsysbinary.readouterr().err.decode(errors="replace"))
            assert capsysbinary.readouterr().out, f"{line} printed nothing"


def test_the_pages_have_command_lines() -> None:
    assert {line.arguments[0] for line in lines()} >= {"generate", "chat", "tokenize"}
    assert any(names_a_checkpoint(line.arguments) for line in lines())


@pytest.mark.parametrize("arguments", ["nonsense", "generate --no-such", "bench cpu --no-such", "chat --top-q 1"])
def test_the_checker_catches_what_does_not_exist(arguments: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such"):
        check_options(shlex.split(arguments))


def test_the_checker_reads_a_shell_line() -> None:
    assert parse("page", "make demo   # then `fledge` runs") is None
    assert parse("page", 'echo "def f():" | fledge generate --stop "a b" --json  # why') == Line(
        "page", ["generate", "--stop", "a b", "--json"], b"def f():\n"
    )
    assert parse("page", "fledge tokenize --count < README.md") == Line(
        "page", ["tokenize", "--count"], (REPO / "README.md").read_bytes()
    )
    with pytest.raises(AssertionError, match="cannot tell"):
        parse("page", "fledge generate x > file")
