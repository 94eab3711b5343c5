"""`POST /predict`: receive, predict in a thread, make the log entry durable while the answer is made, answer.

The event loop only ever waits. A request holds a place in `uploads` while its body arrives and one in `in_flight` from
then until its thread is free again, even when its client was told 504 meanwhile: an abandoned prediction still costs.
Its upload takes memory until it is answered, and its image from its decoding to its answer.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from starlette.datastructures import UploadFile
from starlette.responses import Response

from cv_platform.client.answers import PredictionResult
from cv_platform.serving.capacity.limits import overloaded
from cv_platform.serving.http.problems import prediction_response
from cv_platform.serving.http.refusal_log import logged_url
from cv_platform.serving.http.request_facts import facts_of
from cv_platform.serving.http.security import API_KEY
from cv_platform.serving.http.upload_form import EXPLAIN_QUERY, UploadForm, read_upload, received
from cv_platform.serving.log.spool import BegunEntry
from cv_platform.serving.model.explain import Explain
from cv_platform.serving.model.runtime import LoadedModel
from cv_platform.serving.problem import Problem, try_later
from cv_platform.serving.routes.answer import OK, answer_body, log_entry, predict_upload
from cv_platform.serving.routes.examples import PREDICT_DESCRIPTION, PREDICTION_EXAMPLE, predict_responses
from cv_platform.serving.routes.parts import ImageRoute, Parts, WorkerParts
from cv_platform.serving.telemetry.observation import staged

PREDICT_PATH = "/predict"
_FORM = UploadForm(
    field="file",
    max_files=1,
    expected="multipart/form-data with one image in the field 'file', or the image itself as image/*",
)

_TAG = re.compile(r"[A-Za-z0-9._-]{1,64}")
TAG_QUERY = "where the image is from, such as line-3 (letters, digits, dots, dashes, underscores): drift is told by tag"
_T = TypeVar("_T")


router = APIRouter(tags=["predictions"], route_class=ImageRoute)


@router.post(
    PREDICT_PATH,
    summary="Classify an image",
    description=PREDICT_DESCRIPTION,
    dependencies=[API_KEY],
    responses=predict_responses(PredictionResult, PREDICTION_EXAMPLE),
    openapi_extra={"requestBody": _FORM.request_body()},
)
async def predict(
    parts: Parts,
    request: Request,
    explain: Annotated[str | None, Query(description=EXPLAIN_QUERY)] = None,
    tag: Annotated[str | None, Query(description=TAG_QUERY)] = None,
) -> Response:
    """Answers one image."""
    model = begin(parts, request, tag)
    async with received(parts.admission, request, _FORM, explain) as ((upload,), wished):
        parts.admission.admit()
        response = await answer_and_log(parts, request, model, upload, wished, prediction_response)
    facts_of(request.scope).is_logged = True
    return response


def begin(parts: WorkerParts, request: Request, tag: str | None = None) -> LoadedModel:
    """Returns the model that answers a request, before its body is read: when there is no use in reading it, it is not.

    Raises:
        Problem: 422 for a tag that is none, 503 without a model, 429 when the worker is full or the client has sent too
            many images.
    """
    if tag is not None and not _TAG.fullmatch(tag):
        expected = "tag=1 to 64 letters, digits, dots, dashes or underscores, or no tag"
        raise Problem(422, f"Expected {expected}. Received: {len(tag)} characters of others.", expected=expected)
    model = parts.models.current()
    if model is None:
        raise try_later(
            503, "No model is deployed yet. Materialise the experiment's deployment.", expected="a deployed model"
        )
    facts = facts_of(request.scope)
    facts.model_version, facts.client, facts.tag = model.metadata.version, parts.guard.name_of(request), tag
    facts.network = parts.guard.network_of(request)
    if parts.admission.in_flight.is_full:
        raise overloaded("predictions", parts.admission.in_flight.limit)
    parts.admission.charge(parts.guard.client_of(request), 1)
    return model


async def answer_and_log(
    parts: WorkerParts,
    request: Request,
    model: LoadedModel,
    upload: UploadFile,
    explain: Explain,
    render: Callable[[dict[str, Any]], _T],
) -> _T:
    """Answers one admitted image; returns once the answer's log entry is durable.

    Args:
        parts: the worker's; `admit` has given this image its place.
        request: which request it came with.
        model: the model to ask.
        upload: the image.
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
        data = read_upload(upload, parts.settings.max_upload_bytes)
        with parts.admission.decoding(data):
            predicted = predict_upload(
                model, data, max_pixels=parts.settings.max_upload_pixels, probation=parts.models.probation()
            )
            facts.model_version = predicted.model.version
            entry = log_entry(predicted, data, facts, url=url, keep_images=parts.settings.log_images)
            if not claim.acquire(blocking=False):
                raise TimeoutError("Nobody waits for this answer any more.")
            # The disk takes the entry while the pictures are drawn: together they need hardly longer than either.
            begun = parts.log.begin_entry(entry, more_follow=parts.admission.has_waiting)
            message = OK
            try:
                body = answer_body(predicted, explain, on_explain_failure=parts.metrics.explain_failures.inc)
                message = body["message"]
                with staged("encode"):
                    return render(body), begun
            finally:
                begun.settle(message, facts.seconds())

    try:
        rendered, entry = await parts.admission.compute_admitted(work)
    except BaseException:
        claim.acquire(blocking=False)
        raise
    await parts.log.entry_written(entry)
    parts.metrics.image_answered(200)
    return rendered
