"""Configuration of a server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MB = 1 << 20


@dataclass(frozen=True)
class ServerSettings:
    """Limits and paths. Sizes are in bytes, times in seconds."""

    name: str | None = None  # name of the model; None: the name of its file
    folder: Path | None = None  # saved states and the cache on disk; None: nothing outlives the process
    shared: Path | None = None  # saved states, shared with other servers; replaces `folder` and needs the same `secret`
    keys: Path | None = None  # file with API keys; None: requests need no key
    secret: Path | None = None  # signs states and handles; None: a file in `folder`, or random for this process
    slots: int = 64  # sequences in a batch
    max_requests: int = 256  # requests that are queued or running
    default_max_tokens: int = 1024  # tokens of a completion if the request gives no limit
    max_tokens_limit: int = 1 << 16  # largest `max_tokens` of a request
    max_prompt_tokens: int = 1 << 20
    max_body_bytes: int = 64 * MB  # body of a request
    cache_memory: int = 512 * MB
    cache_disk: int = 4096 * MB
    snapshot_interval: int = 512  # tokens between snapshots of the prefix cache
    state_storage: int = 16 * 1024 * MB  # saved states; if there are several keys, each can use half of it
    drain_seconds: float = 30.0  # time for running requests when the server stops
    origins: tuple[str, ...] = ()  # origins of web pages that may call the server (CORS)
