"""API keys, tenants and their limits. Keys are stored only as their SHA-256 and are never logged."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from starlette.requests import Request

from fledge.core.config import read_toml
from fledge.core.errors import ConfigError
from fledge.server.errors import ApiError

UNLIMITED = 1 << 60
MIN_KEY_CHARACTERS = 16


@dataclass(eq=False)
class Tenant:
    """The owner of a key with its limits, or the single tenant of a server without keys."""

    name: str
    requests_per_minute: int = UNLIMITED
    tokens_per_minute: int = UNLIMITED
    parallel: int = UNLIMITED  # concurrent requests
    max_tokens: int = UNLIMITED
    max_priority: int = 0
    num_running: int = field(default=0, init=False)
    _requests: TokenBucket = field(init=False, repr=False)
    _tokens: TokenBucket = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._requests, self._tokens = TokenBucket(self.requests_per_minute), TokenBucket(self.tokens_per_minute)

    def acquire(self) -> None:
        """Count a request that starts. Raises ApiError 429 if a limit is reached."""
        if self.num_running >= self.parallel:
            message = f"{self.parallel} requests of this key are running; wait until one has ended"
            raise ApiError(429, message, code="parallel", retry_after=1)
        seconds = max(self._requests.try_take(1), self._tokens.seconds_until())
        if seconds:
            message = f"the rate limit of this key is reached; retry after {seconds} s"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=seconds)
        self.num_running += 1

    def release(self) -> None:
        """Count a request that has ended."""
        self.num_running -= 1

    def spend_tokens(self, count: int) -> None:
        """Charge tokens of prompts and completions. The balance can become negative."""
        self._tokens.spend(count)


class TokenBucket:
    """A rate limit that refills continuously. Its balance can become negative."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity, self._clock = per_minute, clock
        self._balance, self._updated_at = float(per_minute), clock()

    def try_take(self, count: int) -> int:
        """Spend `count` if the balance suffices and return 0, else return the seconds until it does."""
        seconds = self.seconds_until(count)
        if not seconds:
            self._balance -= count
        return seconds

    def seconds_until(self, count: int = 1) -> int:
        """Seconds until the balance is `count`, or 0 if it is already."""
        now = self._clock()
        self._balance = min(self._capacity, self._balance + (now - self._updated_at) * self._capacity / 60)
        self._updated_at = now
        if self._balance >= count:
            return 0
        return max(1, round((count - self._balance) * 60 / max(self._capacity, 1)))

    def spend(self, count: int) -> None:
        """Spend `count`, even if the balance does not suffice."""
        self._balance -= count


class KeyStore:
    """The API keys of a server. Without keys, all requests belong to the tenant "everybody"."""

    def __init__(self, tenants: dict[str, Tenant] | None = None) -> None:
        """tenants: by the hexadecimal SHA-256 of their keys; None: no key is required."""
        self._tenants = tenants
        self._everybody = Tenant("everybody", max_priority=100)

    @property
    def is_required(self) -> bool:
        """Whether requests must have a key."""
        return self._tenants is not None

    @property
    def has_several_tenants(self) -> bool:
        """Whether there is more than one tenant."""
        return self._tenants is not None and len(self._tenants) > 1

    def authenticate(self, authorization: str | None) -> Tenant:
        """The tenant for the value of an `Authorization` header. Raises ApiError 401."""
        if self._tenants is None:
            return self._everybody
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(401, "this server requires a key: Authorization: Bearer KEY", code="missing_api_key")
        tenant = self._tenants.get(hashlib.sha256(key.strip().encode()).hexdigest())
        if tenant is None:
            raise ApiError(401, "this key is unknown", code="invalid_api_key")
        return tenant

    @classmethod
    def read(cls, path: Path) -> KeyStore:
        """Read a TOML file with one [[keys]] table per key. Raises ConfigError."""
        entries = read_toml(path).get("keys")
        if not isinstance(entries, list) or not entries:
            raise ConfigError(f"{path}: there is no [[keys]] table; each needs a name, and a key or its sha256")
        tenants: dict[str, Tenant] = {}
        names = set[str]()
        for number, entry in enumerate(entries, 1):
            digest, tenant = _parse_entry(f"{path}: key {number}", entry)
            if digest in tenants or tenant.name in names:
                raise ConfigError(f"{path}: key {number} ({tenant.name}) has the name or the key of an earlier entry")
            tenants[digest] = tenant
            names.add(tenant.name)
        return cls(tenants)


def get_tenant(request: Request) -> Tenant:
    """The tenant of a request. Raises ApiError 401 if a key is required and missing or unknown."""
    keys = request.app.state.keys
    assert isinstance(keys, KeyStore)
    return keys.authenticate(request.headers.get("authorization"))


def _parse_entry(location: str, entry: Any) -> tuple[str, Tenant]:
    """The SHA-256 of a key and its tenant. location: for error messages."""
    allowed = {item.name for item in fields(Tenant) if item.init} | {"key", "sha256"}
    if not isinstance(entry, dict) or set(entry) - allowed:
        unknown = ", ".join(sorted(set(entry) - allowed)) if isinstance(entry, dict) else repr(entry)
        raise ConfigError(f"{location} has {unknown}; allowed: {', '.join(sorted(allowed))}")
    key, digest = entry.get("key"), entry.get("sha256")
    if (key is None) == (digest is None) or not isinstance(entry.get("name"), str):
        raise ConfigError(f"{location} needs a name, and either a key or its sha256")
    if key is not None:
        if not isinstance(key, str) or len(key) < MIN_KEY_CHARACTERS:
            raise ConfigError(f"{location}: a key must be a string of at least {MIN_KEY_CHARACTERS} characters")
        digest = hashlib.sha256(key.encode()).hexdigest()
    if not isinstance(digest, str) or len(digest) != 64 or set(digest.lower()) - set("0123456789abcdef"):
        raise ConfigError(f"{location}: sha256 must be 64 hexadecimal digits")
    limits = {name: entry[name] for name in entry if name not in ("key", "sha256", "name")}
    for name, value in limits.items():
        if type(value) is not int or (value < 1 and name != "max_priority"):
            raise ConfigError(f"{location}: {name} is {value!r}; it must be an integer of at least 1")
    return digest.lower(), Tenant(entry["name"], **limits)
