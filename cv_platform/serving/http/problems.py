"""The one shape in which every refusal reaches a client.

    {"message": what happened and what to do, "expected": what would have been accepted, "request_id": …, …}

Routes raise `Problem`; everything else that can leave a route (errors of the platform, validation, unknown paths) is
turned into one here, so that no client ever meets another shape. Nothing that a client sent may become a 5xx: those
are for what is wrong on this side, and say so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cv_platform.errors import (
    BundleNotFoundError,
    CorruptBundleError,
    CvPlatformError,
    DatabaseError,
    DatabaseUnavailableError,
    DeploymentError,
    ImageError,
    PromotionBusyError,
    SchemaMismatchError,
    ServiceError,
    SpoolFullError,
    StorageError,
)
from cv_platform.images import SUPPORTED_FORMATS
from cv_platform.serving.http.request_facts import facts_of
from cv_platform.serving.problem import RETRY_SECONDS, Problem

logger = logging.getLogger(__name__)

_MAX_MISTAKES = 20
_ANSWERS: tuple[tuple[type[CvPlatformError], int, str], ...] = (
    (ServiceError, 503, "a service that has started"),
    (SpoolFullError, 503, "room in the request log: free disk space or start the database"),
    (BundleNotFoundError, 404, "the name, and optionally the version, of a published model"),
    (PromotionBusyError, 409, "one update at a time"),
    (CorruptBundleError, 409, "a model that passes its load test"),
    (DeploymentError, 409, "an earlier version to go back to"),
    (DatabaseUnavailableError, 503, "the request log's database, up and migrated"),
    (SchemaMismatchError, 503, "the request log's database, up and migrated"),
    (StorageError, 503, "a reachable central storage"),
)
"""Status, and what was expected, of the platform's errors; the first that fits counts."""


def method_not_allowed(path: str, method: str, methods: Collection[str]) -> Problem:
    """Returns the 405 of a path that takes other methods, which its header Allow names (RFC 9110, section 15.5.6)."""
    allowed = ", ".join(sorted(methods))
    message = f"{path} does not take {ascii(method)[1:-1][:40]}."
    return Problem(405, message, expected=f"one of: {allowed}", headers={"Allow": allowed})


def problem_of(error: CvPlatformError) -> Problem:
    """Returns the HTTP answer to an error of the platform."""
    text = str(error)
    if isinstance(error, ImageError):
        return Problem(
            error.status_code,
            text,
            expected=f"a complete image ({', '.join(SUPPORTED_FORMATS)}) within the limits",
            extra={"code": error.code},
        )
    for kind, status, expected in _ANSWERS:
        if isinstance(error, kind):
            text = (
                f"Production stays as it is. {text}"
                if isinstance(error, DeploymentError | CorruptBundleError)
                else text
            )
            headers = {"Retry-After": str(RETRY_SECONDS)} if status == 503 or kind is PromotionBusyError else None
            return Problem(status, text, expected=expected, headers=headers)
    return Problem(500, text, expected="this service to be set up completely; its log says more")


def public_reason(error: CvPlatformError) -> str | None:
    """Returns in a few words what is wrong on this side; None for an error whose text anybody may read.

    The text itself may hold paths, the database's address or a parser's view of a file: it is for the log and admins.
    """
    if isinstance(error, SchemaMismatchError):
        return "database not migrated"
    if isinstance(error, DatabaseError):
        return "database unreachable"
    if isinstance(error, SpoolFullError):
        return "request log full or unwritable"
    if isinstance(error, StorageError) and not isinstance(error, BundleNotFoundError | CorruptBundleError):
        return "storage unreadable"
    return None


def shown_problem(error: CvPlatformError, *, is_admin: bool, request_id: str) -> Problem:
    """Returns the HTTP answer to an error as this client may read it; the log has what it may not."""
    problem = problem_of(error)
    reason = public_reason(error)
    if reason is not None and not is_admin:
        logger.warning("Request %s: %s", request_id, error)
        problem.message = f"Expected: {problem.expected}. Received: {reason}. Try again later."
    return problem


def defect(request_id: str) -> Problem:
    """Returns the 500 of what nobody foresaw; the log has the traceback."""
    return Problem(
        500,
        f"Something went wrong in the service. Its log says more of request {request_id}.",
        expected="this not to happen: please report it with the request_id",
    )


def problem_response(scope: Scope, problem: Problem) -> Response:
    """Renders a problem; the request's log entry takes its message from here."""
    facts = facts_of(scope)
    facts.message = problem.message if problem.logged is None else problem.logged
    body = {"message": problem.message, "expected": problem.expected, "request_id": facts.request_id, **problem.extra}
    # ASCII with escapes: whatever a client sent (lone surrogates, say) can be quoted back without failing to encode.
    return Response(
        json.dumps(body, ensure_ascii=True, default=str),
        status_code=problem.status_code,
        headers=problem.headers,
        media_type="application/json",
    )


def json_response(content: Mapping[str, Any], *, status: int = 200) -> Response:
    """Renders an answer as JSON; UUIDs and times become text."""
    return Response(json.dumps(content, default=_plain), status_code=status, media_type="application/json")


def prediction_response(fields: Mapping[str, Any]) -> Response:
    """Renders a prediction's fields as JSON; the text of its pictures costs `json` a fiftieth of a request."""
    return Response(msgspec.json.encode(fields), media_type="application/json")


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    return str(value)


_MEANINGS = {
    400: "a well-formed request",
    404: "one of the routes of /docs",
}


def install_problem_handlers(app: FastAPI, *, is_admin: Callable[[Request], bool]) -> None:
    """Makes every error that leaves a route a problem in our shape.

    Args:
        app: where.
        is_admin: says who reads the whole text of what is wrong on this side; others get `public_reason`.
    """

    async def on_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return problem_response(request.scope, error)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        expected = _MEANINGS.get(error.status_code, "a request as /docs describes it")
        problem = Problem(error.status_code, str(error.detail), expected=expected, headers=error.headers)
        return problem_response(request.scope, problem)

    async def on_platform(request: Request, error: Exception) -> Response:
        assert isinstance(error, CvPlatformError)
        problem = shown_problem(error, is_admin=is_admin(request), request_id=facts_of(request.scope).request_id)
        return problem_response(request.scope, problem)

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return problem_response(request.scope, validation_problem(error.errors()))

    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(CvPlatformError, on_platform)
    app.add_exception_handler(RequestValidationError, on_validation)


class Checks:
    """ASGI middleware: asks each check of a request before anything is done for it; the problem of one is the answer.

    Args:
        app: what it stands before.
        checks: each takes the scope of a request, and raises a `Problem` or returns.
    """

    def __init__(self, app: ASGIApp, *, checks: Sequence[Callable[[Scope], None]]) -> None:
        self.app = app
        self.checks = checks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        answer = self.app
        try:
            for check in self.checks if scope["type"] == "http" else ():
                check(scope)
        except Problem as problem:
            answer = problem_response(scope, problem)
        await answer(scope, receive, send)


class Unexpected:
    """ASGI middleware: what nobody foresaw becomes a 500 that names the request, and a traceback in the log."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        has_begun = False

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, receive, noted)
        # The outermost place: beyond it a client would meet another shape, or a cut connection.
        except Exception:
            if scope["type"] != "http" or has_begun:
                raise
            request_id = facts_of(scope).request_id
            logger.exception("Request %s failed", request_id)
            await problem_response(scope, defect(request_id))(scope, receive, send)


def validation_problem(errors: Sequence[Any]) -> Problem:
    """Returns a 422 that lists the mistakes, up to twenty, with their places and what was received."""
    details = [
        {
            "place": ".".join(str(part) for part in error["loc"])[:200],
            "message": error["msg"],
            "received": ascii(error.get("input"))[:200],
        }
        for error in errors[:_MAX_MISTAKES]
    ]
    message = "; ".join(f"{d['place']}: {d['message']}. Received: {d['received']}" for d in details)
    if len(errors) > _MAX_MISTAKES:
        message += f"; and {len(errors) - _MAX_MISTAKES} more"
    return Problem(422, message, expected="fields as /docs describes them", extra={"errors": details})
