"""Events on their way: what rings at once, what waits for more, and that nothing is lost or changes places."""

from __future__ import annotations

import pytest

from fledge.core.errors import FledgeError
from fledge.engine import events
from fledge.engine.events import ErrorEvent, EventBuffer, FinishEvent, TextEvent, TextRequest, TextToken
from fledge.engine.request import Request


class Clock:
    """The time of a test."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(events, "time", clock)
    return clock


def job() -> TextRequest:
    return TextRequest(Request((1,)))


def piece(text: str, choice: int = 0) -> TextEvent:
    return TextEvent(choice, text, tuple(TextToken(ord(letter), None) for letter in text))


def end(choice: int = 0) -> FinishEvent:
    return FinishEvent(choice, "length", None, (), 1, 0, 0)


def rung(box: EventBuffer, rings: list[None]) -> bool:
    """Whether the bell rings now."""
    before = len(rings)
    box.notify()
    return len(rings) > before


def test_beginnings_and_ends_ring_and_text_between_waits(clock: Clock) -> None:
    rings = list[None]()
    box, mine = EventBuffer(lambda: rings.append(None), 0.5), job()
    assert not rung(box, rings), "there is nothing"
    box.put(mine, piece("a"))
    assert rung(box, rings) and not rung(box, rings), "once is enough"
    assert box.drain() == [(mine, piece("a"))]
    box.put(mine, piece("b"))
    assert not rung(box, rings)
    clock.now += 0.4
    box.put(mine, piece("cd"))
    assert not rung(box, rings)
    clock.now += 0.1
    assert rung(box, rings) and box.drain() == [(mine, piece("bcd"))]
    box.put(mine, piece("e"))
    box.put(mine, end())
    assert rung(box, rings) and box.drain() == [(mine, piece("e")), (mine, end())]
    assert box.drain() == []


def test_who_has_found_nothing_is_rung_for(clock: Clock) -> None:
    """He comes back by himself only after he has found something."""
    rings = list[None]()
    box, mine = EventBuffer(lambda: rings.append(None), 0.5), job()
    box.put(mine, piece("a"))
    assert box.drain()
    clock.now += 1.0
    assert not box.drain()
    clock.now += 0.1
    box.put(mine, piece("b"))
    assert rung(box, rings)
    assert box.drain() and not box.drain(), "the second time before the first one's hour"
    box.put(mine, piece("c"))
    assert rung(box, rings)


def test_what_waits_can_be_collected_unrung_and_rings_when_nothing_should_wait(clock: Clock) -> None:
    rings = list[None]()
    box, mine = EventBuffer(lambda: rings.append(None), 0.5), job()
    box.put(mine, piece("a"))
    box.drain()
    box.put(mine, piece("b"))
    assert box.drain() == [(mine, piece("b"))] and not rings
    box.put(mine, piece("c"))
    box.notify(force=True)
    assert len(rings) == 1


def test_texts_of_all_choices_and_jobs_are_joined_each_with_its_own(clock: Clock) -> None:
    box = EventBuffer(lambda: None, 0.5)
    one, two = job(), job()
    for letter in "xyz":
        for place, each in enumerate((one, two)):
            for choice in range(2):
                box.put(each, piece(f"{letter}{place}{choice}", choice))
    box.put(one, end(1))
    expected = [
        (each, choice, f"x{place}{choice}y{place}{choice}z{place}{choice}")
        for place, each in enumerate((one, two))
        for choice in range(2)
    ]
    *told, last = box.drain()
    assert [(each, event.choice, event.text) for each, event in told if isinstance(event, TextEvent)] == expected
    assert last == (one, end(1))


@pytest.mark.parametrize("way", ["ended", "failed", "failed whole", "cancelled"])
def test_nothing_is_remembered_of_a_job_that_is_over(clock: Clock, way: str) -> None:
    box, mine = EventBuffer(lambda: None, 0.5), job()
    for choice in range(2):
        box.put(mine, piece("a", choice))
    box.drain()
    if way == "cancelled":
        box.discard(mine)
    elif way == "failed whole":
        box.put(mine, ErrorEvent(-1, FledgeError("it broke")))
    else:
        for choice in range(2):
            box.put(mine, end(choice) if way == "ended" else ErrorEvent(choice, FledgeError("it broke")))
    box.drain()
    assert not vars(box)["_started"] and not vars(box)["_text_positions"]
