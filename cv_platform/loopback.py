"""Keeps requests to this machine away from the proxies that the environment names (HTTP_PROXY, ALL_PROXY and the like).

`past_proxies` is for the environment of every process: requests, urllib, botocore, gRPC and curl obey NO_PROXY, so that
MLflow's and Evidently's clients do. httpx makes a transport of every proxy before it looks at NO_PROXY, and fails for
one that it does not know (`socks://`): `direct_transport` is for each of its clients. https://www.python-httpx.org/environment_variables/
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import httpx

NAMES = ("localhost", "127.0.0.1", "::1")


def past_proxies(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns NO_PROXY and no_proxy: what `environ` has in either, and this machine."""
    # Most programs read the lower one first, some only one of them.
    listed = ",".join(filter(None, (environ.get("no_proxy"), environ.get("NO_PROXY"))))
    names = list(dict.fromkeys(name for part in listed.split(",") if (name := part.strip())))
    # Beside other names, urllib no longer takes a star for everything.
    value = "*" if "*" in names else ",".join(dict.fromkeys([*names, *NAMES]))
    return {"NO_PROXY": value, "no_proxy": value}


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
    import httpx  # Late: the service's requirements are without it.

    return httpx.HTTPTransport() if is_loopback(url) else None
