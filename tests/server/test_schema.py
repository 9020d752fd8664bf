"""Invalid bodies are rejected with a message that names the field; fields without effect are accepted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import CHAT, COMPLETIONS, HI, Server, random_llm, serving

from fledge.engine.llm.chat import CHAT_PARAMS
from fledge.engine.sampling import SamplingParams
from fledge.server.schema import MAX_CHOICES, MAX_STOPS, ChatRequest, FledgeOptions
from fledge.server.settings import ServerSettings

DOCS = Path(__file__).resolve().parents[2] / "docs" / "server.md"
JSON_HEADERS = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(random_llm(), slots=8) as running:
        yield running


def content(*parts: Any) -> dict[str, Any]:
    """A field `messages` with one message of these parts."""
    return {"messages": [{"role": "user", "content": list(parts)}]}


def json_schema(schema: Any) -> dict[str, Any]:
    """A field `response_format` with a JSON schema."""
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": None, "message": HI}, "message"),
        (content({"type": "image_url", "image_url": {"url": "x"}}), "messages.0.content"),
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
        (json_schema({"type": "nothing"}), "response_format"),
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
def test_an_error_names_the_invalid_field(server: Server, change: dict[str, Any], param: str) -> None:
    body = json.dumps({"messages": HI, "max_tokens": 3, **change})
    response = server.http.post(CHAT, content=body, headers=JSON_HEADERS)
    error = response.json()["error"]
    assert 400 <= response.status_code < 500 and error["param"] is not None and error["param"].startswith(param), error
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 400


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": NaN}', b"[" * 90_000])
def test_a_body_that_is_not_a_json_object(server: Server, body: bytes) -> None:
    response = server.http.post(CHAT, content=body, headers=JSON_HEADERS)
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


VALID_BODY = json.dumps({"messages": HI, "max_tokens": 2}).encode()


@pytest.mark.parametrize(
    ("body", "content_type", "message"),
    [
        (VALID_BODY, None, "send the header Content-Type: application/json"),
        (VALID_BODY, "application/x-www-form-urlencoded", "Content-Type: application/json"),
        (b"", "application/json", "the body is empty"),
        (b"[]", "application/json", "must be a JSON object"),
        (b'{"messages": "\xff"}', "application/json", "not UTF-8"),
        (b"[" * 90_000, "application/json", "nested too deeply"),
    ],
)
def test_messages_about_bodies(server: Server, body: bytes, content_type: str | None, message: str) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = server.http.post(CHAT, content=body, headers=headers)
    assert response.status_code == 400 and message in response.json()["error"]["message"], response.text


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (CHAT, content({"type": "image_url"}), "messages.0.content", "images"),
        (CHAT, content({"type": "a{b}"}), "messages.0.content", "type 'a{b}'"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "a string or a list of parts"),
        (CHAT, content({"type": "text", "text": 3}), "messages.0.content.0.text", "valid string (given: 3)"),
        (CHAT, {"messages": HI, "stop": 3}, "stop", "a string or a list of strings (given: 3)"),
        (CHAT, {"messages": HI, "stop": ["a", 3]}, "stop.1", "valid string (given: 3)"),
        (CHAT, {"messages": HI, "tool_choice": 3}, "tool_choice", "a string or an object"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt", "a list of integers or a list of lists of integers"),
        (CHAT, {"messages": HI, "top_k": 3}, "top_k", "use fledge.top_k"),
        (CHAT, content({"type": "text", "text": "a", "x": 1}), "messages.0.content.0.x", "unknown field"),
    ],
)
def test_messages_about_fields(server: Server, path: str, body: dict[str, Any], param: str, message: str) -> None:
    """The types of a union are listed in the message and do not appear in `param`."""
    error = server.post(path, body).json()["error"]
    assert error["param"] == param and error["message"].startswith(f"{param}: ") and message in error["message"], error


def test_an_error_can_quote_text_that_is_not_unicode(server: Server) -> None:
    surrogate: Any = "\ud800"
    for change in ({"stream": surrogate}, {"messages": surrogate}, {surrogate: 1}, {"model": surrogate}):
        body = json.dumps({"messages": HI, **change})
        response = server.http.post(CHAT, content=body, headers=JSON_HEADERS)
        assert response.status_code in (400, 404) and response.json()["error"]["message"], change
        assert response.headers["content-type"] == "application/json"


IGNORED_FIELDS = {
    "user": "u",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "modalities": ["text"],
    "stream_options": {"include_obfuscation": True},
}
IGNORED_SCHEMA_FIELDS = {"name": "n", "description": "d", "strict": False}
IGNORED_MESSAGE_FIELDS = {"name": "n", "refusal": "r", "tool_call_id": "t"}


def equivalent_requests() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Paths with two bodies: the second one has additional fields without effect."""
    call = {"type": "function", "function": {"name": "a", "arguments": "{}"}}
    messages = [*HI, {"role": "assistant", "tool_calls": [{"id": "1", **call}]}, {"role": "tool", "content": "x"}]
    extended = [{**message, **IGNORED_MESSAGE_FIELDS} for message in messages]
    extended[1]["tool_calls"] = [{"id": "2", **call}]
    chat, text = {"seed": 1, "max_tokens": 4}, {"prompt": "a", "seed": 1, "max_tokens": 4}
    schema = {"schema": {"type": "integer", "minimum": 1, "maximum": 9}}
    formats = [
        {"response_format": {"type": "json_schema", "json_schema": each}}
        for each in (schema, schema | IGNORED_SCHEMA_FIELDS)
    ]
    tools = [{"tools": [{"type": "function", "function": {"name": "a", **each}}]} for each in ({}, {"strict": True})]
    pairs = [(CHAT, *({"messages": HI, **chat, **each} for each in pair)) for pair in (formats, tools)]
    return [
        (CHAT, {"messages": messages, **chat}, {"messages": extended, **chat, **IGNORED_FIELDS}),
        (COMPLETIONS, text, {**text, "suffix": "", "best_of": 1, "user": "u"}),
        *pairs,  # type: ignore[list-item]
    ]


@pytest.mark.parametrize("index", range(4))
def test_fields_without_effect_are_accepted(server: Server, index: int) -> None:
    path, *bodies = equivalent_requests()[index]
    responses = [server.post(path, body).json() for body in bodies]
    for response in responses:
        for call in response["choices"][0].get("message", {}).get("tool_calls", []):
            call.pop("id")
    first, second = responses
    assert first["choices"] == second["choices"]
    assert first["usage"]["prompt_tokens"] == second["usage"]["prompt_tokens"]


def test_the_documentation_lists_all_fields_without_effect() -> None:
    listed = DOCS.read_text(encoding="utf-8").partition("change nothing:")[2].partition("Errors are")[0]
    names = {
        *IGNORED_FIELDS,
        *IGNORED_SCHEMA_FIELDS,
        *IGNORED_MESSAGE_FIELDS,
        "include_obfuscation",
        "suffix",
        "best_of",
    }
    assert [name for name in names - {"stream_options"} if not re.search(rf"[`.]{name}`", listed)] == []


def test_null_is_the_same_as_an_absent_field(server: Server) -> None:
    chat: Any = {"messages": HI, "seed": 1, "max_tokens": 4}
    names = [name for name, field in ChatRequest.model_fields.items() if not field.is_required() and name not in chat]
    options = dict.fromkeys(FledgeOptions.model_fields)
    expected = server.post(CHAT, chat).json()["choices"]
    for nulls in (dict.fromkeys(names), {"fledge": options}, {"stream_options": {"include_usage": None}}):
        response = server.post(CHAT, {**chat, **nulls})
        assert response.status_code == 200 and response.json()["choices"] == expected
    schema: Any = {"type": "json_schema", "json_schema": {"name": None, "schema": None, "strict": None}}
    assert server.post(CHAT, {**chat, "response_format": schema}).status_code == 200
    for invalid in ({"messages": None}, {"unknown": None}, {"messages": [{"role": None, "content": "a"}]}):
        assert server.post(CHAT, {**chat, **invalid}).status_code == 400


def test_the_documentation_lists_defaults_and_limits() -> None:
    text = DOCS.read_text(encoding="utf-8")
    completion = SamplingParams()
    for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty", "penalty_decay"):
        field = "fledge.penalty_decay" if name == "penalty_decay" else name
        assert f"| `{field}` | {getattr(CHAT_PARAMS, name):g} | {getattr(completion, name):g} |" in text, name
    for number in (
        ServerSettings.default_max_tokens,
        ServerSettings.max_tokens_limit,
        ServerSettings.max_prompt_tokens,
        MAX_STOPS,
        MAX_CHOICES,
    ):
        assert re.search(rf"\b{number}\b", text), number
