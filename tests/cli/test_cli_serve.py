"""`fledge serve`: what it hands on to the server, and what it says once somebody may call."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge.cli.serve import Limits
from fledge.engine.loading import load as fledge_load
from fledge.engine.text import LLM
from fledge.server.settings import MB, Settings

uvicorn = pytest.importorskip("uvicorn", reason="the server needs uvicorn")
pytest.importorskip("fastapi", reason="the server needs fastapi")
replicas = pytest.importorskip("fledge.server.replicas")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA whose file records neither its alpha nor its base."""
    path = tmp_path / "lora.pth"
    names = {"lora_A": torch.ones(3, 16), "lora_B": torch.ones(16, 3)}
    torch.save({f"blocks.0.att.key.{name}": tensor for name, tensor in names.items()}, path)
    return path


def test_it_listens_before_it_says_so_and_under_its_name(
    fledge: Any, byte_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = list[int]()

    def called(server: Any, sockets: list[socket.socket]) -> None:
        ports.append(sockets[0].getsockname()[1])
        with sockets[0]:
            socket.create_connection(("127.0.0.1", ports[0]), timeout=5).close()

    monkeypatch.setattr(uvicorn.Server, "run", called)
    done = fledge("serve", "--model", byte_model, "--port", 0, "--name", "mine")
    assert done.code == 0 and done.messages.startswith(f"mine at http://127.0.0.1:{ports[0]}  (the chat page")


def test_a_port_that_is_taken(fledge: Any, byte_model: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        fledge("serve", "--model", byte_model, "--port", port).check_error(1, f"127.0.0.1:{port}", "--port")


def test_limits_are_those_of_the_settings(fledge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list[Settings]()
    monkeypatch.setattr("fledge.cli.serve._run", lambda model, settings, place: found.append(settings))
    assert fledge("serve").code == 0
    assert found == [Settings()]
    assert Limits().shelf * MB == Settings.shelf


def test_copies_get_the_whole_command_line(
    fledge: Any, byte_model: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list[Any]()
    monkeypatch.setattr(replicas, "run", lambda *arguments: found.append(arguments))
    shared = lora.parent / "shared"
    command = ["serve", "--model", byte_model, "--replicas", 2, "--shared", shared, "--host", "0.0.0.0"]
    fledge(*command, "--alpha", 8).check_error(2, "--alpha is about an adapter")
    fledge(*command, "--adapter", lora).check_error(2, "does not record its alpha")
    assert fledge(*command, "--adapter", lora, "--alpha", 8, "--any-base").code == 0
    ((arguments, settings, count, host, *_),) = found
    assert count == 2 and settings.shared == shared
    shared.mkdir()
    loaded = list[Any]()

    def load(adapter: Any, **more: Any) -> LLM:
        loaded.extend(adapter)
        return fledge_load(adapter=adapter, **more)

    monkeypatch.setattr(replicas, "load", load)
    app = replicas.build(arguments, settings, host)
    assert [(adapter.alpha, adapter.any_base) for adapter in loaded] == [(8, True)]
    assert app.user_middleware[0].kwargs["hosts"].allow("192.168.1.5:8000")
