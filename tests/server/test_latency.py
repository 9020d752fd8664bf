"""Latencies are measured per generation and per choice, without the time that the client takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from live_server import IDENTITY, random_llm

from fledge.engine.events import Event, FinishEvent, TextEvent, TextRequest
from fledge.engine.sampling import SamplingParams
from fledge.server.generation import Generation, GenerationParams
from fledge.server.prompts import EncodedPrompt
from fledge.server.schema import FledgeOptions
from fledge.server.service import Service
from fledge.server.settings import ServerSettings

CREATED, ENTERED = 100.0, 200.0
"""Times at which the generation is created and entered."""

Batches = list[tuple[float, list[Event]]]
"""Events with the time at which they arrive."""


def text(choice: int) -> TextEvent:
    return TextEvent(choice, "x", ())


def finish(choice: int, sampled_tokens: int) -> FinishEvent:
    return FinishEvent(choice, "length", None, (), sampled_tokens, 1, 0)


async def run(
    batches: Batches, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    """The summary of a generation with these events, and the (count, sum) of the metrics of latency."""
    now = [CREATED]
    monkeypatch.setattr("fledge.server.latency.time", SimpleNamespace(monotonic=lambda: now[0]))
    service = Service(random_llm(), ServerSettings(cache_memory=0), IDENTITY)

    @asynccontextmanager
    async def generate(request: TextRequest) -> AsyncIterator[AsyncIterator[list[Event]]]:
        async def read_events() -> AsyncIterator[list[Event]]:
            for time, events in batches:
                now[0] = time
                yield events

        yield read_events()

    monkeypatch.setattr(service, "generate", generate)
    params = GenerationParams(EncodedPrompt((5, 6)), SamplingParams(max_tokens=9), FledgeOptions(**options), n=2)
    generation = Generation(service, service.keys.authenticate(None), params)
    now[0] = ENTERED
    async with generation:
        async for _ in generation.events:
            now[0] += 1000  # a slow client
    metrics = {}
    for name in ("time_to_first_token", "time_per_output_token"):
        (family,) = getattr(service.metrics, name).collect()
        samples = {sample.name: sample.value for sample in family.samples}
        metrics[name] = tuple(value for name, value in samples.items() if name.endswith(("_count", "_sum")))
    return generation.summarize(), metrics  # type: ignore[return-value]


BATCHES: Batches = [
    (ENTERED + 3, [text(0)]),
    (ENTERED + 5, [text(1)]),
    (ENTERED + 7, [text(0), finish(0, 3)]),
    (ENTERED + 21, [text(1)]),
    (ENTERED + 25, [finish(1, 5)]),
]


def test_the_clock_starts_when_the_generation_is_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    summary, metrics = asyncio.run(run(BATCHES, monkeypatch))
    assert summary["seconds_to_first_token"] == 3 and summary["seconds"] == 25
    assert metrics["time_to_first_token"] == (1, 3)


def test_the_time_per_token_is_measured_per_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    _, metrics = asyncio.run(run(BATCHES, monkeypatch))
    assert metrics["time_per_output_token"] == (2, (7 - 3) / 2 + (25 - 5) / 4)


def test_the_time_per_token_ends_with_the_text_if_a_state_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    _, metrics = asyncio.run(run(BATCHES, monkeypatch, return_state="inline"))
    assert metrics["time_per_output_token"] == (2, (7 - 3) / 2 + (21 - 5) / 4)


def test_nothing_is_measured_without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    summary, metrics = asyncio.run(run([(ENTERED + 4, [finish(0, 0), finish(1, 0)])], monkeypatch))
    assert summary["seconds_to_first_token"] is None and summary["seconds"] == 4
    assert metrics == {"time_to_first_token": (0, 0), "time_per_output_token": (0, 0)}


def test_states_are_saved_after_the_last_choice_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = list[tuple[int, int]]()

    async def save_state(generation: Generation, event: FinishEvent) -> None:
        saved.append((event.choice, len(generation.finish_events)))

    monkeypatch.setattr(Generation, "_save_state", save_state)
    asyncio.run(run(BATCHES, monkeypatch, return_state="inline"))
    assert saved == [(0, 2), (1, 2)]
