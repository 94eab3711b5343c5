"""Runs an exported SavedModel: the only module of the service that imports TensorFlow, and only when a model is loaded.

https://www.tensorflow.org/guide/saved_model
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cv_platform.errors import CorruptBundleError
from cv_platform.serving.model.runtime import Prediction

logger = logging.getLogger(__name__)

ENDPOINT = "serve"
"""Name of the combined signature: images and class indices in; probabilities, features, uae and cam out."""


class TensorFlowRuntime:
    """One SavedModel's combined signature as a plain function on arrays; safe to call from many threads.

    Args:
        saved_model: the SavedModel's folder.
        threads: of one call; ignored when this process has run TensorFlow before, whose pools are made once.

    Raises:
        CorruptBundleError: the folder is no SavedModel with the combined signature.
    """

    def __init__(self, saved_model: Path, *, threads: int | None = None) -> None:
        import tensorflow

        tf: Any = tensorflow  # It has no types that a checker could follow.
        _prepare_process(tf, threads)
        try:
            self._loaded: Any = tf.saved_model.load(str(saved_model))
            self._serve: Any = self._loaded.signatures[ENDPOINT]
        # TensorFlow answers broken files with errors of many unrelated classes.
        except Exception as err:
            raise CorruptBundleError(
                f"{saved_model}: expected a SavedModel with the signature {ENDPOINT!r}. "
                f"Received: {_first_line(err)}. Export the model again."
            ) from err
        self._constant: Any = tf.constant
        self._int32: Any = tf.int32
        self._errors: type[Exception] = tf.errors.OpError

    def __call__(self, images: NDArray[np.uint8], class_index: NDArray[np.int32]) -> Prediction:
        """Answers `(N, H, W, 3)` uint8 RGB images, explaining the classes `(N,)` int32.

        Raises:
            ValueError: the model refuses the shapes.
        """
        try:
            out = self._serve(images=self._constant(images), class_index=self._constant(class_index, dtype=self._int32))
        except self._errors as err:
            raise ValueError(f"Expected images that the model takes. Received: {_first_line(err)}") from err
        return Prediction(out["probabilities"].numpy(), out["features"].numpy(), out["uae"].numpy(), out["cam"].numpy())


def _prepare_process(tf: Any, threads: int | None) -> None:
    """Sets what must be set before TensorFlow's first operation."""
    try:
        if threads is not None:
            tf.config.threading.set_intra_op_parallelism_threads(threads)
            tf.config.threading.set_inter_op_parallelism_threads(threads)
        for gpu in tf.config.list_physical_devices("GPU"):
            # Several workers share a GPU; the first would take all of its memory otherwise.
            tf.config.experimental.set_memory_growth(gpu, True)
    except RuntimeError:
        logger.debug("TensorFlow runs already in this process: its threads and devices stay as they are.")


def _first_line(err: Exception) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[0][:300]
