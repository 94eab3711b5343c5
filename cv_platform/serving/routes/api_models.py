"""The shapes of the service's JSON: what /openapi.json documents and what the client reads.

The routes build their answers as plain dicts (`answer.result_body` and its kin), which costs nothing per request; that
they have these shapes is held by the contract test. What may be null may be missing too: FastAPI leaves null out of the
document's examples, which have to fit their own shapes. https://fastapi.tiangolo.com/advanced/additional-responses/
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field


class _Shape(BaseModel):
    """Fields may be added by later versions of the service, so others than these are no mistake."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class PredictionResult(_Shape):
    """One answered image.

    Attributes:
        prediction: probability of each class, in the model's order; null is no number.
        overlaid_img: base64 picture of the heat-map over the image; null where none was asked for, or drawn.
        raw_hm_img: base64 picture of the heat-map alone.
        media_type: of both pictures.
        cam: the small class-activation map, rows of numbers from 0 to 1; null unless `explain=cam` asked for it.
        message: `ok`, or what is missing: the pictures, or anything to see in them.
    """

    prediction_id: UUID
    model_name: str
    model_version: str
    classifier_type: Literal["multi-class", "multi-label"] | None = None
    predicted_class: str
    predicted_classes: list[str]
    prediction: dict[str, float | None]
    overlaid_img: str | None = None
    raw_hm_img: str | None = None
    media_type: str | None = None
    cam: list[list[float]] | None = None
    message: str


class StoredResult(PredictionResult):
    """A prediction that was looked up: the picture of its image comes with it, where the image was kept."""

    original_img: str | None = None
    created_on: datetime


class BatchPrediction(PredictionResult):
    """An answered image of a batch."""

    filename: str
    status_code: Literal[200]


class BatchFailure(_Shape):
    """An image of a batch that has no answer, and why; the status is the one that POST /predict would have had."""

    filename: str
    status_code: int = Field(ge=400, le=599)
    message: str
    expected: str


class BatchResult(_Shape):
    """A batch: one item for each file, in the order of the files."""

    results: list[BatchPrediction | BatchFailure]
    answered: int
    failed: int


class ProblemBody(BaseModel):
    """A refusal: what happened and what to do, what would have been accepted, and the request's id.

    `code` tells programs apart what has the same status: `unusable_image` is the image's fault, not the request's.
    """

    model_config = ConfigDict(extra="allow")

    message: str
    expected: str
    request_id: str
    code: str | None = None


class FeedbackResult(_Shape):
    """What was said of a prediction, and kept; `true_class` is null where the image shows none of the classes."""

    prediction_id: UUID
    true_class: str | None = None
    none_of_these: bool = False
    source: str
    message: str


class DeletionResult(_Shape):
    """A prediction that is gone."""

    prediction_id: UUID
    message: str


class Passport(_Shape):
    """Where a prediction comes from; `model` is null, and the next two are missing, where its metadata are gone."""

    prediction: dict[str, Any]
    model: dict[str, Any] | None = None
    training_run: str | None = None
    config: dict[str, Any] | None = None
    message: str


class Production(_Shape):
    """The production pointer."""

    model_name: str
    version: str
    previous_model_name: str | None = None
    previous_version: str | None = None
    since_utc: datetime
    experiment: str | None = None


class MovedPointer(_Shape):
    """The production pointer after it was moved."""

    service: str
    production: Production
    message: str


class WorkerState(_Shape):
    """What a worker last said of itself, and whether it is seen to go on saying so."""

    worker_id: str
    model_name: str | None = None
    version: str | None = None
    beat_utc: datetime
    last_swap_error: str | None = None
    is_live: bool
    is_current: bool


class CurrentModels(_Shape):
    """The production pointer, and what each worker runs."""

    service: str
    production: Production | None = None
    workers: list[WorkerState]


class SpoolState(_Shape):
    """What waits for the database; null before the start."""

    entries: int | None = None
    oldest_seconds: float | None = None
    rejected: int | None = None
    as_of_seconds: float


class DatabaseState(_Shape):
    """The request log's database."""

    state: str | None = None
    error: str | None = None


class Health(_Shape):
    """Whether this worker can answer predictions, and why not."""

    status: Literal["ready", "not ready", "busy"]
    model_name: str | None = None
    model_version: str | None = None
    model: dict[str, Any]
    spool: SpoolState
    database: DatabaseState
    in_flight: int
    max_upload_bytes: int
    max_upload_pixels: int
    max_batch_files: int
    message: str
