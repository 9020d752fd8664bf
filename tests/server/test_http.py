"""What surrounds the answers: keys and limits, bad requests, clients that go away, health and figures."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import ByteTokenizer, FakeModel
from running import Server, fake, key_file, random_model, serving
from starlette.requests import ClientDisconnect
from starlette.types import Message

from fledge.core.errors import ConfigError
from fledge.engine.llm.chat import CHAT_PARAMS
from fledge.engine.llm.llm import LLM
from fledge.engine.sampling import SamplingParams
from fledge.server.auth import KeyStore, TokenBucket
from fledge.server.responses import EventStream
from fledge.server.schema import MAX_CHOICES, MAX_STOPS, ChatRequest, FledgeOptions
from fledge.server.settings import ServerSettings

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
ENDLESS = {"prompt": "Hi", "max_tokens": 60_000, "fledge": {"ban": [0]}}  # no text ends by itself without id 0
HI: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(
        random_model(), max_requests=8, slots=8, max_body_bytes=100_000, origins=("https://page.example",)
    ) as running:
        yield running


def is_idle(server: Server) -> bool:
    """Whether no request is running, in the server or in the engine."""
    engine = server.service.async_engine
    return engine.num_requests == 0 and not engine.engine.busy


def eventually(what: Any) -> None:
    """Wait until something holds."""
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": None, "message": HI}, "message"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content",
        ),
        ({"messages": [{"role": "input", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}, {"role": "user", "x": 1}]}, "messages.1.x"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("1e999")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 9}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**19}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"logit_bias": {"x": -100}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [], "tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}},
            "response_format",
        ),
        ({"fledge": {"regex": "("}}, "fledge.regex"),
        ({"fledge": {"regex": "a"}, "response_format": {"type": "json_object"}}, "fledge.regex"),
        ({"fledge": {"template": "pirate"}}, "fledge.template"),
        ({"fledge": {"template": "qa"}, "messages": [{"role": "system", "content": "x"}]}, "messages.0.role"),
        ({"fledge": {"ban": [10**9]}}, "fledge.ban"),
        ({"fledge": {"unknown": 1}}, "fledge.unknown"),
        ({"model": "gpt-5"}, "model"),
        ({"modalities": ["audio"]}, "modalities.0"),
        ({"store": True}, "store"),
        ({"audio": {}}, "audio"),
    ],
)
def test_a_bad_request_is_told_which_field(server: Server, change: dict[str, Any], param: str) -> None:
    body = json.dumps({"messages": HI, "max_tokens": 3, **change})
    answer = server.http.post(CHAT, content=body, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert 400 <= answer.status_code < 500 and error["param"] is not None and error["param"].startswith(param), error
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 400


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": NaN}', b"[" * 90_000])
def test_a_body_that_is_no_request(server: Server, body: bytes) -> None:
    answer = server.http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


GOOD = json.dumps({"messages": HI, "max_tokens": 2}).encode()


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (GOOD, None, "send the header Content-Type: application/json"),
        (GOOD, "application/x-www-form-urlencoded", "Content-Type: application/json"),
        (b"", "application/json", "the body is empty"),
        (b"[]", "application/json", "must be a JSON object"),
        (b'{"messages": "\xff"}', "application/json", "not UTF-8"),
        (b"[" * 90_000, "application/json", "nested too deeply"),
    ],
)
def test_a_body_is_told_what_is_wrong_with_it(server: Server, body: bytes, kind: str | None, words: str) -> None:
    answer = server.http.post(CHAT, content=body, headers={} if kind is None else {"content-type": kind})
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize(
    ("path", "change", "param", "words"),
    [
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "images"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "a{b}"}]}]}, "messages.0.content", "type 'a{b}'"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "a string or a list of parts"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
            "messages.0.content.0.text",
            "valid string (given: 3)",
        ),
        (CHAT, {"messages": HI, "stop": 3}, "stop", "a string or a list of strings (given: 3)"),
        (CHAT, {"messages": HI, "stop": ["a", 3]}, "stop.1", "valid string (given: 3)"),
        (CHAT, {"messages": HI, "tool_choice": 3}, "tool_choice", "a string or an object"),
        (
            TEXT,
            {"prompt": [1, "a"]},
            "prompt",
            "a string or a list of strings or a list of integers or a list of lists",
        ),
        (CHAT, {"messages": HI, "top_k": 3}, "top_k", "use fledge.top_k"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]},
            "messages.0.content.0.x",
            "unknown field",
        ),
    ],
)
def test_a_field_of_several_shapes_is_named_without_them(
    server: Server, path: str, change: dict[str, Any], param: str, words: str
) -> None:
    error = server.post(path, change).json()["error"]
    assert error["param"] == param and error["message"].startswith(f"{param}: ") and words in error["message"], error


def test_an_error_tells_of_text_that_is_no_unicode(server: Server) -> None:
    wrong: Any = "\ud800"
    for change in ({"stream": wrong}, {"messages": wrong}, {wrong: 1}, {"model": wrong}):
        body = json.dumps({"messages": HI, **change})
        answer = server.http.post(CHAT, content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 404) and answer.json()["error"]["message"], change
        assert answer.headers["content-type"] == "application/json"


def test_what_changes_nothing_is_taken_and_listed(server: Server) -> None:
    """The list in docs/server.md: no client is refused for these, and none is told that they do something."""
    call = {"type": "function", "function": {"name": "a", "arguments": "{}"}}
    plain = [*HI, {"role": "assistant", "tool_calls": [{"id": "1", **call}]}, {"role": "tool", "content": "x"}]
    more = [{**message, "name": "n", "refusal": "r", "tool_call_id": "t"} for message in plain]
    more[1]["tool_calls"] = [{"id": "2", **call}]
    request = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "modalities": ["text"],
        "stream_options": {"include_obfuscation": True},
    }
    named = {"name": "n", "description": "d", "strict": False}
    chat, text = {"seed": 1, "max_tokens": 4}, {"prompt": "a", "seed": 1, "max_tokens": 4}
    schema = {"schema": {"type": "integer", "minimum": 1, "maximum": 9}}
    pairs = [
        (CHAT, {"messages": plain, **chat}, {"messages": more, **chat, **request}),
        (TEXT, text, {**text, "suffix": "", "best_of": 1, "user": "u"}),
        *(
            (CHAT, {"messages": HI, **chat, **one}, {"messages": HI, **chat, **other})
            for one, other in [
                [
                    {"response_format": {"type": "json_schema", "json_schema": each}}
                    for each in (schema, schema | named)
                ],
                [
                    {"tools": [{"type": "function", "function": {"name": "a", **each}}]}
                    for each in ({}, {"strict": True})
                ],
            ]
        ),
    ]
    for path, one, other in pairs:
        first, second = (server.post(path, body).json() for body in (one, other))
        for answer in (first, second):
            for each in answer["choices"][0].get("message", {}).get("tool_calls", []):
                each.pop("id")
        assert (
            first["choices"] == second["choices"]
            and first["usage"]["prompt_tokens"] == second["usage"]["prompt_tokens"]
        )
    listed = (Path(__file__).resolve().parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    listed = listed.partition("change nothing:")[2].partition("Errors are")[0]
    names = {*request, "include_obfuscation", "name", "refusal", "tool_call_id", "suffix", "best_of", *named}
    assert [name for name in names - {"stream_options"} if not re.search(rf"[`.]{name}`", listed)] == []


def test_null_is_as_good_as_nothing(server: Server) -> None:
    chat: Any = {"messages": HI, "seed": 1, "max_tokens": 4}
    names = [name for name, field in ChatRequest.model_fields.items() if not field.is_required() and name not in chat]
    options = dict.fromkeys(FledgeOptions.model_fields)
    schema: Any = {"type": "json_schema", "json_schema": {"name": None, "schema": None, "strict": None}}
    for more in (dict.fromkeys(names), {"fledge": options}, {"stream_options": {"include_usage": None}}):
        answer = server.post(CHAT, {**chat, **more})
        assert answer.status_code == 200 and answer.json()["choices"] == server.post(CHAT, chat).json()["choices"]
    assert server.post(CHAT, {**chat, "response_format": schema}).status_code == 200
    for wrong in ({"messages": None}, {"unknown": None}, {"messages": [{"role": None, "content": "a"}]}):
        assert server.post(CHAT, {**chat, **wrong}).status_code == 400


def test_how_text_is_drawn_is_told_as_it_is() -> None:
    """The table in docs/server.md."""
    told = (Path(__file__).resolve().parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    plain = SamplingParams()
    for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty", "penalty_decay"):
        shown = "fledge.penalty_decay" if name == "penalty_decay" else name
        assert f"| `{shown}` | {getattr(CHAT_PARAMS, name):g} | {getattr(plain, name):g} |" in told, name
    for number in (
        ServerSettings.default_max_tokens,
        ServerSettings.max_tokens_limit,
        ServerSettings.max_prompt_tokens,
        MAX_STOPS,
        MAX_CHOICES,
    ):
        assert re.search(rf"\b{number}\b", told), number


def test_sizes_have_limits(server: Server) -> None:
    long = {"messages": [{"role": "user", "content": "x" * 200_000}]}
    assert server.post(CHAT, long).json()["error"]["code"] == "too_large"

    def pieces() -> Iterator[bytes]:
        for _ in range(200):
            yield b" " * 1000

    answer = server.http.post(CHAT, content=pieces(), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    with serving(random_model(), max_prompt_tokens=30) as small:
        answer = small.post(CHAT, {"messages": [{"role": "user", "content": "x" * 100}]})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


def test_paths_and_methods_that_are_not_there(server: Server) -> None:
    assert server.http.get("/v1/nothing").status_code == 404
    for method, path, allowed in (("GET", CHAT, "POST"), ("DELETE", "/v1/models", "GET"), ("POST", "/app.js", "GET")):
        answer = server.http.request(method, path)
        assert answer.status_code == 405 and allowed in answer.headers["allow"].split(", ")
        assert answer.json()["error"]["type"] == "invalid_request_error" and path in answer.json()["error"]["message"]
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


def test_a_client_that_goes_away_frees_its_slot(server: Server) -> None:
    endless = {
        "messages": HI,
        "max_tokens": 60_000,
        "temperature": 5.0,
        "top_p": 1.0,
        "fledge": {"ban": [0], "template": "world"},
    }
    body = {**endless, "stop": []}
    stream = server.stream(CHAT, body)
    next(stream)
    next(stream)
    stream.close()
    eventually(lambda: is_idle(server))
    data = json.dumps(ENDLESS).encode()
    host, _, port = server.url.removeprefix("http://").partition(":")
    for when in ("reading", "writing"):
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST {TEXT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: "
            connection.sendall(f"{head}{len(data)}\r\n\r\n".encode() + (data if when == "writing" else data[:20]))
            if when == "writing":
                eventually(lambda: server.service.async_engine.num_requests == 1)
        eventually(lambda: is_idle(server))
    assert server.service._queues == {}


def test_more_than_the_queue_holds_is_turned_away(server: Server) -> None:
    streams = [server.stream(TEXT, {**ENDLESS, "seed": number}) for number in range(8)]
    for stream in streams:
        next(stream)
    answer = server.post(CHAT, {"messages": HI})
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    for stream in streams:
        stream.close()
    eventually(lambda: server.service.async_engine.num_requests == 0)
    assert server.post(CHAT, {"messages": HI, "max_tokens": 2}).status_code == 200


def test_health_figures_and_headers(server: Server) -> None:
    assert server.http.get("/health").json() == {"status": "ok"}
    server.ask("Hi", max_tokens=3)
    eventually(lambda: not server.service.async_engine.engine.busy)
    text = server.http.get("/metrics").text
    values = {line.split(" ")[0]: float(line.split(" ")[1]) for line in text.splitlines() if line and line[0] != "#"}
    assert values["fledge_sampled_tokens_total"] > 0 and values["fledge_running"] == 0
    assert values['fledge_requests_total{path="/v1/chat/completions",status="200"}'] >= 1
    answer = server.http.get("/health", headers={"origin": "https://page.example"})
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-origin" not in server.http.get("/health", headers={"origin": "https://e.vil"}).headers
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert server.http.head("/health").status_code == 200
    about = server.http.get("/v1/fledge/server").json()
    assert about["model"] == "random" and about["layers"] == 2 and about["state_bytes"] > 0


def test_parts_of_characters_have_names_of_their_own() -> None:
    with serving(fake(" \u597d\n\n")) as server:
        body = {"prompt": "ask:", "temperature": 0, "max_tokens": 4, "logprobs": 20}
        found = server.post(TEXT, body).json()["choices"][0]["logprobs"]
    assert found["tokens"] == [" ", "bytes:\\xe5\\xa5", "bytes:\\xbd", "\n\n"]
    assert found["text_offset"] == [0, 1, 1, 2]
    assert [len(each) for each in found["top_logprobs"]] == [20] * 4
    for name, value, each in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert each[name] == value


def test_a_drawn_token_is_among_the_most_probable_ones_and_scoring_is_counted() -> None:
    with serving(random_model()) as server:
        body = {"prompt": "hello you", "max_tokens": 8, "seed": 1, "top_p": 1.0, "logprobs": 1, "echo": True}
        found = server.post(TEXT, body).json()
        scores = found["choices"][0]["logprobs"]
        rows = list(zip(scores["tokens"], scores["token_logprobs"], scores["top_logprobs"], strict=True))
        assert all(top[token] == value and len(top) <= 2 for token, value, top in rows[1:])
        assert server.service.async_engine.engine.stats.prefill_tokens >= found["usage"]["prompt_tokens"] > 2


CALL = '<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>'
CALLABLE: Any = [{"type": "function", "function": {"name": "a"}}]


def calling(text: str) -> LLM:
    """A model that answers with `text`, in tokens of one byte."""
    tokenizer = ByteTokenizer("\n\n", "Assistant:")
    return LLM(
        FakeModel([tokenizer.encode(text)], tokenizer.id_of("Assistant:"), tokenizer.vocab_size), tokenizer, "fake"
    )


def test_what_looks_like_a_call_is_text_where_none_is_allowed() -> None:
    with serving(calling(CALL + "\n\n")) as server:
        for choice in ("auto", "none"):
            answer = server.ask("Hi", temperature=0, tools=CALLABLE, tool_choice=choice)["choices"][0]
            called = choice == "auto"
            assert answer["finish_reason"] == ("tool_calls" if called else "stop")
            assert answer["message"]["content"] == (None if called else CALL)
            assert ("tool_calls" in answer["message"]) is called


@pytest.mark.parametrize(
    ("tokens", "choice", "called", "content", "reason"),
    [
        (1, "required", 0, "", "length"),
        (1, "auto", 0, "<", "length"),  # a word may begin so, too
        (10, "auto", 0, "", "length"),
        (len(CALL) - 1, "required", 0, "", "length"),
        (len(CALL), "required", 1, None, "tool_calls"),
        (len(CALL) + 1, "required", 1, None, "tool_calls"),
        (len(CALL) + 2, "required", 1, None, "length"),
        (len(CALL) + 20, "auto", 1, None, "length"),
        (2 * len(CALL) + 1, "auto", 2, None, "tool_calls"),
        (200, {"type": "function", "function": {"name": "a"}}, 1, None, "tool_calls"),
    ],
)
def test_a_call_that_is_cut_is_never_text(tokens: int, choice: Any, called: int, content: Any, reason: str) -> None:
    wanted = {"temperature": 0, "tools": CALLABLE, "tool_choice": choice, "max_tokens": tokens}
    with serving(calling(f"{CALL}\n{CALL}")) as server:
        answer = server.ask("Hi", **wanted)["choices"][0]
    with serving(calling(f"{CALL}\n{CALL}")) as server:
        pieces = [each["choices"][0] for each in server.stream(CHAT, {"messages": HI, **wanted})]
    assert answer["message"]["content"] == content and answer["finish_reason"] == reason
    assert len(answer["message"].get("tool_calls", [])) == called
    assert "".join(each["delta"].get("content", "") for each in pieces) == (content or "")
    assert sum(len(each["delta"].get("tool_calls", [])) for each in pieces) == called
    assert pieces[-1]["finish_reason"] == reason


def test_tokens(server: Server) -> None:
    tokens = server.post("/tokenize", {"content": "hello \u597d"}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json() == {"content": "hello \u597d"}
    assert server.post("/detokenize", {"tokens": [-1]}).json()["error"]["param"] == "tokens"


KEYS = """
[[keys]]
name = "alice"
key = "alice-0123456789abcdef"
parallel = 1
max_tokens = 5
requests_per_minute = 4
[[keys]]
name = "bob"
sha256 = "8d70d691c822d55638b6e7fd54cd94170c87d19eb1f628b757506ede5688d297"
max_priority = 3
tokens_per_minute = 60
"""


def test_keys_and_their_limits(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(KEYS, encoding="utf-8")
    alice, bob = "alice-0123456789abcdef", "bob-0123456789abcdefgh"
    import hashlib

    text = KEYS.replace(
        "8d70d691c822d55638b6e7fd54cd94170c87d19eb1f628b757506ede5688d297", hashlib.sha256(bob.encode()).hexdigest()
    )
    with serving(random_model(), keys=key_file(tmp_path, text)) as server:
        for key in (None, "wrong", alice + "x"):
            answer = server.post(CHAT, {"messages": HI}, key)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert server.http.get("/v1/models").status_code == 401 and server.http.get("/health").status_code == 200
        assert server.post(CHAT, {"messages": HI, "max_tokens": 6}, alice).json()["error"]["param"] == "max_tokens"
        assert server.ask("Hi", alice)["usage"]["completion_tokens"] <= 5
        answer = server.post(CHAT, {"messages": HI, "fledge": {"priority": 1}}, alice)
        assert answer.status_code == 403 and answer.json()["error"]["param"] == "fledge.priority"
        assert server.ask("Hi", bob, fledge={"priority": 3}, max_tokens=2)
        statuses = [server.post(CHAT, {"messages": HI, "max_tokens": 1}, alice).status_code for _ in range(4)]
        assert statuses[-1] == 429 and statuses[0] == 200
        while server.post(CHAT, {"messages": HI, "max_tokens": 40}, bob).status_code == 200:
            pass
        answer = server.post(CHAT, {"messages": HI, "max_tokens": 40}, bob)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        for tenant in server.service.keys._tenants.values():  # type: ignore[union-attr]
            assert tenant.num_running == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no \\[\\[keys\\]\\] table"),
        ("[[keys]]\nname = 'a'", "either a key or its sha256"),
        ("[[keys]]\nname = 'a'\nkey = 'short'", "at least 16 characters"),
        ("[[keys]]\nname = 'a'\nsha256 = 'zz'", "64 hexadecimal"),
        ("[[keys]]\nname = 'a'\nkey = '0123456789abcdef'\nlimit = 3", "has limit; allowed"),
        ("[[keys]]\nname = 'a'\nkey = '0123456789abcdef'\nparallel = 0", "parallel is 0"),
        ("[[keys]]\nname = 'a'\nkey = '0123456789abcdef'\n" * 2, "an earlier entry"),
        ("[[keys]", "is not TOML"),
    ],
)
def test_a_bad_file_of_keys_says_where(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "keys.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        KeyStore.read(tmp_path / "keys.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyStore.read(tmp_path / "none.toml")


def test_an_allowance_refills_evenly() -> None:
    now = [0.0]
    bucket = TokenBucket(60, clock=lambda: now[0])
    assert [bucket.try_take(30) for _ in range(2)] == [0, 0] and bucket.try_take(1) == 1
    bucket.spend(30)
    assert bucket.seconds_until() == 31
    now[0] = 31.0
    assert bucket.try_take(1) == 0 and bucket.try_take(1) == 1
    now[0] = 1000.0
    assert bucket.try_take(60) == 0 and bucket.try_take(1) == 1


def test_stopping_finishes_what_is_under_way() -> None:
    with serving(fake(" hello there\n\n")) as server:
        found: list[Any] = []
        body = {"messages": HI, "temperature": 0}

        def ask() -> None:
            found.extend(server.stream(CHAT, body))

        thread = threading.Thread(target=ask)
        thread.start()
        eventually(lambda: server.service.async_engine.engine.stats.requests >= 1)
        thread.join(timeout=20)
    assert found[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_stream_that_never_begins_lets_go_of_its_place() -> None:
    """The client has gone before the first piece: a generator that was not begun runs no `finally`."""
    closed = list[str]()

    class Held:
        async def close(self) -> None:
            closed.append("exchange")

    async def pieces() -> AsyncIterator[bytes]:
        closed.append("begun")
        yield b""

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise OSError("gone")

    scope = {"type": "http", "asgi": {"spec_version": "2.4"}, "method": "POST", "path": "/", "headers": []}
    stream = EventStream(pieces(), [Held()])  # type: ignore[list-item]
    with pytest.raises(ClientDisconnect):
        asyncio.run(stream(scope, receive, send))
    assert closed == ["exchange"]


def test_running_requests_end_with_an_error_at_shutdown() -> None:
    with serving(random_model()) as server:
        responses = list[Any]()
        ask = threading.Thread(target=lambda: responses.append(server.post(TEXT, ENDLESS)))
        ask.start()
        engine = server.service.async_engine
        eventually(lambda: engine.num_requests == 1 and engine.engine.num_running == 1)
        engine.begin_shutdown()
        ask.join(timeout=60)
    error = responses[0].json()["error"]
    assert responses[0].status_code == 503 and error["code"] == "busy" and "shutting down" in error["message"]


def test_running_streams_end_with_an_error_at_shutdown() -> None:
    with (
        serving(random_model()) as server,
        server.http.stream("POST", TEXT, json={**ENDLESS, "stream": True}) as response,
    ):
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        server.service.async_engine.begin_shutdown()
        *_, last = lines
    error = json.loads(last.removeprefix("data: "))["error"]
    assert response.status_code == 200 and error["code"] == "busy" and "shutting down" in error["message"]
