"""Events on their way to whoever asked: text that comes fast goes together.

A small model writes thousands of tokens a second, and to hand over each of them would cost more than to write it. So
the bell is rung at once for what begins or ends a text, but for more text only where nothing has been collected for
FRAME seconds. A model may take long over its next token: who has collected something comes back by itself a little
later, for text that has been waiting since.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fledge.engine.events import ErrorEvent, Event, TextEvent, TextRequest

Bell = Callable[[], None]
"""Rung where events wait to be collected; in the thread that tells them."""

FRAME = 0.01
"""Seconds; the pictures of a screen follow each other in 0.017."""


class EventBuffer:
    """Filled by one thread, emptied by another."""

    def __init__(self, bell: Bell, frame: float = FRAME) -> None:
        self._bell, self._frame = bell, frame
        self._lock = threading.Lock()
        self._events: list[tuple[TextRequest, Event]] = []
        self._pieces: dict[tuple[TextRequest, int], int] = {}  # where among them the text of each choice is
        self._begun = set[tuple[TextRequest, int]]()  # choices of which some text has been told
        self._urgent = self._rung = False
        self._collected = 0.0  # the moment when something was last

    def tell(self, job: TextRequest, event: Event) -> None:
        """Take one in. Text of a choice that waits already is joined to it."""
        place = (job, event.choice)
        with self._lock:
            if isinstance(event, TextEvent) and place in self._pieces:
                at = self._pieces[place]
                before = self._events[at][1]
                assert isinstance(before, TextEvent)
                whole = TextEvent(event.choice, before.text + event.text, before.tokens + event.tokens)
                self._events[at] = (job, whole)
                return
            if isinstance(event, TextEvent):
                self._urgent |= place not in self._begun
                self._begun.add(place)
                self._pieces[place] = len(self._events)
            else:
                self._urgent = True
                self._begun.discard(place)
            self._events.append((job, event))
        if isinstance(event, ErrorEvent) and event.choice < 0:
            self.forget(job)

    def forget(self, job: TextRequest) -> None:
        """Nothing more comes of a job."""
        with self._lock:
            self._begun = {place for place in self._begun if place[0] is not job}

    def ring(self, *, now: bool = False) -> None:
        """Ring, where something is there that should not wait. now: nothing should."""
        with self._lock:
            due = now or self._urgent or time.monotonic() >= self._collected + self._frame
            if self._rung or not self._events or not due:
                return
            self._rung = True
        self._bell()

    def collect(self) -> list[tuple[TextRequest, Event]]:
        """All that is there."""
        with self._lock:
            events, self._events = self._events, []
            self._pieces.clear()
            self._urgent = self._rung = False
            # Who finds nothing does not come back by itself: what is told next must ring.
            self._collected = time.monotonic() if events else 0.0
        return events
