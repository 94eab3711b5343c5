"""From Keras to ONNX: the combined signature, or the classifier alone; what does not convert is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cv_platform.deployment.signature import plain_signature
from cv_platform.encoders.to_onnx import to_onnx
from cv_platform.errors import ExportError

logger = logging.getLogger(__name__)


def write_onnx(model: Any, uae: Any, path: Path) -> None:
    """Writes classifier, encoder and Grad-CAM as one graph of standard operators, N dynamic, weights inside.

    Args:
        model: Keras classifier, see `signature.plain_signature`.
        uae: Keras encoder of the same images.
        path: the file.

    Raises:
        ExportError: the head has no plain form, or a layer does not convert.
    """
    import tensorflow as tf

    asked = tf.TensorSpec((None,), tf.int32, name="class_index")
    _convert(plain_signature(model, uae), [_images(model), asked], path)


def write_classifier(model: Any, path: Path) -> None:
    """Writes the classifier alone: `images` uint8 `(N, H, W, 3)` to `probabilities` float32 `(N, C)`.

    Raises:
        ExportError: a layer does not convert.
    """
    _convert(lambda images: {"probabilities": model(images, training=False)}, [_images(model)], path)


def _images(model: Any) -> Any:
    import tensorflow as tf

    return tf.TensorSpec((None, *(int(side) for side in model.input_shape[1:])), tf.uint8, name="images")


def _convert(function: Callable[..., dict[str, Any]], signature: list[Any], path: Path) -> None:
    try:
        model = to_onnx(function, signature)
    except ValueError as err:
        raise ExportError(str(err)) from err
    path.write_bytes(model.SerializeToString())
    logger.info("Converted to ONNX: %d nodes, %.1f MB", len(model.graph.node), path.stat().st_size / 1e6)
