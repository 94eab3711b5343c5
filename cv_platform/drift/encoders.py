"""The untrained autoencoder's encoder (UAE): a seeded random convolutional embedding, made once per model version.

Random features of the pixels see shifts that the classifier has learned to ignore (Rabanser et al. 2019, "Failing
Loudly", arXiv 1810.11953, section 3.1). Rows embedded by different encoders are never comparable, so each encoder has a
hash over its weights, which reference data and bundles carry.
"""

# Keras comes without complete types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras

UAE_LAYER = "uae"
_FILTERS = (16, 32, 64)
_LARGEST_MAP_PX = 4


def build_uae(image_size: tuple[int, int], dims: int, seed: int) -> keras.Model:
    """Makes the encoder: the same weights for the same arguments, on any machine.

    Args:
        image_size: (height, width) in pixels.
        dims: width D of the embedding.
        seed: of the weights.

    Returns:
        A model from `(N, H, W, 3)` uint8 RGB, 0–255, to `(N, D)` float32, output layer "uae". Scaling is its first
        layer; it has no Lambda, so that it loads in Keras' safe mode.
    """
    import keras

    def glorot(layer: int) -> Any:
        return keras.initializers.GlorotUniform(seed=seed * 10 + layer)

    height, width = image_size
    # float32 whatever the global policy: reference and serving must agree.
    image: Any = keras.Input((height, width, 3), dtype="uint8", name="image")
    x: Any = keras.layers.Rescaling(1 / 255, dtype="float32", name="uae_rescaling")(image)
    for index, filters in enumerate(_FILTERS):
        x = keras.layers.Conv2D(
            filters,
            4,
            strides=2,
            padding="same",
            activation="relu",
            kernel_initializer=glorot(index),
            dtype="float32",
            name=f"uae_conv{index + 1}",
        )(x)
    # Photos would otherwise end in a dense layer of tens of millions of random weights.
    pool = tuple(math.ceil(math.ceil(side / 2 ** len(_FILTERS)) / _LARGEST_MAP_PX) for side in image_size)
    if max(pool) > 1:
        x = keras.layers.AveragePooling2D(pool, padding="same", dtype="float32", name="uae_pool")(x)
    x = keras.layers.Flatten(dtype="float32", name="uae_flatten")(x)
    x = keras.layers.Dense(
        dims,
        kernel_initializer=glorot(len(_FILTERS)),
        dtype="float32",
        name=UAE_LAYER,
    )(x)
    return keras.Model(image, x, name="uae_encoder")


def encoder_hash(model: keras.Model) -> str:
    """Returns 16 hex digits over an encoder's input shape and weights: other digits mean other embeddings."""
    digest = hashlib.sha256(repr(tuple(model.input_shape)).encode())
    for weights in model.get_weights():
        array = np.ascontiguousarray(weights)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
