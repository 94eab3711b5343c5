"""What /docs and /openapi.json say beside the signatures: descriptions, answers, examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

API_TITLE = "API of the image classifier"
API_VERSION = "1"
API_DESCRIPTION = (
    "Send an image, get classes with their probabilities and a heat-map of what spoke for them.\n"
    "Every refusal is JSON with `message` (what happened, what to do), `expected` (what would have been accepted) and "
    "`request_id`. Send X-Request-Id to choose that id yourself."
)
PREDICT_DESCRIPTION = (
    "One image in the multipart field `file`: JPEG, PNG, WebP, BMP, TIFF or GIF (first frame). "
    "The answer's pictures are base64 without a prefix; `explain` chooses their format, a small matrix (`cam`) in "
    "their place, or nothing.\n"
    "With status 200 the request is in the log for good."
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
    },
    "message": "Every worker takes it up within seconds; GET /models/current shows them.",
}
HEALTH_EXAMPLE: dict[str, Any] = {
    "status": "ready",
    "model_name": "digits_classifier",
    "model_version": VERSION,
    "model": {"worker_id": "host-4711", "model_source": "pointer", "last_swap_error": None, "storage_error": None},
    "spool": {"entries": 0, "oldest_seconds": None, "rejected": 0},
    "database": {"state": "ok", "error": None},
    "in_flight": 0,
    "max_upload_bytes": 10_000_000,
    "message": "ok",
}

_REFUSALS = {
    400: "empty, truncated or malformed",
    401: "a key or token is missing",
    403: "wrong admin token, or the admin routes are closed",
    404: "nothing of that name or id",
    408: "the body did not arrive in time",
    409: "the model did not pass its load test, or another update is running; production stays as it is",
    413: "too many bytes or pixels; decided before decoding",
    415: "not an image of a supported format",
    422: "wrong or missing field; the message says what was expected",
    429: "overload; Retry-After says when to come again",
    503: "not this request's fault: no model, full log, database or storage away; Retry-After",
    504: "the prediction was not ready in time",
}


def responses(
    ok: Mapping[str, Any] | None, *refusals: int, description: str = "done"
) -> dict[int | str, dict[str, Any]]:
    """Returns OpenAPI's `responses` of a route: its 200 with an example, and the refusals it knows."""
    answers: dict[int | str, dict[str, Any]] = {200: {"description": description}}
    if ok is not None:
        answers[200]["content"] = {"application/json": {"example": dict(ok)}}
    for status in refusals:
        example = {"message": _REFUSALS[status].capitalize() + ".", "expected": "…", "request_id": "b6d1…"}
        answers[status] = {"description": _REFUSALS[status]}
        if status == 422:  # FastAPI documents a shape of its own for it otherwise.
            answers[status]["content"] = {"application/json": {"example": example}}
    return answers


def predict_responses(ok: Mapping[str, Any]) -> dict[int | str, dict[str, Any]]:
    """Returns the answers of `POST /predict`."""
    return responses(ok, 400, 401, 408, 413, 415, 422, 429, 503, 504, description="the prediction, logged for good")
