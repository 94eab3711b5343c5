"""`POST /predict`: receive, predict in a thread, make the log entry durable, answer; and the log of what was refused.

The event loop only ever waits. A request holds a place in `uploads` while its body arrives and one in `in_flight` from
then until its thread is free again, even when its client was told 504 meanwhile: an abandoned prediction still costs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cv_platform.errors import CvPlatformError
from cv_platform.images import SUPPORTED_FORMATS
from cv_platform.serving.answer import Answer, answer_upload, log_entry
from cv_platform.serving.clean_requests import escaped, has_control_characters
from cv_platform.serving.context import ServingContext
from cv_platform.serving.examples import PREDICT_DESCRIPTION, PREDICTION_EXAMPLE, predict_responses
from cv_platform.serving.explain import Explain
from cv_platform.serving.limits import overloaded, too_large
from cv_platform.serving.log_entry import LogEntry
from cv_platform.serving.problems import Problem, json_response, trace_of, try_later
from cv_platform.serving.security import API_KEY

logger = logging.getLogger(__name__)

PREDICT_PATH = "/predict"
FILE_FIELD = "file"
EXPLAIN_FIELD = "explain"
_MAX_URL = 2000
_MAX_MESSAGE = 1000
_FORM = "multipart/form-data with one image in the field 'file'"
_REQUEST_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": [FILE_FIELD],
                "properties": {
                    FILE_FIELD: {
                        "type": "string",
                        "contentMediaType": "application/octet-stream",
                        "description": f"One image: {', '.join(SUPPORTED_FORMATS)}.",
                    },
                    EXPLAIN_FIELD: {
                        "type": "string",
                        "enum": [e.value for e in Explain],
                        "description": "As in the query.",
                    },
                },
            }
        }
    },
}


def predict_router(context: ServingContext) -> APIRouter:
    """Returns the route `POST /predict`."""
    router = APIRouter(tags=["predictions"])

    @router.post(
        PREDICT_PATH,
        summary="Classify an image",
        description=PREDICT_DESCRIPTION,
        dependencies=[Depends(context.guard.require_api_key), *API_KEY],
        responses=predict_responses(PREDICTION_EXAMPLE),
        openapi_extra={"requestBody": _REQUEST_BODY},
    )
    async def predict(
        request: Request,
        explain: Annotated[str | None, Query(description="jpeg (default), png, cam (a small matrix) or none")] = None,
    ) -> Response:
        model = context.models.current()
        if model is None:
            raise try_later(
                503, "No model is deployed yet. Materialise the experiment's deployment.", expected="a deployed model"
            )
        trace = trace_of(request.scope)
        trace.model_version = model.metadata.version
        if context.in_flight.is_full:  # Before the body is read: it would be read in vain.
            raise overloaded("predictions", context.in_flight.limit)
        data, wished = await _receive(context, request, explain)

        def work() -> tuple[Answer, Response]:
            answer = answer_upload(
                model,
                data,
                explain=wished,
                max_pixels=context.settings.max_upload_pixels,
                on_explain_failure=context.metrics.explain_failed,
            )
            return answer, json_response(answer.body)

        answer, response = await context.compute(work)
        await context.append(
            log_entry(answer, data, trace, url=_url(request.scope), keep_images=context.settings.log_images)
        )
        trace.is_logged = True
        context.metrics.predict_answered(200, trace.seconds())
        for name in answer.predicted_classes:
            context.metrics.predicted(answer.model.model_name, answer.model.version, name)
        return response

    return router


async def _receive(context: ServingContext, request: Request, explain: str | None) -> tuple[bytes, Explain]:
    if not context.uploads.enter():
        raise overloaded("uploads", context.uploads.limit)
    seconds = context.limits.upload_seconds
    try:
        async with asyncio.timeout(seconds):
            return await _read_form(request, explain, context.settings.max_upload_bytes)
    except TimeoutError as err:
        raise Problem(
            408,
            f"The body was not complete after {seconds:g} s. Send it again.",
            expected=f"a body within {seconds:g} s",
            headers={"Connection": "close"},
        ) from err
    finally:
        context.uploads.leave()


async def _read_form(request: Request, explain: str | None, max_bytes: int) -> tuple[bytes, Explain]:
    """Reads the multipart body; the parser keeps no more than 1 MB of it in memory, the rest in a temporary file.

    Raises:
        Problem: 413 or 422, saying what was received.
    """
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
        raise Problem(422, f"Expected {_FORM}. Received: content type {content_type[:100]!r}.", expected=_FORM)
    parser = MultiPartParser(request.headers, request.stream(), max_files=4, max_fields=16, max_part_size=4096)
    try:
        form = await parser.parse()
    except ClientDisconnect as err:
        raise Problem(400, "The client went away before its upload was complete.", expected="a complete body") from err
    # The parser trusts the boundary's encoding and the part headers' form; a hostile body breaks it in ways of its own.
    except (MultiPartException, UnicodeError, ValueError, LookupError, AssertionError) as err:
        text = getattr(err, "message", "") or type(err).__name__
        raise Problem(422, f"Expected {_FORM}. Received: a body that is none ({text}).", expected=_FORM) from err
    try:
        items = form.multi_items()
        files = [value for name, value in items if name == FILE_FIELD]
        wished = _explain([value for name, value in items if name == EXPLAIN_FIELD], explain)
        if len(files) != 1 or not isinstance(files[0], UploadFile):
            raise Problem(422, f"Expected {_FORM}. Received: {_received(items)}.", expected=_FORM)
        upload = files[0]
        if (upload.size or 0) > max_bytes:
            raise too_large(max_bytes, f"{upload.size} bytes")
        return await upload.read(), wished
    finally:
        await form.close()


def _received(items: Sequence[tuple[str, Any]]) -> str:
    if not items:
        return "no field"
    kinds = (f"{name[:40]!a} ({'a file' if isinstance(value, UploadFile) else 'text'})" for name, value in items[:8])
    return "the fields " + ", ".join(kinds)


def _explain(fields: Sequence[Any], query: str | None) -> Explain:
    """The form's field wins over the query: it is the more deliberate of the two."""
    value = fields[-1] if fields else query
    if value is None:
        return Explain.JPEG
    try:
        return Explain(value)
    except ValueError as err:
        known = ", ".join(e.value for e in Explain)
        received = ascii(value)[:60] if isinstance(value, str) else "a file"
        raise Problem(422, f"explain: expected {known}. Received: {received}.", expected=f"explain={known}") from err


class RefusalLog:
    """ASGI middleware: gives each refused `POST /predict` its log entry before the refusal leaves.

    It sits outside of everything that can refuse (body limit, keys, overload, validation), so that nothing is missed.
    A refusal that cannot be logged is still given, and counted.
    """

    def __init__(self, app: ASGIApp, *, context: ServingContext) -> None:
        self.app = app
        self.context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http" or scope["method"] != "POST" or _path(scope) != PREDICT_PATH:
            await self.app(scope, receive, send)
            return

        async def logged(message: Message) -> None:
            if message["type"] == "http.response.start" and not trace_of(scope).is_logged:
                await self._log(scope, message["status"])
            await send(message)

        await self.app(scope, receive, logged)

    async def _log(self, scope: Scope, status: int) -> None:
        trace = trace_of(scope)
        trace.is_logged = True
        message = trace.message[:_MAX_MESSAGE]
        self.context.metrics.predict_answered(status, trace.seconds())
        entry = LogEntry(
            request_method="POST",
            request_url=_url(scope),
            response_status_code=status,
            response_message=message,
            timespan=trace.seconds(),
            created_on=trace.created_on,
            model_version=trace.model_version,
            client_error=message if 400 <= status < 500 else None,
        )
        try:
            await self.context.append(entry)
        except CvPlatformError as err:
            self.context.metrics.refusal_unlogged()
            logger.warning("Request %s was refused (%d) without a log entry: %s", trace.request_id, status, err)


def _path(scope: Scope) -> str:
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    # As a router's regular expression sees it: `$` matches before a newline.
    return "".join(c for c in path if not has_control_characters(c))


def _url(scope: Scope) -> str:
    query = scope.get("query_string", b"").decode("latin-1")
    path = escaped(scope["path"])
    return (f"{path}?{query}" if query else path)[:_MAX_URL]
