"""Ends a request whose body is larger than allowed or arrives too slowly.

By its Content-Length before a byte is read, and by counting when there is none, so that no more than the limit is ever
read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cv_platform.serving.capacity.limits import SMALL_BODY_BYTES, Gate, overloaded, too_large
from cv_platform.serving.http.problems import problem_response
from cv_platform.serving.problem import Problem


@dataclass(frozen=True)
class BodyAllowance:
    """What a route's body may be: at most `max_bytes`, complete within `seconds`; of a larger one `advice` is given."""

    max_bytes: int
    seconds: float
    advice: str = "Send less."


class BodyLimit:
    """ASGI middleware: refuses bodies that are too large (413, having read no more than allowed) or too slow (408).

    Args:
        app: what it stands before.
        allowance_for: what the body of a request to this path may be.
        small_bodies: places of the requests with a body whose route counts no uploads itself; beyond, 429.
    """

    def __init__(
        self, app: ASGIApp, *, allowance_for: Callable[[str], BodyAllowance], small_bodies: Gate | None = None
    ) -> None:
        self.app = app
        self.allowance_for = allowance_for
        self.small_bodies = small_bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        allowance = self.allowance_for(scope["path"].removeprefix(scope.get("root_path", "")))
        headers = Headers(scope=scope)
        problem = _declared_problem(headers, allowance)
        has_body = "transfer-encoding" in headers or headers.get("content-length", "0").strip("0") != ""
        gate = self.small_bodies if has_body and allowance.max_bytes <= SMALL_BODY_BYTES else None
        if problem is None and gate is not None and not gate.enter():
            problem, gate = overloaded("requests with a body", gate.limit), None
        if problem is not None:
            await problem_response(scope, problem)(scope, receive, send)
            return
        try:
            await self.app(scope, _bounded(receive, allowance), send)
        finally:
            if gate is not None:
                gate.leave()


def _declared_problem(headers: Headers, allowance: BodyAllowance) -> Problem | None:
    """Returns what is wrong with a request's Content-Length; None where it is right, or where there is none."""
    declared = headers.getlist("content-length")
    if not declared:
        return None
    lengths = {value.strip() for value in declared}
    length = lengths.pop()
    # `isdigit` alone would accept digits of other scripts.
    if lengths or not (length.isascii() and length.isdigit()):
        return Problem(
            400, "Content-Length is not one number of bytes. Send one.", expected="one Content-Length, in digits"
        )
    digits = length.lstrip("0") or "0"
    # By the number of digits first: Python refuses to convert thousands of them.
    if len(digits) > 18 or int(digits) > allowance.max_bytes:
        return too_large(allowance.max_bytes, f"{length[:40]} bytes (Content-Length)", advice=allowance.advice)
    return None


def _bounded(receive: Receive, allowance: BodyAllowance) -> Receive:
    """Returns `receive` with an end: of bytes, and of time until the body is complete."""
    deadline = asyncio.get_running_loop().time() + allowance.seconds
    seen = 0
    is_complete = False

    async def bounded() -> Message:
        nonlocal seen, is_complete
        if is_complete:  # What follows is the client's going away, for which nobody is in a hurry.
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError as err:
            raise Problem(
                408,
                f"The body was not complete after {allowance.seconds:g} s. Send it again.",
                expected=f"a body within {allowance.seconds:g} s",
                headers={"Connection": "close"},
            ) from err
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if seen > allowance.max_bytes:
                received = f"more than {allowance.max_bytes} bytes"
                raise too_large(allowance.max_bytes, received, advice=allowance.advice)
        return message

    return bounded
