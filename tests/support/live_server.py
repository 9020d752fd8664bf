"""A server in a thread of the test, on a free port, with an HTTP client and models that answer quickly."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import ByteTokenizer, FakeModel, random_finch

from fledge.engine.llm.llm import LLM

pytest.importorskip("fastapi", reason="the server needs fastapi")
pytest.importorskip("httpx2", reason="the tests of the server need httpx2")

import httpx2 as httpx
import uvicorn

from fledge.server.app import create_app
from fledge.server.service import Service
from fledge.server.settings import ServerSettings

TOKENIZER = ByteTokenizer("\n\n", " he", "llo", b"\xe5\xa5", "User:")
CUE = TOKENIZER.get_id(":")
IDENTITY = "0" * 64

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
STATES = "/v1/fledge/states"
HI: list[Any] = [{"role": "user", "content": "Hi"}]
ENDLESS: dict[str, Any] = {"prompt": "Hi", "max_tokens": 60_000, "fledge": {"ban": [0]}}
"""A completion that only `max_tokens` ends, because the end-of-text id is banned."""


def scripted_llm(*replies: str) -> LLM:
    """A model that answers the first question with the first reply, and so on. Every colon counts as a question."""
    model = FakeModel([TOKENIZER.encode(reply) for reply in replies], CUE, TOKENIZER.vocab_size)
    return LLM(model, TOKENIZER, "fake")


def random_llm() -> LLM:
    """A small real model with random weights."""
    return LLM(random_finch(TOKENIZER.vocab_size), TOKENIZER, "random")


class Server:
    """A running server."""

    def __init__(self, service: Service, url: str) -> None:
        self.service, self.url = service, url
        self.http = httpx.Client(base_url=url, timeout=60)

    def post(self, path: str, body: Any, key: str | None = None) -> Any:
        """The response to a POST request."""
        return self.http.post(path, json=body, headers=_make_headers(key))

    def ask(self, text: str, key: str | None = None, **fields: Any) -> dict[str, Any]:
        """The body of a successful chat response. fields: of the request."""
        response = self.post(CHAT, {"messages": [{"role": "user", "content": text}], **fields}, key)
        assert response.status_code == 200, response.text
        body: dict[str, Any] = response.json()
        return body

    def stream(self, path: str, body: dict[str, Any], key: str | None = None) -> Iterator[dict[str, Any]]:
        """The events of a stream as they arrive, up to [DONE]."""
        with self.http.stream("POST", path, json={**body, "stream": True}, headers=_make_headers(key)) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))
        raise AssertionError("the stream ended without [DONE]")

    @contextmanager
    def sending(self, path: str, body: dict[str, Any], size: int | None = None) -> Iterator[None]:
        """Send a request, or its head and the first `size` bytes of its body, and disconnect at the end."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}\r\n\r\n".encode() + data[:size])
            yield

    @property
    def is_idle(self) -> bool:
        """Whether no request is running, in the server or in the engine."""
        async_engine = self.service.async_engine
        return async_engine.num_requests == 0 and not async_engine.engine.busy


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.01)


def _make_headers(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


def write_key_file(folder: Path, text: str) -> Path:
    """Write a file with API keys."""
    path = folder / "keys.toml"
    path.write_text(text, encoding="utf-8")
    return path


@contextmanager
def serving(llm: LLM, folder: Path | None = None, identity: str = IDENTITY, **settings: Any) -> Iterator[Server]:
    """A server for a model, stopped at the end. settings: of ServerSettings."""
    defaults = ServerSettings(folder=folder, drain_seconds=5.0, cache_memory=1 << 24, snapshot_interval=16)
    service = Service(llm, replace(defaults, **settings), identity)
    config = uvicorn.Config(create_app(service), port=0, log_level="error", timeout_graceful_shutdown=5, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.001)
        port = server.servers[0].sockets[0].getsockname()[1]
        running = Server(service, f"http://127.0.0.1:{port}")
        with running.http:
            yield running
    finally:
        server.should_exit = True
        thread.join(timeout=30)
    assert not thread.is_alive() and not service.async_engine.is_alive
