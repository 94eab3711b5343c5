"""Connects to this machine past the proxies that the environment names (HTTP_PROXY, ALL_PROXY and the like).

httpx makes a transport of every proxy before it looks at NO_PROXY, and fails for one that it does not know
(`socks://`): `direct_transport` is for each of its clients. https://www.python-httpx.org/environment_variables/
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import httpx


def is_loopback(url: str) -> bool:
    """Returns whether `url` leads to this machine by a name or address that says so."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return False  # Who connects says what is wrong with it.
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def direct_transport(url: str) -> httpx.HTTPTransport | None:
    """Returns what connects httpx to `url` past all proxies if it is on this machine; None: as the environment says."""
    import httpx  # Late, as in `client`.

    return httpx.HTTPTransport() if is_loopback(url) else None
