"""What is refused is refused before the work, and what fails after it is told in the stream too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running import Server, random_model, serving
from test_http import CHAT, HI, TEXT

from fledge.core.errors import StateError

READ = "/v1/fledge/states"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(random_model(), tmp_path) as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["a\nb", "\x07"])
@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, {"messages": HI, "max_tokens": 3}), (TEXT, {"prompt": "Hi", "max_tokens": 3})]
)
def test_a_conversation_under_an_impossible_name(
    server: Server, path: str, body: dict[str, Any], name: str, stream: bool
) -> None:
    answer = server.post(path, {**body, "stream": stream, "fledge": {"session": name}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "fledge.session")
    server.post(path, {**body, "fledge": {"session": "talk"}})
    read = server.service.async_engine.engine.stats.requests
    answer = server.post(path, {**body, "fledge": {"session": "talk", "branch": name}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "fledge.branch")
    assert server.service.async_engine.engine.stats.requests == read


def test_a_state_under_an_impossible_name_is_not_read(server: Server) -> None:
    answer = server.post(READ, {"text": "A long book.", "name": "a\nb"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "name")
    assert server.service.async_engine.engine.stats.requests == 0


def test_nothing_is_read_where_nothing_is_kept() -> None:
    with serving(random_model()) as server:
        answer = server.post(READ, {"text": "A long book."})
        assert answer.status_code == 400 and "--folder" in answer.json()["error"]["message"]
        assert server.service.async_engine.engine.stats.requests == 0


@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, {"messages": HI, "max_tokens": 3}), (TEXT, {"prompt": "Hi", "max_tokens": 3})]
)
def test_what_fails_at_the_end_is_told_in_the_stream(server: Server, path: str, body: dict[str, Any]) -> None:
    async def move(*arguments: Any) -> None:
        raise StateError("there is no state st_x")

    server.service.update_session = move  # type: ignore[method-assign]
    body = {**body, "fledge": {"session": "talk"}}
    with server.http.stream("POST", path, json={**body, "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert error["code"] == "state_not_kept" and "there is no state" in error["message"]
    whole = server.post(path, body)
    assert whole.status_code == 500 and whole.json()["error"] == error
    assert not server.service._locked_sessions and server.service.keys.authenticate(None).num_running == 0
