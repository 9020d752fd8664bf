"""Text requests, the events that they produce, and the buffer that hands events from the engine's thread to a caller.

Each completion of a request is written by a `Detokenizer`, as in `Stream`, so stop texts, incomplete UTF-8 characters
and final states behave identically in both.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from fledge.core.errors import FledgeError
from fledge.engine.detokenizer import Detokenizer, FinishReason
from fledge.engine.request import Request, TokenLogprob, TokenOutput
from fledge.models.state import State
from fledge.tokenizer import Tokenizer


class TextToken(NamedTuple):
    """A token that appears in the text, at least in part."""

    id: int
    logprob: TokenLogprob | None


class TextEvent(NamedTuple):
    """New text of one completion."""

    choice: int  # index of the completion in its request
    text: str
    tokens: tuple[TextToken, ...]  # empty unless the request asks for log probabilities


class FinishEvent(NamedTuple):
    """One completion has ended."""

    choice: int  # index of the completion in its request
    reason: FinishReason
    stop: str | None  # the stop text that ended it
    ids: tuple[int, ...]  # what the state has read after the prompt: the text, then `suffix_ids`
    sampled_tokens: int  # includes the tokens of a stop text
    seed: int  # reproduces this completion
    cached_tokens: int  # tokens of the prompt that came from the prefix cache
    state: State | None = None  # the state after the prompt and `ids`; only if the request asks for it


class PromptLogprobsEvent(NamedTuple):
    """Consecutive prompt tokens of a request with `prompt_logprobs`; together these events hold the whole prompt.

    If the deadline passes before the whole prompt is read, FinishEvents with the reason "deadline" follow. The tokens
    until then include the one after the last token read, because its log probability is known.
    """

    choice: int  # always 0: the completions share the prompt
    tokens: tuple[TextToken, ...]  # the first prompt token has no log probability
    computed_tokens: int  # prompt tokens that the model has read so far


class ErrorEvent(NamedTuple):
    """A request, or one completion of it, has failed."""

    choice: int  # index of the completion, or -1 for the whole request
    error: FledgeError


Event = TextEvent | FinishEvent | PromptLogprobsEvent | ErrorEvent

EventCallback = Callable[[], None]
"""Called in the engine's thread when events are ready to be drained."""

FINISH_REASONS: dict[str, FinishReason] = {
    "length": "length",
    "complete": "complete",
    "read": "complete",
    "deadline": "deadline",
}
"""Maps the engine's finish reasons to those of a completion."""

FLUSH_INTERVAL = 0.01
"""Seconds between two notifications for more text. A screen shows a frame every 0.017 seconds."""


@dataclass(eq=False)
class TextRequest:
    """A request for text: token ids in, events out."""

    request: Request
    suffix_ids: tuple[int, ...] = ()  # read into the state after the text, such as the end of a chat turn
    should_return_state: bool = False  # the FinishEvent then waits until the state has read the whole text
    should_cache_state: bool = False  # store the final state in the prefix cache, for prompts that continue this text
    show_held: bool = True  # whether text that could have become a stop text is emitted when generation ends
    choices: dict[int, CompletionState] = field(default_factory=dict, repr=False)
    open_choices: int = field(init=False, repr=False)  # completions that have not ended
    cancelled: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        self.open_choices = max(self.request.n, 1)


class CompletionState:
    """Detokenization of one completion."""

    def __init__(self, request: TextRequest, tokenizer: Tokenizer, first: TokenOutput) -> None:
        """first: the first output of this completion."""
        self.index, self.seed, self.cached_tokens = first.choice, first.seed, first.cached_tokens
        self.sampled_tokens = 0
        self.prompt_incomplete = first.prompt_incomplete
        self.detokenizer = Detokenizer(
            tokenizer, request.request.params.stop, first.state_before, show_held=request.show_held
        )
        self._tokenizer = tokenizer
        self._has_logprobs = request.request.logprobs is not None
        # Tokens that have not been emitted yet, each with the byte offsets of its text.
        self._unsent = deque[tuple[int, int, TextToken]]()
        self._length = 0  # bytes of all tokens so far

    def process(self, output: TokenOutput) -> TextEvent | None:
        """Add a token, an end or both. Returns the text that can be emitted now, or None if there is none."""
        text = ""
        if output.token is not None:
            self.sampled_tokens += 1
            if self._has_logprobs:
                self._add_token(output)
            text = self.detokenizer.add_token(output.token, output.state_before)
        if output.finish_reason is not None and self.detokenizer.outcome is None:
            text += self.detokenizer.finish(FINISH_REASONS.get(output.finish_reason, "eos"))
        tokens = self._take_emitted_tokens() if self._has_logprobs else ()
        return TextEvent(self.index, text, tokens) if text or tokens else None

    def _add_token(self, output: TokenOutput) -> None:
        assert output.token is not None
        begin = self._length
        if output.finish_reason != "eos":
            self._length += len(self._tokenizer.decode_bytes([output.token]))
        self._unsent.append((begin, self._length, TextToken(output.token, output.logprob)))

    def _take_emitted_tokens(self) -> tuple[TextToken, ...]:
        """Remove and return the tokens whose text has been emitted: completely or, at the end, in part."""
        outcome = self.detokenizer.outcome
        emitted = []
        while self._unsent:
            begin, end, token = self._unsent[0]
            if not (begin < outcome.length if outcome is not None else end <= self.detokenizer.emitted_bytes):
                break
            emitted.append(token)
            self._unsent.popleft()
        return tuple(emitted)


class EventBuffer:
    """Events that the engine's thread produces and another thread drains.

    A small model samples thousands of tokens per second, and sending a token costs more than computing it. Therefore
    the start and the end of a completion are notified immediately, and more text only if nothing was drained in the
    last `flush_interval` seconds. After a drain that returned events, the consumer must drain again a little later
    without a notification: text may be waiting, and the next token of a slow model may take long.
    """

    def __init__(self, on_events: EventCallback, flush_interval: float = FLUSH_INTERVAL) -> None:
        self._on_events, self._flush_interval = on_events, flush_interval
        self._lock = threading.Lock()
        self._events: list[tuple[TextRequest, Event]] = []
        self._text_positions: dict[
            tuple[TextRequest, int], int
        ] = {}  # position in `_events` of the text of each choice
        self._started = set[tuple[TextRequest, int]]()  # choices that have emitted some text
        self._is_urgent = self._is_notified = False
        self._last_drain = 0.0

    def put(self, request: TextRequest, event: Event) -> None:
        """Add an event. Text is appended to text of the same choice that is still waiting."""
        key = (request, event.choice)
        with self._lock:
            if isinstance(event, TextEvent) and key in self._text_positions:
                position = self._text_positions[key]
                waiting = self._events[position][1]
                assert isinstance(waiting, TextEvent)
                joined = TextEvent(event.choice, waiting.text + event.text, waiting.tokens + event.tokens)
                self._events[position] = (request, joined)
                return
            if isinstance(event, TextEvent):
                self._is_urgent |= key not in self._started
                self._started.add(key)
                self._text_positions[key] = len(self._events)
            else:
                self._is_urgent = True
                if not isinstance(event, PromptLogprobsEvent):
                    self._started.discard(key)
            self._events.append((request, event))
        if isinstance(event, ErrorEvent) and event.choice < 0:
            self.discard(request)

    def discard(self, request: TextRequest) -> None:
        """Forget a request that will produce no more events. Events that are waiting stay."""
        with self._lock:
            self._started = {key for key in self._started if key[0] is not request}

    def notify(self, *, force: bool = False) -> None:
        """Call `on_events` if events are waiting that should not wait longer. force: no event should wait."""
        with self._lock:
            is_due = force or self._is_urgent or time.monotonic() >= self._last_drain + self._flush_interval
            if self._is_notified or not self._events or not is_due:
                return
            self._is_notified = True
        self._on_events()

    def drain(self) -> list[tuple[TextRequest, Event]]:
        """Remove and return all events."""
        with self._lock:
            events, self._events = self._events, []
            self._text_positions.clear()
            self._is_urgent = self._is_notified = False
            # A consumer that drains nothing does not come back by itself, so the next event must notify it.
            self._last_drain = time.monotonic() if events else 0.0
        return events
