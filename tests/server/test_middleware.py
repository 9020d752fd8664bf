"""The host check, which protects a server without keys from DNS rebinding, and the limit of the body size."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import CHAT, HI, random_llm, serving, write_key_file

from fledge.server.middleware import HostCheck, is_local

KEYS = '[[keys]]\nname = "alice"\nkey = "alice-0123456789abcdef"\n'
LOOPBACK = ["localhost", "LocalHost:8000", "127.0.0.1", "127.9.8.7:1", "[::1]", "[::1]:8000"]
FOREIGN = [
    "evil.example:8000",
    "localhost.evil.example",
    "evil@localhost",
    "[::1",
    "::1",
    "",
    ":8000",
    "127.0.0.1.",
    "*",
]
ADDRESSES = ["192.168.1.5:8000", "8.8.8.8", "[fe80::1]:8000", "0.0.0.0"]
OWN = [socket.gethostname(), f"{socket.gethostname().upper()}.local:8000"]


@pytest.mark.parametrize(
    ("listen_host", "origins", "allowed", "rejected"),
    [
        ("127.0.0.1", (), LOOPBACK, [*FOREIGN, *ADDRESSES]),
        ("192.168.1.5", (), [*LOOPBACK, "192.168.1.5:8000"], [*FOREIGN, "192.168.1.6"]),
        ("fe80::1", (), [*LOOPBACK, "[fe80::1]"], FOREIGN),
        ("Box.example", (), [*LOOPBACK, "box.example:8000"], [*FOREIGN, "boxxexample", *ADDRESSES]),
        ("127.0.0.1", ("https://Page.example:444", "*"), [*LOOPBACK, "page.example:8000"], [*FOREIGN, *ADDRESSES]),
        ("0.0.0.0", (), [*LOOPBACK, *ADDRESSES, *OWN], FOREIGN),
        ("::", (), [*LOOPBACK, *ADDRESSES, *OWN], FOREIGN),
        ("", (), [*LOOPBACK, *ADDRESSES, *OWN], FOREIGN),
    ],
)
def test_allowed_hosts(listen_host: str, origins: tuple[str, ...], allowed: list[str], rejected: list[str]) -> None:
    host_check = HostCheck(listen_host, origins)
    assert [host for host in allowed if not host_check.is_allowed(host)] == []
    assert [host for host in rejected if host_check.is_allowed(host)] == []


def test_is_local() -> None:
    assert all(map(is_local, ("localhost", "127.0.0.2", "::1")))
    assert not any(map(is_local, ("0.0.0.0", "::", "192.168.1.5", "example.org", "")))


def test_a_foreign_host_is_rejected_if_the_server_has_no_keys(tmp_path: Path) -> None:
    with serving(random_llm(), tmp_path / "states") as server:
        for path in ("/", "/v1/fledge/states", "/v1/models", "/health"):
            response = server.http.get(path, headers={"host": "evil.example:8000"})
            message = response.json()["error"]["message"]
            assert response.status_code == 403 and "'evil.example:8000'" in message, path
            assert "--origin" in message and "--keys" in message and "\n" not in message
            assert server.http.get(path, headers={"host": "localhost"}).status_code == 200
        with socket.create_connection(("127.0.0.1", server.http.base_url.port)) as connection:
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")  # without the header, so not from a browser
            assert b" 200 " in connection.recv(100)
    with serving(random_llm(), keys=write_key_file(tmp_path, KEYS)) as server:
        headers = {"host": "models.example"}
        assert server.http.get("/v1/models", headers=headers).status_code == 401
        headers["authorization"] = "Bearer alice-0123456789abcdef"
        assert server.http.get("/v1/models", headers=headers).status_code == 200


def test_large_bodies_are_rejected() -> None:
    def generate_chunks() -> Iterator[bytes]:
        for _ in range(200):
            yield b" " * 1000

    with serving(random_llm(), max_body_bytes=100_000) as server:
        response = server.post(CHAT, {"messages": [{"role": "user", "content": "x" * 200_000}]})
        assert response.status_code == 413 and response.json()["error"]["code"] == "too_large"
        chunked = {"content": generate_chunks(), "headers": {"content-type": "application/json"}}
        assert server.http.post(CHAT, **chunked).status_code == 413
        assert server.post(CHAT, {"messages": HI, "max_tokens": 1}).status_code == 200
