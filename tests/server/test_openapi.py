"""Schemathesis on the server's OpenAPI schema: no generated request causes an internal error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from live_server import Server, random_llm, serving

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
    limits = {"default_max_tokens": 3, "max_tokens_limit": 50}  # valid requests are answered quickly
    with serving(random_llm(), tmp_path_factory.mktemp("openapi"), **limits) as running:
        yield running


def test_every_operation_is_tested(server: Server) -> None:
    paths = server.http.get("/openapi.json").json()["paths"]
    operations = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    without_input = ("/health", "/metrics", "/v1/models", "/v1/fledge/server", "/v1/fledge/states")
    untested = {*(("GET", path) for path in without_input), ("GET", "/v1/fledge/states/{handle}/view")}
    assert operations == {*OPERATIONS, *untested}


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_causes_an_internal_error(server: Server, method: str, path: str) -> None:
    schema: Any = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    modes = schemathesis.GenerationMode
    for mode in (modes.POSITIVE, modes.NEGATIVE):

        @given(case=schema[path][method].as_strategy(generation_mode=mode))
        @settings(
            max_examples=20,
            deadline=None,
            derandomize=True,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        def send(case: Any) -> None:
            response = case.call(timeout=20)
            assert response.status_code < 500, response.text
            if response.status_code >= 400 and response.content:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        try:
            send()
        except Unsatisfiable:  # an operation without input has no invalid requests
            assert mode is modes.NEGATIVE
