"""How probable the tokens of a prompt are: read by pieces in the desk's thread, so that others go on in between."""

from __future__ import annotations

import asyncio

import torch

from fledge.engine.engine import likelihood
from fledge.engine.generation import CHUNK, device_of
from fledge.engine.job import Token
from fledge.models.state import State
from fledge.server.exchange import Exchange
from fledge.server.service import Service


async def prompt_tokens(service: Service, exchange: Exchange, top: int) -> list[Token]:
    """The tokens of the prompt, each with its likelihood after those before it; the first follows nothing."""
    ids, model = exchange.order.prompt.ids, service.llm.model
    device = device_of(model)
    found = [Token(ids[0], None)]
    state: State = service.beginning

    def piece(start: int) -> list[Token]:
        nonlocal state
        part = ids[start : start + CHUNK]
        with torch.no_grad():
            logits, state = model(torch.tensor([part], dtype=torch.long, device=device), state)
        after = ids[start + 1 : start + CHUNK + 1]
        return [Token(token, likelihood(logits[0, place].cpu(), token, top)) for place, token in enumerate(after)]

    for start in range(0, len(ids), CHUNK):
        found += await asyncio.wrap_future(service.desk.call(lambda start=start: piece(start)))  # type: ignore[misc]
    return found
