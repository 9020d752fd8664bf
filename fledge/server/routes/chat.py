"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import uuid
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fledge.engine.events import FinishEvent, TextEvent, TextToken
from fledge.engine.structured.tool_calls import parse_tool_calls
from fledge.server.auth import Tenant, get_tenant
from fledge.server.concurrency import run_blocking
from fledge.server.errors import ApiError
from fledge.server.generation import Generation, GenerationParams, limit_sampling
from fledge.server.prompts import compile_constraint, encode_turns, find_template, make_chat_params, to_turns
from fledge.server.responses import FINISH_REASONS, Reply, ResponseChoice, ResponseHeader, format_chat_logprobs
from fledge.server.schema import ChatRequest
from fledge.server.service import Service, get_service
from fledge.tokenizer import Tokenizer

router = APIRouter()

TOOL_CALL_START = "<tool_call>"

GRAMMAR_COMPLETE = ("eos", "complete")
"""Finish reasons after which a tool call cannot be incomplete."""


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation. With `stream`, the answer is sent as server-sent events."""
    service, tenant = get_service(request), get_tenant(request)
    service.check_model(body.model)
    generation = Generation(service, tenant, await make_params(service, tenant, body))
    choices = [ChatChoice(index, body, service.llm.tokenizer) for index in range(body.n)]
    header = ResponseHeader("chat.completion", service.model_name)
    extra_fields = {"system_fingerprint": None}
    reply = Reply(header, [generation], [choices], include_usage=body.include_usage, extra_fields=extra_fields)
    return await reply.respond(request, stream=body.stream)


async def make_params(service: Service, tenant: Tenant, body: ChatRequest) -> GenerationParams:
    """The parameters of the generation. Raises ApiError with the invalid field."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs")
    if body.tool_choice is not None and not body.tools:
        raise ApiError(400, "tool_choice needs tools", param="tool_choice")
    tokenizer = service.llm.tokenizer
    template = find_template(body.fledge.template, service.default_template)
    turns = to_turns(body.messages, template, body.tools if body.uses_tools else None)
    characters = sum(len(text) for _, text in turns)
    prompt = await run_blocking(characters, partial(encode_turns, turns, template, tokenizer))
    sampling = make_chat_params(body, template, service.settings.default_max_tokens)
    sampling = limit_sampling(sampling, body, tenant, service)
    constraint = None
    if body.tools or body.response_format or body.fledge.regex:
        constraint = await asyncio.to_thread(lambda: compile_constraint(body, service.grammar_vocabulary))
    return GenerationParams(
        prompt,
        sampling,
        body.fledge,
        n=body.n,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=constraint,
        suffix_ids=tuple(tokenizer.encode(template.close_turn())),
        template=template.name,
        show_held=False,
    )


class ChatChoice(ResponseChoice):
    """One answer to a conversation: text without white space at both ends, and tool calls.

    Tool calls are emitted only when complete. Text of an incomplete call is never emitted.
    """

    def __init__(self, index: int, body: ChatRequest, tokenizer: Tokenizer) -> None:
        self._index, self._tokenizer = index, tokenizer
        self._has_logprobs = bool(body.logprobs)
        self._parses_calls = body.uses_tools
        self._requires_calls = body.tool_choice not in (None, "auto")
        self._text = ""
        self._tokens = list[TextToken]()
        self._tool_calls = list[dict[str, Any]]()
        self._is_call_cut = False  # whether generation ended within a tool call
        self._undecided = ""  # the end of the text, if it may be the start of a tool call
        self._held_space = ""  # white space that may turn out to be the end of the text
        self._call_text = ""  # everything from the first tool call on

    def start(self) -> dict[str, Any]:
        """The chunk with the role."""
        return self._make_chunk({"role": "assistant", "content": ""})

    def add(self, event: TextEvent | FinishEvent) -> list[dict[str, Any]]:
        """Chunks with new text; at the end, also with the tool calls and the finish reason."""
        if isinstance(event, FinishEvent):
            return self._finish(event)
        self._tokens += event.tokens
        text = self._add_text(event.text)
        logprobs = None
        if self._has_logprobs and event.tokens:
            logprobs = format_chat_logprobs(event.tokens, self._tokenizer)
        return [self._make_chunk({"content": text}, logprobs)] if text or logprobs else []

    def to_dict(self) -> dict[str, Any]:
        """The choice with the whole message."""
        message: dict[str, Any] = {"role": "assistant", "content": self._text, "refusal": None}
        if self._tool_calls:
            message |= {"content": self._text or None, "tool_calls": self._tool_calls}
        logprobs = format_chat_logprobs(self._tokens, self._tokenizer) if self._has_logprobs else None
        return {
            "index": self._index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self._finish_reason,
        }

    def _finish(self, event: FinishEvent) -> list[dict[str, Any]]:
        self.finish_event = event
        text = self._parse_tool_calls(event) if self._parses_calls else ""
        chunks = [self._make_chunk({"content": text})] if text else []
        if self._tool_calls:
            calls = [{"index": index, **call} for index, call in enumerate(self._tool_calls)]
            chunks.append(self._make_chunk({"tool_calls": calls}))
        return [*chunks, self._make_chunk({}) | {"finish_reason": self._finish_reason}]

    def _parse_tool_calls(self, event: FinishEvent) -> str:
        """Parse the text from the first tool call on. Returns the text that can be emitted now."""
        rest, calls = parse_tool_calls(self._call_text or self._undecided)
        if event.reason not in GRAMMAR_COMPLETE:
            # A single "<" may be text; more characters of the tag are almost certainly the start of a call.
            self._is_call_cut = bool(rest) and (bool(self._call_text) or self._requires_calls or len(rest) > 1)
        self._tool_calls = [
            {
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in calls
        ]
        return "" if self._is_call_cut else self._strip(rest)

    @property
    def _finish_reason(self) -> str:
        """For complete calls that are followed by an incomplete one, the reason why generation ended."""
        assert self.finish_event is not None
        if self._tool_calls and not self._is_call_cut:
            return "tool_calls"
        return FINISH_REASONS[self.finish_event.reason]

    def _add_text(self, text: str) -> str:
        """Add text. Returns the text that can be emitted now."""
        if not self._parses_calls:
            return self._strip(text)
        if self._call_text:
            self._call_text += text
            return ""
        text = self._undecided + text
        start = text.find(TOOL_CALL_START)
        if start >= 0:
            self._undecided, self._call_text = "", text[start:]
        else:
            sizes = range(len(TOOL_CALL_START) - 1, -1, -1)
            start = len(text) - next(size for size in sizes if text.endswith(TOOL_CALL_START[:size]))
            self._undecided = text[start:]
        return self._strip(text[:start])

    def _strip(self, text: str) -> str:
        """Add text that contains no tool call. Returns what is not white space at the start or the end."""
        text = self._held_space + text
        if not self._text:
            text = text.lstrip()
        stripped = text.rstrip()
        self._held_space = text[len(stripped) :]
        self._text += stripped
        return stripped

    def _make_chunk(self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
