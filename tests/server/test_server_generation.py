"""Requests are rejected before any work is done, and errors after the text are reported in streams too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import CHAT, COMPLETIONS, HI, STATES, Server, random_llm, serving

from fledge.core.errors import StateError

BOTH_ROUTES = pytest.mark.parametrize(
    ("path", "body"), [(CHAT, {"messages": HI, "max_tokens": 3}), (COMPLETIONS, {"prompt": "Hi", "max_tokens": 3})]
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(random_llm(), tmp_path) as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["a\nb", "\x07"])
@BOTH_ROUTES
def test_an_invalid_session_name(server: Server, path: str, body: dict[str, Any], name: str, stream: bool) -> None:
    response = server.post(path, {**body, "stream": stream, "fledge": {"session": name}})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "fledge.session")
    server.post(path, {**body, "fledge": {"session": "talk"}})
    requests_before = server.service.async_engine.engine.stats.requests
    response = server.post(path, {**body, "fledge": {"session": "talk", "branch": name}})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "fledge.branch")
    assert server.service.async_engine.engine.stats.requests == requests_before


def test_a_text_for_a_state_with_an_invalid_name_is_not_read(server: Server) -> None:
    response = server.post(STATES, {"text": "A long book.", "name": "a\nb"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "name")
    assert server.service.async_engine.engine.stats.requests == 0


def test_a_text_is_not_read_if_the_server_saves_no_states() -> None:
    with serving(random_llm()) as server:
        response = server.post(STATES, {"text": "A long book."})
        assert response.status_code == 400 and "--folder" in response.json()["error"]["message"]
        assert server.service.async_engine.engine.stats.requests == 0


@BOTH_ROUTES
def test_an_error_at_the_end_is_reported_in_the_stream(server: Server, path: str, body: dict[str, Any]) -> None:
    async def fail(*arguments: Any) -> None:
        raise StateError("there is no state st_x")

    server.service.update_session = fail  # type: ignore[method-assign]
    body = {**body, "fledge": {"session": "talk"}}
    with server.http.stream("POST", path, json={**body, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert error["code"] == "state_not_kept" and "there is no state" in error["message"]
    response = server.post(path, body)
    assert response.status_code == 500 and response.json()["error"] == error
    assert not server.service._locked_sessions and server.service.keys.authenticate(None).num_running == 0
