"""Routes for saved states: create, list, get, delete, download, upload and inspect them."""

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
from fledge.engine.states.state_file import decode_state, encode_state
from fledge.engine.states.store import StateEntry
from fledge.models.state import State
from fledge.server.auth import Tenant, get_tenant
from fledge.server.concurrency import ConcurrencySlot, cancel_on_disconnect
from fledge.server.errors import ApiError, to_api_error
from fledge.server.generation import check_prompt_length, check_state_name, compute_state
from fledge.server.prompts import encode_texts, find_template, to_turns
from fledge.server.schema import ReadRequest, ViewRequest
from fledge.server.service import Service, get_service
from fledge.tokenizer import render_segments

router = APIRouter(prefix="/v1/fledge")


@router.post("/states")
async def create_state(body: ReadRequest, request: Request) -> dict[str, Any]:
    """Read a text or messages and save the state after them."""
    service, tenant = get_service(request), get_tenant(request)
    if (body.text is None) == (body.messages is None):
        raise ApiError(400, "give either text or messages", param="text")
    check_state_name(body.name, "name")
    service.require_state_store()  # before anything is read
    param = "text" if body.messages is None else "messages"
    segments, template = _render_segments(service, body)
    ids = tuple(chain.from_iterable(await encode_texts(service.llm, segments, param)))
    if not ids:
        raise ApiError(400, "there is nothing to read", param=param)
    check_prompt_length(service, len(ids), param)
    start, tokens_before = service.llm.initial_state, 0
    namespace: str | None = f"{service.get_owner(tenant)}\0"
    if body.state is not None:
        start, metadata = await service.load_state(tenant, body.state, "state")
        tokens_before = metadata.tokens
        namespace = f"{namespace}{body.state}" if body.state.startswith("st_") else None
    engine_request = EngineRequest(ids, start=start, n=0, cache_namespace=namespace)
    async with ConcurrencySlot(tenant):
        state = await cancel_on_disconnect(request, compute_state(service, tenant, engine_request))
    metadata = service.make_metadata(tokens_before + len(ids), template)
    handle = await service.save_state(tenant, state, metadata, body.name)
    return await _describe_state(service, tenant, handle)


def _render_segments(service: Service, body: ReadRequest) -> tuple[list[str], str | None]:
    """What the model reads for a text or messages, and the name of the chat template of messages."""
    if body.messages is None:
        return [body.text or ""], None
    template = find_template(body.template, service.default_template, "template")
    segments = render_segments(to_turns(body.messages, template), template, answer=False)
    return [*segments, template.close_turn()], template.name


@router.get("/states")
async def list_states(request: Request) -> dict[str, Any]:
    """List the saved states of this key, newest first."""
    service, tenant = get_service(request), get_tenant(request)
    entries = await asyncio.to_thread(service.require_state_store().list, service.get_owner(tenant))
    return {"object": "list", "data": [_format_entry(service, tenant, entry) for entry in entries]}


@router.get("/states/{handle}")
async def get_state(handle: str, request: Request) -> dict[str, Any]:
    """Describe a saved state."""
    return await _describe_state(get_service(request), get_tenant(request), handle)


@router.delete("/states/{handle}")
async def delete_state(handle: str, request: Request) -> dict[str, Any]:
    """Delete a saved state."""
    service, tenant = get_service(request), get_tenant(request)
    id = service.parse_handle(tenant, handle, "handle")
    try:
        await asyncio.to_thread(service.require_state_store().delete, service.get_owner(tenant), id)
    except FledgeError as error:
        raise ApiError(404, str(error), param="handle", code="state_not_found") from None
    return {"id": handle, "object": "state", "deleted": True}


@router.get("/states/{handle}/file")
async def download_state(handle: str, request: Request) -> Response:
    """Return a saved state as a signed file."""
    service, tenant = get_service(request), get_tenant(request)
    id = service.parse_handle(tenant, handle, "handle")
    state, metadata = await service.load_state(tenant, handle, "handle")
    entry = await asyncio.to_thread(service.require_state_store().describe, service.get_owner(tenant), id)
    metadata = replace(metadata, title=entry.name or metadata.title)  # so that an upload restores the name
    data = await asyncio.to_thread(encode_state, state, metadata, service.secret)
    headers = {"content-disposition": f'attachment; filename="{id}.state"'}
    return Response(data, media_type="application/octet-stream", headers=headers)


@router.put("/states/file")
async def upload_state(request: Request) -> Response:
    """Save the state of a file that this server, or another one with the same secret, has signed."""
    service, tenant = get_service(request), get_tenant(request)
    data = await request.body()
    try:
        state, metadata = await asyncio.to_thread(decode_state, data, service.secret)
        metadata.check(service.identity, service.llm.name)
        state.check(service.llm.config, 1)
    except FledgeError as error:
        raise to_api_error(error, "file") from None
    handle = await service.save_state(tenant, state, metadata, metadata.title or None)
    return JSONResponse(await _describe_state(service, tenant, handle), status_code=201)


@router.get("/states/{handle}/view")
async def inspect_state(handle: str, request: Request) -> dict[str, Any]:
    """Return the norm of each head of a saved state."""
    service, tenant = get_service(request), get_tenant(request)
    service.parse_handle(tenant, handle, "handle")
    state, _ = await service.load_state(tenant, handle, "handle")
    config = service.llm.config
    return {
        "layers": config.n_layer,
        "heads": config.n_head,
        "head_size": config.head_size,
        "norms": _format_heads(await asyncio.to_thread(head_norms, state)),
    }


@router.post("/view")
async def inspect_conversation(body: ViewRequest, request: Request) -> dict[str, Any]:
    """Return the half-life of each head, and how much each part of a conversation changes each head."""
    service, tenant = get_service(request), get_tenant(request)
    template = find_template(body.template, service.default_template, "template")
    segments = [*render_segments(to_turns(body.messages, template), template, answer=False)]
    encoded = await encode_texts(service.llm, segments, "messages")
    check_prompt_length(service, sum(map(len, encoded)), "messages")
    start = service.initial_state
    if body.state is not None:
        start, _ = await service.load_state(tenant, body.state, "state")
    async with ConcurrencySlot(tenant):
        changes = await cancel_on_disconnect(request, _compute_changes(service, tenant, encoded, start))
    return {
        "half_lives": _format_heads(await asyncio.to_thread(half_lives, service.llm.model)),
        "pieces": [
            {"text": text, "tokens": len(ids), "change": _format_heads(change)}
            for text, ids, change in zip(segments, encoded, changes, strict=True)
        ],
    }


async def _compute_changes(service: Service, tenant: Tenant, encoded: list[tuple[int, ...]], state: State) -> list[Any]:
    """How much each segment changes the state. Each is its own request, so that other requests run in between."""
    changes = list[Any]()
    for ids in encoded:
        before, state = state, await compute_state(service, tenant, EngineRequest(ids, start=state, n=0))
        changes.append(await asyncio.to_thread(relative_changes, before, state))
    return changes


@router.post("/render")
async def render_prompt(body: ViewRequest, request: Request) -> dict[str, Any]:
    """Return the text that the model reads for messages."""
    service = get_service(request)
    get_tenant(request)
    template = find_template(body.template, service.default_template, "template")
    segments = [*render_segments(to_turns(body.messages, template), template)]
    encoded = await encode_texts(service.llm, segments, "messages")
    return {"text": "".join(segments), "tokens": sum(map(len, encoded))}


async def _describe_state(service: Service, tenant: Tenant, handle: str) -> dict[str, Any]:
    id = service.parse_handle(tenant, handle, "handle")
    try:
        entry = await asyncio.to_thread(service.require_state_store().describe, service.get_owner(tenant), id)
    except FledgeError as error:
        raise ApiError(404, str(error), param="handle", code="state_not_found") from None
    return _format_entry(service, tenant, entry)


def _format_entry(service: Service, tenant: Tenant, entry: StateEntry) -> dict[str, Any]:
    metadata = entry.metadata
    return {
        "id": service.make_handle(tenant, entry.id),
        "object": "state",
        "name": entry.name,
        "tokens": metadata.tokens,
        "bytes": entry.nbytes,
        "created": metadata.created,
        "model": metadata.model,
        "template": metadata.template,
    }


def _format_heads(values: Any) -> list[list[float | None]] | None:
    """Numbers of shape (L, H) for JSON; values that are not finite become null."""
    if values is None:
        return None
    table = np.asarray(values, dtype=float)
    return [[float(f"{value:.6g}") if np.isfinite(value) else None for value in row] for row in table]
