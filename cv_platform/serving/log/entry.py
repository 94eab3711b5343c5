"""What a request leaves behind (`LogEntry`), what a person says of it later (`FeedbackEntry`), and their spooled form.

Values are cleaned here, on their way in, so that the database accepts what the spool has promised to keep: NUL and lone
surrogates leave the text, and a probability that is not a number becomes null. Field names are the SQL column names of
`database/schema.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, Required, TypedDict
from uuid import UUID

import msgspec
import numpy as np
from numpy.typing import NDArray

from cv_platform.predictions import VECTOR_COLUMNS
from cv_platform.serving.random_ids import new_id

UNKNOWN_MEDIA_TYPE = "application/octet-stream"
_FLOAT = np.dtype("<f4")
FloatArray = NDArray[np.float32]
EntryKind = Literal["request", "feedback"]

_ORIGINS = ("client", "tag", "network")


@dataclass(frozen=True, kw_only=True, eq=False)
class LogEntry:
    """One `/predict` request: its row in `api_log` and, when it was answered with a prediction, its `predictions` row.

    Attributes:
        request_method: such as `POST`.
        request_url: path and query, see `refusal_log.logged_url`.
        response_status_code: HTTP status.
        response_message: what the client was told.
        timespan: seconds from reception to answer.
        created_on: time of reception, with a time zone.
        entry_id: makes writing idempotent: an entry that is drained twice is one row.
        model_name: null for a request that no model saw.
        model_version: version that answered.
        client_error: error that the client itself caused, if any.
        prediction_id: null for a refused request; then all fields below are null too.
        predicted_class: class name; for multi-label the positive class names joined by `|`.
        prediction_json: class name → probability.
        uae_feats: `(D,)` float32, UAE embedding.
        bbsd_feats: `(C,)` float32, the probabilities in the model's class order.
        features: `(F,)` float32, penultimate layer.
        properties: `(7,)` float32 in the order of `properties.PROPERTY_NAMES`.
        raw_hm: `(h, w)` float32 Grad-CAM map in 0–1 at its own small size.
        image: the upload as received; null keeps no image.
        media_type: such as `image/jpeg`.
        client: which API key it came with, see `Guard.name_of`.
        tag: where the client says that the image is from.
        network: the client's, such as 203.0.113.0/24, see `Guard.network_of`.
    """

    request_method: str
    request_url: str
    response_status_code: int
    response_message: str = ""
    timespan: float = 0.0
    created_on: datetime = field(default_factory=lambda: datetime.now(UTC))
    entry_id: UUID = field(default_factory=new_id)
    model_name: str | None = None
    model_version: str | None = None
    client_error: str | None = None
    prediction_id: UUID | None = None
    predicted_class: str | None = None
    prediction_json: Mapping[str, float] | None = None
    uae_feats: FloatArray | None = None
    bbsd_feats: FloatArray | None = None
    features: FloatArray | None = None
    properties: FloatArray | None = None
    raw_hm: FloatArray | None = None
    image: bytes | None = None
    media_type: str | None = None
    client: str | None = None
    tag: str | None = None
    network: str | None = None

    def __post_init__(self) -> None:
        _require_time_zone(self.created_on)
        for name in VECTOR_COLUMNS:
            vector = getattr(self, name)
            if vector is not None and np.ndim(vector) != 1:
                raise ValueError(f"{name}: expected one vector. Received: shape {np.shape(vector)}.")
        if self.raw_hm is not None and np.ndim(self.raw_hm) != 2:
            raise ValueError(f"raw_hm: expected a (h, w) matrix. Received: shape {np.shape(self.raw_hm)}.")
        if self.prediction_id is not None:
            required = ("model_name", "model_version", "predicted_class", "prediction_json", *VECTOR_COLUMNS)
            missing = [name for name in required if getattr(self, name) is None]
            if missing:
                raise ValueError(f"A prediction needs all its fields. Missing: {', '.join(missing)}.")


@dataclass(frozen=True, kw_only=True)
class FeedbackEntry:
    """The true class of an earlier prediction, as a person or a system states it; every statement is kept.

    Attributes:
        prediction_id: which prediction.
        true_class: class name; for multi-label the true class names joined by `|`; or `predictions.NONE_OF_THESE`.
        source: who says so, such as `page` or an API client's name.
        created_on: when, with a time zone.
        entry_id: makes writing idempotent.
    """

    prediction_id: UUID
    true_class: str
    source: str
    created_on: datetime = field(default_factory=lambda: datetime.now(UTC))
    entry_id: UUID = field(default_factory=new_id)

    def __post_init__(self) -> None:
        _require_time_zone(self.created_on)


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredPrediction:
    """A prediction read back by its id, from the database or from a spool; the fields are those of `LogEntry`.

    `image_sha256` and `image` are null when the upload was not kept; `raw_hm` is null when no map was made.
    """

    prediction_id: UUID
    model_name: str
    model_version: str
    predicted_class: str
    prediction_json: dict[str, float | None]
    uae_feats: FloatArray
    bbsd_feats: FloatArray
    features: FloatArray
    properties: FloatArray
    raw_hm: FloatArray | None
    image_sha256: str | None
    image: bytes | None
    media_type: str | None
    created_on: datetime


class Outcome(NamedTuple):
    """What is known of a prediction only once its answer is: the message, and the seconds from reception to answer."""

    entry_id: str
    prediction_id: str
    message: str
    seconds: float


class SpooledImage(NamedTuple):
    """An upload, kept once however often it is sent."""

    sha256: str
    content: bytes
    media_type: str
    created_on: datetime


class SpooledEntry(NamedTuple):
    """One entry as the spool keeps it: scalars as JSON text, arrays as one run of little-endian float32."""

    entry_id: str
    kind: EntryKind
    prediction_id: str | None
    record: str
    vectors: bytes
    image: SpooledImage | None


class _Record(TypedDict, total=False):
    """What `encode` writes as JSON; what else is there, as of a former release, is passed over.

    The probabilities are not read at all: the database takes their text.
    """

    entry_id: Required[UUID]
    created_on: Required[datetime]
    prediction_id: Required[UUID | None]
    request_method: str
    request_url: str
    response_status_code: int
    response_message: str
    timespan: float
    client_error: str | None
    model_name: str | None
    model_version: str | None
    predicted_class: str | None
    prediction_json: msgspec.Raw
    image_sha256: str | None
    client: str | None
    tag: str | None
    network: str | None
    dims: list[int]
    hm_height: int | None
    hm_width: int | None
    true_class: str
    source: str


_READER = msgspec.json.Decoder(_Record)


def encode(entry: LogEntry | FeedbackEntry) -> SpooledEntry:
    """Returns the entry's spooled form, with its values cleaned for PostgreSQL."""
    prediction_id = None if entry.prediction_id is None else str(entry.prediction_id)
    if isinstance(entry, FeedbackEntry):
        record: dict[str, Any] = {
            "entry_id": str(entry.entry_id),
            "prediction_id": prediction_id,
            "true_class": _clean(entry.true_class),
            "source": _clean(entry.source),
            "created_on": _utc(entry.created_on),
        }
        return SpooledEntry(str(entry.entry_id), "feedback", prediction_id, _json(record), b"", None)
    image = None
    if entry.image is not None and prediction_id is not None:
        image = SpooledImage(
            hashlib.sha256(entry.image).hexdigest(),
            entry.image,
            _clean(entry.media_type or UNKNOWN_MEDIA_TYPE),
            entry.created_on.astimezone(UTC),
        )
    record = {
        "entry_id": str(entry.entry_id),
        "request_method": _clean(entry.request_method),
        "request_url": _clean(entry.request_url),
        "response_status_code": int(entry.response_status_code),
        "response_message": _clean(entry.response_message),
        "timespan": _finite(entry.timespan) or 0.0,
        "created_on": _utc(entry.created_on),
        "model_version": _clean_optional(entry.model_version),
        "client_error": _clean_optional(entry.client_error),
        "prediction_id": prediction_id,
    }
    vectors: list[FloatArray] = []
    if prediction_id is not None:
        record["model_name"] = _clean_optional(entry.model_name)
        record["predicted_class"] = _clean_optional(entry.predicted_class)
        record["prediction_json"] = {_clean(k): _finite(v) for k, v in (entry.prediction_json or {}).items()}
        record["image_sha256"] = image.sha256 if image else None
        record |= {name: _clean_optional(getattr(entry, name)) for name in _ORIGINS}
        vectors = [np.asarray(getattr(entry, name), dtype=_FLOAT) for name in VECTOR_COLUMNS]
        record["dims"] = [vector.size for vector in vectors]
        if entry.raw_hm is not None:
            heat_map = np.asarray(entry.raw_hm, dtype=_FLOAT)
            record["hm_height"], record["hm_width"] = heat_map.shape
            vectors.append(heat_map)
    packed = b"".join(vector.tobytes() for vector in vectors)
    return SpooledEntry(str(entry.entry_id), "request", prediction_id, _json(record), packed, image)


def encode_outcome(outcome: Outcome) -> str:
    """Returns what an outcome replaces in its entry's record."""
    return _json({"response_message": _clean(outcome.message), "timespan": _finite(outcome.seconds) or 0.0})


def decode(record: str, vectors: bytes) -> dict[str, Any]:
    """Returns an entry's columns by name, from its spooled form.

    As `read_record`, with the arrays: `(n,)` float32 (`raw_hm` flattened row by row).

    Raises:
        ValueError: the record is not one that `encode` wrote (KeyError and TypeError mean the same).
    """
    values = read_record(record)
    numbers, start = np.frombuffer(vectors, dtype=_FLOAT), 0
    for name, size in take_sizes(values, vectors).items():
        values[name] = numbers[start : start + size]
        start += size
    return values


def read_record(record: str) -> dict[str, Any]:
    """Returns an entry's columns by name, but for its arrays, of which it says the sizes (`take_sizes`).

    Identifiers become `UUID`, times aware `datetime`, and `prediction_json` stays JSON text.

    Raises:
        ValueError: the record is not one that `encode` wrote.
    """
    values: dict[str, Any] = dict(_READER.decode(record))
    if "prediction_json" in values:
        values["prediction_json"] = str(values["prediction_json"], "utf-8")
        for name in (*_ORIGINS, "hm_height", "hm_width", "raw_hm"):  # Not in every record, nor in a former release's.
            values.setdefault(name, None)
    return values


def take_sizes(values: dict[str, Any], vectors: bytes) -> dict[str, int]:
    """Takes the sizes of the arrays, in their order, out of what `read_record` returned.

    Raises:
        ValueError: they are not those of `vectors`.
    """
    dims = values.pop("dims", None)
    sizes: dict[str, int] = {} if dims is None else dict(zip(VECTOR_COLUMNS, dims, strict=True))
    if values.get("hm_height") is not None:
        sizes["raw_hm"] = values["hm_height"] * values["hm_width"]
    if _FLOAT.itemsize * sum(sizes.values()) != len(vectors):
        raise ValueError(f"Expected arrays of {sizes} float32. Received: {len(vectors)} bytes.")
    return sizes


def stored_prediction(values: Mapping[Any, Any], *, image: bytes | None, media_type: str | None) -> StoredPrediction:
    """Returns the record of one prediction from its columns, whether they come from `decode` or from the database."""
    probabilities = values["prediction_json"]
    vectors = {name: np.asarray(values[name], dtype=np.float32) for name in VECTOR_COLUMNS}
    heat_map = None
    if values["raw_hm"] is not None:
        heat_map = np.asarray(values["raw_hm"], dtype=np.float32).reshape(values["hm_height"], values["hm_width"])
    return StoredPrediction(
        prediction_id=values["prediction_id"],
        model_name=values["model_name"],
        model_version=values["model_version"],
        predicted_class=values["predicted_class"],
        prediction_json=json.loads(probabilities) if isinstance(probabilities, str) else dict(probabilities),
        **vectors,
        raw_hm=heat_map,
        image_sha256=values["image_sha256"],
        image=image,
        media_type=media_type,
        created_on=values["created_on"].astimezone(UTC),
    )


def _require_time_zone(moment: datetime) -> None:
    if moment.tzinfo is None:
        raise ValueError(f"created_on: expected a time with a time zone. Received: {moment.isoformat()}.")


def _utc(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat()


def _clean(text: str) -> str:
    """PostgreSQL's text takes neither NUL nor surrogates, and both can arrive in a URL or a file name."""
    if text.isascii() and "\0" not in text:
        return text
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def _clean_optional(text: str | None) -> str | None:
    return None if text is None else _clean(text)


def _finite(value: float) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
