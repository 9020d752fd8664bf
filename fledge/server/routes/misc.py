"""The small routes: models, tokens, vectors, health, figures."""

from __future__ import annotations

import asyncio
import base64
import struct
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fledge.engine.llm.embedding import embed_state
from fledge.engine.request import Request as EngineRequest
from fledge.server.access import service_of, tenant_of
from fledge.server.auth import Tenant
from fledge.server.concurrency import at_once, encoded, state_after, together
from fledge.server.errors import ApiError
from fledge.server.generation import ConcurrencySlot, check_length, unless_gone
from fledge.server.responses import usage
from fledge.server.schema import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from fledge.server.service import Service
from fledge.tokenizer import TEMPLATES

router = APIRouter()

MOST_TEXTS = 2048


@router.head("/health", include_in_schema=False)  # as some balancers ask
@router.get("/health")
async def health(request: Request) -> Response:
    """Whether requests are answered."""
    alive = service_of(request).desk.is_alive
    return JSONResponse({"status": "ok" if alive else "closing"}, status_code=200 if alive else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    service = service_of(request)
    text = await asyncio.to_thread(service.metrics.text)  # which looks into the folder of kept states
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The model being served."""
    tenant_of(request)
    return {"object": "list", "data": [_model(service_of(request))]}


@router.get("/v1/models/{name}")
async def model(name: str, request: Request) -> dict[str, Any]:
    """That model, or 404."""
    tenant_of(request)
    service_of(request).check_model(name)
    return _model(service_of(request))


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.began, "owned_by": "fledge"}


@router.get("/v1/fledge/server")
async def server(request: Request) -> dict[str, Any]:
    """The model, its sizes, and what may be asked for."""
    service, tenant = service_of(request), tenant_of(request)
    config, settings = service.llm.config, service.settings
    return {
        "model": service.name,
        "family": config.family,
        "version": config.version,
        "layers": config.n_layer,
        "width": config.n_embd,
        "heads": config.n_head,
        "vocabulary": config.vocab_size,
        "weights": service.llm.weights,
        "device": str(service.llm.device),
        "state_bytes": service.beginning.nbytes,
        "template": service.template,
        "templates": sorted(TEMPLATES),
        "slots": settings.slots,
        "max_tokens": min(settings.most_tokens, tenant.max_tokens),
        "default_max_tokens": min(settings.max_tokens, tenant.max_tokens),
        "keeps_states": service.shelf is not None,
    }


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """Text to ids."""
    tenant_of(request)
    tokens = await asyncio.to_thread(service_of(request).llm.tokenizer.encode, body.content)
    return {"tokens": tokens, "count": len(tokens)}


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
    """Ids to text."""
    tenant_of(request)
    tokenizer = service_of(request).llm.tokenizer
    for token in body.tokens:
        if not 0 <= token < tokenizer.vocab_size:
            raise ApiError(400, f"token id {token} is outside the vocabulary of {tokenizer.vocab_size}", param="tokens")
    return {"content": await asyncio.to_thread(tokenizer.decode, body.tokens)}


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingRequest, request: Request) -> dict[str, Any]:
    """One vector a text, of length one: what it leaves in the heads (fledge.engine.llm.embedding).

    The model was trained to write and not for this; docs/server.md says how well it does.
    """
    service, tenant = service_of(request), tenant_of(request)
    service.check_model(body.model)
    if body.dimensions not in (None, service.llm.config.dim_att):
        message = f"the vectors have {service.llm.config.dim_att} dimensions, and no other number"
        raise ApiError(400, message, param="dimensions")
    given = body.input
    texts = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not 1 <= len(texts) <= MOST_TEXTS:
        raise ApiError(400, f"{len(texts)} texts; give 1 to {MOST_TEXTS}", param="input")
    ids = await encoded(service, texts, "input")  # type: ignore[arg-type]
    if not all(ids):
        raise ApiError(400, "a text is empty", param="input")
    check_length(service, max(map(len, ids)), "input")
    works = [partial(_vector, service, tenant, each) for each in ids]
    async with ConcurrencySlot(tenant):
        vectors = await unless_gone(request, together(works, at_once(service)))
    data = [
        {"object": "embedding", "index": number, "embedding": _packed(vector, body.encoding_format)}
        for number, vector in enumerate(vectors)
    ]
    counts = usage(sum(map(len, ids)), [], 0)
    counts.pop("completion_tokens")
    return {"object": "list", "data": data, "model": service.name, "usage": counts}


async def _vector(service: Service, tenant: Tenant, ids: tuple[int, ...]) -> list[float]:
    state = await state_after(service, tenant, EngineRequest(ids, start=service.llm.initial_state, n=0))
    found: list[float] = embed_state(state).tolist()
    return found


def _packed(vector: list[float], format: str) -> list[float] | str:
    return vector if format == "float" else base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
