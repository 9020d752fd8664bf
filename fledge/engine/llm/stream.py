"""Streaming generation of one text.

`Stream` combines the engine and the detokenizer. However it ends, the final state has read exactly the text that
was returned.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from fledge.engine.detokenizer import Detokenizer, FinishReason
from fledge.engine.engine import Engine
from fledge.engine.generation import ModelOutput, ProgressCallback, advance_state
from fledge.engine.request import Request, TokenOutput
from fledge.engine.sampling import Sampler, SamplingParams
from fledge.models.state import State
from fledge.models.state_slice import StateSlice
from fledge.tokenizer import Tokenizer


@dataclass(frozen=True)
class Timings:
    """Seconds spent in the engine, without the time the caller spends between two pieces of text."""

    prefill_s: float
    decode_s: float


@dataclass(frozen=True, eq=False)
class Completion:
    """One finished generation.

    `state` has read the prompt and then `ids`, whose bytes are those of `text` (U+FFFD replaces bytes that are not
    valid UTF-8). Neither contains the stop string or the end-of-text id. If the text ends inside a token, its kept part
    is encoded again, so the last tokens of `ids` may differ from those that were sampled.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    stop: str | None  # the stop string that was found
    prompt_tokens: int  # tokens of the prompt that were read; fewer than all if reading was interrupted
    seed: int  # reproduces the text
    state: State = field(repr=False)
    timings: Timings


class Stream(Iterator[str]):
    """Iterates over the pieces of one generated text. `completion` is the result.

    Computes nothing before the first piece is requested. Must be used by one thread at a time.
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
        """Continue `prompt`, read after the state `start`. If `start` is a ModelOutput, the prompt must be empty.

        progress: called while the prompt is read. on_end: called once with the completion, before the iteration ends.
        show_held: when generation ends without a stop string, whether to emit text held back for one.
        """
        assert (len(prompt) == 0) == isinstance(start, ModelOutput)
        self.params = params
        self._model, self._tokenizer = model, tokenizer
        self._progress, self._on_end = progress, on_end
        self._seed = Sampler(params).seed
        self._request = Request(tuple(prompt), replace(params, seed=self._seed), start, should_return_logits=True)
        self._prompt_output: ModelOutput | None = None
        initial = StateSlice(start.state if isinstance(start, ModelOutput) else start)
        self._detokenizer = Detokenizer(tokenizer, params.stop, initial, show_held=show_held)
        self._engine: Engine | None = None
        self._request_id = 0
        self._outputs = deque[TokenOutput]()  # of the last step of the engine
        self._completion: Completion | None = None
        self._prefill_s = self._decode_s = 0.0

    def __next__(self) -> str:
        if self._detokenizer.outcome is None:
            piece = self._advance()
            if piece:
                return piece
        self._complete()
        raise StopIteration

    def close(self) -> None:
        """Stop generating. No effect if the text has already ended."""
        self._detokenizer.interrupt()
        self._complete()

    @property
    def completion(self) -> Completion:
        """The result. If the text has not ended, it ends here with the reason "interrupted"."""
        self._detokenizer.interrupt()
        return self._complete()

    @property
    def prompt_output(self) -> ModelOutput | None:
        """Logits and state after the prompt, from which another text can be sampled. None until it has been read."""
        return self._prompt_output

    def _advance(self) -> str:
        """The next piece of text, or "" once the outcome is known."""
        try:
            if self._engine is None:
                self._engine = self._prefill()
            began = time.perf_counter()
            piece = self._decode(self._engine)
            self._decode_s += time.perf_counter() - began
            return piece
        except BaseException:
            self._detokenizer.interrupt()
            raise

    def _prefill(self) -> Engine:
        """Read the prompt and sample the first token."""
        began = time.perf_counter()
        engine, total = Engine(self._model, eos_id=self._tokenizer.eos_id), len(self._request.ids)
        self._request_id = engine.add(self._request)
        while not self._outputs:
            self._outputs.extend(engine.step())
            progress = engine.get_prompt_progress(self._request_id) if not self._outputs else None
            if progress is not None:
                self._report(*progress)
        first, start = self._outputs[0], self._request.start
        if isinstance(start, ModelOutput):
            self._prompt_output = start
        elif first.logits is not None:
            self._report(first.state_before, total)
            self._prompt_output = ModelOutput(first.logits, first.state_before.extract())
        self._prefill_s = time.perf_counter() - began
        return engine

    def _report(self, state: StateSlice, tokens: int) -> None:
        """Record how much of the prompt has been read."""
        self._detokenizer.set_prompt_state(state, tokens)
        if self._progress is not None:
            self._progress(tokens, len(self._request.ids))

    def _decode(self, engine: Engine) -> str:
        """Sample tokens until there is text to emit."""
        while self._outputs or engine.busy:
            if not self._outputs:
                self._outputs.extend(engine.step())
                continue
            output = self._outputs.popleft()
            if output.error is not None:
                raise output.error
            assert output.token is not None
            piece = self._detokenizer.add_token(output.token, output.state_before)
            if piece or self._detokenizer.outcome is not None:
                return piece
        return self._detokenizer.finish("length")

    def _complete(self) -> Completion:
        """Compute the state at the end of the text, once. If that is interrupted, the next call repeats it."""
        if self._completion is None:
            outcome = self._detokenizer.outcome
            assert outcome is not None
            began = time.perf_counter()
            point = self._detokenizer.rewind_point()
            remaining = self._detokenizer.remaining_ids(point)
            completion = Completion(
                text=self._detokenizer.text,
                ids=(*point.ids, *remaining),
                finish_reason=outcome.reason,
                stop=outcome.stop,
                prompt_tokens=self._detokenizer.prompt_tokens,
                seed=self._seed,
                state=advance_state(self._model, remaining, point.state.extract()),
                timings=Timings(self._prefill_s, self._decode_s + time.perf_counter() - began),
            )
            if self._on_end is not None:
                self._on_end(completion)
            self._completion = completion
            self._on_end = None  # it may refer to this stream, and would keep all its states in memory
            self._engine = None
            self._outputs.clear()
        return self._completion
