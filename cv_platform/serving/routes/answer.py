"""From the bytes of an upload to the answer that a client gets and the entry that the log keeps.

All of it runs in a worker's thread. Decoding happens once: the decoded image is resized for the model exactly as
`images.preprocess` does, and is what the pictures are drawn on.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from cv_platform.config import ClassifierType
from cv_platform.images import read_image, resize, seen_box
from cv_platform.predictions import LABEL_SEPARATOR
from cv_platform.properties import image_properties
from cv_platform.serving.log.entry import LogEntry
from cv_platform.serving.model.explain import (
    BLANK,
    Explain,
    Pictures,
    draw,
    is_blank,
    map_of_whole,
    small_map,
    to_base64,
)
from cv_platform.serving.model.probation import LiveProbation
from cv_platform.serving.model.runtime import LoadedModel, Prediction, predicted_classes
from cv_platform.serving.random_ids import new_id
from cv_platform.serving.telemetry.observation import RequestFacts, note_prediction, staged
from cv_platform.storage import BundleMetadata

logger = logging.getLogger(__name__)

OK = "ok"
SAMPLED_SHARE = 10
"""With `log_images = sampled`, one upload in so many is kept, chosen by its sha256: the same image always or never."""


@dataclass(frozen=True)
class Predicted:
    """One upload that a model has answered.

    Attributes:
        prediction_id: UUIDv4; whoever knows it may see the result again.
        model: metadata of the model that answered.
        prediction: its outputs.
        predicted_classes: one class name, or for multi-label any number.
        pixels: `(height, width, 3)` uint8 RGB, the preprocessed image.
        image: `(H, W, 3)` uint8 RGB, the decoded upload.
        media_type: of the upload.
        unknown_score: see `UnknownRule.score`; None where the model has no rule.
    """

    prediction_id: UUID
    model: BundleMetadata
    prediction: Prediction
    predicted_classes: tuple[str, ...]
    pixels: NDArray[np.uint8]
    image: NDArray[np.uint8]
    media_type: str
    unknown_score: float | None = None

    @functools.cached_property
    def properties(self) -> NDArray[np.float32]:
        """Returns `(7,)`, see `image_properties`, when it is first asked for."""
        return image_properties(self.pixels)


@dataclass(frozen=True)
class Result:
    """What a client is told of a prediction, the same whether it is fresh or read back."""

    prediction_id: UUID
    model_name: str
    model_version: str
    classifier_type: ClassifierType | None
    classes: Sequence[str]
    probabilities: Mapping[str, float | None]
    pictures: Pictures | None
    cam: NDArray[np.float32] | None
    message: str
    unknown_score: float | None = None

    def fields(self) -> dict[str, Any]:
        """Returns it ready for JSON."""
        pictures = self.pictures
        return {
            "prediction_id": str(self.prediction_id),
            "model_name": self.model_name,
            "model_version": self.model_version,
            "classifier_type": self.classifier_type,
            "predicted_class": LABEL_SEPARATOR.join(self.classes),
            "predicted_classes": list(self.classes),
            "prediction": {name: _number(p) for name, p in self.probabilities.items()},
            "overlaid_img": to_base64(pictures.overlaid) if pictures else None,
            "raw_hm_img": to_base64(pictures.raw_heat_map) if pictures else None,
            "media_type": pictures.media_type if pictures else None,
            "cam": None if self.cam is None else small_map(self.cam),
            "is_unknown": None if self.unknown_score is None else self.unknown_score > 1,
            "unknown_score": _number(self.unknown_score),
            "message": self.message,
        }


def predict_upload(
    model: LoadedModel, data: bytes, *, max_pixels: int, probation: LiveProbation | None = None
) -> Predicted:
    """Predicts one upload.

    Args:
        model: the model to ask; the caller's own reference, so that a swap cannot change it half-way.
        data: the upload.
        max_pixels: largest height × width, judged before decoding.
        probation: of a challenger that may be drawn for it.

    Raises:
        ImageError: the upload is no usable image.
    """
    prediction_id = new_id()
    if probation is None:
        return _predict(model, prediction_id, data, max_pixels)
    return probation.ask(prediction_id, model, data, lambda asked: _predict(asked, prediction_id, data, max_pixels))


def _predict(model: LoadedModel, prediction_id: UUID, data: bytes, max_pixels: int) -> Predicted:
    metadata = model.metadata
    with staged("decode"):
        made = model.preprocessing
        decoded = read_image(data, max_pixels=max_pixels, preprocessing=made)
        pixels = resize(decoded.pixels, metadata.image_size, framing=made.framing)
    with staged("model"):
        prediction = model.predict(pixels)
        if made.framing != "stretch":
            box = seen_box(decoded.pixels.shape, metadata.image_size, made.framing)
            prediction = replace(prediction, cam=map_of_whole(prediction.cam, decoded.pixels.shape, box))
        rule = model.unknown
        unknown_score = None if rule is None else float(rule.score(prediction.features[np.newaxis])[0])
    classes = predicted_classes(prediction.probabilities, metadata)
    note_prediction(
        prediction_id,
        metadata.model_name,
        metadata.version,
        classes,
        float(prediction.probabilities.max()),
        is_unknown=unknown_score is not None and unknown_score > 1,
    )
    media_type = f"image/{decoded.format.lower()}"
    return Predicted(prediction_id, metadata, prediction, classes, pixels, decoded.pixels, media_type, unknown_score)


def answer_body(predicted: Predicted, explain: Explain, *, on_explain_failure: Callable[[], None]) -> dict[str, Any]:
    """Returns what the client gets, ready for JSON; a failing explanation costs the pictures, nothing else.

    Args:
        predicted: the prediction.
        explain: what to add to the probabilities.
        on_explain_failure: is called when there are no pictures although they were asked for; `message` says so, too.
    """
    metadata, prediction = predicted.model, predicted.prediction
    message = BLANK if explain is not Explain.NONE and is_blank(prediction.cam) else OK
    pictures: Pictures | None = None
    if explain.media_type is not None:
        try:
            with staged("explain"):
                pictures = draw(predicted.image, prediction.cam, explain)
        # Whatever drawing meets: the prediction is already there, and it is what was asked for.
        except Exception as err:
            logger.exception(
                "A prediction of %s %s goes out without its pictures", metadata.model_name, metadata.version
            )
            on_explain_failure()
            message = f"The prediction is complete, but its pictures could not be drawn ({type(err).__name__})."
    result = Result(
        prediction_id=predicted.prediction_id,
        model_name=metadata.model_name,
        model_version=metadata.version,
        classifier_type=metadata.classifier_type,
        classes=predicted.predicted_classes,
        probabilities=dict(zip(metadata.class_names, (float(p) for p in prediction.probabilities), strict=True)),
        pictures=pictures,
        cam=prediction.cam if explain is Explain.CAM else None,
        message=message,
        unknown_score=predicted.unknown_score,
    )
    return result.fields()


def _number(probability: float | None) -> float | None:
    """Seven digits are what a float32 holds; JSON has no word for what is no number."""
    return None if probability is None or not math.isfinite(probability) else float(f"{probability:.7g}")


def log_entry(
    predicted: Predicted, data: bytes, facts: RequestFacts, *, url: str, keep_images: Literal["all", "sampled", "none"]
) -> LogEntry:
    """Returns the log entry of a prediction whose answer is still to be made: `BegunEntry.settle` completes it."""
    prediction = predicted.prediction
    return LogEntry(
        request_method="POST",
        request_url=url,
        response_status_code=200,
        response_message=OK,
        timespan=facts.seconds(),
        created_on=facts.created_on,
        client=facts.client,
        tag=facts.tag,
        network=facts.network,
        model_name=predicted.model.model_name,
        model_version=predicted.model.version,
        prediction_id=predicted.prediction_id,
        predicted_class=LABEL_SEPARATOR.join(predicted.predicted_classes),
        prediction_json={
            name: float(p) for name, p in zip(predicted.model.class_names, prediction.probabilities, strict=True)
        },
        uae_feats=prediction.uae,
        bbsd_feats=prediction.probabilities,
        features=prediction.features,
        properties=predicted.properties,
        raw_hm=prediction.cam,
        image=data if _is_kept(data, keep_images) else None,
        media_type=predicted.media_type,
    )


def _is_kept(data: bytes, keep_images: Literal["all", "sampled", "none"]) -> bool:
    if keep_images == "sampled":
        return hashlib.sha256(data).digest()[0] * SAMPLED_SHARE < 256
    return keep_images == "all"
