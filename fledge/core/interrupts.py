"""SIGINT and SIGTERM for work that stops only between steps: signals are recorded and checked there."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ended the work. The text says what was saved, for the user; it may be empty."""

    def __init__(self, number: int = signal.SIGINT, saved: str = "") -> None:
        super().__init__(saved)
        self.number = number

    @property
    def exit_code(self) -> int:
        """The exit code that shells report for a process ended by this signal."""
        return 128 + self.number


class StopRequest:
    """Whether a stop was requested. `number` is the first signal, or 0 if none has arrived.

    A signal beyond the number that may be deferred raises Interrupted as it arrives; usually that is the second one.
    """

    def __init__(self, min_deferred: float) -> None:
        self.number, self._received = 0, 0
        self._min_deferred, self._max_deferred = min_deferred, max(min_deferred, 1)

    @contextmanager
    def defer(self, signals: float = math.inf) -> Iterator[None]:
        """Only record up to this many signals within the block: all by default, none with 0."""
        before, self._max_deferred = self._max_deferred, max(self._min_deferred, signals)
        try:
            self._raise_if_exceeded()
            yield
        finally:
            self._max_deferred = before

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._received += 1
        self.number = self.number or number
        self._raise_if_exceeded()

    def _raise_if_exceeded(self) -> None:
        if self._received > self._max_deferred:
            raise Interrupted(self.number)


@contextmanager
def catch_signals(*, always_defer: bool = False) -> Iterator[StopRequest]:
    """Record signals while the block runs. One that the block did not handle is raised when the block ends.

    always_defer: never raise as a signal arrives, for work that other processes wait for. Outside the main thread no
    signal is recorded. A signal that the process ignored at its start (`nohup`, `&` in a script) stays ignored.
    """
    stop = StopRequest(math.inf if always_defer else 0)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, stop._on_signal)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop.number:
        raise Interrupted(stop.number)
