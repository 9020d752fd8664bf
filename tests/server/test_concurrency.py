"""`gather_limited`: order of the results, limit and errors."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from fledge.server.concurrency import gather_limited


def test_the_first_error_cancels_the_other_functions() -> None:
    started, ended = list[int](), list[int]()

    async def work(number: int) -> int:
        started.append(number)
        try:
            await asyncio.sleep(0 if number == 1 else 60)
        finally:
            ended.append(number)
        raise ValueError(str(number))

    async def run() -> None:
        with pytest.raises(ValueError, match=r"^1$"):
            await gather_limited([partial(work, number) for number in range(9)], 3)
        assert sorted(started) == sorted(ended) == [0, 1, 2], "all have ended when the error is raised"

    asyncio.run(run())


def test_results_are_in_order_and_the_limit_holds() -> None:
    running, most_running = 0, 0

    async def work(number: int) -> int:
        nonlocal running, most_running
        running += 1
        most_running = max(most_running, running)
        await asyncio.sleep((number % 3) / 1000)
        running -= 1
        return number

    results = asyncio.run(gather_limited([partial(work, number) for number in range(20)], 4))
    assert results == list(range(20)) and most_running == 4
