"""The names a server without keys answers to: a page that lets its own name point here gets nothing."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from running import key_file, random_model, serving

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
    ("listening", "origins", "allowed", "refused"),
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
def test_names(listening: str, origins: tuple[str, ...], allowed: list[str], refused: list[str]) -> None:
    hosts = HostCheck(listening, origins)
    assert [name for name in allowed if not hosts.is_allowed(name)] == []
    assert [name for name in refused if hosts.is_allowed(name)] == []


def test_what_only_this_machine_reaches() -> None:
    assert all(map(is_local, ("localhost", "127.0.0.2", "::1")))
    assert not any(map(is_local, ("0.0.0.0", "::", "192.168.1.5", "example.org", "")))


def test_a_foreign_name_gets_nothing_unless_there_are_keys(tmp_path: Path) -> None:
    with serving(random_model(), tmp_path / "states") as server:
        for path in ("/", "/v1/fledge/states", "/v1/models", "/health"):
            answer = server.http.get(path, headers={"host": "evil.example:8000"})
            error = answer.json()["error"]
            assert answer.status_code == 403 and "'evil.example:8000'" in error["message"], path
            assert "--origin" in error["message"] and "--keys" in error["message"] and "\n" not in error["message"]
            assert server.http.get(path, headers={"host": "localhost"}).status_code == 200
        with socket.create_connection(("127.0.0.1", server.http.base_url.port)) as connection:
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")  # no browser: it names no host
            assert b" 200 " in connection.recv(100)
    with serving(random_model(), keys=key_file(tmp_path, KEYS)) as server:
        named = {"host": "models.example"}
        assert server.http.get("/v1/models", headers=named).status_code == 401
        known = {**named, "authorization": "Bearer alice-0123456789abcdef"}
        assert server.http.get("/v1/models", headers=known).status_code == 200
