"""How much a worker takes on at once, and how large a request may be.

`Gate` counts what is in progress. `BodyLimit` ends a request whose body is larger than allowed: by its Content-Length
before a byte is read, and by counting when there is none (chunked), so that no more than the limit is ever read.

Both are per worker; the reverse proxy in front has limits of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cv_platform.serving.problems import Problem, problem_response, try_later

FORM_OVERHEAD_BYTES = 16_384
"""What a multipart body may hold beside the file: boundaries, part headers, the field `explain`."""
SMALL_BODY_BYTES = 65_536
"""Largest body of every route that takes no file."""


@dataclass(frozen=True)
class ServingLimits:
    """What one worker allows itself.

    Attributes:
        max_in_flight: predictions running or waiting for a thread; beyond, 429.
        max_uploads: bodies being received; beyond, 429.
        predict_threads: predictions that run at the same time.
        upload_seconds: longest time for receiving a body; beyond, 408.
        predict_seconds: longest time for a prediction; beyond, 504.
    """

    max_in_flight: int = 32
    max_uploads: int = 128
    predict_threads: int = 2
    upload_seconds: float = 30.0
    predict_seconds: float = 20.0


class Gate:
    """Admits up to `limit` at a time; safe to use from any thread."""

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"Expected a limit of 1 or more. Received: {limit}.")
        self.limit = limit
        self._inside = 0
        self._lock = threading.Lock()

    @property
    def inside(self) -> int:
        """How many are in progress."""
        return self._inside

    @property
    def is_full(self) -> bool:
        """Whether the next one would be refused."""
        return self._inside >= self.limit

    def enter(self) -> bool:
        """Takes a place, or returns False when there is none; never waits."""
        with self._lock:
            if self._inside >= self.limit:
                return False
            self._inside += 1
            return True

    def leave(self) -> None:
        """Gives a place back; once for every `enter` that returned True."""
        with self._lock:
            self._inside -= 1


class BodyLimit:
    """ASGI middleware: refuses bodies larger than `limit_for(path)` bytes with 413, having read at most that much."""

    def __init__(self, app: ASGIApp, *, limit_for: Callable[[str], int]) -> None:
        self.app = app
        self.limit_for = limit_for

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.limit_for(scope["path"])
        declared = Headers(scope=scope).getlist("content-length")
        if declared:
            lengths = {value.strip() for value in declared}
            length = lengths.pop()
            # `isdigit` alone would accept digits of other scripts.
            if lengths or not (length.isascii() and length.isdigit()):
                problem = Problem(
                    400,
                    "Content-Length is not one number of bytes. Send one.",
                    expected="one Content-Length, in digits",
                )
                await problem_response(scope, problem)(scope, receive, send)
                return
            digits = length.lstrip("0") or "0"
            # By the number of digits first: Python refuses to convert thousands of them.
            if len(digits) > 18 or int(digits) > limit:
                await problem_response(scope, too_large(limit, f"{length[:40]} bytes (Content-Length)"))(
                    scope, receive, send
                )
                return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > limit:
                    raise too_large(limit, f"more than {limit} bytes")
            return message

        await self.app(scope, counted, send)


def too_large(limit: int, received: str) -> Problem:
    """Returns the 413 of a body of more than `limit` bytes; the connection closes, as the rest stays unread."""
    return Problem(
        413,
        f"Expected at most {limit} bytes. Received: {received}. Shrink or recompress the image.",
        expected=f"a body of at most {limit} bytes",
        headers={"Connection": "close"},
        extra={"max_bytes": limit},
    )


def overloaded(what: str, limit: int) -> Problem:
    """Returns the 429 of a worker that has `limit` of `what` in progress."""
    return try_later(
        429,
        f"This worker is busy with {limit} {what}. Try again.",
        expected=f"fewer than {limit} {what} at a time",
        seconds=1,
    )
