"""What people say of a prediction: which class it should have been, or that it shows none of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Self, TypeVar
from unicodedata import normalize
from uuid import UUID, uuid5

from fastapi import APIRouter, Depends, Header, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from cv_platform.client.answers import FeedbackResult
from cv_platform.errors import DatabaseError
from cv_platform.predictions import LABEL_SEPARATOR, NONE_OF_THESE
from cv_platform.serving.http.problems import json_response, public_reason, validation_problem
from cv_platform.serving.http.request_facts import facts_of
from cv_platform.serving.http.security import API_KEY
from cv_platform.serving.log.entry import FeedbackEntry, StoredPrediction
from cv_platform.serving.problem import Problem, client_gone
from cv_platform.serving.routes.examples import FEEDBACK_DESCRIPTION, FEEDBACK_EXAMPLE, PREDICTION_ID, responses
from cv_platform.serving.routes.parts import Parts, WorkerParts
from cv_platform.serving.routes.predictions import PredictionId, find, metadata_of

logger = logging.getLogger(__name__)
FEEDBACK_PATH = "/feedback"
router = APIRouter(tags=["predictions"])


class Feedback(BaseModel):
    """The true class of a prediction, or that the image shows none of the model's classes."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={"anyOf": [{"required": ["true_class"]}, {"required": ["none_of_these"]}]},
    )

    true_class: str | None = Field(
        default=None, min_length=1, max_length=4000, description="one of the model's classes; multi-label: joined by |"
    )
    none_of_these: bool = Field(
        default=False,
        strict=True,
        description="true, in place of true_class: the image shows none of the model's classes",
    )
    source: str = Field(
        "client", pattern=r"^[A-Za-z0-9_.@ -]{1,64}$", description="who says so; the latest of a source counts"
    )

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if (self.true_class is None) is not self.none_of_these:
            raise ValueError("Expected either true_class or none_of_these: true")
        return self

    @property
    def kept_class(self) -> str:
        """What the log keeps."""
        return self.true_class or NONE_OF_THESE


class FeedbackOn(Feedback):
    """The same, with the prediction that it is about."""

    prediction_id: UUID = Field(description="as POST /predict returned it")


def _body_of(model: type[Feedback], example: dict[str, str]) -> dict[str, Any]:
    content = {"application/json": {"schema": model.model_json_schema(), "example": example}}
    return {"requestBody": {"required": True, "content": content}}


_EXAMPLE = {"true_class": "1", "source": "page"}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    **responses(FeedbackResult, FEEDBACK_EXAMPLE, 401, 403, 404, 408, 413, 422, 429, 503, description="kept for good"),
    202: {
        "model": FeedbackResult,
        "description": "kept for good; the database is away, so nobody could look for the prediction",
    },
}
_IdempotencyKey = Annotated[
    str | None, Header(pattern=r"^[!-~]{1,255}$", description="chosen by you, another for each statement")
]
_Said = TypeVar("_Said", bound=Feedback)


async def said(request: Request) -> Feedback:
    """Returns what the body of a request says of an image."""
    return await _read(Feedback, request)


async def _said_on(request: Request) -> FeedbackOn:
    return await _read(FeedbackOn, request)


async def _read(model: type[_Said], request: Request) -> _Said:
    """Reads the body. FastAPI itself would do so before it asks for a key: any stranger's, for as long as it takes."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Problem(
            422, f"Expected JSON. Received: content type {ascii(media_type)[:100]}.", expected="application/json"
        )
    try:
        return model.model_validate_json(await request.body())
    except ClientDisconnect as err:
        raise client_gone() from err
    except ValidationError as err:
        mistakes = err.errors(include_url=False, include_context=False)
        raise validation_problem([{**mistake, "loc": ("body", *mistake["loc"])} for mistake in mistakes]) from err


@router.post(
    FEEDBACK_PATH + "/{prediction_id}",
    summary="Say what an image really shows",
    description=FEEDBACK_DESCRIPTION,
    dependencies=[API_KEY],
    openapi_extra=_body_of(Feedback, _EXAMPLE),
    responses=_RESPONSES,
)
async def feedback(
    parts: Parts,
    request: Request,
    prediction_id: PredictionId,
    stated: Annotated[Feedback, Depends(said)],
    idempotency_key: _IdempotencyKey = None,
) -> Response:
    """Keeps what somebody says of a prediction."""
    return await keep(parts, request, prediction_id, stated, idempotency_key)


@router.post(
    FEEDBACK_PATH,
    summary="Say what an image really shows, with the prediction's id in the body",
    description=FEEDBACK_DESCRIPTION,
    dependencies=[API_KEY],
    openapi_extra=_body_of(FeedbackOn, {"prediction_id": PREDICTION_ID, **_EXAMPLE}),
    responses=_RESPONSES,
)
async def feedback_on(
    parts: Parts,
    request: Request,
    said: Annotated[FeedbackOn, Depends(_said_on)],
    idempotency_key: _IdempotencyKey = None,
) -> Response:
    """Keeps what somebody says of a prediction, as BentoML's clients send it."""
    return await keep(parts, request, said.prediction_id, said, idempotency_key)


async def keep(
    parts: WorkerParts, request: Request, prediction_id: UUID, said: Feedback, idempotency_key: str | None = None
) -> Response:
    """Answers one statement once it is durable.

    Raises:
        Problem: 404, there is no such prediction; 422, its model has no such class, or the key came with another one.
    """
    stored, reason = await _find_or_reason(parts, prediction_id)
    if said.true_class is not None:
        named = await named_by(parts, stored, said.true_class)
        said = said.model_copy(update={"true_class": named})
    statement = FeedbackEntry(
        prediction_id=prediction_id,
        true_class=said.kept_class,
        source=said.source,
        created_on=facts_of(request.scope).created_on,
    )
    if idempotency_key is not None:
        statement = replace(statement, entry_id=_id_by_key(statement, idempotency_key))
    if idempotency_key is None or not await parts.calls.look_ups.run(
        lambda: _is_repeated(parts, statement, idempotency_key)
    ):
        await parts.log.append(statement)
        parts.metrics.feedback.inc()
    body = {
        "prediction_id": str(prediction_id),
        "true_class": said.true_class,
        "none_of_these": said.none_of_these,
        "source": said.source,
        "message": "ok",
    }
    if stored is None:
        body["message"] = f"Kept. Whether there is such a prediction could not be checked now: {reason}"
    return json_response(body, status=200 if stored is not None else 202)


async def _find_or_reason(parts: WorkerParts, prediction_id: UUID) -> tuple[StoredPrediction | None, str]:
    """Returns the prediction, or why nobody can say now whether there is one.

    Raises:
        Problem: 404, there is none.
    """
    try:
        return await parts.calls.look_ups.run(lambda: find(parts, prediction_id)), ""
    except DatabaseError as err:
        logger.warning("Prediction %s cannot be looked up: %s", prediction_id, err)
        return None, public_reason(err) or "database unreachable"


def _id_by_key(statement: FeedbackEntry, key: str) -> UUID:
    """Returns the id of a statement with an Idempotency-Key: what is sent twice, to whichever replica, is one row."""
    return uuid5(statement.prediction_id, "\n".join((key, statement.source, statement.true_class)))


def _is_repeated(parts: WorkerParts, statement: FeedbackEntry, key: str) -> bool:
    """Says whether the log has this statement already.

    Raises:
        Problem: 422, the key came with another statement before.
    """
    try:
        for earlier in parts.log.opened.statements(statement.prediction_id):
            if earlier.entry_id != _id_by_key(earlier, key):
                continue
            if earlier.entry_id == statement.entry_id:
                return True
            raise Problem(
                422,
                "This Idempotency-Key came with another statement on this prediction before, which is kept. "
                "Send a new statement with a key of its own.",
                expected="the statement that the Idempotency-Key belongs to, or another key",
            )
    except DatabaseError as err:
        # It may have a statement with this key. If it is the same one, they become one row; if not, both are kept.
        logger.warning("Feedback on %s is kept without a look at earlier ones: %s", statement.prediction_id, err)
    return False


async def named_by(parts: WorkerParts, stored: StoredPrediction | None, true_class: str) -> str:
    """Returns `true_class` as the prediction's model spells it.

    Raises:
        Problem: 422, the model has no such class.
    """
    if stored is None:
        # The prediction cannot be looked up, so the classes of the model that serves now have to do.
        model = parts.models.current()
        if model is None:
            return true_class
        is_multi_label = model.metadata.classifier_type == "multi-label"
        return _as_named(true_class, model.metadata.class_names, is_multi_label=is_multi_label)
    class_names = list(stored.prediction_json)
    # Only what would be split needs the model's type, which may have to be read from central storage.
    is_multi_label = False
    if true_class not in class_names and LABEL_SEPARATOR in true_class:
        metadata = await metadata_of(parts, stored)
        is_multi_label = (
            metadata.classifier_type == "multi-label"
            if metadata is not None
            else stored.predicted_class not in stored.prediction_json
        )
    return _as_named(true_class, class_names, is_multi_label=is_multi_label)


def _as_named(true_class: str, class_names: Sequence[str], *, is_multi_label: bool) -> str:
    # An accent is one character here and two there, and to a person the same name.
    spelled = {normalize("NFC", name): name for name in class_names}
    true_class = normalize("NFC", true_class)
    # A class name may itself contain the separator, so the whole is tried first.
    is_whole = true_class in spelled or not is_multi_label
    names = [true_class] if is_whole else true_class.split(LABEL_SEPARATOR)
    unknown = [name for name in names if name not in spelled]
    if unknown:
        known = ", ".join(class_names)
        received = ", ".join(ascii(name)[:80] for name in unknown)
        raise Problem(
            422,
            f"true_class: expected one of the model's classes ({known}). Received: {received}.",
            expected=f"one of: {known}",
            extra={"classes": list(class_names)},
        )
    return LABEL_SEPARATOR.join(spelled[name] for name in names)
