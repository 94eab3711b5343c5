"""The log of what was refused: requests for a prediction without an answer, as far as `refusal_bounds` logs them."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cv_platform.errors import CvPlatformError
from cv_platform.serving.capacity.refusal_bounds import RefusalBounds
from cv_platform.serving.http.clean_requests import CONTROL_CHARACTER
from cv_platform.serving.http.request_facts import facts_of
from cv_platform.serving.http.security import Guard
from cv_platform.serving.log.entry import LogEntry
from cv_platform.serving.log.worker_log import WorkerLog
from cv_platform.serving.model.explain import Explain
from cv_platform.serving.telemetry.log_format import BLOT, escaped
from cv_platform.serving.telemetry.metrics import ServingMetrics

logger = logging.getLogger(__name__)

_MAX_URL = 2000
_KEPT = {"explain": frozenset(wish.value for wish in Explain)}
"""The query parameters that the routes know, with their values. Whatever else a query holds may be a secret."""
_MAX_MESSAGE = 1000


@dataclass(frozen=True)
class Refusals:
    """Takes what one worker refuses of predictions."""

    metrics: ServingMetrics
    guard: Guard
    bounds: RefusalBounds
    entries: WorkerLog

    async def log(self, scope: Scope, status: int, message: str) -> None:
        """Counts one refused image, and makes its log entry if it gets one; what cannot be logged is still refused."""
        facts = facts_of(scope)
        message = message[:_MAX_MESSAGE]
        self.metrics.image_answered(status)
        has_key = self.guard.has_key(HTTPConnection(scope))
        way = self.bounds.choose(status, has_key=has_key, is_open=self.guard.is_open)
        self.metrics.refused(_path(scope), status, way)
        if way == "counted":
            return
        entry = LogEntry(
            request_method="POST",
            request_url=logged_url(scope),
            response_status_code=status,
            response_message=message,
            timespan=facts.seconds(),
            created_on=facts.created_on,
            model_version=facts.model_version,
            client_error=message if 400 <= status < 500 else None,
        )
        try:
            if way == "durable":
                await self.entries.append(entry)
            else:
                self.entries.append_soon(entry)
        except CvPlatformError as err:
            self.metrics.unlogged_refusals.inc()
            logger.warning("Request %s was refused (%d) without a log entry: %s", facts.request_id, status, err)


class RefusalLog:
    """ASGI middleware: counts and logs each refused request for a prediction before the refusal leaves.

    It sits outside of everything that can refuse (body limit, keys, overload, validation), so that nothing is missed.

    Args:
        app: what it stands before.
        refusals: takes them.
        paths: of the routes that predict.
    """

    def __init__(self, app: ASGIApp, *, refusals: Refusals, paths: Collection[str]) -> None:
        self.app = app
        self.refusals = refusals
        self.paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http" or scope["method"] != "POST" or _path(scope) not in self.paths:
            await self.app(scope, receive, send)
            return

        async def logged(message: Message) -> None:
            facts = facts_of(scope)
            if message["type"] == "http.response.start" and not facts.is_logged:
                facts.is_logged = True
                await self.refusals.log(scope, message["status"], facts.message)
            await send(message)

        await self.app(scope, receive, logged)


def logged_url(scope: Scope) -> str:
    """Returns path and query as the log keeps them: of the query only the names and values that the routes know."""
    query = scope.get("query_string", b"").decode("latin-1")
    path = escaped(scope["path"])
    if not query:
        return path[:_MAX_URL]
    return f"{path}?{'&'.join(_logged_parameter(parameter) for parameter in query.split('&'))}"[:_MAX_URL]


def _logged_parameter(parameter: str) -> str:
    name, equals, value = parameter.partition("=")
    known = _KEPT.get(name)
    if known is None:
        return f"{BLOT}={BLOT}" if equals else BLOT
    return parameter if not equals or value in known else f"{name}={BLOT}"


def _path(scope: Scope) -> str:
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    # As a router's regular expression sees it: `$` matches before a newline.
    return CONTROL_CHARACTER.sub("", path)
