"""A server in a thread of the test, on a free port, and helpers for requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
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
CUE = TOKENIZER.id_of(":")
IDENTITY = "0" * 64


def fake(*replies: str) -> LLM:
    """A model that answers the first question with the first reply, the second with the second (a colon is a cue)."""
    return LLM(FakeModel([TOKENIZER.encode(reply) for reply in replies], CUE, TOKENIZER.vocab_size), TOKENIZER, "fake")


def random_model() -> LLM:
    """A real small model with random weights."""
    return LLM(random_finch(TOKENIZER.vocab_size), TOKENIZER, "random")


class Server:
    """A running server."""

    def __init__(self, service: Service, url: str) -> None:
        self.service, self.url = service, url
        self.http = httpx.Client(base_url=url, timeout=60)

    def post(self, path: str, body: Any, key: str | None = None) -> Any:
        """The answer to a POST; its JSON, whatever its status."""
        return self.http.post(path, json=body, headers=_headers(key))

    def ask(self, text: str, key: str | None = None, **more: Any) -> dict[str, Any]:
        """An answered chat request."""
        answer = self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **more}, key)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def stream(self, path: str, body: dict[str, Any], key: str | None = None) -> Iterator[dict[str, Any]]:
        """The events of a stream as they come, up to [DONE]."""
        with self.http.stream("POST", path, json={**body, "stream": True}, headers=_headers(key)) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))
        raise AssertionError("the stream ended without [DONE]")


def _headers(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


def key_file(folder: Path, text: str) -> Path:
    """A file of keys in a folder."""
    path = folder / "keys.toml"
    path.write_text(text, encoding="utf-8")
    return path


@contextmanager
def serving(llm: LLM, folder: Path | None = None, identity: str = IDENTITY, **settings: Any) -> Iterator[Server]:
    """A server for one model; it has stopped when this is left."""
    wanted = replace(
        ServerSettings(folder=folder, drain_seconds=5.0, cache_memory=1 << 24, snapshot_interval=16), **settings
    )
    service = Service(llm, wanted, identity)
    config = uvicorn.Config(create_app(service), port=0, log_level="error", timeout_graceful_shutdown=5, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
        port = server.servers[0].sockets[0].getsockname()[1]
        running = Server(service, f"http://127.0.0.1:{port}")
        with running.http:
            yield running
    finally:
        server.should_exit = True
        thread.join(timeout=30)
    assert not thread.is_alive() and not service.async_engine.is_alive
