"""POST /v1/completions: text or token ids, and their continuations."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fledge.core.errors import FledgeError
from fledge.engine.events import Event, FinishEvent, TextEvent, TextToken
from fledge.engine.structured.grammar import Constraint, compile_regex
from fledge.server.access import service_of, tenant_of
from fledge.server.auth import Tenant
from fledge.server.concurrency import at_once, encoded, together, unhindered
from fledge.server.errors import ApiError, api_error
from fledge.server.generation import (
    ConcurrencySlot,
    EventStream,
    Generation,
    GenerationParams,
    check_length,
    unless_gone,
    with_limits,
)
from fledge.server.prompts import ChatPrompt, completion_params
from fledge.server.responses import DONE, REASONS, WAITING, ResponseHeader, event, text_logprobs, usage
from fledge.server.schema import CompletionRequest
from fledge.server.service import Service

router = APIRouter()

MOST_PROMPTS = 128

SCORE_LENGTH = 50
"""Characters, about, that one scored token takes in an answer."""


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """What follows each prompt, whole or in pieces; the prompts of a stream come one after the other."""
    service, tenant = service_of(request), tenant_of(request)
    service.check_model(body.model)
    orders = await orders_of(service, tenant, body)
    header = ResponseHeader("text_completion", service.name)
    async with AsyncExitStack() as stack:
        visit = await stack.enter_async_context(ConcurrencySlot(tenant))
        exchanges = [Generation(service, tenant, each, visit) for each in orders]
        replies = [CompletionReply(service, body, each, number) for number, each in enumerate(exchanges)]
        if body.stream:
            await unless_gone(request, replies[0].open())
            stack.pop_all()  # the stream closes it
            return EventStream(pieces(header, body, replies), [*exchanges, visit])
        most = 1 if scored(body) or body.fledge.session is not None else at_once(service, body.n)
        await unless_gone(request, together([reply.whole for reply in replies], most))
    return await unhindered(sum(reply.size for reply in replies), partial(_answer, header, replies))


def _answer(header: ResponseHeader, replies: list[CompletionReply]) -> Response:
    choices = [choice for reply in replies for choice in reply.choices()]
    fledge = [reply.exchange.summary() for reply in replies]
    return JSONResponse(header.body(choices, usage=_usage(replies), fledge=fledge[0] if len(fledge) == 1 else fledge))


def scored(body: CompletionRequest) -> bool:
    """Whether the likelihoods of the prompt are asked for."""
    return body.echo and body.logprobs is not None


def prompts_of(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts in a body, whichever of the four shapes they have."""
    given: Any = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not 1 <= len(given) <= MOST_PROMPTS:
        raise ApiError(400, f"{len(given)} prompts; give 1 to {MOST_PROMPTS}", param="prompt")
    return list(given)


async def orders_of(service: Service, tenant: Tenant, body: CompletionRequest) -> list[GenerationParams]:
    """What a body asks for, prompt by prompt. Raises ApiError with the field at fault."""
    if body.best_of not in (None, body.n):
        raise ApiError(400, "best_of is not supported; it may only equal n", param="best_of")
    if body.fledge.template is not None:
        raise ApiError(400, "a completion has no template; use /v1/chat/completions", param="fledge.template")
    params = completion_params(body, service.settings.max_tokens, body.max_tokens or None)
    params = with_limits(params, tenant, service, body.max_tokens)
    eos = service.llm.tokenizer.eos_id
    begin = (eos,) if eos >= 0 else ()  # of a document: what an empty prompt stands for
    prompts = [ids or begin for ids in await encoded(service, prompts_of(body), "prompt")]
    check_length(service, max(map(len, prompts)), "prompt")
    constraint = await _constraint(service, body.fledge.regex)
    return [
        GenerationParams(
            ChatPrompt(ids, (len(ids),)),
            params,
            body.fledge,
            n=0 if body.max_tokens == 0 else body.n,
            logprobs=body.logprobs,
            constraint=constraint,
            scored=body.logprobs if scored(body) else None,
        )
        for ids in prompts
    ]


async def _constraint(service: Service, pattern: str | None) -> Constraint | None:
    """What the answers must match: compiled once, beside the event loop; each text takes a copy."""
    if pattern is None:
        return None
    try:
        return await asyncio.to_thread(lambda: compile_regex(pattern, service.vocabulary))
    except FledgeError as error:
        raise api_error(error, "fledge.regex") from None


@dataclass
class CompletionChoice:
    """One choice."""

    text: str = ""
    tokens: list[TextToken] = field(default_factory=list)
    end: FinishEvent | None = None


class CompletionReply:
    """What follows one prompt."""

    def __init__(self, service: Service, body: CompletionRequest, exchange: Generation, number: int) -> None:
        self.exchange, self.texts = exchange, [CompletionChoice() for _ in range(body.n)]
        self._service, self._body, self._number = service, body, number
        self._first: list[Event] = []

    async def whole(self) -> None:
        """Have everything written."""
        async with self.exchange as exchange:
            async for events in exchange.events:
                for found in events:
                    self.take(found)

    async def open(self) -> None:
        """Wait for the first events, while an error can still be told by the status."""
        self._first = await self.exchange.open()

    @cached_property
    def _echo(self) -> str:
        """What is repeated of the prompt; where a deadline cut its scoring, the part that has scores."""
        if not self._body.echo:
            return ""
        ids, known = self.exchange.order.prompt.ids, self.exchange.known
        return self._service.llm.tokenizer.decode(ids[: len(known)] if known else ids)

    async def stream(self) -> AsyncIterator[list[Event]]:
        """All events, after `open`."""
        try:
            yield self._first
            async for events in self.exchange.events:
                yield events
        finally:  # the next prompt of the stream must not wait for this one's place
            await self.exchange.close()

    def take(self, found: Event) -> CompletionChoice:
        """Add an event to the text it belongs to."""
        assert isinstance(found, TextEvent | FinishEvent)
        text = self.texts[found.choice]
        if isinstance(found, FinishEvent):
            text.end = found
        else:
            text.text += found.text
            text.tokens += found.tokens
        return text

    def choices(self) -> list[dict[str, Any]]:
        """The finished texts; of a prompt that was only read, the prompt."""
        for text in self.texts:
            text.end = text.end or self.texts[0].end
        return [
            self.choice(number, self._echo + text.text, [*self.exchange.known, *text.tokens], text.end)
            for number, text in enumerate(self.texts)
        ]

    def choice(
        self, number: int, text: str, tokens: list[TextToken], end: FinishEvent | None, offset: int = 0
    ) -> dict[str, Any]:
        """One choice, or a piece of it."""
        wanted = self._body.logprobs is not None
        return {
            "index": self._number * self._body.n + number,
            "text": text,
            "logprobs": text_logprobs(tokens, self._service.llm.tokenizer, offset) if wanted else None,
            "finish_reason": None if end is None else "length" if not end.sampled_tokens else REASONS[end.reason],
        }

    def pieces(self, found: Event) -> list[dict[str, Any]]:
        """An event as choices of the stream."""
        assert isinstance(found, TextEvent | FinishEvent)
        text = self.texts[found.choice]
        offset = len(self._echo) + len(text.text)
        self.take(found)
        if isinstance(found, FinishEvent):
            return [self.choice(found.choice, "", [], found)]
        return [self.choice(found.choice, found.text, list(found.tokens), None, offset)]

    @property
    def size(self) -> int:
        """About how many characters the scores of the prompt come to."""
        return SCORE_LENGTH * len(self.exchange.known) * len(self.texts)

    def opening(self, header: ResponseHeader) -> bytes:
        """The beginning of a stream that repeats the prompt."""
        choices = [self.choice(number, self._echo, self.exchange.known, None) for number in range(len(self.texts))]
        return b"".join(event(header.body([choice], stream=True)) for choice in choices)


async def pieces(
    header: ResponseHeader, body: CompletionRequest, replies: list[CompletionReply]
) -> AsyncIterator[bytes]:
    """The stream; the first reply has been opened."""
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    try:
        for reply in replies:
            if reply is not replies[0]:
                await reply.open()
            if body.echo:
                yield await unhindered(reply.size, partial(reply.opening, header))
            async for events in reply.stream():
                bodies = [header.body([choice], stream=True) for found in events for choice in reply.pieces(found)]
                if bodies and reply is replies[-1] and len(reply.exchange.ends) == body.n and not with_usage:
                    bodies[-1]["fledge"] = reply.exchange.summary()
                yield b"".join(map(event, bodies)) if events else WAITING
        if with_usage:
            rest = {"usage": _usage(replies), "fledge": replies[-1].exchange.summary()}
            yield event(header.body([], stream=True, **rest))
        yield DONE
    except ApiError as error:
        yield event(error.body)


def _usage(replies: list[CompletionReply]) -> dict[str, Any]:
    prompt = sum(reply.exchange.read for reply in replies)
    cached = sum(reply.exchange.cached for reply in replies)
    return usage(prompt, [end for reply in replies for end in reply.exchange.ends], cached)
