"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fledge.engine.events import Event, FinishEvent, TextEvent
from fledge.server.access import service_of, tenant_of
from fledge.server.auth import Tenant
from fledge.server.concurrency import unhindered
from fledge.server.errors import ApiError
from fledge.server.generation import EventStream, Generation, GenerationParams, unless_gone, with_limits
from fledge.server.prompts import NO_TOOLS, chat_params, closing, constraint_of, prompt, template_of, turns
from fledge.server.responses import DONE, WAITING, ChatCompletionStream, ResponseHeader, chat_logprobs, event, usage
from fledge.server.schema import ChatRequest
from fledge.server.service import Service

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request) -> Response:
    """An answer to messages, whole or in pieces."""
    service, tenant = service_of(request), tenant_of(request)
    service.check_model(body.model)
    reply = ChatReply(service, body, Generation(service, tenant, await order(service, tenant, body)))
    if not body.stream:
        return JSONResponse(await unless_gone(request, reply.whole()))
    await unless_gone(request, reply.open())
    return EventStream(reply.pieces(), [reply.exchange])


async def order(service: Service, tenant: Tenant, body: ChatRequest) -> GenerationParams:
    """What a body asks for. Raises ApiError with the field at fault."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs")
    if body.tool_choice is not None and not body.tools:
        raise ApiError(400, "tool_choice needs tools", param="tool_choice")
    template = template_of(body.fledge.template, service.template)
    tools = body.tools if body.tool_choice != NO_TOOLS else None
    tokenizer = service.llm.tokenizer
    messages = turns(body.messages, template, tools)
    size = sum(len(text) for _, text in messages)
    ids = await unhindered(size, partial(prompt, messages, template, tokenizer))
    wanted = body.max_completion_tokens or body.max_tokens
    params = with_limits(chat_params(body, template, service.settings.max_tokens), tenant, service, wanted)
    return GenerationParams(
        ids,
        params,
        body.fledge,
        n=body.n,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=await asyncio.to_thread(lambda: constraint_of(body, service.vocabulary)) if _bound(body) else None,
        closing=closing(template, tokenizer),
        template=template.name,
        show_held=False,
    )


def _bound(body: ChatRequest) -> bool:
    return bool(body.tools or body.response_format or body.fledge.regex)


class ChatReply:
    """The answer to one chat request as it comes."""

    def __init__(self, service: Service, body: ChatRequest, exchange: Generation) -> None:
        self.header = ResponseHeader("chat.completion", service.name)
        calls = bool(body.tools) and body.tool_choice != NO_TOOLS
        only = body.tool_choice not in (None, "auto")
        self.answers = [ChatCompletionStream(calls=calls, only=only) for _ in range(body.n)]
        self._body, self.exchange, self._tokenizer = body, exchange, service.llm.tokenizer
        self._first: list[Event] = []

    async def whole(self) -> dict[str, Any]:
        """The body."""
        async with self.exchange as exchange:
            async for events in exchange.events:
                for found in events:
                    self._take(found)
        choices = [self._choice(number, answer) for number, answer in enumerate(self.answers)]
        return self.header.body(choices, usage=self._usage(), fledge=exchange.summary(), system_fingerprint=None)

    async def open(self) -> None:
        """Wait for the first events, while an error can still be told by the status."""
        self._first = await self.exchange.open()

    async def pieces(self) -> AsyncIterator[bytes]:
        """The stream; it begins after `open`."""
        try:
            for number in range(len(self.answers)):
                yield self._chunk(number, {"role": "assistant", "content": ""})
            yield b"".join(self._chunks(self._first))
            async for events in self.exchange.events:
                yield b"".join(self._chunks(events)) if events else WAITING
            if self._body.stream_options is not None and self._body.stream_options.include_usage:
                rest = {"usage": self._usage(), "fledge": self.exchange.summary()}
                yield event(self.header.body([], stream=True, **rest))
            yield DONE
        except ApiError as error:
            yield event(error.body)

    def _take(self, found: Event) -> str:
        """The text that an event lets be shown."""
        assert isinstance(found, TextEvent | FinishEvent)
        answer = self.answers[found.choice]
        return answer.take(found) if isinstance(found, TextEvent) else answer.finish(found)

    def _chunks(self, events: list[Event]) -> list[bytes]:
        made = []
        for found in events:
            text = self._take(found)
            assert isinstance(found, TextEvent | FinishEvent)
            answer = self.answers[found.choice]
            logprobs = None
            if self._body.logprobs and isinstance(found, TextEvent) and found.tokens:
                logprobs = chat_logprobs(found.tokens, self._tokenizer)
            if text or logprobs:
                made.append(self._chunk(found.choice, {"content": text}, logprobs))
            if isinstance(found, FinishEvent):
                if answer.calls:
                    calls = [{"index": number, **call} for number, call in enumerate(answer.calls)]
                    made.append(self._chunk(found.choice, {"tool_calls": calls}))
                made.append(self._last_chunk(found.choice, answer))
        return made

    def _chunk(self, number: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> bytes:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        return event(self.header.body([choice], stream=True))

    def _last_chunk(self, number: int, answer: ChatCompletionStream) -> bytes:
        choice = {"index": number, "delta": {}, "logprobs": None, "finish_reason": answer.reason}
        last = all(answer.end is not None for answer in self.answers)
        with_usage = self._body.stream_options is not None and self._body.stream_options.include_usage
        more = {"fledge": self.exchange.summary()} if last and not with_usage else {}
        return event(self.header.body([choice], stream=True, **more))

    def _choice(self, number: int, answer: ChatCompletionStream) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.calls:
            message |= {"content": answer.text or None, "tool_calls": answer.calls}
        logprobs = chat_logprobs(answer.tokens, self._tokenizer) if self._body.logprobs else None
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": answer.reason}

    def _usage(self) -> dict[str, Any]:
        ends = [answer.end for answer in self.answers if answer.end is not None]
        return usage(len(self.exchange.order.prompt.ids), ends, self.exchange.cached)
