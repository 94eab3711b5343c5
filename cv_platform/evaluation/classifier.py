"""A trained model that answers images: those of a large split in shards, by other machines as well.

Batches are of the same rows whoever predicts them, so that the same probabilities come out, to the bit, of processors
with the same vector instructions; others round otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cv_platform.compute import map_shards
from cv_platform.compute.carried import CarriedFile
from cv_platform.compute.engine import Engine
from cv_platform.compute.rows import Device, RowShard, batch_slices, row_shards
from cv_platform.datasets.packing import PackedSplit
from cv_platform.datasets.shards.reading import Images
from cv_platform.errors import TrainingError
from cv_platform.properties import batch_properties
from cv_platform.records import TrainedModel


@dataclass(frozen=True)
class Classifier:
    """A trained model by its file; each process loads it once.

    Attributes:
        file: of Keras.
        classes: outputs that it has to have.
        device: that it computes on.
    """

    file: CarriedFile
    classes: int
    device: Device

    @classmethod
    def of(cls, trained: TrainedModel) -> Classifier:
        """Returns a model as this process computes it."""
        return cls(CarriedFile.of(trained.keras_path), len(trained.task.class_names), Device.here())

    @property
    def model(self) -> Any:
        """Returns the Keras model.

        Raises:
            TrainingError: see `load_classifier`.
        """
        return _loaded(self)


def load_classifier(keras_path: Path, *, classes: int) -> Any:
    """Loads a Keras model with so many outputs.

    Raises:
        TrainingError: the file is no such model.
    """
    import keras

    try:
        model: Any = keras.models.load_model(keras_path, compile=False)
    except (OSError, ValueError, TypeError) as err:
        raise TrainingError(f"{keras_path}: expected a Keras model. Received: {err}. Train the model again.") from err
    shape = tuple(model.output_shape)
    if len(shape) != 2 or shape[1] != classes:
        raise TrainingError(
            f"{keras_path}: expected a model with {classes} outputs, one per class. Received: output shape {shape}. "
            "Train the model again with this config."
        )
    return model


def predict(model: Any, images: Images) -> np.ndarray:
    """Returns `(N, C)` float32 probabilities of `(N, H, W, 3)` uint8 images, in order."""
    # One compiled call per batch shape (there are at most two); `model.predict` would set up a data adapter as well.
    batches = (np.asarray(images[rows]) for rows in batch_slices(len(images)))
    return np.concatenate([_probabilities(model, batch) for batch in batches])


def predict_split(classifier: Classifier, split: PackedSplit, engine: Engine | None) -> np.ndarray:
    """Predicts every image of a split, in its order.

    Args:
        classifier: the model.
        split: the images.
        engine: whose machines predict what takes long; None: this process alone.

    Returns:
        `(N, C)` float32 probabilities.

    Raises:
        TrainingError: the file is no such model.
    """
    (probabilities,) = _shared_out(predict_rows, classifier, split, engine)
    return probabilities


def answer_split(classifier: Classifier, split: PackedSplit, engine: Engine | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `predict_split` does, and `(N, 7)` float32 pixel statistics, of the same pass.

    Raises:
        TrainingError: as there; or the model gives probabilities that are not finite.
    """
    probabilities, properties = _shared_out(answer_rows, classifier, split, engine)
    broken = int((~np.isfinite(probabilities).all(axis=1)).sum())
    if broken or len(probabilities) != len(split.paths):
        raise TrainingError(
            f"{classifier.file.path}: expected finite probabilities of {len(split.paths)} images. "
            f"Received: {len(probabilities)} rows, {broken} of them not finite. "
            "The training has diverged: lower train.init_lr and train again."
        )
    return probabilities, properties


def predict_rows(classifier: Classifier, shard: RowShard) -> tuple[np.ndarray, ...]:
    """Returns the probabilities of a shard's images."""
    return (np.concatenate([_probabilities(classifier.model, batch) for batch in shard.batches()]),)


def answer_rows(classifier: Classifier, shard: RowShard) -> tuple[np.ndarray, ...]:
    """Returns the probabilities of a shard's images, and their pixel statistics."""
    made = [(_probabilities(classifier.model, batch), batch_properties(batch)) for batch in shard.batches()]
    return tuple(np.concatenate(part) for part in zip(*made, strict=True))


def _shared_out(
    function: Callable[[Classifier, RowShard], tuple[np.ndarray, ...]],
    classifier: Classifier,
    split: PackedSplit,
    engine: Engine | None,
) -> tuple[np.ndarray, ...]:
    parts = map_shards(
        partial(function, classifier),
        row_shards(split.images),
        engine=engine,
        title="Predictions",
        total=len(split.images),
        alone_seconds=classifier.device.alone_seconds(engine),
    )
    return tuple(np.concatenate(part) for part in zip(*(made for _, made in parts), strict=True))


def _probabilities(model: Any, batch: np.ndarray) -> np.ndarray:
    return np.asarray(model.predict_on_batch(batch), dtype=np.float32)


@functools.lru_cache(maxsize=1)
def _loaded(classifier: Classifier) -> Any:
    classifier.device.use()
    with classifier.file.open_path() as path:
        return load_classifier(path, classes=classifier.classes)
