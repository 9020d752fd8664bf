"""Output of commands: text that is safe for a terminal, tables, notes, and a bar for work longer than two seconds."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from threading import Timer
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

STYLES = {"ok": "green", "installed": "green", "wrong": "red", "missing": "red"}
"""The colors of table cells that contain one of these words."""

DELAY = 2.0
"""Seconds before a bar appears."""

# A model can generate any byte, and a terminal would execute escape sequences. So control characters are replaced by
# the Unicode symbols for them.
CONTROLS = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def escape_controls(text: str) -> str:
    """`text` with visible symbols in place of control characters, except line feeds and tabs."""
    return text.translate(CONTROLS)


def to_one_line(message: str) -> str:
    """`message` as one safe line: the file and tensor names in it may contain any character."""
    return escape_controls(re.sub(r"\s*[\r\n]\s*", " ", message.strip()))


def write(piece: str) -> None:
    """Write text to standard output and flush it: unchanged, or with escaped controls on a terminal."""
    sys.stdout.write(escape_controls(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def message_console() -> Console:
    """Standard error, for everything except the result."""
    return Console(stderr=True, highlight=False)


def print_rows(rows: Sequence[Sequence[str]], heads: Sequence[str] = (), indent: int = 0) -> None:
    """Print columns on standard output, the first one colored. Long text wraps on a terminal only.

    heads: names of the columns. With names, all columns except the first are aligned to the right.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        lines = [[escape_controls(cell) for cell in row] for row in ([heads] if heads else []) + list(rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            cells = [
                cell.rjust(width) if heads and index else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            print((" " * indent + "  ".join(cells)).rstrip())
        return
    table = Table(box=None, show_header=bool(heads), pad_edge=False, padding=(0, 2, 0, 0))
    for index, head in enumerate(heads or rows[0]):
        justify: Literal["left", "right"] = "right" if heads and index else "left"
        table.add_column(head if heads else "", style="" if index else "cyan", justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(escape_controls(cell), style=STYLES.get(cell, "")) for cell in row))
    console.print(Padding(table, (0, 0, 0, indent)))


def print_heading(text: str) -> None:
    """Print a bold line above a table."""
    Console(highlight=False).print(Text(text, style="bold"), soft_wrap=True)


def print_note(text: str) -> None:
    """Print dim text on standard error."""
    message_console().print(Text(escape_controls(text), style="dim"), soft_wrap=True)


def print_terminal_note(text: str) -> None:
    """`print_note` if standard error is a terminal; nothing in a pipe or a log."""
    if message_console().is_terminal:
        print_note(text)


class SlowBar:
    """A progress bar on standard error, if it is a terminal, after the block has taken `DELAY` seconds.

    Without `update` it shows only that the command is working. It is removed from the screen at the end.
    """

    def __init__(self, label: str, unit: str = "", *, per_second: float = 10) -> None:
        """unit: the unit of the numbers passed to `update`. per_second: redraws per second, which also take time."""
        console = message_console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            refresh_per_second=per_second,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task(label, total=None, count="")
        self._unit = unit
        self._timer = Timer(DELAY, self._progress.start) if console.is_terminal else None

    def __enter__(self) -> SlowBar:
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()
        return self

    def update(self, done: int, total: int) -> None:
        """Show that `done` of `total` units are done."""
        count = f"{done:,} of {total:,} {self._unit}".rstrip()
        self._progress.update(self._task, completed=done, total=total, count=count)

    def step(self, label: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps are done and that `label` is running."""
        self._progress.update(self._task, description=label)
        self.update(done, total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()  # if the bar is just being started, it must be stopped after that
            self._progress.stop()


def write_answer(pieces: Iterator[str], waiting: str) -> bool:
    """Write an answer while it is generated, without leading whitespace. Returns whether it has any text.

    waiting: the label of the bar until the first text.
    """
    has_text = False
    with SlowBar(waiting):
        piece = next(pieces, "")
    while piece:
        piece = piece if has_text else piece.lstrip()
        has_text = has_text or bool(piece)
        write(piece)
        piece = next(pieces, "")
    return has_text


def print_answer_end(has_text: bool, reason: str) -> None:
    """Print what the text of a finished answer does not show: that it is empty or was cut off."""
    if not has_text:
        print_terminal_note("the answer is empty")
    if reason == "length":
        print_terminal_note("stopped by --max-tokens")
