"""Ends a request that nothing else has ended: 504, far behind every limit of the routes' own.

BentoML's middleware for that leaves a timer behind for each request until its time is over, with what it holds: at 300
requests a second and 140 s these are 42,000 at any time. Here the timer goes when the answer begins.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cv_platform.serving.http.access import WatchedReceive
from cv_platform.serving.http.problems import problem_response
from cv_platform.serving.problem import client_gone, try_later


class Deadline:
    """ASGI middleware: cancels what has not begun to answer in time, and answers 504.

    Args:
        app: what it stands before.
        seconds: longest time from the arrival of a request to the beginning of its answer.
    """

    def __init__(self, app: ASGIApp, *, seconds: float) -> None:
        self.app = app
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        watched = WatchedReceive(receive)

        async def begun(message: Message) -> None:
            if not deadline.expired():
                deadline.reschedule(None)
            await send(message)

        deadline = asyncio.timeout(self.seconds)
        try:
            async with deadline:
                await self.app(scope, watched, begun)
        except TimeoutError:
            if not deadline.expired():
                raise
            problem = try_later(
                504,
                f"The answer had not begun after {self.seconds:g} s. Try again later.",
                expected="a service with less to do",
            )
            await problem_response(scope, client_gone() if watched.has_left else problem)(scope, receive, send)
