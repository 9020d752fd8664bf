"""Who asks, and how much they may ask for. Keys are known by their SHA-256 only, and never logged."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fledge.core.config import read_toml
from fledge.core.errors import ConfigError
from fledge.server.errors import ApiError

UNLIMITED = 1 << 60


@dataclass(eq=False)
class Tenant:
    """Somebody with a key, or everybody where there are none."""

    name: str
    requests_per_minute: int = UNLIMITED
    tokens_per_minute: int = UNLIMITED
    parallel: int = UNLIMITED
    max_tokens: int = UNLIMITED
    max_priority: int = 0
    running: int = field(default=0, init=False)
    _requests: TokenBucket = field(init=False, repr=False)
    _tokens: TokenBucket = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._requests, self._tokens = TokenBucket(self.requests_per_minute), TokenBucket(self.tokens_per_minute)

    def enter(self) -> None:
        """Count one request in. Raises ApiError 429 where that is one too many."""
        if self.running >= self.parallel:
            raise ApiError(
                429, f"{self.parallel} requests of this key are running; wait for one", code="parallel", wait=1
            )
        wait = max(self._requests.take(1), self._tokens.wait())
        if wait:
            raise ApiError(
                429, f"the limit of this key is reached; wait {wait} s", code="rate_limit_exceeded", wait=wait
            )
        self.running += 1

    def leave(self) -> None:
        """Count it out."""
        self.running -= 1

    def spend(self, tokens: int) -> None:
        """Take tokens that were read or written from the allowance, whether they are there or not."""
        self._tokens.spend(tokens)


class TokenBucket:
    """An allowance that refills evenly; what was spent too much is waited for."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = per_minute, clock
        self._left, self._then = float(per_minute), clock()

    def take(self, count: int) -> int:
        """Spend it if there is enough; else the seconds until there is."""
        wait = self.wait(count)
        if not wait:
            self._left -= count
        return wait

    def wait(self, count: int = 1) -> int:
        """Seconds until `count` is there; 0 where it is."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._then) * self._most / 60)
        self._then = now
        return 0 if self._left >= count else max(1, round((count - self._left) * 60 / max(self._most, 1)))

    def spend(self, count: int) -> None:
        """Take it, whether it is there or not."""
        self._left -= count


class KeyStore:
    """The keys of a file, or none: then everybody is the tenant "everybody"."""

    def __init__(self, tenants: dict[str, Tenant] | None = None) -> None:
        """tenants: by the SHA-256 of their keys, in hex."""
        self._tenants = tenants
        self._everybody = Tenant("everybody", max_priority=100)

    @property
    def needed(self) -> bool:
        """Whether a request must carry a key."""
        return self._tenants is not None

    @property
    def several(self) -> bool:
        """Whether there is more than one tenant."""
        return self._tenants is not None and len(self._tenants) > 1

    def tenant(self, authorization: str | None) -> Tenant:
        """Whose the header `Authorization: Bearer KEY` is. Raises ApiError 401."""
        if self._tenants is None:
            return self._everybody
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(401, "this server wants a key: Authorization: Bearer KEY", code="missing_api_key")
        found = self._tenants.get(hashlib.sha256(key.strip().encode()).hexdigest())
        if found is None:
            raise ApiError(401, "this key is not known here", code="invalid_api_key")
        return found

    @classmethod
    def read(cls, path: Path) -> KeyStore:
        """The keys of a TOML file with one [[keys]] table each. Raises ConfigError."""
        entries = read_toml(path).get("keys")
        if not isinstance(entries, list) or not entries:
            raise ConfigError(f"{path}: there is no [[keys]] table; each needs a name, and a key or its sha256")
        tenants: dict[str, Tenant] = {}
        names = set[str]()
        for number, entry in enumerate(entries, 1):
            digest, tenant = _entry(f"{path}: key {number}", entry)
            if digest in tenants or tenant.name in names:
                raise ConfigError(f"{path}: key {number} ({tenant.name}) has the name or the key of an earlier one")
            tenants[digest] = tenant
            names.add(tenant.name)
        return cls(tenants)


def _entry(place: str, entry: Any) -> tuple[str, Tenant]:
    known = {item.name for item in fields(Tenant) if item.init} | {"key", "sha256"}
    if not isinstance(entry, dict) or set(entry) - known:
        unknown = ", ".join(sorted(set(entry) - known)) if isinstance(entry, dict) else repr(entry)
        raise ConfigError(f"{place} has {unknown}; known: {', '.join(sorted(known))}")
    key, digest = entry.get("key"), entry.get("sha256")
    if (key is None) == (digest is None) or not isinstance(entry.get("name"), str):
        raise ConfigError(f"{place} needs a name, and either a key or its sha256")
    if key is not None:
        if not isinstance(key, str) or len(key) < 16:
            raise ConfigError(f"{place}: a key is a text of at least 16 characters")
        digest = hashlib.sha256(key.encode()).hexdigest()
    if not isinstance(digest, str) or len(digest) != 64 or set(digest.lower()) - set("0123456789abcdef"):
        raise ConfigError(f"{place}: sha256 is 64 hexadecimal digits")
    limits = {name: entry[name] for name in entry if name not in ("key", "sha256", "name")}
    for name, value in limits.items():
        if type(value) is not int or (value < 1 and name != "max_priority"):
            raise ConfigError(f"{place}: {name} is {value!r}; it must be a whole number from 1 up")
    return digest.lower(), Tenant(entry["name"], **limits)
