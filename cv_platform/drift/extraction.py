"""One ordered pass over images that gives everything drift detection compares: probabilities, features, UAE embedding.

Three passes over a reshuffling dataset gave rows whose parts belong to different images; here the parts of row i come
out of one call on image i.
"""

# Keras and TensorFlow come without complete types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from cv_platform.drift.encoders import UAE_LAYER
from cv_platform.drift.sample import Float32Matrix
from cv_platform.errors import InvalidModelError

if TYPE_CHECKING:
    import keras

PROBABILITIES_LAYER = "probabilities"
FEATURES_LAYER = "features"


def load_model(path: Path) -> keras.Model:
    """Loads a `.keras` file for inference, in safe mode: no code of the file is run.

    Raises:
        InvalidModelError: the file is missing or is no such model.
    """
    import keras

    try:
        return cast("keras.Model", keras.models.load_model(path, compile=False, safe_mode=True))
    except (OSError, ValueError, TypeError, KeyError) as err:
        raise InvalidModelError(
            f"Expected a Keras model at {path} that loads in safe mode. Received: {err}. Train or export it again."
        ) from err


def extract(
    keras_path: Path, uae_path: Path, images_batches: Iterable[NDArray[np.uint8]]
) -> tuple[Float32Matrix, Float32Matrix, Float32Matrix]:
    """Runs model and encoder over images, once, in order.

    Args:
        keras_path: the classifier, with layers "features" and "probabilities".
        uae_path: the encoder of `build_uae`.
        images_batches: batches `(n, H, W, 3)` uint8 RGB, 0–255, of any sizes.

    Returns:
        Probabilities `(N, C)`, features `(N, F)` and UAE embedding `(N, D)`, float32; row i belongs to image i.

    Raises:
        InvalidModelError: a model lacks its layers, the two take images of different sizes, or an output is not finite.
    """
    import keras
    import tensorflow as tf

    classifier, encoder = load_model(keras_path), load_model(uae_path)
    if classifier.input_shape != encoder.input_shape:
        raise InvalidModelError(
            f"Expected one image size. Received: {classifier.input_shape} in {keras_path.name} "
            f"and {encoder.input_shape} in {uae_path.name}. Build the drift detectors of this model version again."
        )
    outputs = [
        _layer(classifier, PROBABILITIES_LAYER).output,
        _layer(classifier, FEATURES_LAYER).output,
        encoder(classifier.inputs[0]),
    ]
    combined = keras.Model(classifier.inputs, outputs)
    signature = [tf.TensorSpec((None, *classifier.input_shape[1:]), tf.uint8)]  # One trace, whatever the batch's size.

    def answer(images: Any) -> Any:
        return combined(images, training=False)

    run: Any = tf.function(answer, input_signature=signature)
    parts: tuple[list[Float32Matrix], ...] = tuple(
        [np.empty((0, int(output.shape[-1])), dtype=np.float32)] for output in outputs
    )
    for images in images_batches:
        for part, output in zip(parts, run(tf.convert_to_tensor(np.ascontiguousarray(images))), strict=True):
            part.append(np.asarray(output, dtype=np.float32))
    probabilities, features, uae = (np.concatenate(part) for part in parts)
    for name, array in ((PROBABILITIES_LAYER, probabilities), (FEATURES_LAYER, features), (UAE_LAYER, uae)):
        broken = np.flatnonzero(~np.isfinite(array).all(axis=1))
        if broken.size:
            raise InvalidModelError(
                f"Expected finite outputs. Received: {broken.size} of {len(array)} images with {name} that are not "
                f"(first: image {broken[0]}). The model has diverged: train it again."
            )
    return probabilities, features, uae


def _layer(model: keras.Model, name: str) -> Any:
    try:
        return model.get_layer(name)
    except ValueError as err:
        layers = ", ".join(layer.name for layer in model.layers[-5:])
        raise InvalidModelError(
            f'Expected a model with a layer "{name}". Received: {model.name}, which ends in {layers}. '
            'Name the penultimate layer "features" and the output "probabilities".'
        ) from err
