"""The app: the routers, errors, size limits, names, the page. `uvicorn` or anything else that speaks ASGI runs it."""

from __future__ import annotations

import json
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
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fledge.core.errors import FledgeError
from fledge.server.errors import ApiError, api_error
from fledge.server.host_check import HostCheck
from fledge.server.routes import chat, completions, misc, states
from fledge.server.schema import ONLY_TEXT, FledgeOptions
from fledge.server.service import Service

PAGE = Path(__file__).with_name("web")
POLICY = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", POLICY.encode()),
)

ROUTERS = (chat.router, completions.router, states.router, misc.router)
PATHS = frozenset(route.path for router in ROUTERS for route in router.routes if isinstance(route, Route))

UNREADABLE = {UnicodeDecodeError: "the body is not UTF-8", RecursionError: "the body is nested too deeply"}
NO_OBJECT = "the body must be a JSON object"
SHAPES = {
    "str": "text",
    "list[str]": "a list of texts",
    "list[TextPart]": "a list of parts",
    "list[int]": "a list of numbers",
    "list[list[int]]": "a list of lists of numbers",
    "dict[str,any]": "an object",
}
"""What Pydantic calls the shapes that a field may have, in words."""

log = logging.getLogger("fledge")


def create_app(service: Service, host: str = "127.0.0.1") -> FastAPI:
    """The app of one service; it starts and stops the service with itself.

    host: where it will listen; without keys only requests that call the server by a name of its own are answered.
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
    app.state.service = service
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(ApiError, _api)
    app.add_exception_handler(FledgeError, _fledge)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)
    mimetypes.add_type("text/javascript", ".js")  # whatever the machine's own table says: browsers insist on it
    page = WebFiles(directory=PAGE, html=True)
    for name in ("", *(file.name for file in PAGE.iterdir())):  # not a mount, which would take every path there is
        app.router.routes.append(Route(f"/{name}", page, methods=["GET"], name="page", include_in_schema=False))
    hosts = None if service.keys.needed else HostCheck(host, service.settings.origins)
    app.add_middleware(Middleware, service=service, hosts=hosts)
    if service.settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["authorization", "content-type"],
        )
    return app


class WebFiles(StaticFiles):
    """The page's files, asked for anew each time: a browser must not mix those of two versions."""

    def file_response(self, *arguments: Any, **more: Any) -> Response:
        """A file, or that it has not changed."""
        answer = super().file_response(*arguments, **more)
        answer.headers["cache-control"] = "no-cache"
        return answer


class ErrorResponse(JSONResponse):
    """An error. In ASCII: what it shows of a request may be half a surrogate pair, which UTF-8 has no bytes for."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.body, error.status, error.headers)

    def render(self, content: Any) -> bytes:
        """The body; a line, for those who read it in a terminal."""
        return json.dumps(content).encode("ascii") + b"\n"


class Middleware:
    """What every request passes: names, the limit of its size, headers that keep pages safe, the count of answers."""

    def __init__(self, app: ASGIApp, service: Service, hosts: HostCheck | None) -> None:
        """hosts: the names that are answered to; None: any."""
        self._app, self._service, self._hosts = app, service, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most, size, status, refused = self._service.settings.body, 0, 500, self._refused(scope)

        async def received() -> Message:
            nonlocal size, refused
            message = await receive()
            size += len(message.get("body", b""))
            if size > most:
                refused = _too_large(most)
            # What reads the body would answer an error of its own, so it is told that the client has gone.
            return {"type": "http.disconnect"} if refused else message

        async def sent(message: Message) -> None:
            nonlocal status
            if refused:
                return
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        try:
            if not refused:
                await self._app(scope, received, sent)
        except ClientDisconnect:
            status = 499
        finally:
            if refused:
                status = refused.status
                await ErrorResponse(refused)(scope, receive, send)
            route = getattr(scope.get("route"), "path", "page")
            self._service.metrics.requests.labels(route, str(status)).inc()

    def _refused(self, scope: Scope) -> ApiError | None:
        """Why a request is not even read."""
        try:
            if self._hosts is not None:
                self._hosts.check(scope["headers"])
        except ApiError as error:
            return error
        most, length = self._service.settings.body, dict(scope["headers"]).get(b"content-length", b"0")
        return None if length.isdigit() and int(length) <= most else _too_large(most)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the request is larger than {most} bytes", code="too_large")


async def _api(request: Request, error: Any) -> Response:
    return ErrorResponse(error)


async def _fledge(request: Request, error: Any) -> Response:
    return await _api(request, api_error(error))


async def _http(request: Request, error: Any) -> Response:
    """A path that is not there, or not by this method."""
    method, path = request.method, request.url.path
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        refusal = ErrorResponse(
            ApiError(405, f"{path:.80} takes {allowed}, not {method:.10}", code="method_not_allowed")
        )
        refusal.headers["allow"] = allowed
        return refusal
    if error.status_code != 404:
        found = next((text for kind, text in UNREADABLE.items() if isinstance(error.__cause__, kind)), error.detail)
        return await _api(request, ApiError(error.status_code, str(found)))
    meant = next((name for name in (f"/v1{path}", path.removeprefix("/v1"), path.rstrip("/")) if name in PATHS), None)
    hint = f"; it is {meant} here" if meant else ""
    if meant == f"/v1{path}":
        hint += ": give OpenAI's clients a base_url that ends with /v1"
    return await _api(request, ApiError(404, f"there is no {path:.80} here{hint}", code="unknown_url"))


async def _invalid(request: Request, error: Any) -> Response:
    """A body of the wrong shape: the first fault, with its field."""
    first, wanted = _first_fault(error.errors())
    if first["type"] == "json_invalid":
        return await _api(request, ApiError(400, f"the body is not JSON: {first['ctx']['error']}"))
    param = ".".join(str(part) for part in first["loc"] if part not in ("body", "path", "query")) or None
    if param is None:
        return await _api(request, ApiError(400, _no_object(request, first)))
    given = json.dumps(first.get("input"), default=str, ensure_ascii=False)
    unknown = first["type"] == "extra_forbidden"
    text = _unknown(param, request.url.path) if unknown else wanted or first["msg"]
    shown = f" (given: {given:.80})" if first["type"] not in ("missing", "extra_forbidden", ONLY_TEXT) else ""
    return await _api(request, ApiError(400, f"{param}: {text}{shown}", param=param))


def _unknown(param: str, path: str) -> str:
    ours = path.endswith("/completions") and param in FledgeOptions.model_fields
    return f"this field is not known{f'; it is fledge.{param} here' if ours else ''}"


def _first_fault(errors: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """The fault to tell of, and, where a field may have several shapes and has none, which these are.

    Pydantic tells of every shape apart, and puts its name into the place: ("messages", 0, "content", "str").
    """
    # A field that is not known is often the one that is missed, with a slip in its name.
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    at = next((at for at, part in enumerate(first["loc"]) if part in SHAPES), None)
    if at is None or first["type"] == "extra_forbidden":
        *place, name = first["loc"]
        return {**first, "loc": (*(part for part in place if part not in SHAPES), name)}, ""
    place = first["loc"][:at]
    same = [each for each in errors if each["loc"][:at] == place and each["loc"][at:]]
    names = list(dict.fromkeys(str(each["loc"][at]) for each in same))
    inner = [each for each in same if len(each["loc"]) > at + 1]
    if inner and len(names) == 2:  # text, or a list that has gone wrong inside
        return {**inner[0], "loc": (*place, *inner[0]["loc"][at + 1 :])}, ""
    return {**first, "loc": place}, f"it must be {' or '.join(SHAPES.get(name, name) for name in names)}"


def _no_object(request: Request, fault: dict[str, Any]) -> str:
    """What is wrong with a body that has no fields."""
    kind = request.headers.get("content-type", "")
    if not fault.get("input"):
        return "the body is empty; it must be a JSON object" if fault["type"] == "missing" else NO_OBJECT
    if kind.partition(";")[0].strip().lower() != "application/json":
        return f"the body is {kind[:80] or 'of no type'}; send the header Content-Type: application/json"
    return NO_OBJECT


async def _unexpected(request: Request, error: Any) -> Response:
    log.error("a request to %s failed", request.url.path, exc_info=error)
    return ErrorResponse(ApiError(500, "the server failed; its log says how"))
