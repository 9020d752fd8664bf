"""Text generation on the engine: `TextRequest`s in, events out, in the thread of the caller.

`AsyncEngine` runs a `TextEngine` in a thread of its own. Scripts that generate for a list of prompts use it directly.
"""

from __future__ import annotations

from collections.abc import Callable

from fledge.core.errors import FledgeError
from fledge.engine.engine import Engine
from fledge.engine.events import (
    CompletionState,
    ErrorEvent,
    Event,
    FinishEvent,
    PromptLogprobsEvent,
    TextRequest,
    TextToken,
)
from fledge.engine.request import Request, TokenOutput
from fledge.models.state import State
from fledge.tokenizer import Tokenizer


class TextEngine:
    """An engine whose token outputs are turned into the events of text requests. Used by one thread at a time."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, emit: Callable[[TextRequest, Event], None]) -> None:
        """emit: called with each event, during `step`."""
        self.engine, self.tokenizer = engine, tokenizer
        self._emit = emit
        self.admitted = set[TextRequest]()  # requests that were accepted and have not ended
        self._requests: dict[int, TextRequest] = {}  # by request id
        # Completions that have ended and whose state still has to read the end of the text, by request id.
        self._final_reads: dict[int, tuple[TextRequest, FinishEvent]] = {}

    def add(self, request: TextRequest) -> None:
        """Start a request, even if the engine's queue is full. Raises the errors of `Engine.check_request`."""
        self._requests[self.engine.add(request.request, bypass_limit=True)] = request
        self.admitted.add(request)

    def remove(self, request: TextRequest) -> None:
        """Stop a request. It produces no more events."""
        self.admitted.discard(request)
        for request_id in [key for key, each in self._requests.items() if each is request]:
            self.engine.abort(request_id)
            del self._requests[request_id]
        for request_id in [key for key, (each, _) in self._final_reads.items() if each is request]:
            self.engine.abort(request_id)
            del self._final_reads[request_id]

    def step(self) -> None:
        """Run one step of the engine and emit the resulting events."""
        for output in self.engine.step():
            self._deliver(output)

    def fail_all(self, error: FledgeError) -> None:
        """End all requests with an error."""
        for request_id, request in self._requests.items():
            self.engine.abort(request_id)
            self._emit(request, ErrorEvent(-1, error))
        for request_id, (request, end) in self._final_reads.items():
            self.engine.abort(request_id)
            if request.should_return_state:
                self._emit(request, ErrorEvent(end.choice, error))
        self._requests.clear()
        self.admitted.clear()
        self._final_reads.clear()

    def _deliver(self, output: TokenOutput) -> None:
        """Turn an output of the engine into events."""
        if output.request_id in self._final_reads:
            self._emit_final_state(*self._final_reads[output.request_id], output.state_before.extract())
            # Only now, when nothing can fail any more: `fail_all` fails the requests that are still in here.
            del self._final_reads[output.request_id]
            return
        request = self._requests.get(output.request_id)
        if request is None:
            return
        if output.prompt_logprobs is not None:
            ids, logprobs, computed = output.prompt_logprobs
            tokens = tuple(map(TextToken, ids, logprobs))
            self._emit(request, PromptLogprobsEvent(output.choice, tokens, computed))
            return
        if output.finish_reason == "failed":
            assert output.error is not None
            self._emit(request, ErrorEvent(-1 if output.prompt_incomplete else output.choice, output.error))
            if output.prompt_incomplete:
                self.remove(request)
            else:
                self._release_choice(request, output.request_id)
            return
        completion = request.choices.get(output.choice)
        if completion is None:
            completion = request.choices[output.choice] = CompletionState(request, self.tokenizer, output)
        event = completion.process(output)
        if event is not None:
            self._emit(request, event)
        if completion.detokenizer.outcome is not None:
            self.engine.abort_choice(output.request_id, output.choice)
            self._finish(request, completion)
            self._release_choice(request, output.request_id)

    def _finish(self, request: TextRequest, completion: CompletionState) -> None:
        """Emit the FinishEvent: now, or after the state has read the whole text if the request wants the state."""
        outcome = completion.detokenizer.outcome
        assert outcome is not None
        point = completion.detokenizer.rewind_point()
        remaining = (*completion.detokenizer.remaining_ids(point), *request.suffix_ids)
        end = FinishEvent(
            completion.index,
            outcome.reason,
            outcome.stop,
            (*point.ids, *remaining),
            completion.sampled_tokens,
            completion.seed,
            completion.cached_tokens,
        )
        has_cache = self.engine.cache is not None and request.request.cache_namespace is not None
        needs_state = request.should_return_state or (request.should_cache_state and has_cache)
        if not request.should_return_state or completion.prompt_incomplete:
            self._emit(request, end)
        if not needs_state or completion.prompt_incomplete:
            return
        if remaining:
            final_read = Request(remaining, start=point.state.extract(), n=0, priority=request.request.priority)
            self._final_reads[self.engine.add(final_read, bypass_limit=True)] = (request, end)
        else:
            self._emit_final_state(request, end, point.state.extract())

    def _emit_final_state(self, request: TextRequest, end: FinishEvent, state: State) -> None:
        """Store and emit the state that has read the whole text."""
        namespace = request.request.cache_namespace
        if request.should_cache_state and self.engine.cache is not None and namespace is not None:
            self.engine.cache.put(namespace, (*request.request.ids, *end.ids), state)
        if request.should_return_state:
            self._emit(request, end._replace(state=state))

    def _release_choice(self, request: TextRequest, request_id: int) -> None:
        """Count a completion that has ended, and remove the request after its last one."""
        request.open_choices -= 1
        if not request.open_choices:
            self._requests.pop(request_id, None)
            self.admitted.discard(request)
