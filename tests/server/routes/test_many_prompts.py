"""Many prompts or texts in one request: bounded, counted once, stopped together; prompts whose tokens are scored."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gated import GatedModel
from running import Server, key_file, random_model, serving
from test_http import CHAT, ENDLESS, HI, TEXT, eventually, is_idle

from fledge.server.concurrency import gather_limited

KEYS = """
[[keys]]
name = "erin"
key = "erin-0123456789abcdefg"
parallel = 4
requests_per_minute = 2
[[keys]]
name = "frank"
key = "frank-0123456789abcdef"
tokens_per_minute = 40
"""
ERIN, FRANK = "erin-0123456789abcdefg", "frank-0123456789abcdef"
SCORED = {"prompt": "hello you", "max_tokens": 0, "echo": True, "logprobs": 1}


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[Server]:
    with serving(random_model(), keys=key_file(tmp_path, KEYS)) as running:
        yield running


@contextmanager
def asked(server: Server, path: str, body: dict[str, Any]) -> Iterator[None]:
    """A request whose client goes away at the end."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    data = json.dumps(body).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
        connection.sendall(f"{head}\r\n\r\n".encode() + data)
        yield


def test_more_texts_than_the_queue_holds() -> None:
    with serving(random_model(), max_requests=8, slots=8) as server:
        answer = server.post("/v1/embeddings", {"input": [f"text {number}" for number in range(20)]})
        assert answer.status_code == 200 and [each["index"] for each in answer.json()["data"]] == list(range(20))
        answer = server.post(TEXT, {"prompt": [f"text {number}" for number in range(20)], "max_tokens": 2, "n": 3})
        assert answer.status_code == 200 and len(answer.json()["choices"]) == 60


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_however_many_prompts_it_has(keyed: Server, stream: bool) -> None:
    body = {"prompt": ["a", "b", "c", "d", "e"], "max_tokens": 2}
    for _ in range(2):
        if stream:
            texts = {choice["index"] for piece in keyed.stream(TEXT, body, ERIN) for choice in piece["choices"]}
            assert texts == set(range(5))
        else:
            assert len(keyed.post(TEXT, body, ERIN).json()["choices"]) == 5
    assert keyed.post(TEXT, body, ERIN).status_code == 429
    eventually(lambda: all(tenant.num_running == 0 for tenant in keyed.service.keys._tenants.values()))  # type: ignore[union-attr]


def test_the_first_error_stops_the_others() -> None:
    begun, stopped = list[int](), list[int]()

    async def work(number: int) -> int:
        begun.append(number)
        try:
            await asyncio.sleep(0 if number == 1 else 60)
        finally:
            stopped.append(number)
        raise ValueError(str(number))

    async def all_of_them() -> None:
        with pytest.raises(ValueError, match=r"^1$"):
            await gather_limited([partial(work, number) for number in range(9)], 3)
        assert sorted(begun) == sorted(stopped) == [0, 1, 2], "and have ended when it is told"

    asyncio.run(all_of_them())


def test_results_are_in_order_and_no_more_are_at_work_than_allowed() -> None:
    running, most = 0, 0

    async def work(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep((number % 3) / 1000)
        running -= 1
        return number

    found = asyncio.run(gather_limited([partial(work, number) for number in range(20)], 4))
    assert found == list(range(20)) and most == 4


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": ["some text"] * 40}),
        (TEXT, {"prompt": ["ask:"] * 40}),
        (TEXT, {**SCORED, "prompt": ["x" * 1500] * 4}),
    ],
)
def test_nothing_goes_on_for_a_client_that_has_gone(path: str, body: dict[str, Any]) -> None:
    model = GatedModel()
    with serving(model.llm(), slots=8) as server:
        model.gate.clear()
        with asked(server, path, body):
            assert model.waiting.wait(timeout=30)
        eventually(lambda: server.service.keys.authenticate(None).num_running == 0)
        model.gate.set()
        eventually(lambda: is_idle(server))
        assert server.http.get("/health").status_code == 200 and server.service._queues == {}
        assert server.post(CHAT, {"messages": HI, "max_tokens": 1}).status_code == 200
        assert server.service.async_engine.engine.stats.requests <= 4 and sum(model.calls) < 1000


def test_a_prompt_is_not_scored_beyond_the_limits_of_its_key(keyed: Server) -> None:
    while keyed.post(TEXT, {**SCORED, "prompt": "x" * 30}, FRANK).status_code == 200:
        pass
    calls = list[int]()
    keyed.service.llm.model.register_forward_pre_hook(lambda model, given: calls.append(given[0].shape[1]))
    assert keyed.post(TEXT, SCORED, FRANK).status_code == 429 and calls == []
    assert keyed.post(TEXT, {**SCORED, "fledge": {"priority": 5}}, ERIN).status_code == 403 and calls == []


def test_a_scored_prompt_is_read_once_and_paid_once(keyed: Server) -> None:
    calls = list[int]()
    keyed.service.llm.model.register_forward_pre_hook(lambda model, given: calls.append(given[0].shape[1]))
    for _ in range(2):
        assert keyed.post(TEXT, {**SCORED, "prompt": "x" * 20}, FRANK).status_code == 200
    assert sum(calls) == 40


def test_a_scored_prompt_goes_on_as_any_other(tmp_path: Path) -> None:
    with serving(random_model(), tmp_path) as server:
        state = server.post("/v1/fledge/states", {"text": "Once upon a time. "}).json()["id"]
        found = []
        for options in ({}, {"state": state}):
            body = {"prompt": "hello you", "max_tokens": 6, "seed": 3, "top_p": 0.5, "fledge": options}
            plain = server.post(TEXT, body).json()["choices"][0]["text"]
            choice = server.post(TEXT, {**body, "echo": True, "logprobs": 1}).json()["choices"][0]
            assert choice["text"] == "hello you" + plain
            found.append(choice["logprobs"]["token_logprobs"])
        assert found[0][0] is found[1][0] is None and found[0][1] != found[1][1], "what came before it counts"
        streamed = server.stream(TEXT, {**body, "echo": True, "logprobs": 1, "prompt": ["a", "hello you"]})
        texts = ["", ""]
        for piece in streamed:
            for choice in piece["choices"]:
                texts[choice["index"]] += choice["text"]
        assert texts[1] == "hello you" + plain


def test_scoring_ends_at_the_deadline() -> None:
    calls = list[int]()
    with serving(random_model()) as server:

        def slow(model: object, given: Any) -> None:
            calls.append(given[0].shape[1])
            time.sleep(0.02)

        server.service.llm.model.register_forward_pre_hook(slow)
        body = {**SCORED, "prompt": "x" * 10_000, "fledge": {"deadline": 0.05}}
        answer = server.post(TEXT, body).json()
    assert answer["fledge"]["reasons"] == ["deadline"] and sum(calls) < 1000
    choice = answer["choices"][0]
    scores = choice["logprobs"]["token_logprobs"]
    assert len(scores) == sum(calls) + 1 and scores[0] is None and all(score < 0 for score in scores[1:])
    assert choice["text"] == "".join(choice["logprobs"]["tokens"]), "the part that has scores"
    assert answer["usage"]["prompt_tokens"] == sum(calls)


def test_a_prompt_is_not_scored_where_the_queue_is_full() -> None:
    with serving(random_model(), max_requests=1) as server:
        stream, calls = server.stream(TEXT, ENDLESS), list[int]()
        next(stream)
        server.service.llm.model.register_forward_pre_hook(lambda model, given: calls.append(given[0].shape[1]))
        answer = server.post(TEXT, SCORED)
        stream.close()
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1" and set(calls) <= {1}


def test_prompts_of_a_conversation_follow_each_other(tmp_path: Path) -> None:
    with serving(random_model(), tmp_path) as server:
        body = {"max_tokens": 5, "seed": 2, "top_p": 0.9}
        both = server.post(TEXT, {**body, "prompt": ["a", "b"], "fledge": {"session": "one"}}).json()["choices"]
        single = [
            server.post(TEXT, {**body, "prompt": prompt, "fledge": {"session": "two"}}).json()["choices"][0]["text"]
            for prompt in ("a", "b")
        ]
        assert [choice["text"] for choice in both] == single
