"""What happens to a prediction afterwards: read it again, trace it back, say what it should have been, delete it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Self
from unicodedata import normalize
from uuid import UUID, uuid5

from fastapi import APIRouter, Depends, Header, Path, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from cv_platform.client.answers import DeletionResult, FeedbackResult, Passport, StoredResult
from cv_platform.errors import DatabaseError, ImageError, StorageError
from cv_platform.images import PREPROCESSING_VERSION, decode, preprocessing_version
from cv_platform.predictions import LABEL_SEPARATOR, NONE_OF_THESE
from cv_platform.serving.http.problems import json_response, public_reason, validation_problem
from cv_platform.serving.http.request_facts import facts_of
from cv_platform.serving.log.entry import FeedbackEntry, StoredPrediction
from cv_platform.serving.log.passport import make_passport
from cv_platform.serving.model.explain import BLANK, Explain, draw, is_blank, to_base64
from cv_platform.serving.problem import Problem, client_gone
from cv_platform.serving.routes.answer import OK, result_body
from cv_platform.serving.routes.examples import (
    DELETION_EXAMPLE,
    FEEDBACK_DESCRIPTION,
    FEEDBACK_EXAMPLE,
    PASSPORT_EXAMPLE,
    PREDICTION_ID,
    STORED_EXAMPLE,
    responses,
)
from cv_platform.serving.worker import DELETION_SECONDS, ServingContext
from cv_platform.storage import BundleMetadata

logger = logging.getLogger(__name__)

PredictionId = Annotated[UUID, Path(description="as POST /predict returned it", examples=[PREDICTION_ID])]


class Feedback(BaseModel):
    """The true class of a prediction, or that the image shows none of the model's classes."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={"anyOf": [{"required": ["true_class"]}, {"required": ["none_of_these"]}]},
    )

    true_class: str | None = Field(
        None, min_length=1, max_length=4000, description="one of the model's classes; multi-label: joined by |"
    )
    none_of_these: bool = Field(
        False,
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


_FEEDBACK_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": Feedback.model_json_schema(),
            "example": {"true_class": "1", "source": "page"},
        }
    },
}


async def _said(request: Request) -> Feedback:
    """Reads the body. FastAPI itself would do so before it asks for a key: any stranger's, for as long as it takes."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Problem(
            422, f"Expected JSON. Received: content type {ascii(media_type)[:100]}.", expected="application/json"
        )
    try:
        return Feedback.model_validate_json(await request.body())
    except ClientDisconnect as err:
        raise client_gone() from err
    except ValidationError as err:
        mistakes = err.errors(include_url=False, include_context=False)
        raise validation_problem([{**mistake, "loc": ("body", *mistake["loc"])} for mistake in mistakes]) from err


def feedback_router(context: ServingContext) -> APIRouter:
    """Returns the routes `/feedback/…` and `/predictions/…`."""
    router = APIRouter(tags=["predictions"])
    keyed = [context.guard.api_key]

    @router.post(
        "/feedback/{prediction_id}",
        summary="Say what an image really shows",
        description=FEEDBACK_DESCRIPTION,
        dependencies=keyed,
        openapi_extra={"requestBody": _FEEDBACK_BODY},
        responses={
            **responses(
                FeedbackResult, FEEDBACK_EXAMPLE, 401, 403, 404, 408, 413, 422, 429, 503, description="kept for good"
            ),
            202: {
                "model": FeedbackResult,
                "description": "kept for good; the database is away, so nobody could look for the prediction",
            },
        },
    )
    async def feedback(
        request: Request,
        prediction_id: PredictionId,
        said: Annotated[Feedback, Depends(_said)],
        idempotency_key: Annotated[
            str | None, Header(pattern=r"^[!-~]{1,255}$", description="chosen by you, another for each statement")
        ] = None,
    ) -> Response:
        stored, reason = await _find_or_reason(context, prediction_id)
        if said.true_class is not None:
            named = await _named_by(context, stored, said.true_class)
            said = said.model_copy(update={"true_class": named})
        statement = FeedbackEntry(
            prediction_id=prediction_id,
            true_class=said.kept_class,
            source=said.source,
            created_on=facts_of(request.scope).created_on,
        )
        if idempotency_key is not None:
            statement = replace(statement, entry_id=_id_by_key(statement, idempotency_key))
        if idempotency_key is None or not await context.look_ups.run(
            lambda: _is_repeated(context, statement, idempotency_key)
        ):
            await context.append(statement)
            context.metrics.feedback_received()
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

    @router.get(
        "/predictions/{prediction_id}",
        summary="See a result again",
        description="The fields of POST /predict, with the pictures drawn again, where the image was kept.",
        dependencies=keyed,
        responses=responses(StoredResult, STORED_EXAMPLE, 401, 404, 422, 429, 503, 504, description="the result"),
    )
    async def prediction(prediction_id: PredictionId) -> Response:
        stored = await context.look_ups.run(lambda: _find(context, prediction_id))
        metadata = await _metadata_of(context, stored)
        return json_response(await context.compute(lambda: _result_again(context, stored, metadata)))

    @router.get(
        "/predictions/{prediction_id}/passport",
        summary="Where a result comes from",
        description="Request → model version → training run → dataset version → config.",
        dependencies=keyed,
        responses=responses(Passport, PASSPORT_EXAMPLE, 401, 404, 422, 429, 503, description="the passport"),
    )
    async def passport(prediction_id: PredictionId) -> Response:
        stored = await context.look_ups.run(lambda: _find(context, prediction_id))
        metadata, reason = await context.storage_reads.run(lambda: _metadata(context, stored))
        return json_response(
            make_passport(stored, metadata, mlflow_url=context.settings.mlflow_public_url, reason=reason)
        )

    @router.delete(
        "/predictions/{prediction_id}",
        summary="Delete a result for good",
        description="With what was said of it, and with its image unless another prediction has the same one.",
        dependencies=[context.guard.admin],
        responses=responses(
            DeletionResult, DELETION_EXAMPLE, 401, 403, 404, 408, 413, 422, 429, 503, description="deleted"
        ),
    )
    async def delete_prediction(prediction_id: PredictionId) -> Response:
        delete = context.log.delete_prediction
        if not await context.look_ups.run(lambda: delete(prediction_id), seconds=DELETION_SECONDS):
            raise _unknown(prediction_id, "If it waits on another host, it will not arrive.")
        return json_response({"prediction_id": str(prediction_id), "message": "deleted"})

    return router


def _find(context: ServingContext, prediction_id: UUID) -> StoredPrediction:
    stored = context.find(prediction_id)
    if stored is None:
        raise _unknown(
            prediction_id,
            "It may have been deleted, or wait on another host, whose log has not reached the database yet: then it "
            "arrives, unless it is deleted meanwhile.",
        )
    return stored


async def _find_or_reason(context: ServingContext, prediction_id: UUID) -> tuple[StoredPrediction | None, str]:
    """Returns the prediction, or why nobody can say now whether there is one.

    Raises:
        Problem: 404, there is none.
    """
    try:
        return await context.look_ups.run(lambda: _find(context, prediction_id)), ""
    except DatabaseError as err:
        logger.warning("Prediction %s cannot be looked up: %s", prediction_id, err)
        return None, public_reason(err) or "database unreachable"


def _id_by_key(statement: FeedbackEntry, key: str) -> UUID:
    """Returns the id of a statement with an Idempotency-Key: what is sent twice, to whichever replica, is one row."""
    return uuid5(statement.prediction_id, "\n".join((key, statement.source, statement.true_class)))


def _is_repeated(context: ServingContext, statement: FeedbackEntry, key: str) -> bool:
    """Says whether the log has this statement already.

    Raises:
        Problem: 422, the key came with another statement before.
    """
    try:
        for earlier in context.log.statements(statement.prediction_id):
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


def _unknown(prediction_id: UUID, hint: str) -> Problem:
    return Problem(
        404, f"There is no prediction {prediction_id}. {hint}", expected="a prediction_id that POST /predict returned"
    )


async def _named_by(context: ServingContext, stored: StoredPrediction | None, true_class: str) -> str:
    """Returns `true_class` as the prediction's model spells it.

    Raises:
        Problem: 422, the model has no such class.
    """
    if stored is None:
        # The prediction cannot be looked up, so the classes of the model that serves now have to do.
        model = context.models.current()
        if model is None:
            return true_class
        is_multi_label = model.metadata.classifier_type == "multi-label"
        return _as_named(true_class, model.metadata.class_names, is_multi_label=is_multi_label)
    class_names = list(stored.prediction_json)
    # Only what would be split needs the model's type, which may have to be read from central storage.
    is_multi_label = False
    if true_class not in class_names and LABEL_SEPARATOR in true_class:
        metadata = await _metadata_of(context, stored)
        is_multi_label = (
            metadata.classifier_type == "multi-label"
            if metadata is not None
            else stored.predicted_class not in stored.prediction_json
        )
    return _as_named(true_class, class_names, is_multi_label=is_multi_label)


async def _metadata_of(context: ServingContext, stored: StoredPrediction) -> BundleMetadata | None:
    model = context.models.current()
    metadata = model.metadata if model is not None else None
    if metadata is None or (metadata.model_name, metadata.version) != (stored.model_name, stored.model_version):
        metadata, _ = await context.storage_reads.run(lambda: _metadata(context, stored))
    return metadata


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


def _result_again(
    context: ServingContext, stored: StoredPrediction, metadata: BundleMetadata | None
) -> dict[str, object]:
    pictures, message = None, OK
    if stored.image is None:
        message = "The image was not kept, so there are no pictures."
    elif stored.raw_hm is None:
        message = "There is no heat-map of this prediction."
    else:
        try:
            version = metadata and preprocessing_version(metadata.preprocessing_hash, metadata.image_size)
            limit = context.settings.max_upload_pixels
            with context.decoding(stored.image):
                image = decode(stored.image, max_pixels=limit, version=version or PREPROCESSING_VERSION)
                pictures = draw(image, stored.raw_hm, Explain.JPEG)
            message = BLANK if is_blank(stored.raw_hm) else OK
        except (ImageError, ValueError) as err:
            message = f"The pictures cannot be drawn again: {err}"
        except Problem as err:
            if err.status_code != 413:  # 413: who answered had more memory. Others pass.
                raise
            message = f"The pictures cannot be drawn again: {err.message}"
    names = metadata.class_names if metadata else tuple(stored.prediction_json)
    classifier_type = metadata.classifier_type if metadata else None
    is_single = classifier_type == "multi-class" or stored.predicted_class in stored.prediction_json
    classes = [stored.predicted_class] if is_single else [c for c in stored.predicted_class.split(LABEL_SEPARATOR) if c]
    body = result_body(
        prediction_id=stored.prediction_id,
        model_name=stored.model_name,
        model_version=stored.model_version,
        classifier_type=classifier_type,
        classes=classes,
        # The database sorts the keys its own way; the class order is the model's.
        probabilities={name: stored.prediction_json.get(name) for name in names},
        pictures=pictures,
        cam=stored.raw_hm,
        message=message,
    )
    return {
        **body,
        "original_img": to_base64(pictures.original) if pictures else None,
        "created_on": stored.created_on.isoformat(),
    }


def _metadata(context: ServingContext, stored: StoredPrediction) -> tuple[BundleMetadata | None, str | None]:
    try:
        return context.storage.read_metadata(stored.model_name, stored.model_version), None
    except StorageError as err:
        return None, str(err)
