"""What is read and not gone on with: the state that a text leaves."""

from __future__ import annotations

from fledge.engine.job import End, Job
from fledge.engine.request import Request
from fledge.models.state import State
from fledge.server.keys import Tenant
from fledge.server.service import Service


async def state_after(service: Service, tenant: Tenant, request: Request) -> State:
    """The state that has read a request, which draws nothing; the key pays for it once it has been taken in."""
    async with service.events(Job(request, wants_state=True)) as events:
        tenant.spend(len(request.ids))
        async for found in events:
            for end in found:
                assert isinstance(end, End) and end.state is not None
                state = end.state
    return state
