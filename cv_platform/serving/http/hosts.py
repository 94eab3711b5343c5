"""Which names the service answers to: requests for any other Host are refused before anything is done for them.

A page of another site can make its own name resolve to this machine (DNS rebinding) and would then be of the same
origin as the service; its requests still carry that name. https://owasp.org/www-community/attacks/DNS_Rebinding
Starlette's TrustedHostMiddleware knows no name with a port or a last dot (`test_answers_to_its_names`), and refuses,
as plain text, the probes that ask by address as well (`test_what_machines_ask_by_address_always_answers`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

from starlette.datastructures import Headers
from starlette.types import Scope

from cv_platform.serving.problem import Problem

_HOST = re.compile(r"(?P<name>[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(?:(?<!])\.)?(?P<port>:[0-9]{1,5})?")
"""What a Host may look like, in lower case. The underscore is no host name's, but container networks use it."""
ALWAYS_ANSWERED = frozenset({"/health_check", "/livez", "/readyz", "/healthz", "/metrics"})
"""Load balancers, supervisors and Prometheus ask by address, and only ask."""
_ASKING = frozenset({"GET", "HEAD"})


def allowed_hosts(names: Sequence[str]) -> Callable[[Scope], None]:
    """Returns the check of a request's Host, a `Problem` of 421 for one that is not allowed.

    Args:
        names: without a port (any port passes) or with one; `*.example.org` is each name below example.org. Without
            any, every host is answered.
    """
    known = frozenset(name.strip().lower().rstrip(".") for name in names)

    def check(scope: Scope) -> None:
        if not known or (scope["path"] in ALWAYS_ANSWERED and scope["method"] in _ASKING):
            return
        # `BoundedProtocol` lets no two pass, and none from HTTP/1.1 on; joined or empty they are no name.
        host = ",".join(Headers(scope=scope).getlist("host"))
        if not _is_among(host, known):
            raise Problem(
                421,
                f"This service does not answer to that Host. Received: {ascii(host)[:120]}. Use one of its own names.",
                expected="a Host that CV_ALLOWED_HOSTS names",
                headers={"Connection": "close"},
            )

    return check


def _is_among(host: str, known: Collection[str]) -> bool:
    parts = _HOST.fullmatch(host.strip(" \t").lower())
    if parts is None:
        return False
    name = parts["name"]
    if name in known or name + (parts["port"] or "") in known:
        return True
    labels = name.split(".")
    return any("*." + ".".join(labels[start:]) in known for start in range(1, len(labels)))
