"""Times are those of one exchange and one choice, whatever came before or is done after."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from running import IDENTITY, random_model

from fledge.engine.events import Event, FinishEvent, TextEvent, TextRequest
from fledge.engine.sampling import SamplingParams
from fledge.server.generation import Generation, GenerationParams
from fledge.server.prompts import EncodedPrompt
from fledge.server.schema import FledgeOptions
from fledge.server.service import Service
from fledge.server.settings import ServerSettings

MADE, ENTERED = 100.0, 200.0
"""The moments at which the exchange is made and entered."""


def piece(choice: int) -> TextEvent:
    return TextEvent(choice, "x", ())


def ended(choice: int, drawn: int) -> FinishEvent:
    return FinishEvent(choice, "length", None, (), drawn, 1, 0)


async def run(
    batches: list[tuple[float, list[Event]]], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    """What an exchange tells, and the (count, sum) of the figures, where events come at these moments."""
    now = [MADE]
    monkeypatch.setattr("fledge.server.latency.time", SimpleNamespace(monotonic=lambda: now[0]))
    service = Service(random_model(), replace(ServerSettings(), cache_memory=0), IDENTITY)

    @asynccontextmanager
    async def events(job: TextRequest) -> AsyncIterator[AsyncIterator[list[Event]]]:
        async def each() -> AsyncIterator[list[Event]]:
            for moment, found in batches:
                now[0] = moment
                yield found

        yield each()

    monkeypatch.setattr(service, "generate", events)
    order = GenerationParams(EncodedPrompt((5, 6)), SamplingParams(max_tokens=9), FledgeOptions(**options), n=2)
    one = Generation(service, service.keys.authenticate(None), order)
    now[0] = ENTERED
    async with one:
        async for _ in one.events:
            now[0] += 1000  # whoever takes them, takes his time
    figures = {}
    for name in ("time_to_first_token", "time_per_output_token"):
        sums = {sample.name: sample.value for sample in next(iter(getattr(service.metrics, name).collect())).samples}
        figures[name] = tuple(value for key, value in sums.items() if key.endswith(("_count", "_sum")))
    return one.summarize(), figures  # type: ignore[return-value]


BATCHES: list[tuple[float, list[Event]]] = [
    (ENTERED + 3, [piece(0)]),
    (ENTERED + 5, [piece(1)]),
    (ENTERED + 7, [piece(0), ended(0, 3)]),
    (ENTERED + 21, [piece(1)]),
    (ENTERED + 25, [ended(1, 5)]),
]


def test_an_exchange_begins_when_it_is_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    summary, figures = asyncio.run(run(BATCHES, monkeypatch))
    assert summary["seconds_to_first_token"] == 3 and summary["seconds"] == 25
    assert figures["time_to_first_token"] == (1, 3)


def test_the_time_of_a_token_is_that_of_its_own_text(monkeypatch: pytest.MonkeyPatch) -> None:
    _, figures = asyncio.run(run(BATCHES, monkeypatch))
    assert figures["time_per_output_token"] == (2, (7 - 3) / 2 + (25 - 5) / 4)


def test_and_of_the_text_alone_where_its_state_is_brought_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    _, figures = asyncio.run(run(BATCHES, monkeypatch, return_state="inline"))
    assert figures["time_per_output_token"] == (2, (7 - 3) / 2 + (21 - 5) / 4)


def test_nothing_is_told_where_nothing_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    summary, figures = asyncio.run(run([(ENTERED + 4, [ended(0, 0), ended(1, 0)])], monkeypatch))
    assert summary["seconds_to_first_token"] is None and summary["seconds"] == 4
    assert figures == {"time_to_first_token": (0, 0), "time_per_output_token": (0, 0)}


def test_no_text_waits_for_the_state_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = list[tuple[int, int]]()

    async def keep(exchange: Generation, end: FinishEvent) -> None:
        kept.append((end.choice, len(exchange.finish_events)))

    monkeypatch.setattr(Generation, "_save_state", keep)
    asyncio.run(run(BATCHES, monkeypatch, return_state="inline"))
    assert kept == [(0, 2), (1, 2)], "both when the last has ended"
