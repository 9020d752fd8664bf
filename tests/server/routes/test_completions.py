"""Completions of many prompts in one request, and log probabilities of tokens and prompts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gated_model import GatedModel
from live_server import (
    CHAT,
    COMPLETIONS,
    ENDLESS,
    HI,
    STATES,
    Server,
    random_llm,
    scripted_llm,
    serving,
    wait_until,
    write_key_file,
)

ERIN, FRANK = "erin-0123456789abcdefg", "frank-0123456789abcdef"
KEYS = f"""
[[keys]]
name = "erin"
key = "{ERIN}"
parallel = 4
requests_per_minute = 2
[[keys]]
name = "frank"
key = "{FRANK}"
tokens_per_minute = 40
"""
SCORED: dict[str, Any] = {"prompt": "hello you", "max_tokens": 0, "echo": True, "logprobs": 1}
"""A request for the log probabilities of a prompt."""


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[Server]:
    with serving(random_llm(), keys=write_key_file(tmp_path, KEYS)) as running:
        yield running


def record_calls(server: Server) -> list[int]:
    """A list to which every call of the model adds its number of tokens."""
    calls = list[int]()
    server.service.llm.model.register_forward_pre_hook(lambda model, inputs: calls.append(inputs[0].shape[1]))
    return calls


def test_a_request_may_have_more_texts_than_the_queue() -> None:
    texts = [f"text {number}" for number in range(20)]
    with serving(random_llm(), max_requests=8, slots=8) as server:
        response = server.post("/v1/embeddings", {"input": texts})
        assert response.status_code == 200 and [each["index"] for each in response.json()["data"]] == list(range(20))
        response = server.post(COMPLETIONS, {"prompt": texts, "max_tokens": 2, "n": 3})
        assert response.status_code == 200 and len(response.json()["choices"]) == 60


@pytest.mark.parametrize("stream", [False, True])
def test_many_prompts_count_as_one_request(keyed: Server, stream: bool) -> None:
    body = {"prompt": ["a", "b", "c", "d", "e"], "max_tokens": 2}
    for _ in range(2):
        if stream:
            events = keyed.stream(COMPLETIONS, body, ERIN)
            assert {choice["index"] for event in events for choice in event["choices"]} == set(range(5))
        else:
            assert len(keyed.post(COMPLETIONS, body, ERIN).json()["choices"]) == 5
    assert keyed.post(COMPLETIONS, body, ERIN).status_code == 429
    wait_until(lambda: keyed.service.keys.authenticate(f"Bearer {ERIN}").num_running == 0)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": ["some text"] * 40}),
        (COMPLETIONS, {"prompt": ["ask:"] * 40}),
        (COMPLETIONS, {**SCORED, "prompt": ["x" * 1500] * 4}),
    ],
)
def test_all_work_stops_when_the_client_disconnects(path: str, body: dict[str, Any]) -> None:
    model = GatedModel()
    with serving(model.llm(), slots=8) as server:
        model.gate.clear()
        with server.sending(path, body):
            assert model.waiting.wait(timeout=30)
        wait_until(lambda: server.service.keys.authenticate(None).num_running == 0)
        model.gate.set()
        wait_until(lambda: server.is_idle)
        assert server.http.get("/health").status_code == 200 and server.service._queues == {}
        assert server.post(CHAT, {"messages": HI, "max_tokens": 1}).status_code == 200
        assert server.service.async_engine.engine.stats.requests <= 4 and sum(model.calls) < 1000


def test_a_prompt_is_not_scored_beyond_the_limits_of_the_key(keyed: Server) -> None:
    while keyed.post(COMPLETIONS, {**SCORED, "prompt": "x" * 30}, FRANK).status_code == 200:
        pass
    calls = record_calls(keyed)
    assert keyed.post(COMPLETIONS, SCORED, FRANK).status_code == 429 and calls == []
    body = {**SCORED, "fledge": {"priority": 5}}
    assert keyed.post(COMPLETIONS, body, ERIN).status_code == 403 and calls == []


def test_a_scored_prompt_is_read_and_charged_once(keyed: Server) -> None:
    calls = record_calls(keyed)
    for _ in range(2):
        assert keyed.post(COMPLETIONS, {**SCORED, "prompt": "x" * 20}, FRANK).status_code == 200
    assert sum(calls) == 40


def test_a_scored_prompt_has_the_same_completion(tmp_path: Path) -> None:
    with serving(random_llm(), tmp_path) as server:
        state = server.post(STATES, {"text": "Once upon a time. "}).json()["id"]
        logprobs = []
        for options in ({}, {"state": state}):
            body = {"prompt": "hello you", "max_tokens": 6, "seed": 3, "top_p": 0.5, "fledge": options}
            text = server.post(COMPLETIONS, body).json()["choices"][0]["text"]
            choice = server.post(COMPLETIONS, {**body, "echo": True, "logprobs": 1}).json()["choices"][0]
            assert choice["text"] == "hello you" + text
            logprobs.append(choice["logprobs"]["token_logprobs"])
        assert logprobs[0][0] is logprobs[1][0] is None
        assert logprobs[0][1] != logprobs[1][1], "they depend on the state before the prompt"
        body = {**body, "echo": True, "logprobs": 1, "prompt": ["a", "hello you"]}
        texts = ["", ""]
        for event in server.stream(COMPLETIONS, body):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
        assert texts[1] == "hello you" + text


@pytest.mark.parametrize("stream", [False, True])
def test_scoring_stops_at_the_deadline(stream: bool) -> None:
    with serving(random_llm()) as server:
        calls = record_calls(server)
        server.service.llm.model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
        body = {**SCORED, "prompt": "x" * 10_000, "fledge": {"deadline": 0.05}}
        if stream:
            event, last = server.stream(COMPLETIONS, body)
            assert last["fledge"]["reasons"] == ["deadline"] and last["choices"][0]["finish_reason"] == "length"
        else:
            event = server.post(COMPLETIONS, body).json()
            assert event["fledge"]["reasons"] == ["deadline"] and event["usage"]["prompt_tokens"] == sum(calls)
    assert sum(calls) < 1000
    choice = event["choices"][0]
    logprobs = choice["logprobs"]["token_logprobs"]
    assert len(logprobs) == sum(calls) + 1 and logprobs[0] is None and all(value < 0 for value in logprobs[1:])
    assert choice["text"] == "".join(choice["logprobs"]["tokens"]), "only the scored part of the prompt"


def test_a_prompt_is_not_scored_if_the_queue_is_full() -> None:
    with serving(random_llm(), max_requests=1) as server:
        stream = server.stream(COMPLETIONS, ENDLESS)
        next(stream)
        calls = record_calls(server)
        response = server.post(COMPLETIONS, SCORED)
        stream.close()
        assert response.status_code == 429 and response.headers["retry-after"] == "1" and set(calls) <= {1}


def test_prompts_of_a_session_follow_each_other(tmp_path: Path) -> None:
    with serving(random_llm(), tmp_path) as server:
        body = {"max_tokens": 5, "seed": 2, "top_p": 0.9}
        together = server.post(COMPLETIONS, {**body, "prompt": ["a", "b"], "fledge": {"session": "one"}}).json()
        single = [
            server.post(COMPLETIONS, {**body, "prompt": prompt, "fledge": {"session": "two"}}).json()["choices"][0]
            for prompt in ("a", "b")
        ]
        assert [choice["text"] for choice in together["choices"]] == [choice["text"] for choice in single]


def test_parts_of_characters_have_distinct_token_names() -> None:
    with serving(scripted_llm(" \u597d\n\n")) as server:
        body = {"prompt": "ask:", "temperature": 0, "max_tokens": 4, "logprobs": 20}
        logprobs = server.post(COMPLETIONS, body).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [" ", "bytes:\\xe5\\xa5", "bytes:\\xbd", "\n\n"]
    assert logprobs["text_offset"] == [0, 1, 1, 2]
    assert [len(alternatives) for alternatives in logprobs["top_logprobs"]] == [20] * 4
    rows = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    for token, value, alternatives in rows:
        assert alternatives[token] == value


def test_the_alternatives_include_the_token_itself() -> None:
    with serving(random_llm()) as server:
        body = {"prompt": "hello you", "max_tokens": 8, "seed": 1, "top_p": 1.0, "logprobs": 1, "echo": True}
        response = server.post(COMPLETIONS, body).json()
        logprobs = response["choices"][0]["logprobs"]
        rows = list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))
        assert all(alternatives[token] == value and len(alternatives) <= 2 for token, value, alternatives in rows[1:])
        stats = server.service.async_engine.engine.stats
        assert stats.prefill_tokens >= response["usage"]["prompt_tokens"] > 2
