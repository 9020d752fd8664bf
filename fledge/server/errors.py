"""What goes wrong, as OpenAI's clients expect it: a status, and a body that names the field at fault."""

from __future__ import annotations

from typing import Any

from fledge.core.errors import FledgeError, StateError
from fledge.engine.request import QueueFull

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


class ApiError(Exception):
    """An answer that is not the one asked for. `param` is the path of the field at fault: "messages.0.content"."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, wait: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.wait = status, message, param, code, wait

    @property
    def body(self) -> dict[str, Any]:
        """What the client gets."""
        kind = KINDS.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """How long to wait, where that is known; how to identify oneself."""
        headers = {} if self.wait is None else {"retry-after": str(self.wait)}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def api_error(error: FledgeError, param: str | None = None) -> ApiError:
    """An error of the rooms below as the client sees it: their messages are written for people."""
    if isinstance(error, QueueFull):
        return ApiError(503 if "shutting down" in str(error) else 429, str(error), code="busy", wait=1)
    told = str(error)
    if isinstance(error, StateError) and not told.startswith("the state"):  # elsewhere the file's name comes first
        told = f"the state cannot be used: {told}"
    return ApiError(400, told, param=param)
