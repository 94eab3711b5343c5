"""Labelling: what is asked, what a labeller says, and how far labellers agree. The page `/labelling` is their client.

All of it needs a labeller's key or the admin token, which says whose the label is: nothing in a request does.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Query
from starlette.responses import Response

from cv_platform.errors import BundleNotFoundError
from cv_platform.serving.http.problems import json_response
from cv_platform.serving.http.security import Labeller
from cv_platform.serving.log import labels
from cv_platform.serving.log.labels import Mode, Wish
from cv_platform.serving.problem import Problem
from cv_platform.serving.routes.feedback import Feedback, named_by, said
from cv_platform.serving.routes.parts import Parts
from cv_platform.serving.routes.predictions import PredictionId, find, metadata_of, result_again

LABELS_PATH = "/labels"
_MOST, _MOST_PASSED = 60, 100

router = APIRouter(include_in_schema=False, prefix=LABELS_PATH)


@router.get("")
async def waiting(
    parts: Parts,
    labeller: Labeller,
    mode: Annotated[Mode, Query()] = "queue",
    limit: Annotated[int, Query(ge=1, le=_MOST)] = 12,
    passed: Annotated[tuple[UUID, ...], Query(max_length=_MOST_PASSED)] = (),
) -> Response:
    """Returns the next images for this labeller, without those that were `passed`; how many wait, and the classes."""
    model = parts.models.current()
    if model is None:
        raise BundleNotFoundError("Expected a model, whose classes are the labels. Received: none. Deploy one.")
    metadata = model.metadata
    engine, wish = parts.log.opened.database, Wish(labeller, metadata, passed)
    found, count = await parts.calls.look_ups.run(lambda: labels.tasks(engine(), wish, mode, limit=limit))
    return json_response(
        {
            "labeller": labeller,
            "mode": mode,
            "tasks": [task.fields() for task in found],
            "waiting": count,
            "class_names": list(metadata.class_names),
            "classifier_type": metadata.classifier_type,
        }
    )


@router.get("/agreement")
async def agreement(parts: Parts, labeller: Labeller) -> Response:
    """Returns how many images each labeller has labelled, and how far each two of them agree."""
    del labeller
    engine = parts.log.opened.database
    counts, pairs = await parts.calls.look_ups.run(lambda: labels.agreement(engine()))
    return json_response({"images": counts, "pairs": [asdict(pair) for pair in pairs]})


@router.get("/{prediction_id}")
async def task(parts: Parts, labeller: Labeller, prediction_id: PredictionId) -> Response:
    """Returns an answer again, with its pictures, as `GET /predictions/{id}` does."""
    del labeller
    stored = await parts.calls.look_ups.run(lambda: find(parts, prediction_id))
    metadata = await metadata_of(parts, stored)
    return json_response(await parts.admission.compute(lambda: result_again(parts, stored, metadata)))


@router.post("/{prediction_id}")
async def label(
    parts: Parts,
    labeller: Labeller,
    prediction_id: PredictionId,
    stated: Annotated[Feedback, Depends(said)],
) -> Response:
    """Keeps what the labeller says that an image shows."""
    if "source" in stated.model_fields_set:
        raise Problem(422, "A label's source is its labeller.", expected="true_class, or none_of_these: true, alone")
    stored = await parts.calls.look_ups.run(lambda: find(parts, prediction_id))
    true_class = stated.kept_class
    if stated.true_class is not None:
        true_class = await named_by(parts, stored, stated.true_class)
    engine = parts.log.opened.database
    if not await parts.calls.look_ups.run(lambda: labels.add_label(engine(), prediction_id, labeller, true_class)):
        raise Problem(
            404,
            f"Prediction {prediction_id} is not in the database: deleted meanwhile, or not there yet.",
            expected="a prediction that GET /labels has named",
        )
    parts.metrics.feedback.inc()
    return json_response({"prediction_id": str(prediction_id), "true_class": true_class, "labeller": labeller})


@router.delete("/{prediction_id}")
async def withdraw(parts: Parts, labeller: Labeller, prediction_id: PredictionId) -> Response:
    """Takes this labeller's latest label on a prediction back."""
    engine = parts.log.opened.database
    if not await parts.calls.look_ups.run(lambda: labels.withdraw_label(engine(), prediction_id, labeller)):
        raise Problem(404, "There is no label of yours to take back.", expected="a prediction that you have labelled")
    return json_response({"prediction_id": str(prediction_id), "message": "withdrawn"})


@router.post("/{prediction_id}/skip")
async def skip(parts: Parts, labeller: Labeller, prediction_id: PredictionId) -> Response:
    """Asks this labeller about an image of the queue no more."""
    engine = parts.log.opened.database
    is_queued = await parts.calls.look_ups.run(lambda: labels.skip(engine(), prediction_id, labeller))
    return json_response({"prediction_id": str(prediction_id), "message": "skipped" if is_queued else "not queued"})
