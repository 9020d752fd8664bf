"""The engine in a thread of its own, for callers that want text.

    engine = AsyncEngine(Engine(llm.model, eos_id=llm.tokenizer.eos_id), llm.tokenizer, on_events)
    engine.start()
    engine.submit(text_request)      # from any thread
    engine.drain_events()            # after `on_events`: the events of all requests
    engine.close(drain_seconds=30.0)

Only this thread touches the engine, its cache and its states. Use `call` to run other work there.
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
    ErrorEvent,
    Event,
    EventBuffer,
    EventCallback,
    TextRequest,
)
from fledge.engine.request import EngineStopped, QueueFull
from fledge.engine.text_engine import TextEngine
from fledge.tokenizer import Tokenizer

T = TypeVar("T")

SHUTTING_DOWN = "the server is shutting down; try again later"

log = logging.getLogger("fledge")


class AsyncEngine:
    """Accepts text requests from any thread and emits their events."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        on_events: EventCallback,
        *,
        flush_interval: float = FLUSH_INTERVAL,
    ) -> None:
        """on_events: called in the engine's thread when events are ready. flush_interval: see EventBuffer."""
        self.engine, self.tokenizer = engine, tokenizer
        self._events = EventBuffer(on_events, flush_interval)
        self._text_engine = TextEngine(engine, tokenizer, self._events.put)
        self._commands: deque[Callable[[], None]] = deque()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="fledge-engine", daemon=True)
        self._shutdown_deadline: float | None = None  # when requests that still run are failed
        self._is_stopped = False

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, request: TextRequest) -> None:
        """Start a request. Raises QueueFull if there are too many or the engine shuts down, else as `check_request`."""
        self.engine.check_request(request.request)
        with self._wake:
            if self._shutdown_deadline is not None or self._is_stopped:
                raise EngineStopped(SHUTTING_DOWN)
            if len(self._text_engine.admitted) >= self.engine.max_requests:
                raise QueueFull(f"{self.engine.max_requests} requests are queued or running; try again later")
            self._text_engine.admitted.add(request)
            self._post(lambda: self._admit(request))

    def cancel(self, request: TextRequest) -> None:
        """Stop a request. It produces no more events, except those already in the buffer."""
        request.cancelled = True
        self._post(lambda: self._remove(request))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function in the engine's thread. At most one runs between two steps, so generation continues.

        A future that is cancelled before its turn is skipped. Raises QueueFull after the engine has stopped.
        """
        future: Future[T] = Future()
        with self._wake:
            if self._is_stopped:
                raise EngineStopped(SHUTTING_DOWN)
            self._calls.append((future, function))
            self._wake.notify()
        return future

    def drain_events(self) -> list[tuple[TextRequest, Event]]:
        """Remove and return all events, from any thread. If there are any, drain again soon after; see EventBuffer."""
        return self._events.drain()

    def begin_shutdown(self, drain_seconds: float = 0.0) -> None:
        """Reject new requests, finish the running ones for up to `drain_seconds`, then fail the rest and stop."""
        with self._wake:
            self._shutdown_deadline = time.monotonic() + drain_seconds
            self._wake.notify()

    def close(self, drain_seconds: float = 0.0) -> None:
        """As `begin_shutdown`, and wait until the thread has stopped."""
        self.begin_shutdown(drain_seconds)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def num_requests(self) -> int:
        """Requests that were accepted and have not ended."""
        return len(self._text_engine.admitted)

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:  # reentrant
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                try:
                    self._run_once()
                except Exception as error:  # no request may wait forever, whatever has failed
                    log.exception("the engine failed; all running requests have ended")
                    self._fail_all(error)
                self._events.notify(force=not self.engine.busy)
        finally:
            with self._wake:
                self._is_stopped = True
            while self._commands:
                self._commands.popleft()()
            self._fail_all(EngineStopped(SHUTTING_DOWN))
            self._events.notify(force=True)
            for future, _ in self._calls:
                if future.set_running_or_notify_cancel():
                    future.set_exception(EngineStopped(SHUTTING_DOWN))

    def _run_once(self) -> None:
        """All commands, one call, one step."""
        while self._commands:
            self._commands.popleft()()
        if self._calls:
            _run_call(*self._calls.popleft())
        self._text_engine.step()

    def _wait_for_work(self) -> bool:
        """Wait until there is work. Returns False when the thread should stop."""
        with self._wake:
            while not (self._commands or self._calls or self.engine.busy) and self._shutdown_deadline is None:
                self._wake.wait()
            if self._shutdown_deadline is None:
                return True
            has_work = bool(self._commands or self._calls or self.engine.busy)
            return has_work and time.monotonic() < self._shutdown_deadline

    def _admit(self, request: TextRequest) -> None:
        if request.cancelled:
            return
        try:
            # `submit` has checked the limit; the engine's own count may include completions that have ended.
            self._text_engine.add(request)
        except Exception as error:  # only this request fails, for example because the device is out of memory
            self._text_engine.admitted.discard(request)
            self._events.put(request, ErrorEvent(0, _as_fledge_error(error)))

    def _remove(self, request: TextRequest) -> None:
        self._events.discard(request)
        self._text_engine.remove(request)

    def _fail_all(self, error: Exception) -> None:
        self._text_engine.fail_all(_as_fledge_error(error))


def _run_call(future: Future[Any], function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return  # the future was cancelled
    try:
        result = function()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def _as_fledge_error(error: Exception) -> FledgeError:
    return error if isinstance(error, FledgeError) else FledgeError(f"the model failed: {error}")
