"""Where a request's facts are while it is answered: in its ASGI scope, from the first who asks on."""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.types import Scope

from cv_platform.serving.random_ids import new_id
from cv_platform.serving.telemetry.observation import RequestFacts

_KEY = "cv_platform.facts"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def facts_of(scope: Scope) -> RequestFacts:
    """Returns the facts of a request, made by the first who asks.

    A client's own X-Request-Id is kept when it is 1–128 letters, digits, dots, dashes or underscores: it ends up in
    logs.
    """
    if _KEY not in scope:
        wished = Headers(scope=scope).get("x-request-id", "")
        scope[_KEY] = RequestFacts(wished if _REQUEST_ID.fullmatch(wished) else new_id().hex)
    return scope[_KEY]
