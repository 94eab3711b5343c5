"""The shapes of the service's JSON: what the client reads, and what /openapi.json documents.

The routes build their answers as plain dicts (`Result.fields` and its kin), which costs nothing per request; that they
have these shapes is held by the contract test. What may be null may be missing too: FastAPI leaves null out of the
document's examples, which have to fit their own shapes. https://fastapi.tiangolo.com/advanced/additional-responses/
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, is_dataclass
from datetime import datetime
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints
from uuid import UUID

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class PredictionResult:
    """One answered image.

    Attributes:
        prediction: probability of each class, in the model's order; null is no number.
        overlaid_img: base64 picture of the heat-map over the image; null where none was asked for, or drawn.
        raw_hm_img: base64 picture of the heat-map alone.
        media_type: of both pictures.
        cam: the small class-activation map, rows of numbers from 0 to 1; null unless `explain=cam` asked for it.
        is_unknown: whether the image shows nothing that the model has learned; null where it cannot tell, and of a
            result that is read again.
        unknown_score: 0 is as known as images mostly are, above 1 is unknown.
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
    is_unknown: bool | None = None
    unknown_score: float | None = None
    message: str


@dataclass(frozen=True, kw_only=True)
class StoredResult(PredictionResult):
    """A prediction that was looked up: the picture of its image comes with it, where the image was kept."""

    original_img: str | None = None
    created_on: datetime


@dataclass(frozen=True, kw_only=True)
class BatchPrediction(PredictionResult):
    """An answered image of a batch."""

    filename: str
    status_code: Literal[200]


@dataclass(frozen=True, kw_only=True)
class BatchFailure:
    """An image of a batch that has no answer, and why; the status is the one that POST /predict would have had."""

    filename: str
    status_code: int
    message: str
    expected: str


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """A batch: one item for each file, in the order of the files."""

    results: list[BatchPrediction | BatchFailure]
    answered: int
    failed: int


@dataclass(frozen=True, kw_only=True)
class FeedbackResult:
    """What was said of a prediction, and kept; `true_class` is null where the image shows none of the classes."""

    prediction_id: UUID
    true_class: str | None = None
    none_of_these: bool = False
    source: str
    message: str


@dataclass(frozen=True, kw_only=True)
class DeletionResult:
    """A prediction that is gone."""

    prediction_id: UUID
    message: str


@dataclass(frozen=True, kw_only=True)
class Passport:
    """Where a prediction comes from; `model` is null, and the next two are missing, where its metadata are gone."""

    prediction: dict[str, Any]
    model: dict[str, Any] | None = None
    training_run: str | None = None
    config: dict[str, Any] | None = None
    message: str


@dataclass(frozen=True, kw_only=True)
class Production:
    """The production pointer; `probation` is of a challenger that is tried out, or of the last one that was."""

    model_name: str
    version: str
    previous_model_name: str | None = None
    previous_version: str | None = None
    since_utc: datetime
    experiment: str | None = None
    probation: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class MovedPointer:
    """The production pointer after it was moved."""

    service: str
    production: Production
    message: str


@dataclass(frozen=True, kw_only=True)
class WorkerState:
    """What a worker last said of itself, and whether it is seen to go on saying so."""

    worker_id: str
    model_name: str | None = None
    version: str | None = None
    beat_utc: datetime
    last_swap_error: str | None = None
    is_live: bool
    is_current: bool


@dataclass(frozen=True, kw_only=True)
class CurrentModels:
    """The production pointer, and what each worker runs."""

    service: str
    production: Production | None = None
    workers: list[WorkerState]


@dataclass(frozen=True, kw_only=True)
class SpoolState:
    """What waits for the database; null before the start."""

    entries: int | None = None
    oldest_seconds: float | None = None
    rejected: int | None = None
    as_of_seconds: float


@dataclass(frozen=True, kw_only=True)
class DatabaseState:
    """The request log's database."""

    state: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Health:
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


def read_answer(shape: type[_T], value: object) -> _T:
    """Returns a parsed JSON value as one of the shapes above; fields that a later service adds are left out.

    Raises:
        ValueError: it has another shape.
    """
    return cast(_T, _read(shape, value))


def _read(kind: Any, value: Any) -> Any:
    wanted, arguments = get_origin(kind) or kind, get_args(kind)
    if wanted is Any or (wanted is Literal and value in arguments) or (type(value) is wanted and not arguments):
        return value
    if wanted in (Union, UnionType):  # `X | None` is either, by what X is.
        for one in arguments:
            try:
                return _read(one, value)
            except ValueError:
                continue
    elif wanted in (UUID, datetime) and isinstance(value, str):
        return UUID(value) if wanted is UUID else datetime.fromisoformat(value)
    elif wanted is float and type(value) is int:
        return float(value)
    elif wanted is list and isinstance(value, list):
        return [_read(arguments[0], item) for item in cast(list[Any], value)]
    elif wanted is dict and isinstance(value, dict):
        return {key: _read(arguments[1], item) for key, item in cast(dict[str, Any], value).items()}
    elif is_dataclass(wanted) and isinstance(value, dict):
        given = cast(dict[str, Any], value)
        required = {field.name for field in fields(wanted) if field.default is MISSING}
        if not required - given.keys():
            kinds = get_type_hints(wanted)
            return cast(Any, wanted)(**{name: _read(kinds[name], given[name]) for name in kinds.keys() & given.keys()})
    raise ValueError(f"Expected {getattr(kind, '__name__', kind)}. Received: {ascii(cast(object, value))[:100]}.")
