"""What commands print with: text made safe for a terminal, and a bar for whatever takes more than two seconds."""

from __future__ import annotations

import re
import sys
from threading import Timer
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

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


def results() -> Console:
    """Standard output, for tables and facts. Lines are cut to a terminal's width only."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


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

    def __init__(self, label: str, unit: str = "") -> None:
        console = messages()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()  # a bar that is just being shown is stopped after that, not before
            self._progress.stop()
