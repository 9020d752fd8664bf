"""Schemathesis on the server's own schema: whatever is sent, the fault is never the server's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from running import Server, random_model, serving

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
pytestmark = pytest.mark.peer

OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models/{name}"),
    ("POST", "/v1/fledge/states"),
    ("GET", "/v1/fledge/states/{handle}"),
    ("DELETE", "/v1/fledge/states/{handle}"),
    ("GET", "/v1/fledge/states/{handle}/file"),
    ("PUT", "/v1/fledge/states/file"),
    ("POST", "/v1/fledge/view"),
    ("POST", "/v1/fledge/render"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # Texts are short, so that a request which happens to be sound is soon answered.
    with serving(
        random_model(), tmp_path_factory.mktemp("schema"), default_max_tokens=3, max_tokens_limit=50
    ) as running:
        yield running


def test_every_operation_is_tried(server: Server) -> None:
    paths = server.http.get("/openapi.json").json()["paths"]
    known = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    plain = {("GET", path) for path in ("/health", "/metrics", "/v1/models", "/v1/fledge/server", "/v1/fledge/states")}
    assert known == {*OPERATIONS, *plain, ("GET", "/v1/fledge/states/{handle}/view")}


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_is_too_much(server: Server, method: str, path: str) -> None:
    schema: Any = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    mode = schemathesis.GenerationMode
    for each in (mode.POSITIVE, mode.NEGATIVE):

        @given(case=schema[path][method].as_strategy(generation_mode=each))
        @settings(
            max_examples=20,
            deadline=None,
            derandomize=True,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        def attempt(case: Any) -> None:
            answer = case.call(timeout=20)
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400 and answer.content:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

        try:
            attempt()
        except Unsatisfiable:  # it cannot be wrong: a path without a body, say
            assert each is mode.NEGATIVE
