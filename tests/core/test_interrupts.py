"""Signals are recorded and handled between steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from fledge.core.interrupts import Interrupted, catch_signals

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Check that a test restores the handlers of both signals."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@BOTH
def test_a_signal_is_recorded_and_raised_at_the_end_if_unhandled(number: signal.Signals) -> None:
    reached = []
    with pytest.raises(Interrupted) as caught, catch_signals() as stop:
        signal.raise_signal(number)
        reached.append(stop.number)
    assert reached == [number] and caught.value.exit_code == 128 + number
    with pytest.raises(Interrupted, match="kept"), catch_signals() as stop:
        signal.raise_signal(number)
        raise Interrupted(stop.number, "kept")


@BOTH
def test_the_second_signal_is_raised_as_it_arrives_unless_deferred(number: signal.Signals) -> None:
    reached = []
    with pytest.raises(Interrupted) as caught, catch_signals() as stop:
        with stop.defer():
            for _ in range(3):
                signal.raise_signal(number)
            reached.append("the end of the save")
        reached.append("the end of the step")
        signal.raise_signal(signal.SIGINT)
        reached.append("more")
    assert reached == ["the end of the save", "the end of the step"] and caught.value.number == number


def test_without_deferral_the_first_signal_is_raised_even_if_it_came_before() -> None:
    reached = []
    with pytest.raises(Interrupted), catch_signals() as stop, stop.defer(0):
        signal.raise_signal(signal.SIGINT)
        reached.append("more")
    with pytest.raises(Interrupted), catch_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        with stop.defer(0):
            reached.append("more")
    assert reached == []


def test_signals_can_always_be_deferred() -> None:
    with pytest.raises(Interrupted), catch_signals(always_defer=True) as stop:
        with stop.defer(0):
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM


def test_nothing_happens_without_a_signal_and_in_other_threads() -> None:
    reached = []

    def block() -> None:
        before = signal.getsignal(signal.SIGINT)
        with catch_signals() as stop:
            reached.append((stop.number, signal.getsignal(signal.SIGINT) is before))

    block()
    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert reached == [(0, False), (0, True)]


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with catch_signals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.number == 0
    finally:
        signal.signal(signal.SIGINT, before)
