"""One ordered pass over images that gives everything drift detection compares: probabilities, features, UAE embedding.

Three passes over a reshuffling dataset gave rows whose parts belong to different images; here the parts of row i come
out of one call on image i.
"""

# Keras and TensorFlow come without complete types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from cv_platform.compute.carried import CarriedFile
from cv_platform.compute.rows import Device
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
    said = KerasAnswer.of(keras_path, uae_path)
    parts = [tuple(np.empty((0, width), np.float32) for width in said.widths), *map(said, images_batches)]
    probabilities, features, uae = (np.concatenate(part) for part in zip(*parts, strict=True))
    require_finite(probabilities, features, uae)
    return probabilities, features, uae


@dataclass(frozen=True)
class KerasAnswer:
    """What model and encoder say of images, in one call; each process loads them once.

    Attributes:
        classifier, encoder: files, see `extract`.
        device: that they compute on.
    """

    classifier: CarriedFile
    encoder: CarriedFile
    device: Device

    @classmethod
    def of(cls, keras_path: Path, uae_path: Path) -> KerasAnswer:
        """Returns the answer by two files, as this process computes it."""
        return cls(CarriedFile.of(keras_path), CarriedFile.of(uae_path), Device.here())

    @property
    def widths(self) -> tuple[int, ...]:
        """Returns C, F and D, see `extract`."""
        return _combined(self)[1]

    def __call__(self, images: NDArray[np.uint8]) -> tuple[Float32Matrix, Float32Matrix, Float32Matrix]:
        """Returns `(n, C)`, `(n, F)` and `(n, D)` float32 of `(n, H, W, 3)` uint8; see `extract`.

        Raises:
            InvalidModelError: a model lacks its layers, or the two take images of different sizes.
        """
        import tensorflow as tf

        run, _ = _combined(self)
        outputs = run(tf.convert_to_tensor(np.ascontiguousarray(images)))
        probabilities, features, uae = (np.asarray(output, dtype=np.float32) for output in outputs)
        return probabilities, features, uae


def require_finite(probabilities: Float32Matrix, features: Float32Matrix, uae: Float32Matrix) -> None:
    """Refuses what a diverged model says.

    Raises:
        InvalidModelError: an output is not finite.
    """
    for name, array in ((PROBABILITIES_LAYER, probabilities), (FEATURES_LAYER, features), (UAE_LAYER, uae)):
        broken = np.flatnonzero(~np.isfinite(array).all(axis=1))
        if broken.size:
            raise InvalidModelError(
                f"Expected finite outputs. Received: {broken.size} of {len(array)} images with {name} that are not "
                f"(first: image {broken[0]}). The model has diverged: train it again."
            )


@functools.lru_cache(maxsize=1)
def _combined(answer: KerasAnswer) -> tuple[Any, tuple[int, ...]]:
    """Returns the compiled call of both, and the widths of its outputs."""
    import keras
    import tensorflow as tf

    answer.device.use()
    keras_path, uae_path = answer.classifier.path, answer.encoder.path
    with answer.classifier.open_path() as one, answer.encoder.open_path() as other:
        classifier, encoder = load_model(one), load_model(other)
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

    def run(images: Any) -> Any:
        return combined(images, training=False)

    return tf.function(run, input_signature=signature), tuple(int(output.shape[-1]) for output in outputs)


def _layer(model: keras.Model, name: str) -> Any:
    try:
        return model.get_layer(name)
    except ValueError as err:
        layers = ", ".join(layer.name for layer in model.layers[-5:])
        raise InvalidModelError(
            f'Expected a model with a layer "{name}". Received: {model.name}, which ends in {layers}. '
            'Name the penultimate layer "features" and the output "probabilities".'
        ) from err
