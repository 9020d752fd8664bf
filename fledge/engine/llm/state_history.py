"""Going back: which tokens lie wholly before a place in the generated text, and the state from which to reach it.

A recurrent state cannot be cut back, but it is a value, so the ones from before each recent token are simply kept
until their text is settled. Bytes and ids only; nothing here runs a model.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from fledge.models.state_slice import StateSlice


class HistoryEntry(NamedTuple):
    """A drawn token, or with `id` None the end of what is known: `before` is the state at byte `start`."""

    id: int | None
    number: int  # tokens drawn before it
    start: int  # bytes generated before it
    data: bytes
    before: StateSlice


class RewindPoint(NamedTuple):
    """How to reach a place in the text: `kept` tokens lead to `state`; `token`, then `rest`, remain to be read.

    `token` is a drawn token that no state has read yet; `rest` is the first part of a token that the cut goes through.
    """

    kept: tuple[int, ...]
    row: StateSlice
    token: int | None
    rest: bytes


class StateHistory:
    """The tokens generated so far, with the states before those whose text can still be taken back.

    Every method leaves the trail sound at each of its steps, so an interrupt at any moment does no harm.
    """

    def __init__(self, row: StateSlice) -> None:
        """`row` is the state of the prompt."""
        self._ids: list[int] = []
        self._length = 0
        self._settled = 0
        self._marks = deque([HistoryEntry(None, 0, 0, b"", row)])

    def push(self, token: int, data: bytes, before: StateSlice) -> None:
        """Add a drawn token, the bytes it stands for and the state that has not read it.

        The one before, if its text is still open, may stay so for long: it must not keep a whole batch alive.
        """
        mark = HistoryEntry(token, len(self._ids), self._length, data, before)
        self._ids.append(token)
        self._marks.append(mark)
        self._length += len(data)
        self.settle(self._settled)
        if len(self._marks) > 1 and self._marks[-2].before.state.batch > 1:
            self._marks[-2] = self._marks[-2]._replace(before=StateSlice(self._marks[-2].before.alone()))

    def close(self, row: StateSlice) -> None:
        """Record the state after all tokens so far, where it is known anyway."""
        self._marks.append(HistoryEntry(None, len(self._ids), self._length, b"", row))

    def settle(self, place: int) -> None:
        """Promise never to cut before byte `place`; lets go of the states that only such a cut would need."""
        self._settled = place
        while len(self._marks) > 1 and self._marks[1].start <= place:
            self._marks.popleft()

    def cut(self, place: int) -> RewindPoint:
        """The way to byte `place` of the generated text."""
        for mark in self._marks:
            if mark.start + len(mark.data) > place:
                assert mark.start <= place, "the text before this place has been settled"
                return RewindPoint(tuple(self._ids[: mark.number]), mark.before, None, mark.data[: place - mark.start])
        last = self._marks[-1]
        return RewindPoint(tuple(self._ids[: last.number]), last.before, last.id, b"")
