"""Stop texts, found in bytes: across token boundaries, and never shown, not even in part.

Here: the search. Not here: decoding to str (`writing.py`), and rewinding the state (`rewind.py`).
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Takes bytes as they are generated and passes on those that can no longer belong to a stop text.

    Where several stop texts occur, the one that is complete first counts, and of those that end together the longest;
    so the result does not depend on how the bytes were cut into tokens.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = [(text.encode(), text) for text in stops]
        self._held = b""
        self.found: str | None = None

    def push(self, data: bytes) -> bytes:
        """The bytes that are safe to show now. Once `found` is set they end just before the stop text."""
        assert self.found is None, "a stop text has been found; nothing may follow"
        if not self._stops:
            return data
        text = self._held + data
        places = [(at + len(stop), at, name) for stop, name in self._stops if (at := text.find(stop)) >= 0]
        if places:
            _, cut, self.found = min(places)
            self._held = b""
        else:
            cut = len(text) - self._undecided(text)
            self._held = text[cut:]
        return text[:cut]

    def flush(self) -> bytes:
        """What was held back: at the end of the text it cannot become a stop text any more."""
        held, self._held = self._held, b""
        return held

    def _undecided(self, text: bytes) -> int:
        """Length of the longest end of `text` that some stop text begins with."""
        longest = 0
        for stop, _ in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
