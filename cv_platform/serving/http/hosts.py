"""Which names the service answers to: requests for any other Host are refused before anything is done for them.

A page of another site can make its own name resolve to this machine (DNS rebinding) and would then be of the same
origin as the service; its requests still carry that name. https://owasp.org/www-community/attacks/DNS_Rebinding
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from cv_platform.serving.http.problems import problem_response
from cv_platform.serving.problem import Problem

_HOST = re.compile(r"(?P<name>[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(?:(?<!])\.)?(?P<port>:[0-9]{1,5})?")
"""What a Host may look like, in lower case. The underscore is no host name's, but container networks use it."""
ALWAYS_ANSWERED = frozenset({"/health_check", "/livez", "/readyz", "/healthz", "/metrics"})
"""Load balancers, supervisors and Prometheus ask by address, and only ask."""
_ASKING = frozenset({"GET", "HEAD"})


class AllowedHosts:
    """ASGI middleware: 421 for a Host that is not allowed, 400 where there is not exactly one.

    Args:
        app: what it stands before.
        hosts: names without a port (any port passes) or with one; `*.example.org` is each name below example.org.
            Without any, every host is answered.
    """

    def __init__(self, app: ASGIApp, *, hosts: Sequence[str]) -> None:
        self.app = app
        self.hosts = frozenset(host.strip().lower().rstrip(".") for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if (
            scope["type"] != "http"
            or not self.hosts
            or (scope["path"] in ALWAYS_ANSWERED and scope["method"] in _ASKING)
        ):
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).getlist("host")
        if len(given) == 1 and self._is_allowed(given[0]):
            await self.app(scope, receive, send)
            return
        received = ascii(given[0])[:120] if len(given) == 1 else f"{len(given)} Host headers"
        problem = Problem(
            421 if len(given) == 1 else 400,
            f"This service does not answer to that Host. Received: {received}. Use one of its own names.",
            expected="a Host that CV_ALLOWED_HOSTS names",
            headers={"Connection": "close"},
        )
        await problem_response(scope, problem)(scope, receive, send)

    def _is_allowed(self, host: str) -> bool:
        parts = _HOST.fullmatch(host.strip(" \t").lower())
        if parts is None:
            return False
        name = parts["name"]
        if name in self.hosts or name + (parts["port"] or "") in self.hosts:
            return True
        labels = name.split(".")
        return any("*." + ".".join(labels[start:]) in self.hosts for start in range(1, len(labels)))
