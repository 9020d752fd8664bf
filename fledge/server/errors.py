"""Errors in the form that clients of the OpenAI API expect: an HTTP status, and a body that names the invalid field."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse

from fledge.core.errors import FledgeError, StateError
from fledge.engine.request import EngineStopped, QueueFull

ERROR_TYPES = {
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
"""The field `type` of an error by its status. All others are "server_error"."""


class ApiError(Exception):
    """An error response. `param` is the path of the invalid field, for example "messages.0.content"."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after  # seconds

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response."""
        error_type = ERROR_TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": error_type, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """When to retry, and how to authenticate."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


class ErrorResponse(JSONResponse):
    """The response for an ApiError.

    The body is ASCII, because it may quote a lone surrogate from the request, which UTF-8 cannot encode.
    """

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.body, error.status, error.headers)

    def render(self, content: Any) -> bytes:
        """Encode the body, with a line end for terminals."""
        return json.dumps(content).encode("ascii") + b"\n"


def to_api_error(error: FledgeError, param: str | None = None) -> ApiError:
    """Convert an error of the packages below. Their messages are written for users and are kept."""
    message = str(error)
    if isinstance(error, QueueFull):
        return ApiError(503 if isinstance(error, EngineStopped) else 429, message, code="busy", retry_after=1)
    if isinstance(error, StateError) and not message.startswith("the state"):  # for files, the name comes first
        message = f"the state cannot be used: {message}"
    return ApiError(400, message, param=param)
