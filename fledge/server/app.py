"""The ASGI application: all routes, error responses, the middleware and the web page."""

from __future__ import annotations

import logging
import mimetypes
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from fledge.core.errors import FledgeError
from fledge.server.errors import ApiError, ErrorResponse, to_api_error
from fledge.server.middleware import HostCheck, Middleware
from fledge.server.routes import chat, completions, embeddings, misc, states
from fledge.server.schema import describe_invalid_body
from fledge.server.service import Service

WEB_FOLDER = Path(__file__).with_name("web")

ROUTERS = (chat.router, completions.router, states.router, embeddings.router, misc.router)
PATHS = frozenset(route.path for router in ROUTERS for route in router.routes if isinstance(route, Route))

UNREADABLE_BODY = {UnicodeDecodeError: "the body is not UTF-8", RecursionError: "the body is nested too deeply"}

log = logging.getLogger("fledge")


def create_app(service: Service, host: str = "127.0.0.1") -> FastAPI:
    """The application of a service. Its startup and shutdown start and stop the service.

    host: the address the server listens on. Without keys, only requests for its own host names are answered.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="Fledge",
        version=version("fledge"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service, app.state.keys = service, service.keys
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(ApiError, _handle_api_error)
    app.add_exception_handler(FledgeError, _handle_fledge_error)
    app.add_exception_handler(RequestValidationError, _handle_validation_error)
    app.add_exception_handler(HTTPException, _handle_http_error)
    app.add_exception_handler(Exception, _handle_unexpected_error)
    _add_web_page(app)
    settings = service.settings
    app.add_middleware(
        Middleware,
        metrics=service.metrics,
        max_body_bytes=settings.max_body_bytes,
        host_check=None if service.keys.is_required else HostCheck(host, settings.origins),
    )
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["authorization", "content-type"],
        )
    return app


class WebFiles(StaticFiles):
    """The files of the web page. Browsers revalidate each file, so they never mix two versions of the page."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        """The file, or 304 if it has not changed."""
        response = super().file_response(*arguments, **options)
        response.headers["cache-control"] = "no-cache"
        return response


def _add_web_page(app: FastAPI) -> None:
    """Add a route for each file of the web page. A mount at "/" would match every path."""
    mimetypes.add_type("text/javascript", ".js")  # browsers require it, and the type table of the system may differ
    files = WebFiles(directory=WEB_FOLDER, html=True)
    for name in ("", *(file.name for file in WEB_FOLDER.iterdir())):
        app.router.routes.append(Route(f"/{name}", files, methods=["GET"], name="page", include_in_schema=False))


async def _handle_api_error(request: Request, error: Any) -> Response:
    return ErrorResponse(error)


async def _handle_fledge_error(request: Request, error: Any) -> Response:
    return ErrorResponse(to_api_error(error))


async def _handle_validation_error(request: Request, error: Any) -> Response:
    content_type = request.headers.get("content-type", "")
    message, param = describe_invalid_body(error.errors(), request.url.path, content_type)
    return ErrorResponse(ApiError(400, message, param=param))


async def _handle_http_error(request: Request, error: Any) -> Response:
    """Respond to an unknown path, a method that is not allowed, or a body that cannot be read."""
    method, path = request.method, request.url.path
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{path:.80} accepts {allowed}, not {method:.10}"
        response = ErrorResponse(ApiError(405, message, code="method_not_allowed"))
        response.headers["allow"] = allowed
        return response
    if error.status_code == 404:
        return ErrorResponse(ApiError(404, f"unknown path {path:.80}{_suggest_path(path)}", code="unknown_url"))
    messages = (text for cause, text in UNREADABLE_BODY.items() if isinstance(error.__cause__, cause))
    return ErrorResponse(ApiError(error.status_code, str(next(messages, error.detail))))


def _suggest_path(path: str) -> str:
    """A hint for a path that differs from an existing one only by the prefix /v1 or a trailing slash."""
    candidates = (f"/v1{path}", path.removeprefix("/v1"), path.rstrip("/"))
    similar = next((candidate for candidate in candidates if candidate in PATHS), None)
    if similar is None:
        return ""
    is_base_url_wrong = similar == f"/v1{path}"
    return f"; use {similar}" + (": set the base_url of OpenAI clients to .../v1" if is_base_url_wrong else "")


async def _handle_unexpected_error(request: Request, error: Any) -> Response:
    log.error("request to %s failed", request.url.path, exc_info=error)
    return ErrorResponse(ApiError(500, "internal server error; see the server's log"))
