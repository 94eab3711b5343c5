"""Which names the service answers to: requests for any other Host are refused before anything is done for them.

A page of another site can make its own name resolve to this machine (DNS rebinding) and would then be of the same
origin as the service; its requests still carry that name. https://owasp.org/www-community/attacks/DNS_Rebinding
Starlette's TrustedHostMiddleware knows no name with a port or a last dot (`test_answers_to_its_names`), and refuses,
as plain text, the probes that ask by address as well (`test_what_machines_ask_by_address_always_answers`).
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
    """ASGI middleware: 421 for a Host that is not allowed.

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
        is_probe = scope["type"] == "http" and scope["path"] in ALWAYS_ANSWERED and scope["method"] in _ASKING
        if scope["type"] == "http" and self.hosts and not is_probe:
            # Uvicorn lets no two pass, and none from HTTP/1.1 on; joined or empty they are no name.
            host = ",".join(Headers(scope=scope).getlist("host"))
            if not self._is_allowed(host):
                received = ascii(host)[:120]
                problem = Problem(
                    421,
                    f"This service does not answer to that Host. Received: {received}. Use one of its own names.",
                    expected="a Host that CV_ALLOWED_HOSTS names",
                    headers={"Connection": "close"},
                )
                await problem_response(scope, problem)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _is_allowed(self, host: str) -> bool:
        parts = _HOST.fullmatch(host.strip(" \t").lower())
        if parts is None:
            return False
        name = parts["name"]
        if name in self.hosts or name + (parts["port"] or "") in self.hosts:
            return True
        labels = name.split(".")
        return any("*." + ".".join(labels[start:]) in self.hosts for start in range(1, len(labels)))
