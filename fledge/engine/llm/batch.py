"""Generation for several prompts at the same time: the engine processes them in one batch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence

from torch import nn

from fledge.core.errors import FledgeError
from fledge.engine.engine import Engine
from fledge.engine.events import ErrorEvent, Event, FinishEvent, TextEvent, TextRequest
from fledge.engine.llm.stream import Completion, Timings
from fledge.engine.text_engine import TextEngine
from fledge.tokenizer import Tokenizer


class BatchStream(Iterator[tuple[int, str]]):
    """Iterates over (index of a prompt, next piece of its text), in the order in which the pieces are generated.

    `completions` has the result of each prompt, or None until it has ended. Computes nothing before the first piece is
    requested. Must be used by one thread at a time. An interrupt, an error or `close` ends all texts that still run.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, requests: Sequence[TextRequest]) -> None:
        """requests: one completion each (n=1), with `should_return_state`."""
        self.completions: list[Completion | None] = [None] * len(requests)
        self._text_engine = TextEngine(Engine(model, eos_id=tokenizer.eos_id), tokenizer, self._collect)
        self._waiting = deque(requests)  # not yet added to the engine
        self._indices = {request: index for index, request in enumerate(requests)}
        self._texts = [""] * len(requests)
        self._pieces = deque[tuple[int, str]]()
        self._prefill_s: dict[TextRequest, float] = {}  # of the requests that have sampled their first token
        self._error: FledgeError | None = None
        self._elapsed = self._step_began = 0.0  # seconds of all previous steps, and when the present one began

    def __next__(self) -> tuple[int, str]:
        while not self._pieces:
            if not (self._waiting or self._text_engine.engine.busy):
                raise StopIteration
            self._step()
        return self._pieces.popleft()

    def close(self) -> None:
        """Stop all texts that have not ended; their completions stay None."""
        self._waiting.clear()
        for request in self._indices:
            self._text_engine.remove(request)
        self._pieces.clear()

    def _step(self) -> None:
        try:
            while self._waiting:
                self._text_engine.add(self._waiting.popleft())
            self._step_began = time.perf_counter()
            self._text_engine.step()
            if self._error is not None:
                raise self._error
            self._elapsed += time.perf_counter() - self._step_began
        except BaseException:
            self.close()
            raise

    def _collect(self, request: TextRequest, event: Event) -> None:
        index = self._indices[request]
        seconds = self._elapsed + time.perf_counter() - self._step_began
        prefill_s = self._prefill_s.setdefault(request, seconds)
        if isinstance(event, TextEvent):
            self._texts[index] += event.text
            self._pieces.append((index, event.text))
        elif isinstance(event, FinishEvent):
            self.completions[index] = make_completion(
                request, self._texts[index], event, Timings(prefill_s, seconds - prefill_s)
            )
        elif isinstance(event, ErrorEvent):
            self._error = event.error


def make_completion(request: TextRequest, text: str, end: FinishEvent, timings: Timings) -> Completion:
    """The result of a request whose text has ended with the event `end`."""
    assert end.state is not None, "the request must ask for the state"
    return Completion(
        text=text,
        ids=end.ids,
        finish_reason=end.reason,
        stop=end.stop,
        prompt_tokens=len(request.request.ids),
        seed=end.seed,
        state=end.state,
        timings=timings,
    )
