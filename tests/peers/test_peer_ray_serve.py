"""Two copies of the server on a local Ray, one of them killed while it answers: no conversation is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from random_checkpoints import random_checkpoint
from safetensors.torch import save_file

pytest.importorskip("ray.serve")
pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx2")
pytestmark = [pytest.mark.peer, pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")]

DRAWN = {"seed": 5, "max_tokens": 12, "top_p": 0.9, "temperature": 1.0}


@contextmanager
def copies(folder: Path, count: int) -> Iterator[tuple[str, str]]:
    """A server with `count` copies: its address, and what marks its processes."""
    tensors = random_checkpoint("6.0", n_layer=2, n_embd=32, vocab_size=256)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "tiny.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mark = f"FLEDGE_TEST_{uuid.uuid4().hex}"
    command = [sys.executable, "-m", "fledge", "serve", "--model", "tiny.safetensors", "--port", str(port)]
    server = subprocess.Popen(
        [*command, "--replicas", str(count), "--shared", "shared"],
        cwd=folder,
        env={**os.environ, mark: "1", "RAY_USAGE_STATS_ENABLED": "0"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        lines = []
        while "(chat page" not in (line := server.stderr.readline()):
            lines.append(line)
            assert line, "".join(lines)
        reader = threading.Thread(target=server.stderr.read)
        reader.start()
        yield f"http://127.0.0.1:{port}", mark
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        reader.join()
        server.stderr.close()


def processes(mark: str) -> set[int]:
    """The copies that are running."""
    found = set()
    for path in Path("/proc").iterdir():
        try:
            name = (path / "cmdline").read_bytes()
            if name.startswith(b"ray::ServeReplica:fledge") and mark.encode() in (path / "environ").read_bytes():
                found.add(int(path.name))
        except (OSError, ValueError):
            continue
    return found


def ask(http: Any, text: str, **fledge: str) -> Any:
    body = {"messages": [{"role": "user", "content": text}], "fledge": fledge, **DRAWN}
    return http.post("/v1/chat/completions", json=body)


def test_crashed_replica_loses_no_saved_conversation(tmp_path: Path) -> None:
    with copies(tmp_path, 2) as (address, mark), httpx.Client(base_url=address, timeout=60) as http:
        first = ask(http, "One?", return_state="handle")
        assert first.status_code == 200, first.text
        state = first.json()["fledge"]["states"][0]
        expected = ask(http, "Two?", state=state).json()["choices"][0]["message"]["content"]
        before = processes(mark)
        assert len(before) == 2
        statuses: list[int] = []

        def load() -> None:
            with httpx.Client(base_url=address, timeout=60) as mine:
                for _ in range(15):
                    answer = ask(mine, "Two?", state=state)
                    statuses.append(answer.status_code)
                    if answer.status_code == 200:
                        assert answer.json()["choices"][0]["message"]["content"] == expected

        threads = [threading.Thread(target=load) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        for thread in threads:
            thread.join(timeout=120)
        assert len(statuses) == 45 and statuses.count(200) >= 40, statuses
        assert set(statuses) <= {200, 500, 502, 503}, "what the dead one was answering fails, and says so"
        for _ in range(6):
            assert ask(http, "Two?", state=state).json()["choices"][0]["message"]["content"] == expected
        end = time.monotonic() + 60
        while len(processes(mark) - {victim}) < 2:
            assert time.monotonic() < end, "no new copy was started"
            time.sleep(0.5)
