"""Events on their way to whoever asked: text that comes fast goes together.

A small model writes thousands of tokens a second, and to hand over each of them would cost more than to write it. So
text waits until FRAME seconds have passed since something was handed over; what begins or ends a text never waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from fledge.engine.job import Event, Job, Piece

Sink = Callable[[Sequence[tuple[Job, Event]]], None]

FRAME = 0.01
"""Seconds; the pictures of a screen follow each other in 0.017."""


class Outbox:
    """Takes events in and gives them to one sink. Used by one thread."""

    def __init__(self, sink: Sink, frame: float = FRAME) -> None:
        self._sink, self._frame = sink, frame
        self._events: list[tuple[Job, Event]] = []
        self._pieces: dict[tuple[Job, int], int] = {}  # where among them the text of each choice is
        self._begun = set[tuple[Job, int]]()  # choices of which some text has been told
        self._urgent = False
        self._handed = 0.0  # when something was handed over last

    def tell(self, job: Job, event: Event) -> None:
        """Take one in. Text of a choice that waits already is joined to it."""
        place = (job, event.choice)
        if not isinstance(event, Piece):
            self._urgent = True
            if event.choice < 0:  # the whole job has failed
                self.forget(job)
            self._begun.discard(place)
        elif place in self._pieces:
            before = self._events[self._pieces[place]][1]
            assert isinstance(before, Piece)
            whole = Piece(event.choice, before.text + event.text, before.tokens + event.tokens)
            self._events[self._pieces[place]] = (job, whole)
            return
        else:
            self._urgent |= place not in self._begun
            self._begun.add(place)
            self._pieces[place] = len(self._events)
        self._events.append((job, event))

    def forget(self, job: Job) -> None:
        """Nothing more comes of a job, and nobody is told so."""
        self._begun = {place for place in self._begun if place[0] is not job}

    def hand_over(self, *, now: bool = False) -> None:
        """Give the sink what there is, unless it is text that can wait. now: that too."""
        if not self._events:
            return
        moment = time.monotonic()
        if now or self._urgent or moment >= self._handed + self._frame:
            events, self._events, self._handed, self._urgent = self._events, [], moment, False
            self._pieces.clear()
            self._sink(events)
