"""The desk: the engine in a thread of its own, for callers who want text.

    desk = Desk(Engine(llm.model, eos_id=llm.tokenizer.eos_id), llm.tokenizer, bell)
    desk.start()
    desk.submit(job)          # from any thread
    desk.collect()            # where the bell has rung: the events of all jobs
    desk.close(drain=30.0)

The only thread that touches the engine, its cache and its states is the desk's; whoever needs something done there uses
`call`. Not here: HTTP, templates, what the ids of a prompt are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from fledge.core.errors import FledgeError
from fledge.engine.engine import Engine
from fledge.engine.events import (
    FLUSH_INTERVAL,
    CompletionState,
    ErrorEvent,
    Event,
    EventBuffer,
    EventCallback,
    FinishEvent,
    TextRequest,
)
from fledge.engine.request import QueueFull, Request, TokenOutput
from fledge.models.state import State
from fledge.tokenizer import Tokenizer

T = TypeVar("T")

CLOSED = "the server is shutting down; ask again when it is back"

log = logging.getLogger("fledge")


class AsyncEngine:
    """Takes jobs from any thread, and rings where there are events of theirs."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, on_events: EventCallback, *, flush_interval: float = FLUSH_INTERVAL
    ) -> None:
        """bell: rung in the desk's thread. frame: seconds for which more text does not ring."""
        self.engine, self.tokenizer = engine, tokenizer
        self._events = EventBuffer(on_events, flush_interval)
        self._commands: deque[Callable[[], None]] = deque()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._wake = threading.Condition()
        self._requests: dict[int, TextRequest] = {}  # by the number of their request
        self._admitted = set[TextRequest]()  # those and the ones in the inbox
        self._final_reads: dict[
            int, tuple[TextRequest, FinishEvent]
        ] = {}  # texts whose state is being brought to the end
        self._thread = threading.Thread(target=self._run, name="fledge-desk", daemon=True)
        self._shutdown_deadline: float | None = None  # the moment at which what still runs is given up
        self._is_stopped = False

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, request: TextRequest) -> None:
        """Have a job done. Raises Busy where too many wait or the desk closes, and the errors of `Engine.check`."""
        self.engine.check_request(request.request)
        with self._wake:
            if self._shutdown_deadline is not None or self._is_stopped:
                raise QueueFull(CLOSED)
            if len(self._admitted) >= self.engine.max_requests:
                raise QueueFull(
                    f"{self.engine.max_requests} requests are on their way, and no more may wait; try again later"
                )
            self._admitted.add(request)
            self._post(lambda: self._admit(request))

    def cancel(self, request: TextRequest) -> None:
        """Stop a job; nothing more comes of it, but for events that are on their way."""
        request.cancelled = True
        self._post(lambda: self._remove(request))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Do something in the desk's thread: one such thing between two steps, so that texts go on meanwhile.

        A future that is cancelled before its turn is passed over. Raises Busy once the desk has closed.
        """
        future: Future[T] = Future()
        with self._wake:
            if self._is_stopped:
                raise QueueFull(CLOSED)
            self._calls.append((future, function))
            self._wake.notify()
        return future

    def drain_events(self) -> list[tuple[TextRequest, Event]]:
        """The events since the last time, from any thread. Where there are some, more may wait soon after, unrung."""
        return self._events.drain()

    def begin_shutdown(self, drain_seconds: float = 0.0) -> None:
        """Take nothing more in, finish what runs for up to `drain` seconds, then stop; what runs still fails."""
        with self._wake:
            self._shutdown_deadline = time.monotonic() + drain_seconds
            self._wake.notify()

    def close(self, drain_seconds: float = 0.0) -> None:
        """As `wind_up`, and return when it has stopped."""
        self.begin_shutdown(drain_seconds)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether jobs are being done."""
        return self._thread.is_alive()

    @property
    def num_requests(self) -> int:
        """Jobs taken in and not ended."""
        return len(self._admitted)

    def _post(self, work: Callable[[], None]) -> None:
        with self._wake:  # which its holder may take again
            self._commands.append(work)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                try:
                    self._run_once()
                except Exception as error:  # whatever it was, the others must not wait for ever
                    log.exception("the engine failed; all requests on their way have ended")
                    self._fail_all(error)
                self._events.notify(force=not self.engine.busy)
        finally:
            with self._wake:
                self._is_stopped = True
            while self._commands:
                self._commands.popleft()()
            self._fail_all(QueueFull(CLOSED))
            self._events.notify(force=True)
            for future, _ in self._calls:
                if future.set_running_or_notify_cancel():
                    future.set_exception(QueueFull(CLOSED))

    def _run_once(self) -> None:
        """What has come in, one called thing, one step."""
        while self._commands:
            self._commands.popleft()()
        if self._calls:
            _answer(*self._calls.popleft())
        for output in self.engine.step():
            self._deliver(output)

    def _wait_for_work(self) -> bool:
        """Wait for something to do; False when the desk is to close."""
        with self._wake:
            while not (self._commands or self._calls or self.engine.busy) and self._shutdown_deadline is None:
                self._wake.wait()
            if self._shutdown_deadline is None:
                return True
            return (
                bool(self._commands or self._calls or self.engine.busy) and time.monotonic() < self._shutdown_deadline
            )

    def _admit(self, job: TextRequest) -> None:
        if job.cancelled:
            return
        try:
            # Who is admitted has a place: the engine's own count may still hold texts that have ended.
            self._requests[self.engine.add(job.request, bypass_limit=True)] = job
        except Exception as error:  # of this job alone: a device that has no room for its state, say
            self._admitted.discard(job)
            self._events.put(job, ErrorEvent(0, _shown(error)))

    def _remove(self, job: TextRequest) -> None:
        self._admitted.discard(job)
        self._events.discard(job)
        for number in [number for number, known in self._requests.items() if known is job]:
            self.engine.abort(number)
            del self._requests[number]
        for number in [number for number, (known, _) in self._final_reads.items() if known is job]:
            self.engine.abort(number)
            del self._final_reads[number]

    def _deliver(self, output: TokenOutput) -> None:
        if output.request_id in self._final_reads:
            self._emit_final_state(*self._final_reads[output.request_id], output.state_before.alone())
            del self._final_reads[output.request_id]  # now that nothing can fail: a job that has failed is told so
            return
        job = self._requests.get(output.request_id)
        if job is None:
            return
        if output.finish_reason == "failed":
            assert output.error is not None
            self._events.put(job, ErrorEvent(output.choice, output.error))
            self._release_choice(job, output.request_id)
            return
        choice = job.choices.get(output.choice)
        if choice is None:
            choice = job.choices[output.choice] = CompletionState(job, self.tokenizer, output)
        piece = choice.process(output)
        if piece is not None:
            self._events.put(job, piece)
        if choice.detokenizer.outcome is not None:
            self.engine.abort_choice(output.request_id, output.choice)
            self._finish(job, choice)
            self._release_choice(job, output.request_id)

    def _finish(self, job: TextRequest, choice: CompletionState) -> None:
        """Tell the end of a text, at once or when its state has read all of it."""
        outcome = choice.detokenizer.outcome
        assert outcome is not None
        cut = choice.detokenizer.cut()
        rest = (*choice.detokenizer.rest(cut), *job.suffix_ids)
        end = FinishEvent(
            choice.index,
            outcome.reason,
            outcome.stop,
            (*cut.kept, *rest),
            choice.sampled_tokens,
            choice.seed,
            choice.cached_tokens,
        )
        keeps = job.should_cache_state and self.engine.cache is not None and job.request.cache_namespace is not None
        if not job.should_return_state or choice.prompt_incomplete:
            self._events.put(job, end)
        if not (job.should_return_state or keeps) or choice.prompt_incomplete:
            return
        if rest:
            request = Request(rest, start=cut.row.alone(), n=0, priority=job.request.priority)
            self._final_reads[self.engine.add(request, bypass_limit=True)] = (job, end)
        else:
            self._emit_final_state(job, end, cut.row.alone())

    def _emit_final_state(self, job: TextRequest, end: FinishEvent, state: State) -> None:
        """The state of a text is there."""
        space = job.request.cache_namespace
        if job.should_cache_state and self.engine.cache is not None and space is not None:
            self.engine.cache.put(space, (*job.request.ids, *end.ids), state)
        if job.should_return_state:
            self._events.put(job, end._replace(state=state))

    def _release_choice(self, job: TextRequest, number: int) -> None:
        """A choice has ended, and with the last of them the job."""
        job.open_choices -= 1
        if not job.open_choices:
            self._requests.pop(number, None)
            self._admitted.discard(job)

    def _fail_all(self, error: Exception) -> None:
        shown = _shown(error)
        for number, job in self._requests.items():
            self.engine.abort(number)
            self._events.put(job, ErrorEvent(-1, shown))
        for number, (job, end) in self._final_reads.items():
            self.engine.abort(number)
            if job.should_return_state:
                self._events.put(job, ErrorEvent(end.choice, shown))
        self._requests.clear()
        self._admitted.clear()
        self._final_reads.clear()


def _answer(future: Future[Any], function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return  # whoever asked has gone
    try:
        found = function()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(found)


def _shown(error: Exception) -> FledgeError:
    return error if isinstance(error, FledgeError) else FledgeError(f"the model failed: {error}")
