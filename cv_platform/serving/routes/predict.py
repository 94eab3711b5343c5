"""`POST /predict`: receive, predict in a thread, make the log entry durable while the answer is made, answer.

The event loop only ever waits. A request holds a place in `uploads` while its body arrives and one in `in_flight` from
then until its thread is free again, even when its client was told 504 meanwhile: an abandoned prediction still costs.
Its upload takes memory until it is answered, and its image from its decoding to its answer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from cv_platform.client.answers import PredictionResult
from cv_platform.serving.capacity.limits import overloaded
from cv_platform.serving.http.problems import json_response
from cv_platform.serving.http.refusal_log import logged_url
from cv_platform.serving.http.request_facts import facts_of
from cv_platform.serving.http.upload_form import EXPLAIN_QUERY, UploadForm, read_upload, received
from cv_platform.serving.log.request_log import BegunEntry
from cv_platform.serving.model.explain import Explain
from cv_platform.serving.model.runtime import LoadedModel
from cv_platform.serving.problem import try_later
from cv_platform.serving.routes.answer import OK, answer_body, log_entry, predict_upload
from cv_platform.serving.routes.examples import PREDICT_DESCRIPTION, PREDICTION_EXAMPLE, predict_responses
from cv_platform.serving.telemetry.observation import staged
from cv_platform.serving.worker import ServingContext

PREDICT_PATH = "/predict"
_FORM = UploadForm(
    field="file",
    max_files=1,
    expected="multipart/form-data with one image in the field 'file', or the image itself as image/*",
)

_T = TypeVar("_T")


def predict_router(context: ServingContext) -> APIRouter:
    """Returns the route `POST /predict`."""
    router = APIRouter(tags=["predictions"])

    @router.post(
        PREDICT_PATH,
        summary="Classify an image",
        description=PREDICT_DESCRIPTION,
        dependencies=[context.guard.api_key],
        responses=predict_responses(PredictionResult, PREDICTION_EXAMPLE),
        openapi_extra={"requestBody": _FORM.request_body()},
    )
    async def predict(
        request: Request, explain: Annotated[str | None, Query(description=EXPLAIN_QUERY)] = None
    ) -> Response:
        model = begin(context, request)
        async with received(context, request, _FORM, explain) as ((upload,), wished):
            context.admit()
            response = await answer_and_log(
                context,
                request,
                model,
                lambda: read_upload(upload, context.settings.max_upload_bytes),
                wished,
                json_response,
            )
        facts_of(request.scope).is_logged = True
        return response

    return router


def begin(context: ServingContext, request: Request) -> LoadedModel:
    """Returns the model that answers a request, before its body is read: when there is no use in reading it, it is not.

    Raises:
        Problem: 503 without a model, 429 when the worker is full or the client has sent too many images.
    """
    model = context.models.current()
    if model is None:
        raise try_later(
            503, "No model is deployed yet. Materialise the experiment's deployment.", expected="a deployed model"
        )
    facts_of(request.scope).model_version = model.metadata.version
    if context.in_flight.is_full:
        raise overloaded("predictions", context.in_flight.limit)
    context.charge(context.guard.client_of(request), 1)
    return model


async def answer_and_log(
    context: ServingContext,
    request: Request,
    model: LoadedModel,
    read: Callable[[], bytes],
    explain: Explain,
    render: Callable[[dict[str, Any]], _T],
) -> _T:
    """Answers one admitted image; returns once the answer's log entry is durable.

    Args:
        context: the worker's; `admit` has given this image its place.
        request: which request it came with.
        model: the model to ask.
        read: returns the upload's bytes; called in the thread that predicts.
        explain: what to add to the probabilities.
        render: makes of the answer's fields what the caller wants; called in the thread that predicts.

    Raises:
        ImageError: the upload is no usable image.
        Problem: 504, it took too long; a prediction that was made in time to be logged keeps its row.
        SpoolFullError: the log cannot keep it, or did not in time; then its row may still come.
    """
    facts, url = facts_of(request.scope), logged_url(request.scope)
    claim = threading.Lock()  # Who gets it says what becomes of the request: the entry is written, or it was too late.

    def work() -> tuple[_T, BegunEntry]:
        data = read()
        with context.decoding(data):
            predicted = predict_upload(model, data, max_pixels=context.settings.max_upload_pixels)
            entry = log_entry(predicted, data, facts, url=url, keep_images=context.settings.log_images)
            if not claim.acquire(blocking=False):
                raise TimeoutError("Nobody waits for this answer any more.")
            # The disk takes the entry while the pictures are drawn: together they need hardly longer than either.
            begun = context.begin_entry(entry, more_follow=context.has_waiting)
            message = OK
            try:
                body = answer_body(predicted, explain, on_explain_failure=context.metrics.explain_failed)
                message = body["message"]
                with staged("encode"):
                    return render(body), begun
            finally:
                begun.settle(message, facts.seconds())

    try:
        rendered, entry = await context.compute_admitted(work)
    except BaseException:
        claim.acquire(blocking=False)
        raise
    await context.entry_written(entry)
    context.metrics.image_answered(200)
    return rendered
