"""Whose request it is, and which service it is for."""

from __future__ import annotations

from starlette.requests import Request

from fledge.server.auth import Tenant
from fledge.server.service import Service


def service_of(request: Request) -> Service:
    """The service that the app was made for."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def tenant_of(request: Request) -> Tenant:
    """Who asks. Raises ApiError 401 where a key is needed and missing or unknown."""
    return service_of(request).keys.tenant(request.headers.get("authorization"))
