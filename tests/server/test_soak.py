"""Random requests for ten minutes leak neither memory nor slots. FLEDGE_SOAK_SECONDS sets another duration."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from live_server import CHAT, Server, random_llm, serving, wait_until

SECONDS = float(os.environ.get("FLEDGE_SOAK_SECONDS", "600"))


def resident_memory() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def make_request(random_source: random.Random, states: list[str]) -> dict[str, Any]:
    """A request with random options."""
    options: dict[str, Any] = {}
    if states and random_source.random() < 0.4:
        options["state"] = random_source.choice(states)
    if random_source.random() < 0.3:
        options["return_state"] = "handle"
    if random_source.random() < 0.1:
        options["deadline"] = 0.05
    words = " ".join(random_source.choices(["one", "two", "three", "four"], k=random_source.randrange(1, 60)))
    return {
        "messages": [{"role": "user", "content": words}],
        "max_tokens": random_source.randrange(1, 60),
        "n": random_source.choice([1, 1, 2]),
        "logprobs": random_source.random() < 0.2,
        "response_format": {"type": random_source.choice(["text"] * 4 + ["json_object"])},
        "fledge": options,
    }


def send_requests(server: Server, seed: int, end: float) -> None:
    """Send requests until a time. Disconnect from half of them."""
    random_source, states = random.Random(seed), list[str]()
    while time.monotonic() < end:
        body = make_request(random_source, states)
        if random_source.random() < 0.5:
            disconnect_early(server, body, random_source.randrange(1, 20))
            continue
        response = server.post(CHAT, body)
        assert response.status_code in (200, 404), response.text
        if response.status_code == 404:  # the state was evicted
            states.clear()
        else:
            states = [*states, *response.json()["fledge"].get("states", [])][-20:]


def disconnect_early(server: Server, body: dict[str, Any], lines: int) -> None:
    """Read some lines of a stream, then disconnect."""
    with server.http.stream("POST", CHAT, json={**body, "stream": True}) as response:
        assert response.status_code in (200, 404), response.read()
        iterator = response.iter_lines()
        for _ in range(lines):
            next(iterator, None)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_nothing_leaks(tmp_path: Path) -> None:
    sizes = {"cache_memory": 1 << 22, "cache_disk": 1 << 24, "state_storage": 1 << 24}
    with serving(random_llm(), tmp_path, slots=6, max_requests=12, **sizes) as server:
        memory = []
        for part in range(6):
            end = time.monotonic() + SECONDS / 6
            clients = [
                threading.Thread(target=send_requests, args=(server, 100 * part + seed, end)) for seed in range(8)
            ]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            wait_until(lambda: server.is_idle)
            assert server.service._queues == {} and server.service._locked_sessions == {}
            assert server.service.keys.authenticate(None).num_running == 0
            memory.append(resident_memory())
        assert memory[-1] < 1.05 * memory[1] + 5, f"memory grew: {[round(each) for each in memory]} MB"
        stats = server.service.async_engine.engine.stats
        assert stats.requests > 100 and server.service.prefix_cache is not None
        assert server.service.prefix_cache.stats.bytes <= 1 << 22
        print(f"{stats.requests} requests, {stats.sampled_tokens} tokens, memory {[round(each) for each in memory]} MB")
