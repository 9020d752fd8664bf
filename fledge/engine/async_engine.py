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
from fledge.engine.event_buffer import FRAME, Bell, EventBuffer
from fledge.engine.events import CompletionState, ErrorEvent, Event, FinishEvent, TextRequest
from fledge.engine.request import QueueFull, Request, TokenOutput
from fledge.models.state import State
from fledge.tokenizer import Tokenizer

T = TypeVar("T")

CLOSED = "the server is shutting down; ask again when it is back"

log = logging.getLogger("fledge")


class AsyncEngine:
    """Takes jobs from any thread, and rings where there are events of theirs."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, bell: Bell, *, frame: float = FRAME) -> None:
        """bell: rung in the desk's thread. frame: seconds for which more text does not ring."""
        self.engine, self.tokenizer = engine, tokenizer
        self._outbox = EventBuffer(bell, frame)
        self._inbox: deque[Callable[[], None]] = deque()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._wake = threading.Condition()
        self._jobs: dict[int, TextRequest] = {}  # by the number of their request
        self._admitted = set[TextRequest]()  # those and the ones in the inbox
        self._endings: dict[int, tuple[TextRequest, FinishEvent]] = {}  # texts whose state is being brought to the end
        self._thread = threading.Thread(target=self._run, name="fledge-desk", daemon=True)
        self._closing: float | None = None  # the moment at which what still runs is given up
        self._ended_for_good = False

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, job: TextRequest) -> None:
        """Have a job done. Raises Busy where too many wait or the desk closes, and the errors of `Engine.check`."""
        self.engine.check(job.request)
        with self._wake:
            if self._closing is not None or self._ended_for_good:
                raise QueueFull(CLOSED)
            if len(self._admitted) >= self.engine.queue:
                raise QueueFull(f"{self.engine.queue} requests are on their way, and no more may wait; try again later")
            self._admitted.add(job)
            self._post(lambda: self._take(job))

    def cancel(self, job: TextRequest) -> None:
        """Stop a job; nothing more comes of it, but for events that are on their way."""
        job.cancelled = True
        self._post(lambda: self._drop(job))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Do something in the desk's thread: one such thing between two steps, so that texts go on meanwhile.

        A future that is cancelled before its turn is passed over. Raises Busy once the desk has closed.
        """
        future: Future[T] = Future()
        with self._wake:
            if self._ended_for_good:
                raise QueueFull(CLOSED)
            self._calls.append((future, function))
            self._wake.notify()
        return future

    def collect(self) -> list[tuple[TextRequest, Event]]:
        """The events since the last time, from any thread. Where there are some, more may wait soon after, unrung."""
        return self._outbox.collect()

    def wind_up(self, drain: float = 0.0) -> None:
        """Take nothing more in, finish what runs for up to `drain` seconds, then stop; what runs still fails."""
        with self._wake:
            self._closing = time.monotonic() + drain
            self._wake.notify()

    def close(self, drain: float = 0.0) -> None:
        """As `wind_up`, and return when it has stopped."""
        self.wind_up(drain)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether jobs are being done."""
        return self._thread.is_alive()

    @property
    def jobs(self) -> int:
        """Jobs taken in and not ended."""
        return len(self._admitted)

    def _post(self, work: Callable[[], None]) -> None:
        with self._wake:  # which its holder may take again
            self._inbox.append(work)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._go_on():
                try:
                    self._turn()
                except Exception as error:  # whatever it was, the others must not wait for ever
                    log.exception("the engine failed; all requests on their way have ended")
                    self._fail_all(error)
                self._outbox.ring(now=not self.engine.busy)
        finally:
            with self._wake:
                self._ended_for_good = True
            while self._inbox:
                self._inbox.popleft()()
            self._fail_all(QueueFull(CLOSED))
            self._outbox.ring(now=True)
            for future, _ in self._calls:
                if future.set_running_or_notify_cancel():
                    future.set_exception(QueueFull(CLOSED))

    def _turn(self) -> None:
        """What has come in, one called thing, one step."""
        while self._inbox:
            self._inbox.popleft()()
        if self._calls:
            _answer(*self._calls.popleft())
        for output in self.engine.step():
            self._deliver(output)

    def _go_on(self) -> bool:
        """Wait for something to do; False when the desk is to close."""
        with self._wake:
            while not (self._inbox or self._calls or self.engine.busy) and self._closing is None:
                self._wake.wait()
            if self._closing is None:
                return True
            return bool(self._inbox or self._calls or self.engine.busy) and time.monotonic() < self._closing

    def _take(self, job: TextRequest) -> None:
        if job.cancelled:
            return
        try:
            # Who is admitted has a place: the engine's own count may still hold texts that have ended.
            self._jobs[self.engine.add(job.request, extra=True)] = job
        except Exception as error:  # of this job alone: a device that has no room for its state, say
            self._admitted.discard(job)
            self._outbox.tell(job, ErrorEvent(0, _shown(error)))

    def _drop(self, job: TextRequest) -> None:
        self._admitted.discard(job)
        self._outbox.forget(job)
        for number in [number for number, known in self._jobs.items() if known is job]:
            self.engine.abort(number)
            del self._jobs[number]
        for number in [number for number, (known, _) in self._endings.items() if known is job]:
            self.engine.abort(number)
            del self._endings[number]

    def _deliver(self, output: TokenOutput) -> None:
        if output.request in self._endings:
            self._ended(*self._endings[output.request], output.before.alone())
            del self._endings[output.request]  # now that nothing can fail: a job that has failed is told so
            return
        job = self._jobs.get(output.request)
        if job is None:
            return
        if output.finish == "failed":
            assert output.error is not None
            self._outbox.tell(job, ErrorEvent(output.choice, output.error))
            self._leave(job, output.request)
            return
        choice = job.choices.get(output.choice)
        if choice is None:
            choice = job.choices[output.choice] = CompletionState(job, self.tokenizer, output)
        piece = choice.take(output)
        if piece is not None:
            self._outbox.tell(job, piece)
        if choice.detokenizer.outcome is not None:
            self.engine.abort_choice(output.request, output.choice)
            self._finish(job, choice)
            self._leave(job, output.request)

    def _finish(self, job: TextRequest, choice: CompletionState) -> None:
        """Tell the end of a text, at once or when its state has read all of it."""
        outcome = choice.detokenizer.outcome
        assert outcome is not None
        cut = choice.detokenizer.rewind_point()
        rest = (*choice.detokenizer.remaining_ids(cut), *job.closing)
        end = FinishEvent(
            choice.number,
            outcome.reason,
            outcome.stop,
            (*cut.ids, *rest),
            choice.drawn,
            choice.seed,
            choice.cached,
        )
        keeps = job.keeps and self.engine.cache is not None and job.request.space is not None
        if not job.wants_state or choice.unread:
            self._outbox.tell(job, end)
        if not (job.wants_state or keeps) or choice.unread:
            return
        if rest:
            request = Request(rest, start=cut.state.alone(), n=0, priority=job.request.priority)
            self._endings[self.engine.add(request, extra=True)] = (job, end)
        else:
            self._ended(job, end, cut.state.alone())

    def _ended(self, job: TextRequest, end: FinishEvent, state: State) -> None:
        """The state of a text is there."""
        space = job.request.space
        if job.keeps and self.engine.cache is not None and space is not None:
            self.engine.cache.put(space, (*job.request.ids, *end.ids), state)
        if job.wants_state:
            self._outbox.tell(job, end._replace(state=state))

    def _leave(self, job: TextRequest, number: int) -> None:
        """A choice has ended, and with the last of them the job."""
        job.open -= 1
        if not job.open:
            self._jobs.pop(number, None)
            self._admitted.discard(job)

    def _fail_all(self, error: Exception) -> None:
        shown = _shown(error)
        for number, job in self._jobs.items():
            self.engine.abort(number)
            self._outbox.tell(job, ErrorEvent(-1, shown))
        for number, (job, end) in self._endings.items():
            self.engine.abort(number)
            if job.wants_state:
                self._outbox.tell(job, ErrorEvent(end.choice, shown))
        self._jobs.clear()
        self._admitted.clear()
        self._endings.clear()


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
