"""By which names a server without keys may be called.

A web page can let its own name point to this machine; to the browser it then is of one origin with the server here, and
may read whatever that keeps. Such a request still says the page's name in its header `Host`. Here: the names that are
not foreign. Not here: the refusal (app.py), and keys, with which a page that has none gets nothing (keys.py).
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from fledge.server.errors import ApiError

HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::\d*)?")
SHOWN = 60  # characters of a name in a message


class HostCheck:
    """The names that are answered to: this machine's for itself, where it listens, and those of known web pages."""

    def __init__(self, listening: str, origins: Iterable[str] = ()) -> None:
        """listening: the address or name given to listen at. Where that means every address of this machine, each is
        answered to: an address cannot be made to point elsewhere.
        """
        address = _address(listening)
        self._any = not listening or (address is not None and address.is_unspecified)
        own = socket.gethostname()
        self._names = {name.lower() for name in ((own, f"{own}.local") if self._any else (listening,))}
        self._names |= {host for origin in origins if (host := urlsplit(origin).hostname)}

    def allow(self, header: str) -> bool:
        """Whether the value of a header `Host` names this server; its port is of no matter."""
        found = HOST.fullmatch(header.strip())
        name = (found[1] or found[2] or "").lower() if found else ""
        return name in self._names or is_local(name) or (self._any and _address(name) is not None)

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raise ApiError 403 for a foreign name. Whoever sends none is no browser."""
        for key, value in headers:
            if key == b"host" and not self.allow(header := value.decode("latin-1")):
                message = (
                    f"{header[:SHOWN]!r} is none of this server's names, and it has no keys: call it localhost or as "
                    "its --host says, or start it with --origin http://NAME, or with --keys"
                )
                raise ApiError(403, message, code="foreign_host")


def is_local(host: str) -> bool:
    """Whether a name or an address is of this machine alone."""
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
