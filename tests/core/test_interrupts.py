"""Ctrl-C waits for the end of a block."""

from __future__ import annotations

import signal
import threading

import pytest

from fledge.core.interrupts import uninterrupted


def test_a_signal_inside_comes_at_the_end() -> None:
    before, reached = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        reached.append("the end")
    assert reached == ["the end"] and signal.getsignal(signal.SIGINT) is before


def test_nothing_happens_without_a_signal_and_in_other_threads() -> None:
    reached = []

    def block() -> None:
        with uninterrupted():
            reached.append(threading.current_thread().name)

    block()
    thread = threading.Thread(target=block, name="other")
    thread.start()
    thread.join()
    assert reached == ["MainThread", "other"]
