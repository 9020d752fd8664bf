"""Latency of a generation, for its response and for the metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable

from fledge.engine.events import Event, FinishEvent, TextEvent
from fledge.server.metrics import ServerMetrics


class LatencyTracker:
    """Measures one generation. The clock starts when the tracker is created."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics, self._started_at = metrics, time.monotonic()
        self._text_times: dict[int, tuple[float, float]] = {}  # by choice: time of the first and the last text
        self._ended_at: float | None = None

    def record(self, events: Iterable[Event], *, returns_state: bool) -> None:
        """Record events. Call this before any other work on them.

        returns_state: a FinishEvent then comes later than the last token, after the state has read the whole text, so
        the time per token ends at the last text instead.
        """
        now = time.monotonic()
        for event in events:
            if isinstance(event, TextEvent):
                if not self._text_times:
                    self._metrics.time_to_first_token.observe(now - self._started_at)
                self._text_times[event.choice] = (self._text_times.get(event.choice, (now, now))[0], now)
            elif isinstance(event, FinishEvent) and event.choice in self._text_times:
                first, last = self._text_times[event.choice]
                duration = (last if returns_state else now) - first
                if duration and event.sampled_tokens > 1:
                    self._metrics.time_per_output_token.observe(duration / (event.sampled_tokens - 1))

    def stop(self) -> None:
        """Stop the clock."""
        self._ended_at = time.monotonic()

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds until the first text of any choice."""
        if not self._text_times:
            return None
        return min(first for first, _ in self._text_times.values()) - self._started_at

    @property
    def seconds(self) -> float:
        """Seconds until the clock was stopped, or until now."""
        return (time.monotonic() if self._ended_at is None else self._ended_at) - self._started_at
