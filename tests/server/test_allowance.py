"""What a key pays for: what was read and written for it, whoever stayed to the end, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running import TOKENIZER, Server, key_file, random_model, serving
from test_http import CHAT, ENDLESS, HI, TEXT, eventually

KEYS = """
[[keys]]
name = "carol"
key = "carol-0123456789abcdef"
tokens_per_minute = 50
[[keys]]
name = "dave"
key = "dave-0123456789abcdefg"
tokens_per_minute = 50
"""
CAROL, DAVE = "carol-0123456789abcdef", "dave-0123456789abcdefg"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(random_model(), keys=key_file(tmp_path, KEYS)) as running:
        yield running


def test_who_goes_away_has_paid_for_what_was_written(server: Server) -> None:
    stream = server.stream(TEXT, ENDLESS, CAROL)
    for _ in range(150):
        next(stream)
    answer = server.post(CHAT, {"messages": HI, "max_tokens": 1}, CAROL)
    assert answer.status_code == 429, "while it is written"
    stream.close()
    eventually(lambda: server.service.async_engine.num_requests == 0)
    answer = server.post(CHAT, {"messages": HI, "max_tokens": 1}, CAROL)
    assert answer.status_code == 429 and answer.json()["error"]["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize("options", [{"priority": 5}, {"state": "st_x.y"}])
def test_what_is_refused_costs_nothing(server: Server, options: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "x" * 200}], "max_tokens": 1}
    assert server.post(CHAT, {**body, "fledge": options}, DAVE).status_code in (403, 404)
    assert server.post(CHAT, body, DAVE).status_code == 200
    assert server.post(CHAT, body, DAVE).status_code == 429, "and what is read has its price"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "x" * 200}),
        ("/v1/fledge/view", {"messages": [{"role": "user", "content": "x" * 200}]}),
    ],
)
def test_reading_has_its_price_on_every_route(server: Server, path: str, body: dict[str, Any]) -> None:
    assert len(TOKENIZER.encode("x" * 200)) > 50
    assert [server.post(path, body, CAROL).status_code for _ in range(2)] == [200, 429]
