"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import struct
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from fledge.engine.llm.embedding import embed_state
from fledge.engine.request import Request as EngineRequest
from fledge.server.auth import Tenant, get_tenant
from fledge.server.concurrency import ConcurrencySlot, cancel_on_disconnect, gather_limited, max_concurrency
from fledge.server.errors import ApiError
from fledge.server.generation import check_prompt_length, compute_state
from fledge.server.prompts import encode_texts
from fledge.server.responses import make_usage
from fledge.server.schema import EmbeddingRequest
from fledge.server.service import Service, get_service

router = APIRouter()

MAX_TEXTS = 2048


@router.post("/v1/embeddings")
async def create_embeddings(body: EmbeddingRequest, request: Request) -> dict[str, Any]:
    """Compute one embedding of length one per text from the state after the text.

    The model was not trained for embeddings. docs/server.md reports their quality.
    """
    service, tenant = get_service(request), get_tenant(request)
    service.check_model(body.model)
    dimensions = service.llm.config.dim_att
    if body.dimensions not in (None, dimensions):
        raise ApiError(400, f"dimensions must be {dimensions} for this model", param="dimensions")
    texts = _split_texts(body)
    encoded = await encode_texts(service.llm, texts, "input")
    if not all(encoded):
        raise ApiError(400, "a text is empty", param="input")
    check_prompt_length(service, max(map(len, encoded)), "input")
    functions = [partial(_embed, service, tenant, ids) for ids in encoded]
    async with ConcurrencySlot(tenant):
        limit = max_concurrency(service.settings)
        vectors = await cancel_on_disconnect(request, gather_limited(functions, limit))
    data = [
        {"object": "embedding", "index": index, "embedding": _format_vector(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    usage = make_usage(sum(map(len, encoded)), [], 0)
    usage.pop("completion_tokens")
    return {"object": "list", "data": data, "model": service.model_name, "usage": usage}


def _split_texts(body: EmbeddingRequest) -> list[str | list[int]]:
    """The texts of a body: one or several, as text or token ids."""
    texts: Any = body.input
    if isinstance(texts, str) or (texts and isinstance(texts[0], int)):
        texts = [texts]
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise ApiError(400, f"there are {len(texts)} texts; give 1 to {MAX_TEXTS}", param="input")
    return list(texts)


async def _embed(service: Service, tenant: Tenant, ids: tuple[int, ...]) -> list[float]:
    state = await compute_state(service, tenant, EngineRequest(ids, start=service.llm.initial_state, n=0))
    vector: list[float] = embed_state(state).tolist()
    return vector


def _format_vector(vector: list[float], encoding_format: str) -> list[float] | str:
    if encoding_format == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
