"""Routes for health, metrics, models, server information and tokenization."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fledge.server.auth import get_tenant
from fledge.server.errors import ApiError
from fledge.server.schema import DetokenizeRequest, TokenizeRequest
from fledge.server.service import Service, get_service
from fledge.tokenizer import TEMPLATES

router = APIRouter()


@router.head("/health", include_in_schema=False)  # some load balancers send HEAD
@router.get("/health")
async def check_health(request: Request) -> Response:
    """Report whether the engine runs: 200, or 503 if it has stopped."""
    is_alive = get_service(request).async_engine.is_alive
    return JSONResponse({"status": "ok" if is_alive else "closing"}, status_code=200 if is_alive else 503)


@router.get("/metrics")
async def get_metrics(request: Request) -> Response:
    """Report the metrics in the text format of Prometheus."""
    text = await asyncio.to_thread(get_service(request).metrics.render)  # reads the folder of saved states
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """List the model of this server."""
    get_tenant(request)
    return {"object": "list", "data": [_describe_model(get_service(request))]}


@router.get("/v1/models/{name}")
async def get_model(name: str, request: Request) -> dict[str, Any]:
    """Describe the model of this server. Responds with 404 to any other name."""
    get_tenant(request)
    get_service(request).check_model(name)
    return _describe_model(get_service(request))


def _describe_model(service: Service) -> dict[str, Any]:
    return {"id": service.model_name, "object": "model", "created": service.created_at, "owned_by": "fledge"}


@router.get("/v1/fledge/server")
async def get_server_info(request: Request) -> dict[str, Any]:
    """Describe the model, its sizes and the limits of the server."""
    service, tenant = get_service(request), get_tenant(request)
    config, settings = service.llm.config, service.settings
    return {
        "model": service.model_name,
        "family": config.family,
        "version": config.version,
        "layers": config.n_layer,
        "width": config.n_embd,
        "heads": config.n_head,
        "vocabulary": config.vocab_size,
        "weights": service.llm.weights,
        "device": str(service.llm.device),
        "state_bytes": service.initial_state.nbytes,
        "template": service.default_template,
        "templates": sorted(TEMPLATES),
        "slots": settings.slots,
        "max_tokens": min(settings.max_tokens_limit, tenant.max_tokens),
        "default_max_tokens": min(settings.default_max_tokens, tenant.max_tokens),
        "keeps_states": service.state_store is not None,
    }


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """Encode text as token ids."""
    get_tenant(request)
    tokens = await asyncio.to_thread(get_service(request).llm.tokenizer.encode, body.content)
    return {"tokens": tokens, "count": len(tokens)}


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
    """Decode token ids to text."""
    get_tenant(request)
    tokenizer = get_service(request).llm.tokenizer
    for token in body.tokens:
        if not 0 <= token < tokenizer.vocab_size:
            raise ApiError(400, f"token id {token} is outside the vocabulary of {tokenizer.vocab_size}", param="tokens")
    return {"content": await asyncio.to_thread(tokenizer.decode, body.tokens)}
