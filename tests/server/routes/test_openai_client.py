"""The official OpenAI client works with the server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from live_server import HI, Server, random_llm, scripted_llm, serving

from fledge.engine.events import FLUSH_INTERVAL

openai = pytest.importorskip("openai", reason="openai is not installed")
pytestmark = pytest.mark.peer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "\u597d"]}, "age": {"type": "integer", "minimum": 10, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]},
    },
}


def make_client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """For a model that gives every question the same answer."""
    with serving(scripted_llm(" hello \u597d there\n\nUser: and more")) as server:
        yield make_client(server)


@pytest.fixture(scope="module")
def random_client() -> Iterator[Any]:
    """For a model with random weights."""
    with serving(random_llm()) as server:
        yield make_client(server)


def test_a_chat_completion(client: Any) -> None:
    response = client.chat.completions.create(model="fake", messages=HI, temperature=0)
    assert response.choices[0].message.content == "hello \u597d there"
    assert response.choices[0].finish_reason == "stop"
    assert response.usage.prompt_tokens > 0 and response.usage.completion_tokens > 5
    assert response.usage.total_tokens == response.usage.prompt_tokens + response.usage.completion_tokens
    assert response.object == "chat.completion" and response.model == "fake"


def test_a_stream() -> None:
    llm = scripted_llm(" hello \u597d there\n\nUser: and more")
    # Slower than the flush interval, because faster tokens would share an event.
    llm.model.register_forward_pre_hook(lambda *_: time.sleep(2 * FLUSH_INTERVAL))
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    with serving(llm) as server:
        completions = make_client(server).chat.completions
        chunks = list(completions.create(model="fake", messages=HI, temperature=0, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(texts) == "hello \u597d there" and len([text for text in texts if text]) > 4
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 5
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize(("stop", "text"), [("re", "hello \u597d the"), (["zz", " \u597d"], "hello"), ("h", "")])
def test_stop_texts(client: Any, stop: Any, text: str) -> None:
    fields = {"model": "fake", "messages": HI, "temperature": 0, "stop": stop}
    response = client.chat.completions.create(**fields)
    assert (response.choices[0].message.content, response.choices[0].finish_reason) == (text, "stop")
    chunks = client.chat.completions.create(**fields, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_n_seeds_and_max_tokens(random_client: Any) -> None:
    fields = {"model": "random", "messages": HI, "seed": 7, "n": 3, "max_tokens": 9, "top_p": 0.9}
    first, second = (random_client.chat.completions.create(**fields) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices] and len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert first.fledge["seeds"] == [7, 8, 9]
    third = random_client.chat.completions.create(**{**fields, "seed": 9, "n": 1})
    assert third.choices[0].message.content == texts[2]


def test_log_probabilities(random_client: Any) -> None:
    fields = {"model": "random", "messages": HI, "seed": 1, "max_tokens": 6}
    response = random_client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    content = response.choices[0].logprobs.content
    assert 0 < len(content) <= 6
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
        assert bytes(token.bytes).decode(errors="replace") == token.token


@pytest.mark.parametrize("seed", range(4))
def test_a_json_schema_constrains_even_a_random_model(random_client: Any, seed: int) -> None:
    response_format: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    response = random_client.chat.completions.create(
        model="random", messages=HI, seed=seed, response_format=response_format, max_tokens=200
    )
    person = json.loads(response.choices[0].message.content)
    assert person["name"] in ("Ada", "\u597d") and 10 <= person["age"] <= 99
    assert response.choices[0].finish_reason == "stop"


def test_any_json_object(random_client: Any) -> None:
    response_format: Any = {"type": "json_object"}
    response = random_client.chat.completions.create(
        model="random", messages=HI, seed=3, response_format=response_format, max_tokens=30, stop=["}"]
    )
    assert response.choices[0].message.content.startswith("{")


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_is_read(random_client: Any, stream: bool) -> None:
    fields = {"model": "random", "seed": 3, "max_tokens": 200, "tools": [TOOL]}
    response = random_client.chat.completions.create(
        messages=HI, tool_choice="required", parallel_tool_calls=False, stream=stream, **fields
    )
    if stream:
        chunks = list(response)
        calls = next(chunk.choices[0].delta.tool_calls for chunk in chunks if chunk.choices[0].delta.tool_calls)
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        assert not any(chunk.choices[0].delta.content for chunk in chunks)
    else:
        calls = response.choices[0].message.tool_calls
        assert response.choices[0].finish_reason == "tool_calls" and response.choices[0].message.content is None
    assert calls[0].function.name == "weather"
    assert json.loads(calls[0].function.arguments)["city"] in ("Rome", "Oslo")
    call_message = {"role": "assistant", "tool_calls": [call.model_dump(exclude={"index"}) for call in calls]}
    result_message = {"role": "tool", "tool_call_id": calls[0].id, "content": "sunny"}
    messages = [*HI, call_message, result_message]
    response = random_client.chat.completions.create(messages=messages, tool_choice="none", **fields)
    assert response.choices[0].finish_reason in ("stop", "length")


def test_completions(client: Any, random_client: Any) -> None:
    response = client.completions.create(model="fake", prompt="ask:", temperature=0, max_tokens=2)
    assert (response.choices[0].text, response.choices[0].finish_reason) == (" hello", "length")
    fields = {"model": "random", "max_tokens": 3, "seed": 1}
    several = random_client.completions.create(prompt=["a", "b"], n=2, **fields)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert random_client.completions.create(prompt=[5, 6], echo=True, **fields).usage.prompt_tokens == 2
    texts = ["", "", "", ""]
    for chunk in random_client.completions.create(prompt=["a", "b"], n=2, stream=True, **fields):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in several.choices]


def test_log_probabilities_of_a_prompt(random_client: Any) -> None:
    fields = {"model": "random", "logprobs": 1, "temperature": 0}
    for max_tokens in (0, 1):
        response = random_client.completions.create(prompt="hello", max_tokens=max_tokens, echo=True, **fields)
        choice = response.choices[0]
        assert choice.logprobs.token_logprobs[0] is None
        assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
        assert "".join(choice.logprobs.tokens) == choice.text and choice.text.startswith("hello")
        assert choice.logprobs.text_offset[0] == 0 and len(choice.logprobs.tokens) == len(choice.logprobs.top_logprobs)
    logprobs = random_client.completions.create(prompt="hell", max_tokens=1, **fields).choices[0].logprobs
    assert logprobs.token_logprobs[0] == pytest.approx(max(logprobs.top_logprobs[0].values()))


def test_models_and_embeddings(random_client: Any) -> None:
    assert [model.id for model in random_client.models.list()] == ["random"]
    assert random_client.models.retrieve("random").owned_by == "fledge"
    response = random_client.embeddings.create(model="random", input=["a", "b", "a"])
    first, second, third = (item.embedding for item in response.data)
    assert first == third != second and sum(value * value for value in first) == pytest.approx(1, abs=1e-5)


def test_errors_have_the_types_of_the_client(client: Any) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-5'"):
        create(model="gpt-5", messages=HI)
    empty_message = [{"role": "user", "content": None}]
    for param, fields in (
        ("temperature", {"messages": HI, "temperature": -1}),
        ("messages.0.content", {"messages": empty_message}),
        ("temprature", {"messages": HI, "extra_body": {"temprature": 1}}),
        ("logit_bias", {"messages": HI, "logit_bias": {"5": 3}}),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            create(model="fake", **fields)
        assert caught.value.param == param
