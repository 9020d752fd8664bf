"""Responses for generated text: bodies and server-sent events of the OpenAI API."""

from __future__ import annotations

import codecs
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fledge.engine.events import FinishEvent, TextEvent, TextToken
from fledge.server.concurrency import ConcurrencySlot, cancel_on_disconnect, gather_limited, run_blocking
from fledge.server.errors import ApiError
from fledge.server.generation import Generation
from fledge.tokenizer import Tokenizer

FINISH_REASONS = {"stop": "stop", "eos": "stop", "complete": "stop", "length": "length", "deadline": "length"}
"""Maps the finish reasons of a completion to those of the OpenAI API."""

SCORED_TOKEN_CHARACTERS = 50
"""Approximate length of a prompt token with its log probability in a response."""

JSON_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

LINE_SEPARATORS = {ord(letter): f"\\u{ord(letter):04x}" for letter in "\x85\u2028\u2029"}
"""Some clients, such as httpx's `iter_lines`, end a line at these characters, although the protocol does not."""

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": still reading\n\n"
"""A comment, so that proxies and clients do not time out while there is no text."""


@dataclass
class ResponseHeader:
    """The fields that the body and all stream events of a response start with."""

    object: str  # "chat.completion" or "text_completion"
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def make_body(self, choices: list[dict[str, Any]], *, stream: bool = False, **fields: Any) -> dict[str, Any]:
        """The body of the response. stream: of an event."""
        is_chat = self.object == "chat.completion"
        return {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{self.id}",
            "object": self.object + (".chunk" if stream and is_chat else ""),
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **fields,
        }


class ResponseChoice(ABC):
    """One choice of a response: collects its events, and formats them for a stream or as a whole."""

    finish_event: FinishEvent | None = None

    @abstractmethod
    def start(self) -> dict[str, Any] | None:
        """The first chunk of the stream, or None if there is none. Called when the first events have arrived."""

    @abstractmethod
    def add(self, event: TextEvent | FinishEvent) -> list[dict[str, Any]]:
        """Collect an event and return its chunks for the stream."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The complete choice."""


class Reply:
    """The response to a request for text: one generation per prompt, each with its choices."""

    def __init__(
        self,
        header: ResponseHeader,
        generations: Sequence[Generation],
        choices: Sequence[Sequence[ResponseChoice]],
        *,
        include_usage: bool,
        extra_fields: dict[str, Any] | None = None,
    ) -> None:
        """choices: of each generation. include_usage: at the end of a stream. extra_fields: of the body."""
        self._header, self._generations, self._choices = header, generations, choices
        self._include_usage, self._extra_fields = include_usage, extra_fields or {}

    async def respond(self, request: Request, *, stream: bool, max_running: int = 1) -> Response:
        """The response, complete or as a stream. max_running: generations that run concurrently if it is complete."""
        async with AsyncExitStack() as stack:
            slot = await stack.enter_async_context(ConcurrencySlot(self._generations[0].tenant))
            if stream:
                first_events = await cancel_on_disconnect(request, self._generations[0].open())
                stack.pop_all()  # the EventStream closes the slot
                return EventStream(self._stream(first_events), [*self._generations, slot])
            functions = [partial(self._collect, index) for index in range(len(self._generations))]
            await cancel_on_disconnect(request, gather_limited(functions, max_running))
        length = sum(self._scored_length(index) for index in range(len(self._generations)))
        return await run_blocking(length, self._to_response)

    async def _collect(self, index: int) -> None:
        """Run one generation and collect its events."""
        choices = self._choices[index]
        async with self._generations[index] as generation:
            async for events in generation.events:
                for event in events:
                    choices[event.choice].add(event)

    def _to_response(self) -> Response:
        choices = [choice.to_dict() for choices in self._choices for choice in choices]
        summaries = [generation.summarize() for generation in self._generations]
        summary = summaries[0] if len(summaries) == 1 else summaries
        body = self._header.make_body(choices, usage=self._usage(), fledge=summary, **self._extra_fields)
        return JSONResponse(body)

    async def _stream(self, first_events: list[TextEvent | FinishEvent]) -> AsyncIterator[bytes]:
        """The events of the stream. The generations follow each other; the first one is open."""
        try:
            for index, generation in enumerate(self._generations):
                if index:
                    first_events = await generation.open()
                try:
                    yield await run_blocking(self._scored_length(index), partial(self._encode_start, index))
                    yield self._encode_events(index, first_events)
                    async for events in generation.events:
                        yield self._encode_events(index, events)
                finally:  # the next prompt may need the same session, or the slot of this request in the queue
                    await generation.close()
            if self._include_usage:
                fields = {"usage": self._usage(), "fledge": self._generations[-1].summarize()}
                yield encode_event(self._header.make_body([], stream=True, **fields))
            yield DONE
        except ApiError as error:
            yield encode_event(error.body)

    def _encode_start(self, index: int) -> bytes:
        chunks = [choice.start() for choice in self._choices[index]]
        return b"".join(self._encode_chunk(chunk) for chunk in chunks if chunk is not None)

    def _encode_events(self, index: int, events: list[TextEvent | FinishEvent]) -> bytes:
        """The events of one generation as bytes. The last event of the last one contains the summary."""
        if not events:
            return KEEP_ALIVE
        choices, encoded = self._choices[index], list[bytes]()
        is_last = index == len(self._generations) - 1
        for event in events:
            chunks = choices[event.choice].add(event)
            has_ended = is_last and all(choice.finish_event is not None for choice in choices)
            for number, chunk in enumerate(chunks, 1):
                has_summary = has_ended and not self._include_usage and number == len(chunks)
                encoded.append(self._encode_chunk(chunk, self._generations[index] if has_summary else None))
        return b"".join(encoded)

    def _encode_chunk(self, chunk: dict[str, Any], summarized: Generation | None = None) -> bytes:
        fields = {} if summarized is None else {"fledge": summarized.summarize()}
        return encode_event(self._header.make_body([chunk], stream=True, **fields))

    def _usage(self) -> dict[str, Any]:
        prompt_tokens = sum(generation.num_prompt_tokens for generation in self._generations)
        cached_tokens = sum(generation.cached_tokens for generation in self._generations)
        finish_events = [event for generation in self._generations for event in generation.finish_events]
        return make_usage(prompt_tokens, finish_events, cached_tokens)

    def _scored_length(self, index: int) -> int:
        """Approximate number of characters of the prompt tokens with log probabilities."""
        return SCORED_TOKEN_CHARACTERS * len(self._generations[index].prompt_tokens) * len(self._choices[index])


class EventStream(StreamingResponse):
    """Server-sent events. Closes its generations when it ends, even if it never started."""

    def __init__(self, content: AsyncIterator[bytes], to_close: Sequence[Generation | ConcurrencySlot]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._to_close = to_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            for each in self._to_close:
                await each.close()


def make_usage(prompt_tokens: int, finish_events: Iterable[FinishEvent], cached_tokens: int) -> dict[str, Any]:
    """The field `usage`."""
    sampled_tokens = sum(event.sampled_tokens for event in finish_events)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": sampled_tokens,
        "total_tokens": prompt_tokens + sampled_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def encode_event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    text = JSON_ENCODER.encode(body)
    if not text.isascii():
        text = text.translate(LINE_SEPARATORS)
    return b"data: " + text.encode() + b"\n\n"


def format_chat_logprobs(tokens: Iterable[TextToken], tokenizer: Tokenizer) -> dict[str, Any]:
    """The field `logprobs` of a chat choice."""
    content = []
    for token in tokens:
        assert token.logprob is not None
        alternatives = [_format_logprob(id, logprob, tokenizer) for id, logprob in token.logprob.top]
        content.append({**_format_logprob(token.id, token.logprob.logprob, tokenizer), "top_logprobs": alternatives})
    return {"content": content, "refusal": None}


def _format_logprob(id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.decode_bytes([id])
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}


def format_completion_logprobs(tokens: Iterable[TextToken], tokenizer: Tokenizer, offset: int) -> dict[str, Any]:
    """The field `logprobs` of a completion choice. offset: number of characters before the first token."""
    names, logprobs, alternatives = list[str](), list[float | None](), list[dict[str, float] | None]()
    offsets, decoder = list[int](), codecs.getincrementaldecoder("utf-8")("replace")
    for id, logprob in tokens:
        name = _token_name(id, tokenizer)
        names.append(name)
        offsets.append(offset)
        offset += len(decoder.decode(tokenizer.decode_bytes([id])))
        if logprob is None:  # the first token of a prompt
            logprobs.append(None)
            alternatives.append(None)
        else:  # the alternatives always include the token itself
            logprobs.append(logprob.logprob)
            top = {_token_name(other, tokenizer): value for other, value in logprob.top}
            alternatives.append(top | {name: logprob.logprob})
    return {"tokens": names, "token_logprobs": logprobs, "top_logprobs": alternatives, "text_offset": offsets}


def _token_name(id: int, tokenizer: Tokenizer) -> str:
    """The text of a token, or its bytes as in the OpenAI API if it is a part of a character."""
    data = tokenizer.decode_bytes([id])
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
