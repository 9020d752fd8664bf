"""What is read and not gone on with: the state that a text leaves. And texts to ids, and how much is done at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from fledge.core.errors import FledgeError
from fledge.engine.events import FinishEvent, TextRequest
from fledge.engine.generation import check_token_ids
from fledge.engine.request import Request
from fledge.models.state import State
from fledge.server.auth import Tenant
from fledge.server.errors import api_error
from fledge.server.service import Service

T = TypeVar("T")

LONG = 20_000
"""Characters from which on text is encoded beside the event loop, not in it."""


async def unhindered(characters: int, work: Callable[[], T]) -> T:
    """What is done with so much text: at once where that is short, else beside the event loop."""
    return await asyncio.to_thread(work) if characters > LONG else work()


async def encoded(service: Service, texts: Sequence[str | list[int]], param: str) -> list[tuple[int, ...]]:
    """The ids of each, beside the event loop where that takes a while. Raises ApiError for ids that no token has."""
    tokenizer, size = service.llm.tokenizer, service.llm.config.vocab_size

    def encode() -> list[tuple[int, ...]]:
        found = [tuple(tokenizer.encode(text) if isinstance(text, str) else text) for text in texts]
        for ids in found:
            check_token_ids(ids, size)
        return found

    try:
        return await unhindered(sum(map(len, texts)), encode)
    except FledgeError as error:
        raise api_error(error, param) from None


async def state_after(service: Service, tenant: Tenant, request: Request) -> State:
    """The state that has read a request, which draws nothing; the key pays for it once it has been taken in."""
    async with service.events(TextRequest(request, should_return_state=True)) as events:
        tenant.spend(len(request.ids))
        async for found in events:
            for end in found:
                assert isinstance(end, FinishEvent) and end.state is not None
                state = end.state
    return state


def at_once(service: Service, width: int = 1) -> int:
    """How many parts of one request, each so many sequences, may be on their way: others find room beside them."""
    return max(1, min(service.settings.slots // max(width, 1), service.settings.queue) // 4)


async def together(works: Sequence[Callable[[], Awaitable[T]]], most: int) -> list[T]:
    """The results of all, in order, with `most` of them at work. The first error, or the end of the wait, stops all."""
    found, waiting = dict[int, T](), iter(enumerate(works))

    async def work() -> None:
        for number, begin in waiting:
            found[number] = await begin()

    workers = [asyncio.ensure_future(work()) for _ in range(min(most, len(works)))]
    try:
        await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for worker in workers:
            worker.cancel()
        ends = await asyncio.gather(*workers, return_exceptions=True)
    for end in ends:
        if isinstance(end, BaseException) and not isinstance(end, asyncio.CancelledError):
            raise end
    return [found[number] for number in range(len(works))]
