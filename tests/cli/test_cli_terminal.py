"""What reaches a terminal: no control characters, bars only where somebody waits and watches."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from fledge.cli import terminal
from fledge.cli.terminal import SlowBar, escape_controls, print_rows, to_one_line, write


def test_control_characters_become_visible() -> None:
    assert escape_controls("a\x1b[31m\tb\r\n\x00\x7f\x9b!") == "a␛[31m\tb␍\n␀␡\ufffd!"
    assert escape_controls("naïve 世界 🎉") == "naïve 世界 🎉"


def test_a_message_is_one_line() -> None:
    assert to_one_line(" a\n  b\r\n\nc\x1b ") == "a b c␛"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_text_is_only_changed_for_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, shown in ((io.StringIO(), "\x1b[1mx"), (Terminal(), "␛[1mx")):
        monkeypatch.setattr("sys.stdout", stream)
        write("\x1b[1mx")
        assert stream.getvalue() == shown


ROWS = [("one", "[b]1[/b]"), ("thirteen", "13" * 60)]


def test_rows_in_a_pipe_are_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(ROWS, indent=1)
    assert capsys.readouterr().out == f" one       [b]1[/b]\n thirteen  {'13' * 60}\n"
    print_rows([("a", "1"), ("bb", "22")], heads=("n", "count"))
    assert capsys.readouterr().out == "n   count\na       1\nbb     22\n"


def test_rows_on_a_terminal_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_rows([*ROWS, ("state", "ok")])
    assert "\x1b[36mone" in stream.getvalue() and "[b]1[/b]" in stream.getvalue() and "\x1b[32mok" in stream.getvalue()
    assert len(stream.getvalue().splitlines()) > 5


def test_slow_operations_show_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(terminal, "DELAY", 0.01)
    monkeypatch.setattr(terminal, "message_console", lambda: Console(file=shown, force_terminal=True, width=100))
    with SlowBar("reading", "tokens") as bar:
        bar.update(512, 2048)
        time.sleep(0.15)
    assert "reading" in shown.getvalue() and "512 of 2,048 tokens" in shown.getvalue()


@pytest.mark.parametrize(("delay", "is_terminal"), [(30.0, True), (0.0, False)])
def test_no_progress_bar_for_short_operations_and_pipes(
    monkeypatch: pytest.MonkeyPatch, delay: float, is_terminal: bool
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(terminal, "DELAY", delay)
    monkeypatch.setattr(terminal, "message_console", lambda: Console(file=shown, force_terminal=is_terminal, width=100))
    with SlowBar("reading") as bar:
        bar.step("more", 1, 2)
    assert "reading" not in shown.getvalue() and "more" not in shown.getvalue()
