"""Ten minutes of everything at once: neither memory nor slots may leak. FLEDGE_SOAK_SECONDS sets another time."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from running import Server, random_model, serving

SECONDS = float(os.environ.get("FLEDGE_SOAK_SECONDS", "600"))


def resident() -> float:
    """MB of memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def request(chooser: random.Random, states: list[str]) -> dict[str, Any]:
    """One of all sorts."""
    options: dict[str, Any] = {}
    if states and chooser.random() < 0.4:
        options["state"] = chooser.choice(states)
    if chooser.random() < 0.3:
        options["return_state"] = "handle"
    if chooser.random() < 0.1:
        options["deadline"] = 0.05
    words = " ".join(chooser.choices(["one", "two", "three", "four"], k=chooser.randrange(1, 60)))
    return {
        "messages": [{"role": "user", "content": words}],
        "max_tokens": chooser.randrange(1, 60),
        "n": chooser.choice([1, 1, 2]),
        "logprobs": chooser.random() < 0.2,
        "response_format": {"type": chooser.choice(["text"] * 4 + ["json_object"])},
        "fledge": options,
    }


def use(server: Server, seed: int, end: float) -> None:
    """Ask in every way there is, and go away in the middle as often as not."""
    chooser, states = random.Random(seed), list[str]()
    while time.monotonic() < end:
        body = request(chooser, states)
        if chooser.random() < 0.5:
            go_away(server, body, chooser.randrange(1, 20))
            continue
        answer = server.post("/v1/chat/completions", body)
        assert answer.status_code in (200, 404), answer.text
        if answer.status_code == 404:  # it made room for newer ones
            states.clear()
        else:
            states = [*states, *answer.json()["fledge"].get("states", [])][-20:]


def go_away(server: Server, body: dict[str, Any], pieces: int) -> None:
    """Listen to some pieces of a stream, then close it."""
    with server.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        assert answer.status_code in (200, 404), answer.read()
        lines = answer.iter_lines()
        for _ in range(pieces):
            next(lines, None)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_ten_minutes_leak_nothing(tmp_path: Path) -> None:
    limits = {"slots": 6, "max_requests": 12, "cache_memory": 1 << 22, "cache_disk": 1 << 24, "state_storage": 1 << 24}
    with serving(random_model(), tmp_path, **limits) as server:
        memory = []
        for part in range(6):
            end = time.monotonic() + SECONDS / 6
            users = [threading.Thread(target=use, args=(server, 100 * part + seed, end)) for seed in range(8)]
            for user in users:
                user.start()
            for user in users:
                user.join()
            patience = time.monotonic() + 20
            while server.service.async_engine.num_requests or server.service.async_engine.engine.busy:
                assert time.monotonic() < patience, "slots were not freed"
                time.sleep(0.05)
            assert server.service._queues == {} and server.service._locked_sessions == {}
            assert server.service.keys.authenticate(None).num_running == 0
            memory.append(resident())
        assert memory[-1] < 1.05 * memory[1] + 5, f"memory grew: {[round(each) for each in memory]} MB"
        tally = server.service.async_engine.engine.stats
        assert tally.requests > 100 and server.service.prefix_cache is not None
        assert server.service.prefix_cache.stats.bytes <= 1 << 22
        print(f"{tally.requests} requests, {tally.sampled_tokens} tokens, memory {[round(each) for each in memory]} MB")
