"""The official client of OpenAI against the server, unchanged."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from closeness import MODEL_TOLERANCE
from running import Server, fake, random_model, serving

from fledge.engine.events import FLUSH_INTERVAL

openai = pytest.importorskip("openai", reason="openai is not installed")
pytestmark = pytest.mark.peer

QUESTION: list[Any] = [{"role": "user", "content": "Hi"}]
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


def client_of(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Of a model that answers every question alike."""
    with serving(fake(" hello \u597d there\n\nUser: and more")) as server:
        yield client_of(server)


@pytest.fixture(scope="module")
def random_client() -> Iterator[Any]:
    """Of a model that says anything."""
    with serving(random_model()) as server:
        yield client_of(server)


def test_an_answer(client: Any) -> None:
    answer = client.chat.completions.create(model="fake", messages=QUESTION, temperature=0)
    assert answer.choices[0].message.content == "hello \u597d there"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens > 0 and answer.usage.completion_tokens > 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.object == "chat.completion" and answer.model == "fake"


def test_a_stream() -> None:
    llm = fake(" hello \u597d there\n\nUser: and more")
    llm.model.register_forward_pre_hook(
        lambda *_: time.sleep(2 * FLUSH_INTERVAL)
    )  # what comes faster would come together
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    with serving(llm) as server:
        completions = client_of(server).chat.completions
        chunks = list(completions.create(model="fake", messages=QUESTION, temperature=0, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == "hello \u597d there" and len([piece for piece in pieces if piece]) > 4
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 5
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize(("stop", "text"), [("re", "hello \u597d the"), (["zz", " \u597d"], "hello"), ("h", "")])
def test_stop_texts(client: Any, stop: Any, text: str) -> None:
    settings = {"model": "fake", "messages": QUESTION, "temperature": 0, "stop": stop}
    answer = client.chat.completions.create(**settings)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text, "stop")
    streamed = client.chat.completions.create(**settings, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text


def test_n_seeds_and_max_tokens(random_client: Any) -> None:
    settings = {"model": "random", "messages": QUESTION, "seed": 7, "n": 3, "max_tokens": 9, "top_p": 0.9}
    one, two = (random_client.chat.completions.create(**settings) for _ in range(2))
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in two.choices] and len(set(texts)) == 3
    assert [choice.index for choice in one.choices] == [0, 1, 2]
    assert one.fledge["seeds"] == [7, 8, 9]
    alone = random_client.chat.completions.create(**{**settings, "seed": 9, "n": 1})
    assert alone.choices[0].message.content == texts[2]


def test_log_probabilities(random_client: Any) -> None:
    answer = random_client.chat.completions.create(
        model="random", messages=QUESTION, seed=1, max_tokens=6, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert 0 < len(content) <= 6
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
        assert bytes(token.bytes).decode(errors="replace") == token.token


@pytest.mark.parametrize("seed", range(4))
def test_a_json_schema_binds_even_a_random_model(random_client: Any, seed: int) -> None:
    format: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    answer = random_client.chat.completions.create(
        model="random", messages=QUESTION, seed=seed, response_format=format, max_tokens=200
    )
    person = json.loads(answer.choices[0].message.content)
    assert (
        person["name"] in ("Ada", "\u597d") and 10 <= person["age"] <= 99 and answer.choices[0].finish_reason == "stop"
    )


def test_any_json_object(random_client: Any) -> None:
    answer = random_client.chat.completions.create(
        model="random", messages=QUESTION, seed=3, response_format={"type": "json_object"}, max_tokens=30, stop=["}"]
    )
    assert answer.choices[0].message.content.startswith("{")


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_is_called_and_its_result_read(random_client: Any, stream: bool) -> None:
    settings = {"model": "random", "seed": 3, "max_tokens": 200, "tools": [TOOL]}
    answer = random_client.chat.completions.create(
        messages=QUESTION, tool_choice="required", parallel_tool_calls=False, stream=stream, **settings
    )
    if stream:
        chunks = list(answer)
        calls = next(chunk.choices[0].delta.tool_calls for chunk in chunks if chunk.choices[0].delta.tool_calls)
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        assert not any(chunk.choices[0].delta.content for chunk in chunks)
    else:
        calls = answer.choices[0].message.tool_calls
        assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
    assert calls[0].function.name == "weather"
    assert json.loads(calls[0].function.arguments)["city"] in ("Rome", "Oslo")
    called = {"role": "assistant", "tool_calls": [call.model_dump(exclude={"index"}) for call in calls]}
    result = {"role": "tool", "tool_call_id": calls[0].id, "content": "sunny"}
    again = random_client.chat.completions.create(messages=[*QUESTION, called, result], tool_choice="none", **settings)
    assert again.choices[0].finish_reason in ("stop", "length")


def test_completions(client: Any, random_client: Any) -> None:
    done = client.completions.create(model="fake", prompt="ask:", temperature=0, max_tokens=2)
    assert (done.choices[0].text, done.choices[0].finish_reason) == (" hello", "length")
    several = random_client.completions.create(model="random", prompt=["a", "b"], n=2, max_tokens=3, seed=1)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    ids = random_client.completions.create(model="random", prompt=[5, 6], max_tokens=3, seed=1, echo=True)
    assert ids.usage.prompt_tokens == 2
    streamed = random_client.completions.create(
        model="random", prompt=["a", "b"], n=2, max_tokens=3, seed=1, stream=True
    )
    texts = ["", "", "", ""]
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in several.choices]


def test_a_prompt_can_be_scored(random_client: Any) -> None:
    for most in (0, 1):
        scored = random_client.completions.create(
            model="random", prompt="hello", max_tokens=most, echo=True, logprobs=1, temperature=0
        )
        found = scored.choices[0].logprobs
        assert found.token_logprobs[0] is None and all(value < 0 for value in found.token_logprobs[1:])
        assert "".join(found.tokens) == scored.choices[0].text and scored.choices[0].text.startswith("hello")
        assert found.text_offset[0] == 0 and len(found.tokens) == len(found.top_logprobs)
    chat = random_client.completions.create(model="random", prompt="hell", max_tokens=1, logprobs=1, temperature=0)
    assert chat.choices[0].logprobs.token_logprobs[0] == pytest.approx(
        max(chat.choices[0].logprobs.top_logprobs[0].values())
    )


def test_models_and_vectors(random_client: Any) -> None:
    assert [model.id for model in random_client.models.list()] == ["random"]
    assert random_client.models.retrieve("random").owned_by == "fledge"
    answer = random_client.embeddings.create(model="random", input=["a", "b", "a"])
    one, two, three = (item.embedding for item in answer.data)
    # Two texts that are alike can be rows of one batch, and torch may sum the rows of a product in different orders.
    assert one == pytest.approx(three, abs=MODEL_TOLERANCE) and one != pytest.approx(two, abs=1e-2)
    assert sum(value * value for value in one) == pytest.approx(1, abs=MODEL_TOLERANCE)


def test_errors_are_those_the_client_knows(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-5'"):
        client.chat.completions.create(model="gpt-5", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=QUESTION, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=[{"role": "user", "content": None}])
    assert caught.value.param == "messages.0.content"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=QUESTION, extra_body={"temprature": 1})
    assert caught.value.param == "temprature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=QUESTION, logit_bias={"5": 3})
    assert caught.value.param == "logit_bias"
