"""API keys: authentication, limits, and the tokens that a key is charged for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import (
    CHAT,
    COMPLETIONS,
    ENDLESS,
    HI,
    TOKENIZER,
    Server,
    random_llm,
    serving,
    wait_until,
    write_key_file,
)

from fledge.core.errors import ConfigError
from fledge.server.auth import KeyStore, TokenBucket

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdefgh"
CAROL, DAVE = "carol-0123456789abcdef", "dave-0123456789abcdefg"
KEYS = f"""
[[keys]]
name = "alice"
key = "{ALICE}"
parallel = 1
max_tokens = 5
requests_per_minute = 4
[[keys]]
name = "bob"
sha256 = "{hashlib.sha256(BOB.encode()).hexdigest()}"
max_priority = 3
tokens_per_minute = 60
[[keys]]
name = "carol"
key = "{CAROL}"
tokens_per_minute = 50
[[keys]]
name = "dave"
key = "{DAVE}"
tokens_per_minute = 50
"""
LONG_MESSAGE = [{"role": "user", "content": "x" * 200}]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(random_llm(), keys=write_key_file(tmp_path, KEYS)) as running:
        yield running


def test_keys_and_their_limits(server: Server) -> None:
    for key in (None, "wrong", ALICE + "x"):
        response = server.post(CHAT, {"messages": HI}, key)
        assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    assert server.http.get("/v1/models").status_code == 401 and server.http.get("/health").status_code == 200
    assert server.post(CHAT, {"messages": HI, "max_tokens": 6}, ALICE).json()["error"]["param"] == "max_tokens"
    assert server.ask("Hi", ALICE)["usage"]["completion_tokens"] <= 5
    response = server.post(CHAT, {"messages": HI, "fledge": {"priority": 1}}, ALICE)
    assert response.status_code == 403 and response.json()["error"]["param"] == "fledge.priority"
    assert server.ask("Hi", BOB, fledge={"priority": 3}, max_tokens=2)
    statuses = [server.post(CHAT, {"messages": HI, "max_tokens": 1}, ALICE).status_code for _ in range(4)]
    assert statuses[0] == 200 and statuses[-1] == 429
    while server.post(CHAT, {"messages": HI, "max_tokens": 40}, BOB).status_code == 200:
        pass
    response = server.post(CHAT, {"messages": HI, "max_tokens": 40}, BOB)
    assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
    for key in (ALICE, BOB):
        assert server.service.keys.authenticate(f"Bearer {key}").num_running == 0


@pytest.mark.parametrize(
    ("text", "message"),
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
def test_errors_in_a_key_file_name_the_entry(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KeyStore.read(write_key_file(tmp_path, text))
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyStore.read(tmp_path / "none.toml")


def test_a_token_bucket_refills_continuously() -> None:
    now = [0.0]
    bucket = TokenBucket(60, clock=lambda: now[0])
    assert [bucket.try_take(30) for _ in range(2)] == [0, 0] and bucket.try_take(1) == 1
    bucket.spend(30)
    assert bucket.seconds_until() == 31
    now[0] = 31.0
    assert bucket.try_take(1) == 0 and bucket.try_take(1) == 1
    now[0] = 1000.0
    assert bucket.try_take(60) == 0 and bucket.try_take(1) == 1


def test_a_client_that_disconnects_pays_for_the_tokens_so_far(server: Server) -> None:
    stream = server.stream(COMPLETIONS, ENDLESS, CAROL)
    for _ in range(150):
        next(stream)
    response = server.post(CHAT, {"messages": HI, "max_tokens": 1}, CAROL)
    assert response.status_code == 429, "charged while the request runs"
    stream.close()
    wait_until(lambda: server.service.async_engine.num_requests == 0)
    response = server.post(CHAT, {"messages": HI, "max_tokens": 1}, CAROL)
    assert response.status_code == 429 and response.json()["error"]["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize("options", [{"priority": 5}, {"state": "st_x.y"}])
def test_rejected_requests_are_not_charged(server: Server, options: dict[str, Any]) -> None:
    body = {"messages": LONG_MESSAGE, "max_tokens": 1}
    assert server.post(CHAT, {**body, "fledge": options}, DAVE).status_code in (403, 404)
    assert server.post(CHAT, body, DAVE).status_code == 200
    assert server.post(CHAT, body, DAVE).status_code == 429, "the prompt was charged"


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/embeddings", {"input": "x" * 200}), ("/v1/fledge/view", {"messages": LONG_MESSAGE})],
)
def test_every_route_charges_for_prompts(server: Server, path: str, body: dict[str, Any]) -> None:
    assert len(TOKENIZER.encode("x" * 200)) > 50
    assert [server.post(path, body, CAROL).status_code for _ in range(2)] == [200, 429]
