"""Long work runs outside the event loop and does not block the engine. One limit of prompt length holds everywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import ByteTokenizer, random_finch
from gated_model import GatedModel
from live_server import COMPLETIONS, ENDLESS, STATES, Server, random_llm, serving, wait_until

from fledge.engine.llm.llm import LLM
from fledge.server.routes import completions

LONG_TEXT: dict[str, Any] = {"text": "word " * 5000}
LONG_MESSAGES: dict[str, Any] = {"messages": [{"role": "user", "content": "word " * 5000}]}


def is_event_loop() -> bool:
    """Whether the current thread runs the event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class WatchedTokenizer(ByteTokenizer):
    """Records for each long text whether it was encoded in the event loop."""

    def __init__(self) -> None:
        super().__init__("word ")
        self.in_event_loop = list[bool]()

    def encode(self, text: str | bytes) -> list[int]:
        if len(text) > 20_000:
            self.in_event_loop.append(is_event_loop())
        return super().encode(text)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": ["word " * 5000, "word " * 5000], "max_tokens": 1}),
        ("/v1/embeddings", {"input": "word " * 5000}),
        (STATES, LONG_TEXT),
        (STATES, LONG_MESSAGES),
        ("/v1/fledge/view", LONG_MESSAGES),
        ("/v1/fledge/render", LONG_MESSAGES),
    ],
)
def test_long_texts_are_encoded_in_a_thread(tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    tokenizer = WatchedTokenizer()
    with serving(LLM(random_finch(tokenizer.vocab_size), tokenizer, "watched"), tmp_path) as server:
        assert server.post(path, body).status_code == 200
    assert tokenizer.in_event_loop and not any(tokenizer.in_event_loop)


def test_a_regex_is_compiled_once_per_request_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    in_event_loop, compile_regex = list[bool](), completions.compile_regex

    def compile_watched(*arguments: Any) -> Any:
        in_event_loop.append(is_event_loop())
        return compile_regex(*arguments)

    monkeypatch.setattr(completions, "compile_regex", compile_watched)
    with serving(random_llm()) as server:
        body = {"prompt": ["a", "b", "c"], "n": 2, "max_tokens": 9, "fledge": {"regex": "[abc]{2}"}}
        texts = [choice["text"] for choice in server.post(COMPLETIONS, body).json()["choices"]]
    assert in_event_loop == [False]
    assert len(texts) == 6 and all(len(text) == 2 and set(text) <= set("abc") for text in texts)


@pytest.mark.parametrize("stream", [False, True])
def test_many_prompt_logprobs_are_formatted_in_a_thread(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    calls, format_logprobs = list[tuple[int, bool]](), completions.format_completion_logprobs

    def format_watched(tokens: Any, *arguments: Any) -> Any:
        calls.append((len(tokens), is_event_loop()))
        return format_logprobs(tokens, *arguments)

    monkeypatch.setattr(completions, "format_completion_logprobs", format_watched)
    with serving(random_llm()) as server:
        body = {"prompt": "word " * 400, "max_tokens": 1, "echo": True, "logprobs": 1, "stream": stream}
        bodies = list(server.stream(COMPLETIONS, body)) if stream else [server.post(COMPLETIONS, body).json()]
    ((tokens, in_event_loop),) = [call for call in calls if call[0] > 1000]
    assert not in_event_loop
    assert len(bodies[0]["choices"][0]["logprobs"]["tokens"]) == tokens


def test_metrics_are_collected_in_a_thread() -> None:
    with serving(random_llm()) as server:
        in_event_loop, render = list[bool](), server.service.metrics.render

        def render_watched() -> bytes:
            in_event_loop.append(is_event_loop())
            return render()

        server.service.metrics.render = render_watched  # type: ignore[method-assign]
        assert server.http.get("/metrics").status_code == 200 and in_event_loop == [False]


def test_streams_continue_while_a_conversation_is_inspected() -> None:
    with serving(random_llm()) as server:
        stream, stats = server.stream(COMPLETIONS, ENDLESS), server.service.async_engine.engine.stats
        next(stream)
        sampled = list[int]()  # tokens sampled before each chunk of the conversation was read

        def record(model: Any, arguments: tuple[Any, ...]) -> None:
            if arguments[0].shape[1] > 1:
                sampled.append(stats.sampled_tokens)

        server.service.llm.model.register_forward_pre_hook(record)
        response = server.post("/v1/fledge/view", {"messages": [{"role": "user", "content": "x" * 2000}]})
        assert response.json()["pieces"][0]["tokens"] > 2000
        stream.close()
        assert len(sampled) >= 4 and sampled[-1] - sampled[0] >= len(sampled) - 1


@pytest.mark.parametrize("path", ["/v1/fledge/view", STATES])
def test_reading_stops_when_the_client_disconnects(tmp_path: Path, path: str) -> None:
    model = GatedModel()
    with serving(model.llm(), tmp_path) as server:
        model.gate.clear()
        with server.sending(path, {"messages": [{"role": "user", "content": "x" * 3000}] * 4}):
            assert model.waiting.wait(timeout=30)
        wait_until(lambda: server.service.keys.authenticate(None).num_running == 0)
        model.gate.set()
        wait_until(lambda: server.is_idle)
        assert server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}).status_code == 200
        assert sum(model.calls) < 3000
        assert server.http.get(STATES).json()["data"] == []


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": "x" * 40}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", "x" * 40], "stream": True}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 100}]}, "prompt"),
        ("/v1/embeddings", {"input": ["a", "x" * 40]}, "input"),
        (STATES, {"text": "x" * 40}, "text"),
        (STATES, {"messages": [{"role": "user", "content": "x" * 40}]}, "messages"),
        ("/v1/fledge/view", {"messages": [{"role": "user", "content": "x" * 10}] * 4}, "messages"),
    ],
)
def test_the_limit_of_prompt_length_holds_everywhere(
    tmp_path: Path, path: str, body: dict[str, Any], param: str
) -> None:
    with serving(random_llm(), tmp_path, max_prompt_tokens=30) as server:
        response = server.post(path, body)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
        assert server.service.async_engine.engine.stats.requests == 0


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(random_llm()) as running:
        yield running


def test_token_ids_outside_the_vocabulary(server: Server) -> None:
    for path, param in (("/v1/embeddings", "input"), (COMPLETIONS, "prompt")):
        response = server.post(path, {param: [[5, 6], [7, 10_000]]})
        assert response.status_code == 400 and response.json()["error"]["param"] == param
    assert server.service.async_engine.engine.stats.requests == 0


def test_text_is_sent_while_the_model_still_computes_the_next_token() -> None:
    model = GatedModel()
    with serving(model.llm()) as server:
        remaining_calls = 9

        def close_gate(*_: object) -> None:
            nonlocal remaining_calls
            remaining_calls -= 1
            if not remaining_calls:
                model.gate.clear()

        model.register_forward_pre_hook(close_gate)
        stream = server.stream(COMPLETIONS, {"prompt": "x:", "temperature": 0, "max_tokens": 11})
        text = ""
        while len(text) < 8:  # the text before the call that waits at the gate
            text += next(stream)["choices"][0]["text"]
        assert " hello there".startswith(text) and not model.gate.is_set()
        model.gate.set()
        assert text + "".join(event["choices"][0]["text"] for event in stream) == " hello there"
