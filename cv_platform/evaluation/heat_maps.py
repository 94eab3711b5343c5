"""Grad-CAM of a Keras model's mistakes: which part of an image spoke for the class that it named.

Selvaraju et al. (2017), section 3: https://arxiv.org/abs/1610.02391. What is served has its own, in the exported
signature; here a few images are explained where no export exists yet.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

_OPACITY = 0.45


def grad_cam(model: Any, images: np.ndarray) -> np.ndarray | None:
    """Returns `(N, h, w)` float32, 0–1, for the predicted classes; None of a model without a feature map.

    Args:
        model: a Keras model from uint8 images to probabilities.
        images: `(N, H, W, 3)` uint8.
    """
    import keras
    import tensorflow as tf

    maps = [layer.output for layer in model.layers[1:] if len(getattr(layer.output, "shape", ())) == 4]
    if not maps or not len(images):
        return None
    trunk, head = keras.Model(model.input, maps[-1]), keras.Model(maps[-1], model.output)
    values: Any = trunk(tf.convert_to_tensor(images))
    with tf.GradientTape() as tape:
        tape.watch(values)
        score = tf.reduce_sum(tf.math.log(tf.reduce_max(head(values), axis=1) + 1e-30))
    gradients = tape.gradient(score, values)
    weights = tf.reduce_mean(tf.cast(gradients, tf.float32), axis=(1, 2), keepdims=True)
    cam = tf.nn.relu(tf.reduce_sum(weights * tf.cast(values, tf.float32), axis=3))
    return np.asarray(tf.math.divide_no_nan(cam, tf.reduce_max(cam, axis=(1, 2), keepdims=True)))


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Returns an `(H, W, 3)` uint8 RGB image with a `(h, w)` map of 0–1 over it."""
    height, width = image.shape[:2]
    grown = cv2.resize(heat, (width, height), interpolation=cv2.INTER_LINEAR)
    colours = cv2.applyColorMap((grown * 255).astype(np.uint8), cv2.COLORMAP_JET)[..., ::-1]
    return np.clip((1 - _OPACITY) * image + _OPACITY * colours, 0, 255).astype(np.uint8)
