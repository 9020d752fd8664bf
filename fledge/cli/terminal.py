"""What commands print with: text made safe for a terminal, and a bar for whatever takes more than two seconds."""

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
"""Cells of a table that are one of these words have a colour."""

DELAY = 2.0
"""Seconds before a bar appears."""

# A model writes any byte. On a terminal an escape sequence would act, so control characters show as their pictures.
CONTROLS = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def visible(text: str) -> str:
    """`text` with control characters, line feeds and tabs apart, replaced by visible ones."""
    return text.translate(CONTROLS)


def one_line(message: str) -> str:
    """`message` fit for one line of a terminal: file and tensor names in it may hold anything."""
    return visible(re.sub(r"\s*[\r\n]\s*", " ", message.strip()))


def write(piece: str) -> None:
    """Text to standard output at once; exactly as it is, unless that is a terminal."""
    sys.stdout.write(visible(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def messages() -> Console:
    """Standard error, for everything that is not the result."""
    return Console(stderr=True, highlight=False)


def print_rows(rows: Sequence[Sequence[str]], heads: Sequence[str] = (), indent: int = 0) -> None:
    """Columns on standard output, the first one coloured; long texts fold on a terminal and stay whole elsewhere.

    heads: names of the columns; their numbers then stand to the right, all but the first.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        lines = [[visible(cell) for cell in row] for row in ([heads] if heads else []) + list(rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            cells = [
                cell.rjust(width) if heads and at else cell.ljust(width)
                for at, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            print((" " * indent + "  ".join(cells)).rstrip())
        return
    table = Table(box=None, show_header=bool(heads), pad_edge=False, padding=(0, 2, 0, 0))
    for at, head in enumerate(heads or rows[0]):
        justify: Literal["left", "right"] = "right" if heads and at else "left"
        table.add_column(head if heads else "", style="" if at else "cyan", justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell), style=STYLES.get(cell, "")) for cell in row))
    console.print(Padding(table, (0, 0, 0, indent)))


def print_heading(text: str) -> None:
    """A line above rows."""
    Console(highlight=False).print(Text(text, style="bold"), soft_wrap=True)


def note(text: str) -> None:
    """Dim text on standard error."""
    messages().print(Text(visible(text), style="dim"), soft_wrap=True)


def remark(text: str) -> None:
    """A `note` where a person is watching; nothing in a pipe or a log."""
    if messages().is_terminal:
        note(text)


class SlowBar:
    """A progress bar on standard error, if that is a terminal, once the block has taken `DELAY` seconds.

    Without `update` it shows that work goes on; afterwards nothing of it remains on the screen.
    """

    def __init__(self, label: str, unit: str = "", *, per_second: float = 10) -> None:
        """unit: of the numbers given to `update`. per_second: how often it is drawn, which takes time itself."""
        console = messages()
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
        """So much is done."""
        count = f"{done:,} of {total:,} {self._unit}".rstrip()
        self._progress.update(self._task, completed=done, total=total, count=count)

    def step(self, label: str, done: int, total: int) -> None:
        """So many steps are done, and `label` goes on now."""
        self._progress.update(self._task, description=label)
        self.update(done, total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()  # a bar that is just being shown is stopped after that, not before
            self._progress.stop()


def write_answer(pieces: Iterator[str], waiting: str) -> bool:
    """Write an answer as it comes, without the white space before it; whether there was one. waiting: for the bar."""
    begun = False
    with SlowBar(waiting):
        piece = next(pieces, "")
    while piece:
        piece = piece if begun else piece.lstrip()
        begun = begun or bool(piece)
        write(piece)
        piece = next(pieces, "")
    return begun


def remark_end(begun: bool, reason: str) -> None:
    """Say what cannot be seen of an answer that has ended."""
    if not begun:
        remark("an empty answer")
    if reason == "length":
        remark("cut off by --max-tokens")
