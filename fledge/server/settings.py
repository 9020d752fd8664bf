"""What a server is started with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MB = 1 << 20


@dataclass(frozen=True)
class ServerSettings:
    """Numbers and places. Sizes are in bytes, times in seconds."""

    name: str | None = None  # what the model is called; None: as its file
    folder: Path | None = None  # for states and the cache's second half; None: nothing outlives the process
    shared: Path | None = None  # for kept states in place of `folder`, with other servers; they need one `secret`
    keys: Path | None = None  # who may ask; None: whoever reaches the port
    secret: Path | None = None  # signs states and handles; None: one in `folder`, else one of this process
    slots: int = 64  # sequences computed at once
    queue: int = 256  # requests on their way at once
    max_tokens: int = 1024  # of one answer, where the request names no number
    most_tokens: int = 1 << 16  # of one answer at most
    prompt_tokens: int = 1 << 20  # of one prompt at most
    body: int = 64 * MB  # of one request
    cache_memory: int = 512 * MB
    cache_disk: int = 4096 * MB
    cache_every: int = 512  # tokens between snapshots
    shelf: int = 16 * 1024 * MB  # of states kept on purpose; where there are several keys, each may take half of it
    drain: float = 30.0  # that requests under way may take when the server stops
    origins: tuple[str, ...] = ()  # web pages of other hosts that may call
