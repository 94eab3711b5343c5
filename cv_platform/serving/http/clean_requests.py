"""What no request may carry: control characters in its path, and headers that break what decodes them."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from cv_platform.serving.http.problems import problem_response
from cv_platform.serving.problem import Problem

_CONTENT_TYPE = b"content-type"


def has_control_characters(text: str) -> bool:
    """Says whether there is a character below 0x20, or 0x7f."""
    return any(character < " " or character == "\x7f" for character in text)


class CleanRequest:
    """ASGI middleware: 400 for a path with control characters, and no Content-Type that is not ASCII.

    A regular expression's `$` matches before a last newline, so `/predict%0a` would be a route to one layer and unknown
    to the next.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if has_control_characters(scope["path"]):
            await _refuse(scope, receive, send)
            return
        if any(name.lower() == _CONTENT_TYPE and not value.isascii() for name, value in scope["headers"]):
            headers = [
                (name, b"application/octet-stream" if name.lower() == _CONTENT_TYPE else value)
                for name, value in scope["headers"]
            ]
            scope["headers"] = headers  # In place: those around it read from the same scope which route it took.
        await self.app(scope, receive, send)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    problem = Problem(
        400,
        f"A path has no control characters. Received: {ascii(scope['path'])[:200]}.",
        expected="one of the routes of /docs",
    )
    await problem_response(scope, problem)(scope, receive, send)
