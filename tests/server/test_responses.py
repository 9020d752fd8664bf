"""Server-sent events: their encoding, and streams that never start."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from fledge.server.responses import EventStream, encode_event


def test_an_event_is_one_line_for_every_client() -> None:
    text = "a\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029\u597d\U0001f426" + '"\\'
    event = encode_event({"text": text}).decode()
    assert event.endswith("\n\n") and len(event.rstrip("\n").splitlines()) == 1
    assert json.loads(event.removeprefix("data: ")) == {"text": text}
    assert "\u597d" in event, "letters are not escaped"


def test_a_stream_that_never_starts_closes_its_generations() -> None:
    """If the client disconnects before the first event, the generator never runs, and neither does its `finally`."""
    calls = list[str]()

    class Resource:
        async def close(self) -> None:
            calls.append("close")

    async def generate() -> AsyncIterator[bytes]:
        calls.append("generate")
        yield b""

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise OSError("disconnected")

    scope = {"type": "http", "asgi": {"spec_version": "2.4"}, "method": "POST", "path": "/", "headers": []}
    stream = EventStream(generate(), [Resource()])  # type: ignore[list-item]
    with pytest.raises(ClientDisconnect):
        asyncio.run(stream(scope, receive, send))
    assert calls == ["close"]
