"""Nothing that takes long is done in the event loop or holds the desk; one limit of reading holds on every route."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fakes import ByteTokenizer, random_finch
from gated import GatedModel
from running import Server, random_model, serving
from test_http import ENDLESS, TEXT, eventually, is_idle
from test_many_prompts import asked

from fledge.engine.llm.llm import LLM
from fledge.server.routes import completions

LONG: dict[str, Any] = {"text": "word " * 5000}
LONG_MESSAGES: dict[str, Any] = {"messages": [{"role": "user", "content": "word " * 5000}]}


def in_event_loop() -> bool:
    """Whether this thread is the event loop's."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class WatchedTokenizer(ByteTokenizer):
    """Notes where long texts are encoded."""

    def __init__(self) -> None:
        super().__init__("word ")
        self.places = list[bool]()

    def encode(self, text: str | bytes) -> list[int]:
        if len(text) > 20_000:
            self.places.append(in_event_loop())
        return super().encode(text)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, {"prompt": ["word " * 5000, "word " * 5000], "max_tokens": 1}),
        ("/v1/embeddings", {"input": "word " * 5000}),
        ("/v1/fledge/states", LONG),
        ("/v1/fledge/states", LONG_MESSAGES),
        ("/v1/fledge/view", LONG_MESSAGES),
        ("/v1/fledge/render", LONG_MESSAGES),
    ],
)
def test_long_texts_are_encoded_beside_the_event_loop(tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    tokenizer = WatchedTokenizer()
    with serving(LLM(random_finch(tokenizer.vocab_size), tokenizer, "watched"), tmp_path) as server:
        assert server.post(path, body).status_code == 200
    assert tokenizer.places and not any(tokenizer.places)


def test_a_regex_is_compiled_once_a_request_and_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    places, compile = list[bool](), completions.compile_regex

    def noted(*arguments: Any) -> Any:
        places.append(in_event_loop())
        return compile(*arguments)

    monkeypatch.setattr(completions, "compile_regex", noted)
    with serving(random_model()) as server:
        body = {"prompt": ["a", "b", "c"], "n": 2, "max_tokens": 9, "fledge": {"regex": "[abc]{2}"}}
        texts = [choice["text"] for choice in server.post(TEXT, body).json()["choices"]]
    assert places == [False]
    assert len(texts) == 6 and all(len(text) == 2 and set(text) <= set("abc") for text in texts), "each by itself"


@pytest.mark.parametrize("stream", [False, True])
def test_long_scores_are_told_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    places, told = list[tuple[int, bool]](), completions.format_completion_logprobs

    def noted(tokens: Any, *rest: Any) -> Any:
        places.append((len(list(tokens)), in_event_loop()))
        return told(tokens, *rest)

    monkeypatch.setattr(completions, "format_completion_logprobs", noted)
    with serving(random_model()) as server:
        body = {"prompt": "word " * 400, "max_tokens": 1, "echo": True, "logprobs": 1, "stream": stream}
        answer = list(server.stream(TEXT, body)) if stream else [server.post(TEXT, body).json()]
    long = [place for place in places if place[0] > 1000]
    assert len(long) == 1 and not long[0][1]
    assert len(answer[0]["choices"][0]["logprobs"]["tokens"]) == long[0][0]


def test_figures_are_collected_beside_the_event_loop() -> None:
    with serving(random_model()) as server:
        places, text = list[bool](), server.service.metrics.render

        def noted() -> bytes:
            places.append(in_event_loop())
            return text()

        server.service.metrics.render = noted  # type: ignore[method-assign]
        assert server.http.get("/metrics").status_code == 200 and places == [False]


def test_looking_at_a_conversation_lets_others_go_on() -> None:
    with serving(random_model()) as server:
        stream, tally = server.stream(TEXT, ENDLESS), server.service.async_engine.engine.stats
        next(stream)
        drawn = list[int]()  # tokens written when a piece of the conversation was read

        def noted(model: Any, given: tuple[Any, ...]) -> None:
            if given[0].shape[1] > 1:
                drawn.append(tally.sampled_tokens)

        server.service.llm.model.register_forward_pre_hook(noted)
        answer = server.post("/v1/fledge/view", {"messages": [{"role": "user", "content": "x" * 2000}]})
        assert answer.json()["pieces"][0]["tokens"] > 2000
        stream.close()
        assert len(drawn) >= 4 and drawn[-1] - drawn[0] >= len(drawn) - 1, "the stream went on while it was read"


@pytest.mark.parametrize("path", ["/v1/fledge/view", "/v1/fledge/states"])
def test_nothing_is_read_on_for_a_client_that_has_gone(tmp_path: Path, path: str) -> None:
    model = GatedModel()
    with serving(model.llm(), tmp_path) as server:
        model.gate.clear()
        with asked(server, path, {"messages": [{"role": "user", "content": "x" * 3000}] * 4}):
            assert model.waiting.wait(timeout=30)
        eventually(lambda: server.service.keys.authenticate(None).num_running == 0)
        model.gate.set()
        eventually(lambda: is_idle(server))
        assert server.post(TEXT, {"prompt": "a", "max_tokens": 1}).status_code == 200
        assert sum(model.calls) < 3000
        assert server.http.get("/v1/fledge/states").json()["data"] == []


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (TEXT, {"prompt": "x" * 40}, "prompt"),
        (TEXT, {"prompt": ["a", "x" * 40], "stream": True}, "prompt"),
        ("/v1/embeddings", {"input": ["a", "x" * 40]}, "input"),
        ("/v1/fledge/states", {"text": "x" * 40}, "text"),
        ("/v1/fledge/states", {"messages": [{"role": "user", "content": "x" * 40}]}, "messages"),
        ("/v1/fledge/view", {"messages": [{"role": "user", "content": "x" * 10}] * 4}, "messages"),
    ],
)
def test_one_limit_of_reading_holds_everywhere(tmp_path: Path, path: str, body: dict[str, Any], param: str) -> None:
    with serving(random_model(), tmp_path, max_prompt_tokens=30) as server:
        answer = server.post(path, body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
        assert server.service.async_engine.engine.stats.requests == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with serving(random_model(), tmp_path_factory.mktemp("loop")) as running:
        yield running


def test_a_text_with_an_id_that_no_token_has(server: Server) -> None:
    for path, name in (("/v1/embeddings", "input"), (TEXT, "prompt")):
        answer = server.post(path, {name: [[5, 6], [7, 10_000]]})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == name
    assert server.service.async_engine.engine.stats.requests == 0


def test_text_is_told_though_the_model_takes_long_over_the_next_token() -> None:
    model = GatedModel()
    with serving(model.llm()) as server:
        left = 9

        def close(*_: object) -> None:
            nonlocal left
            left -= 1
            if not left:
                model.gate.clear()

        model.register_forward_pre_hook(close)
        stream = server.stream(TEXT, {"prompt": "x:", "temperature": 0, "max_tokens": 11})
        text = ""
        while len(text) < 8:  # what the model has said when it comes to the gate
            text += next(stream)["choices"][0]["text"]
        assert " hello there".startswith(text) and not model.gate.is_set()
        model.gate.set()
        assert text + "".join(piece["choices"][0]["text"] for piece in stream) == " hello there"
