"""Routing, error responses, CORS, metrics, clients that disconnect, a full queue, and shutdown."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from live_server import CHAT, COMPLETIONS, ENDLESS, HI, Server, random_llm, scripted_llm, serving, wait_until


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(random_llm(), max_requests=8, slots=8, origins=("https://page.example",)) as running:
        yield running


def test_unknown_paths_and_methods(server: Server) -> None:
    assert server.http.get("/v1/nothing").status_code == 404
    for method, path, allowed in (("GET", CHAT, "POST"), ("DELETE", "/v1/models", "GET"), ("POST", "/app.js", "GET")):
        response = server.http.request(method, path)
        assert response.status_code == 405 and allowed in response.headers["allow"].split(", ")
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error" and path in error["message"]
    for path, hint in (
        ("/v1/responses", "unknown path /v1/responses"),
        ("/chat/completions", "use /v1/chat/completions: set the base_url of OpenAI clients"),
        (f"/v1{CHAT}", "use /v1/chat/completions"),
        ("/v1/tokenize", "use /tokenize"),
    ):
        error = server.post(path, {}).json()["error"]
        assert hint in error["message"] and error["type"] == "not_found_error", error
    assert server.http.get("/../pyproject.toml").status_code == 404
    assert server.http.get("/%2e%2e/app.py").status_code == 404


def test_health_metrics_and_headers(server: Server) -> None:
    assert server.http.get("/health").json() == {"status": "ok"}
    server.ask("Hi", max_tokens=3)
    wait_until(lambda: server.is_idle)
    lines = [line for line in server.http.get("/metrics").text.splitlines() if line and line[0] != "#"]
    values = {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines}
    assert values["fledge_sampled_tokens_total"] > 0 and values["fledge_running"] == 0
    assert values['fledge_requests_total{path="/v1/chat/completions",status="200"}'] >= 1
    response = server.http.get("/health", headers={"origin": "https://page.example"})
    assert response.headers["access-control-allow-origin"] == "https://page.example"
    assert "default-src 'self'" in response.headers["content-security-policy"]
    response = server.http.get("/health", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in response.headers
    assert server.http.head("/health").status_code == 200
    info = server.http.get("/v1/fledge/server").json()
    assert info["model"] == "random" and info["layers"] == 2 and info["state_bytes"] > 0


def test_a_client_that_disconnects_from_a_stream_frees_its_slot(server: Server) -> None:
    sampling = {"max_tokens": 60_000, "temperature": 5.0, "top_p": 1.0, "stop": []}
    stream = server.stream(CHAT, {"messages": HI, **sampling, "fledge": {"ban": [0], "template": "world"}})
    next(stream)
    next(stream)
    stream.close()
    wait_until(lambda: server.is_idle)
    assert server.service._queues == {}


@pytest.mark.parametrize("size", [20, None])
def test_a_client_that_disconnects_frees_its_slot(server: Server, size: int | None) -> None:
    """size: bytes of the body that were sent; None: all of it, so that the request runs."""
    with server.sending(COMPLETIONS, ENDLESS, size):
        if size is None:
            wait_until(lambda: server.service.async_engine.num_requests == 1)
    wait_until(lambda: server.is_idle)
    assert server.service._queues == {}


def test_a_full_queue_rejects_requests(server: Server) -> None:
    streams = [server.stream(COMPLETIONS, {**ENDLESS, "seed": seed}) for seed in range(8)]
    for stream in streams:
        next(stream)
    response = server.post(CHAT, {"messages": HI})
    assert response.status_code == 429 and response.headers["retry-after"] == "1"
    for stream in streams:
        stream.close()
    wait_until(lambda: server.service.async_engine.num_requests == 0)
    assert server.post(CHAT, {"messages": HI, "max_tokens": 2}).status_code == 200


def test_shutdown_finishes_running_requests() -> None:
    with serving(scripted_llm(" hello there\n\n")) as server:
        events = list[Any]()
        body = {"messages": HI, "temperature": 0}
        thread = threading.Thread(target=lambda: events.extend(server.stream(CHAT, body)))
        thread.start()
        wait_until(lambda: server.service.async_engine.engine.stats.requests >= 1)
        thread.join(timeout=20)
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_running_requests_end_with_an_error_after_the_drain_time() -> None:
    with serving(random_llm()) as server:
        responses, async_engine = list[Any](), server.service.async_engine
        thread = threading.Thread(target=lambda: responses.append(server.post(COMPLETIONS, ENDLESS)))
        thread.start()
        wait_until(lambda: async_engine.num_requests == 1 and async_engine.engine.num_running == 1)
        async_engine.begin_shutdown()
        thread.join(timeout=60)
    error = responses[0].json()["error"]
    assert responses[0].status_code == 503 and error["code"] == "busy" and "shutting down" in error["message"]


def test_running_streams_end_with_an_error_after_the_drain_time() -> None:
    with (
        serving(random_llm()) as server,
        server.http.stream("POST", COMPLETIONS, json={**ENDLESS, "stream": True}) as response,
    ):
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        server.service.async_engine.begin_shutdown()
        *_, last = lines
    error = json.loads(last.removeprefix("data: "))["error"]
    assert response.status_code == 200 and error["code"] == "busy" and "shutting down" in error["message"]
