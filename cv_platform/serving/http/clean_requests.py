"""What no request may carry: control characters in its path, and headers that break what decodes them."""

from __future__ import annotations

import re

from starlette.types import Scope

from cv_platform.serving.problem import Problem

CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")
_CONTENT_TYPE = b"content-type"


def clean_request(scope: Scope) -> None:
    """Refuses a path with control characters, and takes a Content-Type that is not ASCII out of the scope.

    A regular expression's `$` matches before a last newline, so `/predict%0a` would be a route to one layer and unknown
    to the next.

    Raises:
        Problem: 400.
    """
    if CONTROL_CHARACTER.search(scope["path"]):
        raise Problem(
            400,
            f"A path has no control characters. Received: {ascii(scope['path'])[:200]}.",
            expected="one of the routes of /docs",
        )
    if any(name.lower() == _CONTENT_TYPE and not value.isascii() for name, value in scope["headers"]):
        # In place: those around it read from the same scope which route it took.
        scope["headers"] = [
            (name, b"application/octet-stream" if name.lower() == _CONTENT_TYPE else value)
            for name, value in scope["headers"]
        ]
