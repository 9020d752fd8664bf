"""Generated text as it comes, and what is known once it ends.

`Stream` joins the token loop, the stop texts and the decoder, and sees to it that text and state agree: however it
ends, the final state has read exactly the text that was handed over, no more and no less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from fledge.engine.generation import (
    ModelOutput,
    ProgressCallback,
    SampledToken,
    advance_state,
    generate_tokens,
    prefill_chunks,
)
from fledge.engine.llm.detokenizer import Detokenizer, FinishReason
from fledge.engine.sampling import Sampler, SamplingParams
from fledge.models.state import State
from fledge.models.state_slice import StateSlice
from fledge.tokenizer import Tokenizer


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


class Stream(Iterator[str]):
    """The pieces of one generated text; afterwards, or after breaking off at any point, `completion` tells the rest.

    Nothing is computed before the first piece is asked for. Used by one thread at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        start: State | ModelOutput,
        params: SamplingParams,
        *,
        progress: ProgressCallback | None = None,
        on_end: Callable[[Completion], None] | None = None,
        show_held: bool = True,
    ) -> None:
        """Continue `prompt`, read after `start` (if that is a Cursor, the prompt has been read and is empty).

        progress: called while the prompt is read. on_end: called once with the completion, before the iteration ends.
        show_held: whether text that might have become a stop text is shown after all when generation ends without one.
        """
        assert (len(prompt) == 0) == isinstance(start, ModelOutput)
        self.params = params
        self._model, self._tokenizer = model, tokenizer
        self._prompt, self._progress = prompt, progress
        self._on_end = on_end
        self._sampler = Sampler(params)
        self._begin: ModelOutput | None = None
        known = StateSlice(start.state if isinstance(start, ModelOutput) else start)
        self._writer = Detokenizer(tokenizer, params.stop, known, show_held=show_held)
        self._start = start
        self._steps: Iterator[SampledToken] | None = None
        self._completion: Completion | None = None
        self._prefill_s = self._decode_s = 0.0

    def __next__(self) -> str:
        if self._writer.outcome is None:
            piece = self._advance()
            if piece:
                return piece
        self._complete()
        raise StopIteration

    def close(self) -> None:
        """Stop here, if the text has not ended yet."""
        self._writer.interrupt()
        self._complete()

    @property
    def completion(self) -> Completion:
        """The result. Asking for it before the text has ended stops it there, as "interrupted"."""
        self._writer.interrupt()
        return self._complete()

    @property
    def begin(self) -> ModelOutput | None:
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
            self._writer.interrupt()
            raise

    def _open(self) -> Iterator[SampledToken]:
        """Read the prompt."""
        began = time.perf_counter()
        if isinstance(self._start, ModelOutput):
            cursor = self._start
        else:
            for done, cursor in prefill_chunks(self._model, self._prompt, self._start):
                self._writer.begin(StateSlice(cursor.state), done)
                if self._progress is not None:
                    self._progress(done, len(self._prompt))
        self._begin = cursor
        self._prefill_s = time.perf_counter() - began
        return generate_tokens(self._model, *cursor, self._sampler, self.params.max_tokens)

    def _draw(self, steps: Iterator[SampledToken]) -> str:
        """Draw tokens until there is text that may be shown."""
        for step in steps:
            piece = self._writer.push(step.id, StateSlice(step.state_before))
            if piece or self._writer.outcome is not None:
                return piece
        return self._writer.end("length")

    def _complete(self) -> Completion:
        """Bring the state to the end of the text, once; if that is interrupted, the next call does it."""
        if self._completion is None:
            outcome = self._writer.outcome
            assert outcome is not None
            began = time.perf_counter()
            cut = self._writer.cut()
            rest = self._writer.rest(cut)
            completion = Completion(
                text=self._writer.text,
                ids=(*cut.kept, *rest),
                finish_reason=outcome.reason,
                stop=outcome.stop,
                prompt_tokens=self._writer.read,
                seed=self._sampler.seed,
                state=advance_state(self._model, rest, cut.row.alone()),
                timings=Timings(self._prefill_s, self._decode_s + time.perf_counter() - began),
            )
            if self._on_end is not None:
                self._on_end(completion)
            self._completion = completion
            self._on_end = None  # what it refers to may refer to this stream, and would keep all its states alive
        return self._completion
