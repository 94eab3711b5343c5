"""Keeps requests to this machine away from the proxies that the environment names (HTTP_PROXY, ALL_PROXY and the like).

`past_proxies` is for the environment of every process: requests, urllib, botocore, gRPC and curl obey NO_PROXY, so that
MLflow's and Evidently's clients do. httpx needs `cv_platform.client.loopback`.
"""

from __future__ import annotations

from collections.abc import Mapping

NAMES = ("localhost", "127.0.0.1", "::1")


def past_proxies(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns NO_PROXY and no_proxy: what `environ` has in either, and this machine."""
    # Most programs read the lower one first, some only one of them.
    listed = ",".join(filter(None, (environ.get("no_proxy"), environ.get("NO_PROXY"))))
    names = list(dict.fromkeys(name for part in listed.split(",") if (name := part.strip())))
    # Beside other names, urllib no longer takes a star for everything.
    value = "*" if "*" in names else ",".join(dict.fromkeys([*names, *NAMES]))
    return {"NO_PROXY": value, "no_proxy": value}
