"""`fledge serve`: options, error messages, signals, and what it passes to the server."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge.cli.commands.serve import ServerLimits
from fledge.engine.llm.llm import LLM
from fledge.engine.llm.loading import load as fledge_load
from fledge.server.settings import MB, ServerSettings

uvicorn = pytest.importorskip("uvicorn", reason="the server needs uvicorn")
pytest.importorskip("fastapi", reason="the server needs fastapi")
replicas = pytest.importorskip("fledge.server.replicas")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA file without alpha and base."""
    path = tmp_path / "lora.pth"
    tensors = {"lora_A": torch.ones(3, 16), "lora_B": torch.ones(16, 3)}
    torch.save({f"blocks.0.att.key.{name}": tensor for name, tensor in tensors.items()}, path)
    return path


def test_the_server_listens_before_it_prints_its_address(
    fledge: Any, byte_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = list[int]()

    def connect(server: Any, sockets: list[socket.socket]) -> None:
        ports.append(sockets[0].getsockname()[1])
        with sockets[0]:
            socket.create_connection(("127.0.0.1", ports[0]), timeout=5).close()

    monkeypatch.setattr(uvicorn.Server, "run", connect)
    result = fledge("serve", "--model", byte_model, "--port", 0, "--name", "mine")
    assert result.code == 0 and result.messages.startswith(f"mine at http://127.0.0.1:{ports[0]}  (chat page")


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_during_a_stream_prints_no_error(byte_model: Path, signals: int) -> None:
    """After one signal, the server aborts the stream at the end of the drain time; after two, immediately."""
    command = [sys.executable, "-m", "fledge", "serve", "--model", byte_model, "--port", "0"]
    command += ["--drain", "60" if signals == 2 else "0"]
    body = json.dumps({"prompt": "Hi", "max_tokens": 60_000, "stream": True, "fledge": {"ban": [0]}}).encode()
    with subprocess.Popen(command, stderr=subprocess.PIPE) as server, ExitStack() as stack:
        stack.callback(server.kill)
        assert server.stderr is not None
        port = re.search(rb":(\d+) ", server.stderr.readline())
        assert port is not None
        client = stack.enter_context(socket.create_connection(("127.0.0.1", int(port[1])), timeout=30))
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        assert b" 200 " in client.recv(100)
        for _ in range(signals):
            server.send_signal(signal.SIGINT)
            time.sleep(0.2)  # signals in quick succession are delivered as one
        with suppress(ConnectionError):
            while client.recv(1 << 16):
                pass
        messages = server.stderr.read().decode()
        code = server.wait(timeout=30)
    assert "Traceback" not in messages and len(messages.splitlines()) <= 1, messages
    # A process in the background, such as a test run, may ignore SIGINT.
    assert code == 130 or signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_port_in_use_is_one_line(fledge: Any, byte_model: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        fledge("serve", "--model", byte_model, "--port", port).check_error(1, f"127.0.0.1:{port}", "--port")


@pytest.mark.parametrize("option", ["--folder", "--shared"])
def test_file_in_place_of_the_folder_is_rejected(fledge: Any, byte_model: Path, option: str) -> None:
    fledge("serve", option, byte_model).check_error(2, option, f"{byte_model} is not a folder")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--host", "256.1.1.1"], 1, "another --host"),
        (["--origin", "chat.example"], 2, "--origin chat.example"),
        (["--origin", "https://chat.example/page"], 2, "--origin https://chat.example/page"),
    ],
)
def test_usage_errors(fledge: Any, byte_model: Path, options: list[str], code: int, message: str) -> None:
    fledge("serve", "--model", byte_model, *options).check_error(code, message)


def test_defaults_are_those_of_the_settings(fledge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = list[ServerSettings]()
    monkeypatch.setattr("fledge.cli.commands.serve._run", lambda model, each, listen: settings.append(each))
    assert fledge("serve").code == 0
    assert settings == [ServerSettings()]
    assert ServerLimits().state_storage * MB == ServerSettings.state_storage


def test_replicas_get_all_options(fledge: Any, byte_model: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[Any]()
    monkeypatch.setattr(replicas, "run", lambda *arguments: calls.append(arguments))
    shared = lora.parent / "shared"
    command = ["serve", "--model", byte_model, "--replicas", 2, "--shared", shared, "--host", "0.0.0.0"]
    fledge(*command, "--alpha", 8).check_error(2, "--alpha needs an adapter")
    fledge(*command, "--adapter", lora).check_error(2, "does not record its alpha")
    assert fledge(*command, "--adapter", lora, "--alpha", 8, "--any-base").code == 0
    ((load_arguments, settings, num_replicas, host, *_),) = calls
    assert num_replicas == 2 and settings.shared == shared
    shared.mkdir()
    adapters = list[Any]()

    def load(adapter: Any, **arguments: Any) -> LLM:
        adapters.extend(adapter)
        return fledge_load(adapter=adapter, **arguments)

    monkeypatch.setattr(replicas, "load", load)
    app = replicas.create_replica(load_arguments, settings, host)
    assert [(adapter.alpha, adapter.any_base) for adapter in adapters] == [(8, True)]
    assert app.user_middleware[0].kwargs["host_check"].is_allowed("192.168.1.5:8000")
