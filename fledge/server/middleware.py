"""Middleware for all requests: host check, limit of the body size, security headers, count of requests."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fledge.server.errors import ApiError, ErrorResponse
from fledge.server.metrics import ServerMetrics

CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
)

HOST_HEADER = re.compile(r"(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::\d*)?")
SHOWN_CHARACTERS = 60  # of a host in an error message


class HostCheck:
    """Accepts only requests for the server's own host names. Protects a server without keys from DNS rebinding.

    A web page can let its own domain resolve to this machine. For the browser, the page and the server then have the
    same origin, so the page could read everything that the server stores. Such a request still carries the domain of
    the page in its `Host` header. Accepted hosts are localhost, loopback addresses, the name the server listens on, and
    the hosts of the allowed origins.
    """

    def __init__(self, listen_host: str, origins: Iterable[str] = ()) -> None:
        """listen_host: the address or name the server listens on. If it stands for all interfaces, every IP address is
        accepted, because an address cannot be rebound.
        """
        address = _parse_address(listen_host)
        self._accepts_addresses = not listen_host or (address is not None and address.is_unspecified)
        machine = socket.gethostname()
        own_names = (machine, f"{machine}.local") if self._accepts_addresses else (listen_host,)
        self._names = {name.lower() for name in own_names}
        self._names |= {host for origin in origins if (host := urlsplit(origin).hostname)}

    def is_allowed(self, header: str) -> bool:
        """Whether the value of a `Host` header names this server. The port is ignored."""
        match = HOST_HEADER.fullmatch(header.strip())
        host = (match[1] or match[2] or "").lower() if match else ""
        return host in self._names or is_local(host) or (self._accepts_addresses and _parse_address(host) is not None)

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raise ApiError 403 for a foreign host. A request without the header does not come from a browser."""
        for name, value in headers:
            if name == b"host" and not self.is_allowed(host := value.decode("latin-1")):
                message = (
                    f"{host[:SHOWN_CHARACTERS]!r} is not a host name of this server, which has no keys: call it "
                    "localhost or the value of its --host, or start it with --origin http://NAME or --keys"
                )
                raise ApiError(403, message, code="foreign_host")


class Middleware:
    """Checks the host and the body size of every request, adds security headers and counts the responses."""

    def __init__(
        self, app: ASGIApp, metrics: ServerMetrics, max_body_bytes: int, host_check: HostCheck | None = None
    ) -> None:
        """host_check: None accepts every host."""
        self._app, self._metrics, self._max_body_bytes, self._host_check = app, metrics, max_body_bytes, host_check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body_bytes, status, rejection = 0, 500, self._check_headers(scope)

        async def receive_limited() -> Message:
            nonlocal body_bytes, rejection
            message = await receive()
            body_bytes += len(message.get("body", b""))
            if body_bytes > self._max_body_bytes:
                rejection = self._body_too_large()
            # A disconnect, because the code that reads the body would answer any other message with its own error.
            return {"type": "http.disconnect"} if rejection else message

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if rejection:
                return
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *SECURITY_HEADERS]
            await send(message)

        try:
            if not rejection:
                await self._app(scope, receive_limited, send_with_headers)
        except ClientDisconnect:
            status = 499
        finally:
            if rejection:
                status = rejection.status
                await ErrorResponse(rejection)(scope, receive, send)
            route = getattr(scope.get("route"), "path", "page")
            self._metrics.requests.labels(route, str(status)).inc()

    def _check_headers(self, scope: Scope) -> ApiError | None:
        """The error for a request that is rejected before its body is read, or None."""
        try:
            if self._host_check is not None:
                self._host_check.check(scope["headers"])
        except ApiError as error:
            return error
        length = dict(scope["headers"]).get(b"content-length", b"0")
        return None if length.isdigit() and int(length) <= self._max_body_bytes else self._body_too_large()

    def _body_too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self._max_body_bytes} bytes", code="too_large")


def is_local(host: str) -> bool:
    """Whether a name or an address is reachable from this machine only."""
    address = _parse_address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def _parse_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
