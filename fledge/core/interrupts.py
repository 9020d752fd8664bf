"""SIGINT and SIGTERM for work that ends at a place of its own choosing: noted as they come, looked at between steps."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal has ended the work. As text: what was kept, for the person at the keyboard; may be empty."""

    def __init__(self, number: int = signal.SIGINT, kept: str = "") -> None:
        super().__init__(kept)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What shells make of a process that this signal has ended."""
        return 128 + self.number


class StopRequest:
    """Whether an end was asked for. `number` is that of the first signal, 0 while none has come.

    Signals beyond as many as its patience are raised where they come, as Interrupted; usually the second one.
    """

    def __init__(self, least: float) -> None:
        self.number, self._came = 0, 0
        self._least, self._patience = least, max(least, 1)

    @contextmanager
    def defer(self, signals: float = math.inf) -> Iterator[None]:
        """Only note so many signals within the block: all of them, or with 0 none."""
        before, self._patience = self._patience, max(self._least, signals)
        try:
            self._raise_if_due()
            yield
        finally:
            self._patience = before

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self._came += 1
        self.number = self.number or number
        self._raise_if_due()

    def _raise_if_due(self) -> None:
        if self._came > self._patience:
            raise Interrupted(self.number)


@contextmanager
def catch_signals(*, always_defer: bool = False) -> Iterator[StopRequest]:
    """Note the signals while the block runs; one that the block has left unanswered is raised when it has ended.

    always_defer: never raise where a signal comes, for work that others wait for. Outside the main thread nothing can
    be noted, and a signal that the process was started to ignore (`nohup`, `&` in a script) stays ignored.
    """
    stop = StopRequest(math.inf if always_defer else 0)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, stop._hear)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop.number:
        raise Interrupted(stop.number)
