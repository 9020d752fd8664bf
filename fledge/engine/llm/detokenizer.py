"""One text as it is written: drawn tokens in, pieces that may be shown out, and at the end where text and state meet.

Joins the stop texts, the decoder and the trail of states. Whoever draws the tokens pushes them here: `Stream` for one
text at a time, `Desk` for many. Nothing here runs a model; `cut` says what is still to be read.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from fledge.engine.llm.state_history import RewindPoint, StateHistory
from fledge.engine.llm.stop_strings import StopMatcher
from fledge.models.state_slice import StateSlice
from fledge.tokenizer import StreamDecoder, Tokenizer

FinishReason = Literal["stop", "eos", "length", "complete", "interrupted", "deadline"]


class TextOutcome(NamedTuple):
    """Why and where the text ended."""

    reason: FinishReason
    stop: str | None
    place: int  # bytes of generated text that count


class Detokenizer:
    """The state of one text being written. Every method leaves it sound, so an interrupt at any moment does no harm."""

    def __init__(
        self, tokenizer: Tokenizer, stops: tuple[str, ...], start: StateSlice, *, show_held: bool = True
    ) -> None:
        """start: the state of the prompt. show_held: whether text that might have become a stop text is shown after
        all when generation ends without one."""
        self._tokenizer, self._show_held = tokenizer, show_held
        self._matcher = StopMatcher(stops)
        self._decoder = StreamDecoder(tokenizer)
        self._trail = StateHistory(start)
        self._passed = 0  # bytes the matcher let through
        self._shown: list[tuple[str, int]] = []  # pieces, each with the bytes of text up to its end
        self.read = 0  # tokens of the prompt
        self.outcome: TextOutcome | None = None

    @property
    def text(self) -> str:
        """All that was shown."""
        return "".join(piece for piece, _ in self._shown)

    @property
    def place(self) -> int:
        """The bytes of text that were shown."""
        return self._shown[-1][1] if self._shown else 0

    def begin(self, start: StateSlice, read: int) -> None:
        """`read` tokens of the prompt led to `start`; nothing has been drawn yet. The two change together."""
        self._trail, self.read = StateHistory(start), read

    def push(self, token: int, before: StateSlice) -> str:
        """The piece of text that a drawn token makes safe to show; "" if there is none. `before` has not read it.

        Sets `outcome` where the token ends the text. Nothing may be pushed after that.
        """
        assert self.outcome is None, "the text has ended"
        if token == self._tokenizer.eos_id:
            self._trail.close(before)
            return self.end("eos")
        data = self._tokenizer.decode_bytes([token])
        self._trail.push(token, data, before)
        safe = self._matcher.push(data)
        return self._show(safe) if self._matcher.found is None else self.end("stop", safe)

    def end(self, reason: FinishReason, safe: bytes = b"") -> str:
        """Nothing more comes: the last piece."""
        if reason != "stop" and self._show_held:
            safe = self._matcher.flush()
        piece = self._show(safe, final=True)
        self.outcome = TextOutcome(reason, self._matcher.found, self._passed)
        return piece

    def interrupt(self) -> None:
        """End here, with what was shown, if the text has not ended yet."""
        if self.outcome is None:
            self.outcome = TextOutcome("interrupted", None, self.place)

    def cut(self) -> RewindPoint:
        """How to reach the state that has read exactly the text."""
        assert self.outcome is not None, "the text has not ended"
        return self._trail.cut(self.outcome.place)

    def rest(self, cut: RewindPoint) -> list[int]:
        """The ids still to be read after the state of `cut`."""
        return self._tokenizer.encode(cut.rest) if cut.token is None else [cut.token]

    def _show(self, safe: bytes, final: bool = False) -> str:
        """Decode what may be shown, and let go of the states that only going back before it would need."""
        self._passed += len(safe)
        piece = self._decoder.feed_bytes(safe) + (self._decoder.flush() if final else "")
        if piece:
            place = self._passed - len(self._decoder.pending)
            self._shown.append((piece, place))
            self._trail.settle(place)
        return piece
