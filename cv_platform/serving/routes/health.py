"""Whether this worker can answer: `GET /health_check` for a person, with the reasons, and the probes of supervisors.

The probes answer as BentoML's do, which are not asked (`AnswerFirst`): one line end, or 503. `/readyz` is 503 for every
reason for which `/health_check` is; `/livez` only when nothing but a new start helps.
https://docs.bentoml.com/en/latest/build-with-bentoml/observability/health.html
"""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from cv_platform.client.answers import Health
from cv_platform.errors import CvPlatformError
from cv_platform.serving.capacity.admission import HANGING_TIMEOUTS
from cv_platform.serving.http.problems import json_response
from cv_platform.serving.problem import RETRY_SECONDS, Problem, try_later
from cv_platform.serving.routes.examples import HEALTH_EXAMPLE, responses
from cv_platform.serving.routes.parts import Parts, WorkerParts

_PROBED = ["GET", "HEAD"]
_STALE_SECONDS = 5.0
"""Older figures than these are said to be old: the housekeeper renews them every two seconds."""


router = APIRouter(tags=["health"])


@router.get(
    "/health_check",
    summary="Whether this worker can answer predictions",
    description="200 when it can, else 503 with the same fields. A database that is away stops nothing.",
    responses={
        **responses(Health, HEALTH_EXAMPLE, description="ready"),
        503: {"model": Health, "description": "not ready; the message says why"},
    },
)
async def health_check(parts: Parts, request: Request) -> Response:
    """Says so on the event loop, not in one of Starlette's threads: it has to answer when all of them hang."""
    # Too late, too many at a time, or a broken disk: the former figures have to do.
    with suppress(Problem, CvPlatformError, sqlite3.Error, OSError):
        await parts.calls.status_reads.run(parts.log.read_status)
    report = health_report(parts, is_admin=parts.guard.is_admin(request))
    is_ready = report["status"] == "ready"
    response = json_response(report, status=200 if is_ready else 503)
    if not is_ready:
        response.headers["Retry-After"] = str(RETRY_SECONDS)
    return response


@router.api_route("/livez", methods=_PROBED, include_in_schema=False)
@router.api_route("/healthz", methods=_PROBED, include_in_schema=False)
async def livez(parts: Parts) -> Response:
    """Says whether anything but a new start helps."""
    if parts.admission.is_beyond_help():
        raise Problem(
            503,
            f"Every thread has been at one prediction for more than {HANGING_TIMEOUTS} times the time-out. "
            "Start this worker anew.",
            expected="a thread that becomes free",
        )
    return PlainTextResponse("\n")


@router.api_route("/readyz", methods=_PROBED, include_in_schema=False)
async def readyz(parts: Parts) -> Response:
    """Says whether predictions can be answered."""
    reasons = _reasons(parts, is_admin=False)
    if reasons:
        raise try_later(503, " ".join(reasons), expected="a worker that can answer predictions")
    return PlainTextResponse("\n")


def _reasons(parts: WorkerParts, *, is_admin: bool) -> list[str]:
    """Returns why this worker can answer no prediction now; nothing of it asks a disk."""
    reasons: list[str] = []
    if parts.models.current() is None:
        reasons.append("No model is deployed yet.")
    if parts.stopping.is_set():
        reasons.append("The service is stopping.")
    elif parts.log.append_error is not None:
        error = parts.log.append_error if is_admin else "full or unwritable"
        reasons.append(f"The request log takes no entries: {error}")
    if parts.admission.is_stuck():
        reasons.append("Every thread is busy with a prediction that takes too long.")
    return reasons


def health_report(parts: WorkerParts, *, is_admin: bool) -> dict[str, Any]:
    """Returns the health page's fields, as JSON values; only admins read errors in full, which the log has too."""
    log, age_seconds = parts.log.last_status()

    def shown(error: str | None, public: str) -> str | None:
        return error if is_admin or not error else public

    models = parts.models.status()
    models = {**models, "last_swap_error": shown(models.get("last_swap_error"), "model refused")}
    public_id = models.pop("public_id", None)
    models["worker_id"] = models.get("worker_id") if is_admin else public_id
    models["storage_error"] = shown(models.get("storage_error"), "storage unreadable")
    model = parts.models.current()
    reasons = _reasons(parts, is_admin=is_admin)
    if log is None and not parts.stopping.is_set():
        reasons.append("The spool's disk does not answer.")
    notes: list[str] = []
    swap_error = models["last_swap_error"]
    if swap_error:
        notes.append(f"The model that production names was not taken up: {swap_error}")
    if models["storage_error"]:
        notes.append(f"The model goes on serving without central storage: {models['storage_error']}")
    if log is not None and age_seconds > _STALE_SECONDS:
        notes.append(f"The spool's disk does not answer; its figures are {age_seconds:.0f} s old.")
    if log is not None and log.database != "ok":
        notes.append(f"Log entries wait in the spool; database: {log.database}.")
    if log is not None and (log.dropped_rows or log.archived_rows):
        notes.append(
            f"There is no database: of the oldest log entries, {log.dropped_rows} were dropped and {log.archived_rows} "
            "archived, as the spool was full. Set DATABASE_URL to keep them."
        )
    if log is not None and log.rejected:
        notes.append(f"The database refused {log.rejected} log entries; `cv-platform log rejected` shows them.")
    database_error = shown(log.last_error, f"database {log.database}") if log else None
    return {
        "status": "busy" if reasons and parts.admission.is_stuck() else "not ready" if reasons else "ready",
        "model_name": model.metadata.model_name if model else None,
        "model_version": model.metadata.version if model else None,
        "model": models,
        "spool": {
            "entries": log.depth if log else None,
            "oldest_seconds": round(log.oldest_age_seconds, 3) if log and log.oldest_age_seconds is not None else None,
            "rejected": log.rejected if log else None,
            "as_of_seconds": round(age_seconds, 3),
        },
        "database": {
            "state": log.database if log else None,
            "error": database_error,
        },
        "in_flight": parts.admission.in_flight.inside,
        "max_upload_bytes": parts.settings.max_upload_bytes,
        "max_upload_pixels": parts.settings.max_upload_pixels,
        "max_batch_files": parts.limits.max_batch_files,
        "message": " ".join(reasons + notes) or "ok",
    }
