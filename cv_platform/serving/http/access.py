"""One access line, one count and one span per request: `ObserveRequests`, around everything else.

A line names the route and the path, never the query, whose values may be secrets; and no header.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from starlette.routing import Match, Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cv_platform.serving.http.request_facts import facts_of
from cv_platform.serving.problem import CLIENT_GONE
from cv_platform.serving.telemetry.metrics import ServingMetrics
from cv_platform.serving.telemetry.observation import Observation, RequestFacts, end_observation, observe
from cv_platform.serving.telemetry.tracing import RequestSpan, Tracing

logger = logging.getLogger(__name__)

UNMATCHED = "unmatched"
"""The route of what no route takes."""
_ENDED = 503
"""What a request counts as that the server cancels while it stops."""
_QUIET = frozenset({"/livez", "/readyz", "/healthz", "/metrics"})
"""Routes that machines ask every few seconds: counted, but without a line while they answer 200."""
_MAX_PATH = 300


class WatchedReceive:
    """ASGI's `receive`, which notes in `has_left` that the client has gone."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.has_left = False

    async def __call__(self) -> Message:
        """Waits for the next message."""
        message = await self._receive()
        self.has_left = self.has_left or message["type"] == "http.disconnect"
        return message


class ObserveRequests:
    """ASGI middleware: observes each request.

    Args:
        app: what answers.
        metrics: count it.
        tracing: where its span goes; None: nowhere.
        routes: of the app; what is refused before it gets to one is counted by the route that it wanted.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: ServingMetrics, tracing: Tracing | None, routes: Sequence[Route | Mount]
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.tracing = tracing
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = dict(scope)  # Routing changes the scope.
        facts = facts_of(scope)
        span = None if self.tracing is None else self.tracing.begin(scope["method"], scope["headers"])
        token = observe(Observation(facts, self.metrics, span))
        status = 0
        watched = WatchedReceive(receive)

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, watched, noted)
        except asyncio.CancelledError:
            status = status or (CLIENT_GONE if watched.has_left else _ENDED)
            raise
        finally:
            route = route_template(scope, asked, self.routes)
            self._finish(facts, asked, route, status or 500, span)
            end_observation(token)

    def _finish(self, facts: RequestFacts, asked: Scope, route: str, status: int, span: RequestSpan | None) -> None:
        seconds = facts.seconds()
        method: str = asked["method"]
        self.metrics.answered(route=route, method=method, status=status, version=facts.model_version, seconds=seconds)
        if span is not None:
            span.end(f"{method} {route}", _attributes(facts, method, route, status), failed=status >= 500)
        if status == 200 and route in _QUIET:
            return
        fields: dict[str, Any] = {
            "method": method,
            "route": route,
            "path": asked["path"][:_MAX_PATH],
            "status": status,
            "seconds": round(seconds, 6),
            "model_version": facts.model_version,
            "prediction_id": _only(facts.prediction_ids),
            "predictions": len(facts.prediction_ids) if len(facts.prediction_ids) > 1 else None,
        }
        logger.info("%s %s %d", method, route, status, extra={"fields": fields})


def route_template(answered: Scope, asked: Scope, routes: Iterable[Route | Mount]) -> str:
    """Returns the template of the route that a request belongs to: a label, so never a path that a client chose.

    Args:
        answered: the scope as routing has left it.
        asked: the scope as it came.
        routes: those of the app.
    """
    path = getattr(answered.get("route"), "path", None)
    if isinstance(path, str) and path:
        return path
    # Refused before it got to a route, or as no route takes it: with another method one may.
    for route in routes:
        if route.matches(asked)[0] is not Match.NONE:
            return route.path
    return UNMATCHED


def _attributes(facts: RequestFacts, method: str, route: str, status: int) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {
        "http.request.method": method,
        "http.route": route,
        "http.response.status_code": status,
        "cv.request_id": facts.request_id,
    }
    if facts.model_version is not None:
        attributes["cv.model.version"] = facts.model_version
    prediction_id = _only(facts.prediction_ids)
    if prediction_id is not None:
        attributes["cv.prediction.id"] = prediction_id
    return attributes


def _only(prediction_ids: Sequence[str]) -> str | None:
    return prediction_ids[0] if len(prediction_ids) == 1 else None
