"""Generated text as it comes, and what is known once it ends.

`Stream` joins the token loop, the stop texts and the decoder, and sees to it that text and state agree: however it
ends, the final state has read exactly the text that was handed over, no more and no less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import nn

from fledge.engine.generation import Cursor, Progress, Step, chunks, feed, tokens
from fledge.engine.rewind import Trail
from fledge.engine.sampling import Sampler, SamplingParams
from fledge.engine.stopping import StopMatcher
from fledge.models.state import State
from fledge.tokenizer import StreamDecoder, Tokenizer

FinishReason = Literal["stop", "eos", "length", "interrupted"]


@dataclass(frozen=True)
class Timings:
    """Seconds spent in the engine; what the receiver of the text does in between does not count."""

    prefill_s: float
    decode_s: float


@dataclass(frozen=True, eq=False)
class Completion:
    """One finished generation.

    `state` has read the prompt and then `ids`, whose bytes are those of `text` (where these are not valid UTF-8,
    `text` shows U+FFFD). A stop text and an end-of-text id are in neither. Where the cut falls inside a token, the
    part of it that is kept was encoded anew, so `ids` may end in tokens that were not drawn.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    stop: str | None  # the stop text that was found
    prompt_tokens: int  # read from the prompt; fewer than it has if reading was interrupted
    seed: int  # gives the same text again
    state: State = field(repr=False)
    timings: Timings


class Outcome(NamedTuple):
    """Why and where the text ended."""

    reason: FinishReason
    stop: str | None
    place: int  # bytes of generated text that count


class Stream(Iterator[str]):
    """The pieces of one generated text; afterwards, or after breaking off at any point, `completion` tells the rest.

    Nothing is computed before the first piece is asked for. Used by one thread at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        start: State | Cursor,
        params: SamplingParams,
        *,
        progress: Progress | None = None,
        on_end: Callable[[Completion], None] | None = None,
        show_held: bool = True,
    ) -> None:
        """Continue `prompt`, read after `start` (if that is a Cursor, the prompt has been read and is empty).

        progress: called while the prompt is read. on_end: called once with the completion, before the iteration ends.
        show_held: whether text that might have become a stop text is shown after all when generation ends without one.
        """
        assert (len(prompt) == 0) == isinstance(start, Cursor)
        self.params = params
        self._model, self._tokenizer = model, tokenizer
        self._prompt, self._progress = prompt, progress
        self._on_end, self._show_held = on_end, show_held
        self._sampler = Sampler(params)
        self._matcher = StopMatcher(params.stop)
        self._decoder = StreamDecoder(tokenizer)
        self._begin: Cursor | None = None
        self._trail = Trail(start.state if isinstance(start, Cursor) else start)
        self._start = start
        self._steps: Iterator[Step] | None = None
        self._read = 0  # tokens of the prompt
        self._passed = 0  # bytes the matcher let through
        self._shown: list[tuple[str, int]] = []  # pieces, each with the bytes of text up to its end
        self._outcome: Outcome | None = None
        self._completion: Completion | None = None
        self._prefill_s = self._decode_s = 0.0

    def __next__(self) -> str:
        if self._outcome is None:
            piece = self._advance()
            if piece:
                return piece
        self._complete()
        raise StopIteration

    def close(self) -> None:
        """Stop here, if the text has not ended yet."""
        self._interrupt()
        self._complete()

    @property
    def completion(self) -> Completion:
        """The result. Asking for it before the text has ended stops it there, as "interrupted"."""
        self._interrupt()
        return self._complete()

    @property
    def begin(self) -> Cursor | None:
        """The place after the prompt, from which another text can be drawn; None until the first piece is asked for."""
        return self._begin

    def _advance(self) -> str:
        """The next piece of text; "" when there is none, and then the outcome is known."""
        try:
            if self._steps is None:
                self._steps = self._open()
            began = time.perf_counter()
            piece = self._draw(self._steps)
            self._decode_s += time.perf_counter() - began
            return piece
        except BaseException:
            self._interrupt()
            raise

    def _open(self) -> Iterator[Step]:
        """Read the prompt."""
        began = time.perf_counter()
        if isinstance(self._start, Cursor):
            cursor = self._start
        else:
            for done, cursor in chunks(self._model, self._prompt, self._start):
                self._read, self._trail = done, Trail(cursor.state)
                if self._progress is not None:
                    self._progress(done, len(self._prompt))
        self._begin = cursor
        self._prefill_s = time.perf_counter() - began
        return tokens(self._model, *cursor, self._sampler, self.params.max_tokens)

    def _draw(self, steps: Iterator[Step]) -> str:
        """Draw tokens until there is text that may be shown."""
        for step in steps:
            if step.id == self._tokenizer.eos_id:
                self._trail.close(step.before)
                return self._end("eos")
            data = self._tokenizer.decode_bytes([step.id])
            self._trail.push(step.id, data, step.before)
            safe = self._matcher.push(data)
            if self._matcher.found is not None:
                return self._end("stop", safe)
            piece = self._show(safe)
            if piece:
                return piece
        return self._end("length")

    def _show(self, safe: bytes, final: bool = False) -> str:
        """Decode what may be shown, and let go of the states that only going back before it would need."""
        self._passed += len(safe)
        piece = self._decoder.feed_bytes(safe) + (self._decoder.flush() if final else "")
        if piece:
            place = self._passed - len(self._decoder.pending)
            self._shown.append((piece, place))
            self._trail.settle(place)
        return piece

    def _end(self, reason: FinishReason, safe: bytes = b"") -> str:
        """The last piece."""
        if reason != "stop" and self._show_held:
            safe = self._matcher.flush()
        piece = self._show(safe, final=True)
        self._outcome = Outcome(reason, self._matcher.found, self._passed)
        return piece

    def _interrupt(self) -> None:
        if self._outcome is None:
            self._outcome = Outcome("interrupted", None, self._shown[-1][1] if self._shown else 0)

    def _complete(self) -> Completion:
        """Bring the state to the end of the text, once; if that is interrupted, the next call does it."""
        if self._completion is None:
            assert self._outcome is not None
            began = time.perf_counter()
            cut = self._trail.cut(self._outcome.place)
            rest = self._tokenizer.encode(cut.rest) if cut.token is None else [cut.token]
            completion = Completion(
                text="".join(piece for piece, _ in self._shown),
                ids=(*cut.kept, *rest),
                finish_reason=self._outcome.reason,
                stop=self._outcome.stop,
                prompt_tokens=self._read,
                seed=self._sampler.seed,
                state=feed(self._model, rest, cut.state),
                timings=Timings(self._prefill_s, self._decode_s + time.perf_counter() - began),
            )
            if self._on_end is not None:
                self._on_end(completion)
            self._completion = completion
            self._on_end = None  # what it refers to may refer to this stream, and would keep all its states alive
        return self._completion
