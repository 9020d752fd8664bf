"""How long an exchange takes, choice by choice: for its answer, and for the figures."""

from __future__ import annotations

import time

from fledge.engine.events import Event, FinishEvent, TextEvent
from fledge.server.metrics import ServerMetrics


class LatencyTracker:
    """The times of one exchange, which begins now."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics, self._began = metrics, time.monotonic()
        self._texts: dict[int, tuple[float, float]] = {}  # of each choice: when its first and its last text came
        self._ended: float | None = None

    def note(self, events: list[Event], *, closing: bool) -> None:
        """Events have come; to be told before anything is done with them.

        closing: an end comes later than the last token, when the state has read what follows the text.
        """
        now = time.monotonic()
        for event in events:
            if isinstance(event, TextEvent):
                if not self._texts:
                    self._metrics.first.observe(now - self._began)
                self._texts[event.choice] = (self._texts.get(event.choice, (now, now))[0], now)
            elif isinstance(event, FinishEvent) and event.choice in self._texts:
                first, last = self._texts[event.choice]
                took = (last if closing else now) - first
                if took and event.sampled_tokens > 1:
                    self._metrics.gap.observe(took / (event.sampled_tokens - 1))

    def end(self) -> None:
        """The exchange has ended, whatever is done after it."""
        self._ended = time.monotonic()

    @property
    def first(self) -> float | None:
        """Seconds until the first text, of whichever choice."""
        return min(first for first, _ in self._texts.values()) - self._began if self._texts else None

    @property
    def seconds(self) -> float:
        """Seconds until the end, or until now."""
        return (time.monotonic() if self._ended is None else self._ended) - self._began
