"""`AsyncLLM`: generation for asyncio programs. All requests share one engine, which processes them in one batch."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar, overload

from fledge.engine.async_engine import AsyncEngine
from fledge.engine.engine import Engine
from fledge.engine.events import (
    FLUSH_INTERVAL,
    ErrorEvent,
    Event,
    FinishEvent,
    PromptLogprobsEvent,
    TextEvent,
    TextRequest,
)
from fledge.engine.generation import ModelOutput
from fledge.engine.llm.batch import make_completion
from fledge.engine.llm.llm import LLM
from fledge.engine.llm.prompts import Prompt, Prompts, split_prompts
from fledge.engine.llm.scoring import ScoredText, scoring_request
from fledge.engine.llm.stream import Completion, Timings
from fledge.engine.sampling import SamplingParams
from fledge.models.state import State

T = TypeVar("T")


class AsyncLLM:
    """An LLM for asyncio programs. Requests that run at the same time are processed in one batch.

        async with AsyncLLM(llm) as async_llm:
            completion = await async_llm.generate("Once upon a time")
            async for piece in async_llm.stream("Once upon a time"): ...

    The model runs in a thread of its own. Use the object in one event loop only.
    """

    def __init__(self, llm: LLM, *, max_requests: int = 256) -> None:
        """max_requests: how many requests the engine accepts at the same time; further requests wait."""
        self.llm = llm
        engine = Engine(llm.model, eos_id=llm.tokenizer.eos_id, max_requests=sys.maxsize)
        self._engine = AsyncEngine(engine, llm.tokenizer, self._on_events)
        self._slots = asyncio.Semaphore(max_requests)
        self._queues: dict[TextRequest, asyncio.Queue[Event]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> AsyncLLM:
        self._loop = asyncio.get_running_loop()
        self._engine.start()
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop the engine. Requests that still run fail."""
        await asyncio.to_thread(self._engine.close)
        self._dispatch()

    @overload
    async def generate(
        self, prompt: Prompt, *, state: State | None = None, params: SamplingParams | None = None, **overrides: Any
    ) -> Completion: ...

    @overload
    async def generate(
        self,
        prompt: Prompts,
        *,
        state: State | Sequence[State] | None = None,
        params: SamplingParams | None = None,
        **overrides: Any,
    ) -> list[Completion]: ...

    async def generate(
        self,
        prompt: Prompt | Prompts,
        *,
        state: State | Sequence[State] | None = None,
        params: SamplingParams | None = None,
        **overrides: Any,
    ) -> Completion | list[Completion]:
        """As `LLM.generate`: one completion for one prompt, a list for a list of prompts."""
        prompts, is_batch = split_prompts(prompt)
        requests = self.llm.make_requests(prompts, state, (params or SamplingParams()).with_overrides(overrides))
        completions = await _gather([self._complete(request) for request in requests])
        return completions if is_batch else completions[0]

    def stream(
        self, prompt: Prompt, *, state: State | None = None, params: SamplingParams | None = None, **overrides: Any
    ) -> AsyncStream:
        """As `LLM.stream`: the text in pieces, for `async for`. Raises the same errors, before the first piece."""
        settings = (params or SamplingParams()).with_overrides(overrides)
        (request,) = self.llm.make_requests([prompt], state, settings)
        return AsyncStream(self, request)

    # A str is a Sequence[str] too, but the first signature takes precedence.
    @overload
    async def logprobs(  # type: ignore[overload-overlap]
        self, text: Prompt, state: State | None = None, context: Prompt | None = None
    ) -> ScoredText: ...

    @overload
    async def logprobs(
        self, text: Prompts, state: State | None = None, context: Prompt | None = None
    ) -> list[ScoredText]: ...

    async def logprobs(
        self, text: Prompt | Prompts, state: State | None = None, context: Prompt | None = None
    ) -> ScoredText | list[ScoredText]:
        """As `LLM.logprobs`: the scores of one text, or a list for a list of texts."""
        prompts, is_batch = split_prompts(text)
        texts = [self.llm.encode(each) for each in prompts]
        start = await asyncio.wrap_future(self._engine.call(lambda: self.llm.read_context(state, context)))
        scores = await _gather([self._score(ids, start) for ids in texts])
        return scores if is_batch else scores[0]

    async def _complete(self, request: TextRequest) -> Completion:
        stream = AsyncStream(self, request)
        async for _ in stream:
            pass
        assert stream.completion is not None
        return stream.completion

    async def _score(self, ids: Sequence[int], start: ModelOutput) -> ScoredText:
        logprobs = list[float]()
        if ids:
            async for event in self.run(TextRequest(scoring_request(ids, start))):
                if isinstance(event, PromptLogprobsEvent):
                    logprobs += [token.logprob.logprob for token in event.tokens if token.logprob is not None]
        return ScoredText.from_logprobs(self.llm.tokenizer, ids, logprobs)

    async def run(self, request: TextRequest) -> AsyncGenerator[Event, None]:
        """The events of a request, until all its completions have ended. Raises the error of an ErrorEvent.

        Stops the request if the iteration ends early.
        """
        async with self._slots:
            queue = self._queues[request] = asyncio.Queue()
            try:
                self._engine.submit(request)
                remaining = request.open_choices
                while remaining:
                    event = await queue.get()
                    if isinstance(event, ErrorEvent):
                        raise event.error
                    remaining -= isinstance(event, FinishEvent)
                    yield event
            finally:
                del self._queues[request]
                if request.open_choices:
                    self._engine.cancel(request)

    def _on_events(self) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch)

    def _dispatch(self) -> None:
        """Move the engine's events to the queues of their requests."""
        assert self._loop is not None
        if self._timer is not None:
            self._timer.cancel()
        events = self._engine.drain_events()
        # More text may follow without a notification, see EventBuffer.
        self._timer = self._loop.call_later(2 * FLUSH_INTERVAL, self._dispatch) if events else None
        for request, event in events:
            queue = self._queues.get(request)
            if queue is not None:
                queue.put_nowait(event)


class AsyncStream(AsyncIterator[str]):
    """Iterates over the pieces of one generated text. `completion` is the result, None until the text has ended."""

    def __init__(self, async_llm: AsyncLLM, request: TextRequest) -> None:
        self.completion: Completion | None = None
        self._request, self._text = request, ""
        self._events = async_llm.run(request)
        self._began = time.perf_counter()
        self._prefill_s = 0.0

    async def __anext__(self) -> str:
        async for event in self._events:
            seconds = time.perf_counter() - self._began
            self._prefill_s = self._prefill_s or seconds
            if isinstance(event, FinishEvent):
                timings = Timings(self._prefill_s, seconds - self._prefill_s)
                self.completion = make_completion(self._request, self._text, event, timings)
            elif isinstance(event, TextEvent) and event.text:
                self._text += event.text
                return event.text
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Stop generating. Breaking out of `async for` stops too, when the stream is garbage collected."""
        await self._events.aclose()


async def _gather(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all coroutines. If one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
