"""The event buffer: which events notify immediately, which wait, and that none is lost or reordered."""

from __future__ import annotations

import pytest

from fledge.core.errors import FledgeError
from fledge.engine import events
from fledge.engine.events import ErrorEvent, EventBuffer, FinishEvent, TextEvent, TextRequest, TextToken
from fledge.engine.request import Request


class Clock:
    """A clock that the test sets."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(events, "time", clock)
    return clock


def make_request() -> TextRequest:
    return TextRequest(Request((1,)))


def text_event(text: str, choice: int = 0) -> TextEvent:
    return TextEvent(choice, text, tuple(TextToken(ord(letter), None) for letter in text))


def finish_event(choice: int = 0) -> FinishEvent:
    return FinishEvent(choice, "length", None, (), 1, 0, 0)


def notifies(buffer: EventBuffer, calls: list[None]) -> bool:
    """Whether `notify` calls `on_events` now."""
    before = len(calls)
    buffer.notify()
    return len(calls) > before


def test_the_first_text_and_the_end_notify_immediately(clock: Clock) -> None:
    calls = list[None]()
    buffer, request = EventBuffer(lambda: calls.append(None), 0.5), make_request()
    assert not notifies(buffer, calls), "there is no event"
    buffer.put(request, text_event("a"))
    assert notifies(buffer, calls) and not notifies(buffer, calls), "one notification is enough"
    assert buffer.drain() == [(request, text_event("a"))]
    buffer.put(request, text_event("b"))
    assert not notifies(buffer, calls)
    clock.now += 0.4
    buffer.put(request, text_event("cd"))
    assert not notifies(buffer, calls)
    clock.now += 0.1
    assert notifies(buffer, calls) and buffer.drain() == [(request, text_event("bcd"))]
    buffer.put(request, text_event("e"))
    buffer.put(request, finish_event())
    assert notifies(buffer, calls) and buffer.drain() == [(request, text_event("e")), (request, finish_event())]
    assert buffer.drain() == []


def test_an_event_after_an_empty_drain_notifies_immediately(clock: Clock) -> None:
    """A consumer drains again without a notification only after a drain that returned events."""
    calls = list[None]()
    buffer, request = EventBuffer(lambda: calls.append(None), 0.5), make_request()
    buffer.put(request, text_event("a"))
    assert buffer.drain()
    clock.now += 1.0
    assert not buffer.drain()
    clock.now += 0.1
    buffer.put(request, text_event("b"))
    assert notifies(buffer, calls)
    assert buffer.drain() and not buffer.drain(), "the second drain is empty"
    buffer.put(request, text_event("c"))
    assert notifies(buffer, calls)


def test_waiting_text_can_be_drained_and_forced(clock: Clock) -> None:
    calls = list[None]()
    buffer, request = EventBuffer(lambda: calls.append(None), 0.5), make_request()
    buffer.put(request, text_event("a"))
    buffer.drain()
    buffer.put(request, text_event("b"))
    assert buffer.drain() == [(request, text_event("b"))] and not calls
    buffer.put(request, text_event("c"))
    buffer.notify(force=True)
    assert len(calls) == 1


def test_texts_of_each_choice_are_joined(clock: Clock) -> None:
    buffer = EventBuffer(lambda: None, 0.5)
    first, second = make_request(), make_request()
    for letter in "xyz":
        for index, each in enumerate((first, second)):
            for choice in range(2):
                buffer.put(each, text_event(f"{letter}{index}{choice}", choice))
    buffer.put(first, finish_event(1))
    expected = [
        (each, choice, f"x{index}{choice}y{index}{choice}z{index}{choice}")
        for index, each in enumerate((first, second))
        for choice in range(2)
    ]
    *drained, last = buffer.drain()
    assert [(each, event.choice, event.text) for each, event in drained if isinstance(event, TextEvent)] == expected
    assert last == (first, finish_event(1))


@pytest.mark.parametrize("reason", ["finished", "failed", "request failed", "cancelled"])
def test_nothing_is_kept_of_an_ended_request(clock: Clock, reason: str) -> None:
    buffer, request = EventBuffer(lambda: None, 0.5), make_request()
    for choice in range(2):
        buffer.put(request, text_event("a", choice))
    buffer.drain()
    if reason == "cancelled":
        buffer.discard(request)
    elif reason == "request failed":
        buffer.put(request, ErrorEvent(-1, FledgeError("it broke")))
    else:
        for choice in range(2):
            buffer.put(
                request, finish_event(choice) if reason == "finished" else ErrorEvent(choice, FledgeError("it broke"))
            )
    buffer.drain()
    assert not vars(buffer)["_started"] and not vars(buffer)["_text_positions"]
