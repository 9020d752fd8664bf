"""A request for text, and the events that its writing gives. The desk runs it; who asked gets the events.

Every choice is written by a `Detokenizer`, as a single text is: stop texts, half letters and the end of the state are
the
same in both.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from fledge.core.errors import FledgeError
from fledge.engine.llm.detokenizer import Detokenizer, FinishReason
from fledge.engine.request import Request, TokenLogprob, TokenOutput
from fledge.models.state import State
from fledge.tokenizer import Tokenizer


class TextToken(NamedTuple):
    """A token that a piece of text shows, at least in part."""

    id: int
    likelihood: TokenLogprob | None


class TextEvent(NamedTuple):
    """Text that one choice may show."""

    choice: int
    text: str
    tokens: tuple[TextToken, ...]  # empty unless the request asks for log probabilities


class FinishEvent(NamedTuple):
    """One choice has ended."""

    choice: int
    reason: FinishReason
    stop: str | None  # the stop text that was found
    ids: tuple[int, ...]  # what the state has read after the prompt: the text, and the job's closing
    drawn: int  # tokens, those of a stop text among them
    seed: int  # gives this text again
    cached: int  # tokens of the prompt that the cache spared
    state: State | None = None  # that has read the prompt, then `ids`; only where the job wants it and there was time


class ErrorEvent(NamedTuple):
    """The job, or one choice of it, cannot go on."""

    choice: int
    error: FledgeError


Event = TextEvent | FinishEvent | ErrorEvent

REASONS: dict[str, FinishReason] = {
    "length": "length",
    "complete": "complete",
    "read": "complete",
    "deadline": "deadline",
}
"""The engine's reasons as those of a text."""


@dataclass(eq=False)
class TextRequest:
    """What a caller wants written."""

    request: Request
    closing: tuple[int, ...] = ()  # ids that end the text for the reader: they follow it in its state
    wants_state: bool = False  # the last event of each choice then comes when its state has been brought to the end
    keeps: bool = False  # the state at the end goes into the cache, for a prompt that repeats this text and goes on
    show_held: bool = True
    choices: dict[int, CompletionState] = field(default_factory=dict, repr=False)
    open: int = field(init=False, repr=False)  # choices that have not ended
    cancelled: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        self.open = max(self.request.n, 1)


class CompletionState:
    """One text of a job."""

    def __init__(self, job: TextRequest, tokenizer: Tokenizer, first: TokenOutput) -> None:
        self.number, self.seed, self.cached, self.drawn = first.choice, first.seed, first.cached, 0
        self.unread = first.unread
        self.detokenizer = Detokenizer(tokenizer, job.request.params.stop, first.before, show_held=job.show_held)
        self._tokenizer = tokenizer
        self._wanted = job.request.logprobs is not None
        # Tokens not shown yet, with the bytes they begin and end at.
        self._open = deque[tuple[int, int, TextToken]]()
        self._length = 0

    def take(self, output: TokenOutput) -> TextEvent | None:
        """A token, an end or both -> the text it makes safe to show, if there is some."""
        text = ""
        if output.token is not None:
            self.drawn += 1
            if self._wanted:
                self._note(output)
            text = self.detokenizer.add_token(output.token, output.before)
        if output.finish is not None and self.detokenizer.outcome is None:
            text += self.detokenizer.finish(REASONS.get(output.finish, "eos"))
        tokens = self._shown() if self._wanted else ()
        return TextEvent(self.number, text, tokens) if text or tokens else None

    def _note(self, output: TokenOutput) -> None:
        assert output.token is not None
        begin = self._length
        if output.finish != "eos":
            self._length += len(self._tokenizer.decode_bytes([output.token]))
        self._open.append((begin, self._length, TextToken(output.token, output.likelihood)))

    def _shown(self) -> tuple[TextToken, ...]:
        """The tokens whose text has been shown, whole or, at the end, in part."""
        ended = self.detokenizer.outcome
        found = []
        while self._open:
            begin, end, token = self._open[0]
            if not (begin < ended.length if ended is not None else end <= self.detokenizer.emitted_bytes):
                break
            found.append(token)
            self._open.popleft()
        return tuple(found)
