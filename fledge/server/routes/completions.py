"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from functools import cached_property
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fledge.core.errors import FledgeError
from fledge.engine.events import FinishEvent, TextEvent, TextToken
from fledge.engine.structured.grammar import Constraint, compile_regex
from fledge.server.auth import Tenant, get_tenant
from fledge.server.concurrency import max_concurrency
from fledge.server.errors import ApiError, to_api_error
from fledge.server.generation import Generation, GenerationParams, check_prompt_length, limit_sampling
from fledge.server.prompts import EncodedPrompt, encode_texts, make_completion_params
from fledge.server.responses import (
    FINISH_REASONS,
    Reply,
    ResponseChoice,
    ResponseHeader,
    format_completion_logprobs,
)
from fledge.server.schema import CompletionRequest
from fledge.server.service import Service, get_service

router = APIRouter()

MAX_PROMPTS = 128


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue each prompt. With `stream`, the completions of the prompts are sent one prompt after the other."""
    service, tenant = get_service(request), get_tenant(request)
    service.check_model(body.model)
    generations = [Generation(service, tenant, params) for params in await make_params(service, tenant, body)]
    choices = [
        [CompletionChoice(number * body.n + index, body, generation) for index in range(body.n)]
        for number, generation in enumerate(generations)
    ]
    header = ResponseHeader("text_completion", service.model_name)
    reply = Reply(header, generations, choices, include_usage=body.include_usage)
    is_sequential = _has_prompt_logprobs(body) or body.fledge.session is not None
    max_running = 1 if is_sequential else max_concurrency(service.settings, body.n)
    return await reply.respond(request, stream=body.stream, max_running=max_running)


async def make_params(service: Service, tenant: Tenant, body: CompletionRequest) -> list[GenerationParams]:
    """The parameters of the generation for each prompt. Raises ApiError with the invalid field."""
    if body.best_of not in (None, body.n):
        raise ApiError(400, "best_of is not supported; it must equal n", param="best_of")
    if body.fledge.template is not None:
        message = "a completion has no chat template; use /v1/chat/completions"
        raise ApiError(400, message, param="fledge.template")
    sampling = make_completion_params(body, service.settings.default_max_tokens)
    sampling = limit_sampling(sampling, body, tenant, service)
    eos_id = service.llm.tokenizer.eos_id
    document_start = (eos_id,) if eos_id >= 0 else ()  # replaces an empty prompt
    encoded = await encode_texts(service.llm, _split_prompts(body), "prompt")
    prompts = [ids or document_start for ids in encoded]
    check_prompt_length(service, max(map(len, prompts)), "prompt")
    constraint = await _compile_regex(service, body.fledge.regex)
    return [
        GenerationParams(
            EncodedPrompt(ids, (len(ids),)),
            sampling,
            body.fledge,
            n=0 if body.max_tokens == 0 else body.n,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if _has_prompt_logprobs(body) else None,
            constraint=constraint,
        )
        for ids in prompts
    ]


def _has_prompt_logprobs(body: CompletionRequest) -> bool:
    return body.echo and body.logprobs is not None


def _split_prompts(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a body: one or several, as text or token ids."""
    prompts: Any = body.prompt
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        prompts = [prompts]
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise ApiError(400, f"there are {len(prompts)} prompts; give 1 to {MAX_PROMPTS}", param="prompt")
    return list(prompts)


async def _compile_regex(service: Service, pattern: str | None) -> Constraint | None:
    """The constraint of the completions, compiled once in a thread. Each completion uses a copy."""
    if pattern is None:
        return None
    try:
        return await asyncio.to_thread(lambda: compile_regex(pattern, service.grammar_vocabulary))
    except FledgeError as error:
        raise to_api_error(error, "fledge.regex") from None


class CompletionChoice(ResponseChoice):
    """One completion of a prompt."""

    def __init__(self, index: int, body: CompletionRequest, generation: Generation) -> None:
        self._index, self._generation = index, generation
        self._echo, self._has_logprobs = body.echo, body.logprobs is not None
        self._tokenizer = generation.service.llm.tokenizer
        self._text = ""
        self._tokens = list[TextToken]()

    def start(self) -> dict[str, Any] | None:
        """The chunk with the prompt, if it is echoed."""
        if not self._echo:
            return None
        return self._make_chunk(self._echoed_prompt, self._generation.prompt_tokens)

    def add(self, event: TextEvent | FinishEvent) -> list[dict[str, Any]]:
        """A chunk with new text or with the finish reason."""
        if isinstance(event, FinishEvent):
            self.finish_event = event
            return [self._make_chunk("", [], event)]
        offset = len(self._echoed_prompt) + len(self._text)
        self._text += event.text
        self._tokens += event.tokens
        return [self._make_chunk(event.text, list(event.tokens), offset=offset)]

    def to_dict(self) -> dict[str, Any]:
        """The choice with the whole text."""
        # If the prompt was only read, its end is that of all choices.
        finish_event = self.finish_event or self._generation.finish_events[0]
        tokens = [*self._generation.prompt_tokens, *self._tokens]
        return self._make_chunk(self._echoed_prompt + self._text, tokens, finish_event)

    @cached_property
    def _echoed_prompt(self) -> str:
        """The prompt, if it is echoed. If a deadline passed before it was scored completely, only the scored part."""
        if not self._echo:
            return ""
        ids, scored = self._generation.params.prompt.ids, self._generation.prompt_tokens
        return self._tokenizer.decode(ids[: len(scored)] if scored else ids)

    def _make_chunk(
        self, text: str, tokens: list[TextToken], finish_event: FinishEvent | None = None, offset: int = 0
    ) -> dict[str, Any]:
        """A choice, or a part of it. offset: number of characters before `tokens`."""
        logprobs = format_completion_logprobs(tokens, self._tokenizer, offset) if self._has_logprobs else None
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": _finish_reason(finish_event)}


def _finish_reason(event: FinishEvent | None) -> str | None:
    if event is None:
        return None
    return FINISH_REASONS[event.reason] if event.sampled_tokens else "length"
