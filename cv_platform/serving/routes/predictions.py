"""What happens to a prediction afterwards: read it again, trace it back, delete it."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Path
from starlette.responses import Response

from cv_platform.audit import BY_API, AuditLog, Note
from cv_platform.client.answers import DeletionResult, Passport, StoredResult
from cv_platform.errors import ImageError, StorageError
from cv_platform.images import Preprocessing, decode, find_preprocessing
from cv_platform.predictions import LABEL_SEPARATOR
from cv_platform.serving.http.problems import json_response
from cv_platform.serving.http.security import ADMIN, API_KEY
from cv_platform.serving.log.entry import StoredPrediction
from cv_platform.serving.log.passport import make_passport
from cv_platform.serving.model.explain import BLANK, Explain, draw, is_blank, to_base64
from cv_platform.serving.problem import Problem
from cv_platform.serving.routes.answer import OK, Result
from cv_platform.serving.routes.examples import (
    DELETION_EXAMPLE,
    PASSPORT_EXAMPLE,
    PREDICTION_ID,
    STORED_EXAMPLE,
    responses,
)
from cv_platform.serving.routes.parts import Parts, WorkerParts
from cv_platform.storage import BundleMetadata

DELETION_SECONDS = 20.0
"""Longest wait for a deletion, which may wait for entries that are being committed."""
PredictionId = Annotated[UUID, Path(description="as POST /predict returned it", examples=[PREDICTION_ID])]

router = APIRouter(tags=["predictions"])


@router.get(
    "/predictions/{prediction_id}",
    summary="See a result again",
    description="The fields of POST /predict, with the pictures drawn again, where the image was kept.",
    dependencies=[API_KEY],
    responses=responses(StoredResult, STORED_EXAMPLE, 401, 404, 422, 429, 503, 504, description="the result"),
)
async def prediction(parts: Parts, prediction_id: PredictionId) -> Response:
    """Returns a result again."""
    stored = await parts.calls.look_ups.run(lambda: find(parts, prediction_id))
    metadata = await metadata_of(parts, stored)
    return json_response(await parts.admission.compute(lambda: result_again(parts, stored, metadata)))


@router.get(
    "/predictions/{prediction_id}/passport",
    summary="Where a result comes from",
    description="Request → model version → training run → dataset version → config.",
    dependencies=[API_KEY],
    responses=responses(Passport, PASSPORT_EXAMPLE, 401, 404, 422, 429, 503, description="the passport"),
)
async def passport(parts: Parts, prediction_id: PredictionId) -> Response:
    """Returns where a result comes from."""
    stored = await parts.calls.look_ups.run(lambda: find(parts, prediction_id))
    metadata, reason = await parts.calls.storage_reads.run(lambda: _metadata(parts, stored))
    return json_response(make_passport(stored, metadata, mlflow_url=parts.settings.mlflow_public_url, reason=reason))


@router.delete(
    "/predictions/{prediction_id}",
    summary="Delete a result for good",
    description="With what was said of it, and with its image unless another prediction has the same one.",
    dependencies=[ADMIN],
    responses=responses(
        DeletionResult, DELETION_EXAMPLE, 401, 403, 404, 408, 413, 422, 429, 503, description="deleted"
    ),
)
async def delete_prediction(parts: Parts, prediction_id: PredictionId) -> Response:
    """Deletes a result."""
    delete = parts.log.opened.delete_prediction
    audit = AuditLog(parts.storage.url)
    subject = f"{parts.settings.service_name}: prediction {prediction_id}"
    await parts.calls.storage_reads.run(lambda: audit.write("delete", subject, Note(BY_API)))
    if not await parts.calls.look_ups.run(lambda: delete(prediction_id), seconds=DELETION_SECONDS):
        raise _unknown(prediction_id, "If it waits on another host, it will not arrive.")
    return json_response({"prediction_id": str(prediction_id), "message": "deleted"})


def find(parts: WorkerParts, prediction_id: UUID) -> StoredPrediction:
    """Returns a prediction from a spool of this host or from the database; both may hang: call it by `look_ups`.

    Raises:
        Problem: 404, there is none.
        DatabaseError: it is in no spool, and the database cannot be asked.
    """
    stored = parts.log.find(prediction_id)
    if stored is None:
        raise _unknown(
            prediction_id,
            "It may have been deleted, or wait on another host, whose log has not reached the database yet: then it "
            "arrives, unless it is deleted meanwhile.",
        )
    return stored


def _unknown(prediction_id: UUID, hint: str) -> Problem:
    return Problem(
        404, f"There is no prediction {prediction_id}. {hint}", expected="a prediction_id that POST /predict returned"
    )


async def metadata_of(parts: WorkerParts, stored: StoredPrediction) -> BundleMetadata | None:
    """Returns the metadata of the model that made a prediction; None where they are gone or cannot be read."""
    model = parts.models.current()
    metadata = model.metadata if model is not None else None
    if metadata is None or (metadata.model_name, metadata.version) != (stored.model_name, stored.model_version):
        metadata, _ = await parts.calls.storage_reads.run(lambda: _metadata(parts, stored))
    return metadata


def result_again(parts: WorkerParts, stored: StoredPrediction, metadata: BundleMetadata | None) -> dict[str, object]:
    """Returns an answer as JSON has it, with its pictures drawn again."""
    pictures, message = None, OK
    if stored.image is None:
        message = "The image was not kept, so there are no pictures."
    elif stored.raw_hm is None:
        message = "There is no heat-map of this prediction."
    else:
        try:
            made = metadata and find_preprocessing(metadata.preprocessing_hash, metadata.image_size)
            limit = parts.settings.max_upload_pixels
            with parts.admission.decoding(stored.image):
                image = decode(stored.image, max_pixels=limit, preprocessing=made or Preprocessing())
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
    result = Result(
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
        **result.fields(),
        "original_img": to_base64(pictures.original) if pictures else None,
        "created_on": stored.created_on.isoformat(),
    }


def _metadata(parts: WorkerParts, stored: StoredPrediction) -> tuple[BundleMetadata | None, str | None]:
    try:
        return parts.storage.read_metadata(stored.model_name, stored.model_version), None
    except StorageError as err:
        return None, str(err)
