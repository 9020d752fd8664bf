"""The states that somebody keeps: read something, list, fetch, bring back, look inside."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fledge.core.errors import FledgeError
from fledge.engine.request import Request as EngineRequest
from fledge.engine.states.inspect import half_lives, head_norms, relative_changes
from fledge.engine.states.state_file import StateMetadata, decode_state, encode_state
from fledge.models.state import State
from fledge.server.access import service_of, tenant_of
from fledge.server.auth import Tenant
from fledge.server.concurrency import encoded, state_after
from fledge.server.errors import ApiError, api_error
from fledge.server.generation import ConcurrencySlot, check_label, check_length, unless_gone
from fledge.server.prompts import template_of, turns
from fledge.server.schema import ReadRequest, ViewRequest
from fledge.server.service import Service
from fledge.tokenizer import render_segments

router = APIRouter(prefix="/v1/fledge")


@router.post("/states")
async def read(body: ReadRequest, request: Request) -> dict[str, Any]:
    """Read a text or messages, and keep the state after them."""
    service, tenant = service_of(request), tenant_of(request)
    if (body.text is None) == (body.messages is None):
        raise ApiError(400, "give either text or messages", param="text")
    check_label(body.name, "name")
    service.shelf_for("fledge")  # before anything is read for it
    if body.text is not None:
        template, parts = None, [body.text]
    else:
        chosen = template_of(body.template, service.template, "template")
        template, closed = chosen.name, [*render_segments(turns(body.messages or [], chosen), chosen, answer=False)]
        parts = [*closed, chosen.close_turn()]
    param = "text" if body.messages is None else "messages"
    ids = tuple(chain.from_iterable(await encoded(service, parts, param)))
    if not ids:
        raise ApiError(400, "there is nothing to read", param=param)
    check_length(service, len(ids), param)
    start, before, space = service.llm.initial_state, 0, f"{service.owner(tenant)}\0"
    if body.state is not None:
        start, card = await service.known_state(tenant, body.state, "state")
        before, space = card.tokens, f"{space}{body.state}" if body.state.startswith("st_") else None  # type: ignore[assignment]
    reading = EngineRequest(ids, start=start, n=0, cache_namespace=space)
    async with ConcurrencySlot(tenant):
        state = await unless_gone(request, state_after(service, tenant, reading))
    card = service.card(before + len(ids), template)
    handle = await service.kept(tenant, state, card, body.name)
    return await _described(service, tenant, handle)


@router.get("/states")
async def kept(request: Request) -> dict[str, Any]:
    """What this key keeps, newest first."""
    service, tenant = service_of(request), tenant_of(request)
    entries = await asyncio.to_thread(service.states.list, service.owner(tenant))
    return {"object": "list", "data": [_described_entry(service, tenant, entry) for entry in entries]}


@router.get("/states/{handle}")
async def one(handle: str, request: Request) -> dict[str, Any]:
    """One of them."""
    return await _described(service_of(request), tenant_of(request), handle)


@router.delete("/states/{handle}")
async def forget(handle: str, request: Request) -> dict[str, Any]:
    """Forget one."""
    service, tenant = service_of(request), tenant_of(request)
    id = service.opened(tenant, handle, "handle")
    try:
        await asyncio.to_thread(service.states.delete, service.owner(tenant), id)
    except FledgeError as error:
        raise ApiError(404, str(error), param="handle", code="state_not_found") from None
    return {"id": handle, "object": "state", "deleted": True}


@router.get("/states/{handle}/file")
async def fetched(handle: str, request: Request) -> Response:
    """One as a file, signed."""
    service, tenant = service_of(request), tenant_of(request)
    id = service.opened(tenant, handle, "handle")
    state, card = await service.known_state(tenant, handle, "handle")
    entry = await asyncio.to_thread(service.states.describe, service.owner(tenant), id)
    card = replace(card, title=entry.name or card.title)  # so that the name travels with the state
    data = await asyncio.to_thread(encode_state, state, card, service.secret)
    name = handle.partition(".")[0]
    headers = {"content-disposition": f'attachment; filename="{name}.state"'}
    return Response(data, media_type="application/octet-stream", headers=headers)


@router.put("/states/file")
async def brought(request: Request) -> Response:
    """A file that this server, or one with its secret, has written: keep it again."""
    service, tenant = service_of(request), tenant_of(request)
    data = await request.body()
    try:
        state, card = await asyncio.to_thread(decode_state, data, service.secret)
        card.check(service.identity, service.llm.name)
        state.check(service.llm.config, 1)
    except FledgeError as error:
        raise api_error(error, "file") from None
    handle = await service.kept(tenant, state, card, card.title or None)
    return JSONResponse(await _described(service, tenant, handle), status_code=201)


@router.get("/states/{handle}/view")
async def looked(handle: str, request: Request) -> dict[str, Any]:
    """How much each head holds."""
    service, tenant = service_of(request), tenant_of(request)
    service.opened(tenant, handle, "handle")
    state, _ = await service.known_state(tenant, handle, "handle")
    config = service.llm.config
    return {
        "layers": config.n_layer,
        "heads": config.n_head,
        "head_size": config.head_size,
        "norms": _rows(await asyncio.to_thread(head_norms, state)),
    }


@router.post("/view")
async def view(body: ViewRequest, request: Request) -> dict[str, Any]:
    """How long each head remembers, and how much each message changed it."""
    service, tenant = service_of(request), tenant_of(request)
    template = template_of(body.template, service.template, "template")
    texts = [*render_segments(turns(body.messages, template), template, answer=False)]
    ids = await encoded(service, texts, "messages")
    check_length(service, sum(map(len, ids)), "messages")
    start = service.beginning
    if body.state is not None:
        start, _ = await service.known_state(tenant, body.state, "state")
    async with ConcurrencySlot(tenant):
        found = await unless_gone(request, _changes(service, tenant, ids, start))
    return {
        "half_lives": _rows(await asyncio.to_thread(half_lives, service.llm.model)),
        "pieces": [
            {"text": text, "tokens": len(tokens), "change": _rows(change)}
            for text, tokens, change in zip(texts, ids, found, strict=True)
        ],
    }


async def _changes(service: Service, tenant: Tenant, parts: list[tuple[int, ...]], state: State) -> list[Any]:
    """How much each part changed; each is read as a request of its own, so that those of others go on beside it."""
    found = list[Any]()
    for ids in parts:
        before, state = state, await state_after(service, tenant, EngineRequest(ids, start=state, n=0))
        found.append(await asyncio.to_thread(relative_changes, before, state))
    return found


@router.post("/render")
async def rendered(body: ViewRequest, request: Request) -> dict[str, Any]:
    """What the model reads of messages."""
    service = service_of(request)
    tenant_of(request)
    template = template_of(body.template, service.template, "template")
    texts = [*render_segments(turns(body.messages, template), template)]
    return {"text": "".join(texts), "tokens": sum(map(len, await encoded(service, texts, "messages")))}


async def _described(service: Service, tenant: Tenant, handle: str) -> dict[str, Any]:
    id = service.opened(tenant, handle, "handle")
    try:
        entry = await asyncio.to_thread(service.states.describe, service.owner(tenant), id)
    except FledgeError as error:
        raise ApiError(404, str(error), param="handle", code="state_not_found") from None
    return _described_entry(service, tenant, entry)


def _described_entry(service: Service, tenant: Tenant, entry: Any) -> dict[str, Any]:
    card: StateMetadata = entry.metadata
    return {
        "id": service.handle(tenant, entry.id),
        "object": "state",
        "name": entry.name,
        "tokens": card.tokens,
        "bytes": entry.nbytes,
        "created": card.created,
        "model": card.model,
        "template": card.template,
    }


def _rows(values: Any) -> list[list[float | None]] | None:
    """(L, H) numbers as JSON has them: what is not finite becomes null."""
    if values is None:
        return None
    table = np.asarray(values, dtype=float)
    return [[float(f"{value:.6g}") if np.isfinite(value) else None for value in row] for row in table]
