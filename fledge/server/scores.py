"""How probable the tokens of a prompt are: read by pieces in the desk's thread, so that others go on in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import torch

from fledge.engine.engine import compute_logprobs
from fledge.engine.events import TextToken
from fledge.engine.generation import ModelOutput, get_device
from fledge.engine.llm.scoring import CHUNK
from fledge.engine.request import QueueFull
from fledge.models.state import State
from fledge.server.errors import api_error
from fledge.server.service import Service


class PromptScoring:
    """One prompt, read once: `tokens` and `cursor` are there when `pieces` has come to its end."""

    def __init__(self, service: Service, start: State | None, ids: tuple[int, ...], top: int) -> None:
        """start: what the prompt follows; ids: at least one; top: how many of the most probable tokens are told."""
        self._service, self._ids, self._top = service, ids, top
        self._state = (service.beginning if start is None else start).to(service.llm.device)
        self.tokens = [TextToken(ids[0], None)]  # whose scores nobody has kept

    async def pieces(self, deadline: float | None = None) -> AsyncIterator[int]:
        """Read: after each piece its tokens. Where nobody waits for the next, as the client has gone, it ends there.

        deadline: on the engine's clock; after it no piece begins but the first.
        Raises ApiError where the server is so busy that the request would be turned away afterwards.
        """
        desk = self._service.desk
        if desk.num_requests >= desk.engine.max_requests:
            raise api_error(QueueFull(f"{desk.engine.max_requests} requests are on their way; try again later"))
        for begin in range(0, len(self._ids), CHUNK):
            self.tokens += await asyncio.wrap_future(desk.call(lambda begin=begin: self._piece(begin)))  # type: ignore[misc]
            yield len(self._ids[begin : begin + CHUNK])
            if deadline is not None and time.monotonic() >= deadline:
                return

    def _piece(self, begin: int) -> list[TextToken]:
        model, part = self._service.llm.model, self._ids[begin : begin + CHUNK]
        tally, began = self._service.desk.engine.stats, time.perf_counter()
        with torch.no_grad():
            scores, self._state = model(torch.tensor([part], dtype=torch.long, device=get_device(model)), self._state)
        tally.model_calls, tally.prefill_tokens = tally.model_calls + 1, tally.prefill_tokens + len(part)
        tally.model_seconds += time.perf_counter() - began
        self.cursor = ModelOutput(scores[0, -1], self._state)
        after = self._ids[begin + 1 : begin + CHUNK + 1]
        return [
            TextToken(token, compute_logprobs(scores[0, place].cpu()[None], [token], self._top)[0])
            for place, token in enumerate(after)
        ]
