"""`POST /predict/batch`: several images in one request, each answered, refused and logged on its own.

No more of a batch's images are in the predict threads' queue at a time than there are threads, so that a batch is done
beside single predictions and not before them, and no more of them are in memory. The model is asked for one image at a
time: one combined call took 0.9 of the CPU time with pictures and 0.7 without (ONNX Runtime, 16 images of 320×240), but
would hold all decoded images, of up to 120 MB each, and keep all but one of the threads idle.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.datastructures import UploadFile
from starlette.responses import Response

from cv_platform.client.answers import BatchResult
from cv_platform.errors import CvPlatformError
from cv_platform.serving.capacity.limits import BATCH_UPLOADS
from cv_platform.serving.http.problems import defect, shown_problem
from cv_platform.serving.http.request_facts import facts_of
from cv_platform.serving.http.security import API_KEY
from cv_platform.serving.http.upload_form import EXPLAIN_QUERY, UploadForm, received
from cv_platform.serving.model.explain import Explain
from cv_platform.serving.model.runtime import LoadedModel
from cv_platform.serving.problem import RETRY_SECONDS, Problem, try_later
from cv_platform.serving.routes.examples import BATCH_DESCRIPTION, BATCH_EXAMPLE, predict_responses
from cv_platform.serving.routes.parts import ImageRoute, Parts, WorkerParts
from cv_platform.serving.routes.predict import PREDICT_PATH, TAG_QUERY, answer_and_log, begin
from cv_platform.serving.telemetry.log_format import escaped

logger = logging.getLogger(__name__)

BATCH_PATH = f"{PREDICT_PATH}/batch"
_MAX_FILENAME = 200


@dataclass(frozen=True)
class _Item:
    """What became of one file: a status, and the JSON of its place in the answer."""

    status: int
    json: bytes
    problem: Problem | None = None


router = APIRouter(tags=["predictions"], route_class=ImageRoute)


def form_of(max_files: int) -> UploadForm:
    """Returns the form that a worker takes; how many files depends on its settings."""
    return UploadForm(
        field="files",
        max_files=max_files,
        expected=f"multipart/form-data with 1 to {max_files} images, each in a field 'files'",
    )


@router.post(
    BATCH_PATH,
    summary="Classify several images",
    description=BATCH_DESCRIPTION,
    dependencies=[API_KEY],
    responses=predict_responses(BatchResult, BATCH_EXAMPLE),
)
async def predict_batch(
    parts: Parts,
    request: Request,
    explain: Annotated[str | None, Query(description=EXPLAIN_QUERY)] = None,
    tag: Annotated[str | None, Query(description=TAG_QUERY)] = None,
) -> Response:
    """Answers several images."""
    model = begin(parts, request, tag)  # Counts one image of the client's, whatever the form holds.
    form = form_of(parts.limits.max_batch_files)
    async with received(parts.admission, request, form, explain, places=BATCH_UPLOADS) as (uploads, wished):
        return await answer_batch(parts, request, model, uploads, wished)


async def answer_batch(
    parts: WorkerParts, request: Request, model: LoadedModel, uploads: Sequence[UploadFile], explain: Explain
) -> Response:
    """Answers a batch whose first image `begin` has counted, once each image's log entry is durable.

    Raises:
        Problem: 429, there are more images than this client may send, or than are taken on now.
    """
    if len(uploads) > 1:
        parts.admission.charge(parts.guard.client_of(request), len(uploads) - 1)
    items = await _answer_all(parts, request, model, uploads, explain)
    facts = facts_of(request.scope)
    facts.is_logged = True  # Each of its images is.
    return _response(items, facts.request_id)


async def _answer_all(
    parts: WorkerParts, request: Request, model: LoadedModel, uploads: Sequence[UploadFile], explain: Explain
) -> list[_Item]:
    admission, request_id = parts.admission, facts_of(request.scope).request_id
    admission.admit(len(uploads))
    unused = len(uploads)
    turns = asyncio.Semaphore(admission.limits.predict_threads)
    begin_until = asyncio.get_running_loop().time() + admission.limits.predict_seconds

    async def answer(upload: UploadFile) -> _Item:
        nonlocal unused
        filename = _filename(upload)
        async with turns:
            try:
                if asyncio.get_running_loop().time() > begin_until:
                    raise try_later(
                        504, "Its turn did not come in time. Send it again.", expected="a service with less to do"
                    )
                unused -= 1
                return await answer_and_log(
                    parts,
                    request,
                    model,
                    upload,
                    explain,
                    lambda body: _Item(200, _render({"filename": filename, "status_code": 200, **body})),
                )
            except Problem as err:
                problem = err
            except CvPlatformError as err:
                problem = shown_problem(err, is_admin=parts.guard.is_admin(request), request_id=request_id)
            # Whatever one image meets must not lose the others.
            except Exception:
                logger.exception("An image of request %s failed", request_id)
                problem = defect(request_id)
            await parts.refusals.log(request.scope, problem.status_code, problem.message)
            body = {
                "filename": filename,
                "status_code": problem.status_code,
                "message": problem.message,
                "expected": problem.expected,
            }
            return _Item(problem.status_code, _render(body), problem)

    try:
        return list(await asyncio.gather(*(answer(upload) for upload in uploads)))
    finally:
        if unused:
            admission.in_flight.leave(unused)


def _response(items: Sequence[_Item], request_id: str) -> Response:
    """Puts the items, which are rendered already, into one answer."""
    answered = sum(item.status == 200 for item in items)
    fields: dict[str, Any] = {"answered": answered, "failed": len(items) - answered}
    status = 200
    headers: dict[str, str] = {}
    if not answered:
        problems = [item.problem for item in items if item.problem is not None]
        statuses = {problem.status_code for problem in problems}
        status = statuses.pop() if len(statuses) == 1 else 503 if max(statuses) >= 500 else 422
        if status in {429, 503, 504}:
            headers["Retry-After"] = str(RETRY_SECONDS)
        fields |= {
            "message": f"None of the {len(items)} images was answered. The first: {problems[0].message}",
            "expected": problems[0].expected,
            "request_id": request_id,
        }
    head = json.dumps(fields)[:-1].encode()
    content = b"".join((head, b', "results": [', b", ".join(item.json for item in items), b"]}"))
    return Response(content, status_code=status, headers=headers, media_type="application/json")


def _filename(upload: UploadFile) -> str:
    return escaped(upload.filename or "")[:_MAX_FILENAME]


def _render(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()
