"""Concurrent requests of a key, and concurrent work within one request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from starlette.requests import Request

from fledge.server.auth import Tenant
from fledge.server.errors import ApiError
from fledge.server.settings import ServerSettings

T = TypeVar("T")

BLOCKING_CHARACTERS = 20_000
"""Work on more characters of text than this runs in a thread, not in the event loop."""


class ConcurrencySlot:
    """One running request of a key, counted once for all its generations: `async with ConcurrencySlot(tenant): ...`."""

    def __init__(self, tenant: Tenant) -> None:
        """Raises ApiError 429 if the key has reached a limit."""
        tenant.acquire()
        self._stack = ExitStack()
        self._stack.callback(tenant.release)

    async def close(self) -> None:
        """Release the slot. Later calls have no effect."""
        self._stack.close()

    async def __aenter__(self) -> ConcurrencySlot:
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.close()


async def run_blocking(characters: int, function: Callable[[], T]) -> T:
    """Call a function that processes this much text: in a thread if it is long, else directly."""
    return await asyncio.to_thread(function) if characters > BLOCKING_CHARACTERS else function()


def max_concurrency(settings: ServerSettings, num_sequences: int = 1) -> int:
    """How many parts of a request, each of `num_sequences`, may run concurrently and leave room for other requests."""
    return max(1, min(settings.slots // max(num_sequences, 1), settings.max_requests) // 4)


async def gather_limited(functions: Sequence[Callable[[], Awaitable[T]]], limit: int) -> list[T]:
    """The results of all functions, in order. At most `limit` run concurrently; the first error cancels the others."""
    results, remaining = dict[int, T](), iter(enumerate(functions))

    async def work() -> None:
        for index, function in remaining:
            results[index] = await function()

    workers = [asyncio.ensure_future(work()) for _ in range(min(limit, len(functions)))]
    try:
        await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for worker in workers:
            worker.cancel()
        outcomes = await asyncio.gather(*workers, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
            raise outcome
    return [results[index] for index in range(len(functions))]


async def cancel_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`. Cancels it if the client disconnects. The body of the request must have been read."""

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
            raise ApiError(499, "the client has disconnected")
        return task.result()
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
