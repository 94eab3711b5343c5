"""What /docs and /openapi.json say beside the signatures: descriptions, answers, examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

API_TITLE = "API of the image classifier"
API_VERSION = "1"
API_DESCRIPTION = (
    "Send an image, get classes with their probabilities and a heat-map of what spoke for them.\n"
    "Every refusal is JSON with `message` (what happened, what to do), `expected` (what would have been accepted) and "
    "`request_id`. Send X-Request-Id to choose that id yourself."
)
PREDICT_DESCRIPTION = (
    "One image in the multipart field `file`, or as the body itself with a Content-Type of `image/…`: JPEG, PNG, WebP, "
    "BMP, TIFF or GIF (first frame). "
    "The answer's pictures are base64 without a prefix; `explain` chooses their format, a small matrix (`cam`) in "
    "their place, or nothing.\n"
    "With status 200 the request is in the log for good."
)
BATCH_DESCRIPTION = (
    "Several images, each in a multipart field `files`; the form's `explain` holds for all. The answer's `results` has "
    "one item for each file, in their order: what POST /predict would have answered, with the file's name and "
    "`status_code` 200, or `status_code`, `message` and `expected` of its refusal. One broken file does not lose the "
    "others.\n"
    "Status 200 when at least one image was answered. When none was: the status that all of them have in common, else "
    "422, or 503 where one of them could be answered later; `results` says why of each."
)
FEEDBACK_DESCRIPTION = (
    "Kept beside the prediction: `true_class`, or `none_of_these: true` for an image that shows none of the model's "
    "classes. The latest statement counts; all are kept.\n"
    "With the header Idempotency-Key a statement may be sent again without being counted twice; the same key with "
    "another statement on this prediction is refused. Without one, each request is a statement."
)
PREDICTION_ID = "4f0c4a52-3f0b-4a5e-9d0e-6f2f1f0c9f11"
VERSION = "20260131T060000Z-1f3c9a2e"
PREDICTION_EXAMPLE: dict[str, Any] = {
    "prediction_id": PREDICTION_ID,
    "model_name": "digits_classifier",
    "model_version": VERSION,
    "classifier_type": "multi-class",
    "predicted_class": "7",
    "predicted_classes": ["7"],
    "prediction": {"1": 0.012, "7": 0.985, "9": 0.003},
    "overlaid_img": "/9j/4AAQSkZJRg…",
    "raw_hm_img": "/9j/4AAQSkZJRg…",
    "media_type": "image/jpeg",
    "cam": None,
    "is_unknown": None,
    "unknown_score": None,
    "message": "ok",
}
POINTER_EXAMPLE: dict[str, Any] = {
    "service": "image_classifier",
    "production": {
        "model_name": "digits_classifier",
        "version": VERSION,
        "previous_model_name": "digits_classifier",
        "previous_version": "20260124T060000Z-77ab01c4",
        "since_utc": "2026-01-31T06:01:12+00:00",
        "experiment": "digits",
        "probation": None,
    },
    "message": "Every worker takes it up within seconds; GET /models/current shows them.",
}
HEALTH_EXAMPLE: dict[str, Any] = {
    "status": "ready",
    "model_name": "digits_classifier",
    "model_version": VERSION,
    "model": {"worker_id": "5eaf00d1", "model_source": "pointer", "last_swap_error": None, "storage_error": None},
    "spool": {"entries": 0, "oldest_seconds": None, "rejected": 0, "as_of_seconds": 0.0},
    "database": {"state": "ok", "error": None},
    "in_flight": 0,
    "max_upload_bytes": 10_000_000,
    "max_upload_pixels": 40_000_000,
    "max_batch_files": 32,
    "message": "ok",
}

BATCH_EXAMPLE: dict[str, Any] = {
    "results": [
        {"filename": "seven.png", "status_code": 200, **PREDICTION_EXAMPLE},
        {
            "filename": "notes.pdf",
            "status_code": 415,
            "message": "Expected an image (JPEG, PNG, …). Received: bytes that are none.",
            "expected": "a complete image (JPEG, PNG, …) within the limits",
        },
    ],
    "answered": 1,
    "failed": 1,
}
FEEDBACK_EXAMPLE = {
    "prediction_id": PREDICTION_ID,
    "true_class": "1",
    "none_of_these": False,
    "source": "page",
    "message": "ok",
}
PASSPORT_EXAMPLE: dict[str, Any] = {
    "prediction": {"prediction_id": PREDICTION_ID, "created_on": "2026-01-31T06:05:01+00:00", "model_version": VERSION},
    "model": {"ds_name": "digits", "dvc_tag": "v2.0.0", "dvc_md5": "…", "mlflow_run_id": "…", "git_commit": "…"},
    "training_run": "http://localhost:5050/#/runs/…",
    "config": {"model": {"model_name": "digits_classifier"}},
    "message": "ok",
}
STORED_EXAMPLE: dict[str, Any] = {
    **PREDICTION_EXAMPLE,
    "original_img": "/9j/4AAQSkZJRg…",
    "created_on": "2026-01-31T06:05:01+00:00",
}
DELETION_EXAMPLE = {"prediction_id": PREDICTION_ID, "message": "deleted"}
CURRENT_EXAMPLE: dict[str, Any] = {
    **{key: POINTER_EXAMPLE[key] for key in ("service", "production")},
    "workers": [
        {
            "worker_id": "5eaf00d1",
            "model_name": "digits_classifier",
            "version": VERSION,
            "beat_utc": "2026-01-31T06:05:01+00:00",
            "is_live": True,
            "is_current": True,
            "last_swap_error": None,
        }
    ],
}

_REFUSALS = {
    400: "empty, truncated or malformed",
    401: "a key or token is missing",
    403: "wrong admin token, the admin routes are closed, or a page of another site sent this",
    404: "nothing of that name or id",
    408: "the body did not arrive in time",
    409: "the model did not pass its load test, or another update is running; production stays as it is",
    413: "too many bytes or pixels; decided before decoding",
    415: "not an image of a supported format",
    421: "not one of this service's names (CV_ALLOWED_HOSTS)",
    422: "wrong or missing field; the message says what was expected",
    429: "overload, or more images per minute than this client may send; Retry-After says when to come again",
    503: "not this request's fault: no model, full log, database or storage away; Retry-After",
    504: "it was not ready in time; what was begun may still be done",
}
_ANYWHERE = (400, 421)
"""Refusals that every route has: of a malformed request, and of a Host that is not the service's."""
_RETRY_AFTER = {
    "Retry-After": {"description": "seconds after which to come again", "schema": {"type": "integer", "minimum": 1}}
}


class ProblemBody(BaseModel):
    """A refusal: what happened and what to do, what would have been accepted, and the request's id.

    `code` tells programs apart what has the same status: `unusable_image` is the image's fault, not the request's.
    """

    model_config = ConfigDict(extra="allow")

    message: str
    expected: str
    request_id: str
    code: str | None = None


def responses(
    model: type, ok: Mapping[str, Any], *refusals: int, description: str = "done"
) -> dict[int | str, dict[str, Any]]:
    """Returns OpenAPI's `responses` of a route: its 200 with shape and example, and the refusals it knows."""
    answers: dict[int | str, dict[str, Any]] = {
        200: {
            "model": model,
            "description": description,
            "content": {"application/json": {"example": dict(ok)}},
        }
    }
    for status in sorted({*_ANYWHERE, *refusals}):
        answers[status] = refusal(status)
    return answers


def refusal(status: int) -> dict[str, Any]:
    """Returns what OpenAPI says of one refusal."""
    example = {"message": _REFUSALS[status].capitalize() + ".", "expected": "…", "request_id": "b6d1…"}
    answer: dict[str, Any] = {
        "model": ProblemBody,
        "description": _REFUSALS[status],
        "content": {"application/json": {"example": example}},
    }
    if status in {429, 503, 504}:
        answer["headers"] = _RETRY_AFTER
    return answer


def predict_responses(model: type, ok: Mapping[str, Any]) -> dict[int | str, dict[str, Any]]:
    """Returns the answers of `POST /predict` and `POST /predict/batch`."""
    return responses(
        model, ok, 401, 403, 408, 413, 415, 422, 429, 503, 504, description="answered, and logged for good"
    )
