"""Wide depthwise kernels that learn faster: the same numbers as TensorFlow's own gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cv_platform.training.depthwise import MOST_PAIRS, with_fast_kernels


def network(side: int, stride: int, size: int) -> Any:
    import keras

    keras.utils.set_random_seed(3)
    image = keras.Input((side, side + 1, 4))
    kernels = keras.layers.DepthwiseConv2D(size, strides=stride, padding="same", name="kernels")
    return keras.Model(image, keras.layers.ReLU(6.0)(kernels(image)))


def gradients(model: Any, images: np.ndarray, upstream: np.ndarray) -> list[np.ndarray]:
    import tensorflow as tf

    shown = tf.constant(images)
    with tf.GradientTape() as tape:
        tape.watch(shown)
        loss = tf.reduce_sum(model(shown) * upstream)
    sources: Any = [shown, *(variable.value for variable in model.trainable_variables)]
    return [np.asarray(gradient) for gradient in tape.gradient(loss, sources)]


@pytest.mark.parametrize(("side", "stride", "size"), [(6, 1, 5), (6, 2, 5), (5, 2, 5), (2, 1, 5), (5, 1, 7)])
def test_images_kernels_and_biases_have_the_gradients_of_tensorflow(side: int, stride: int, size: int) -> None:
    rng = np.random.default_rng(0)
    plain = network(side, stride, size)
    plain.set_weights([rng.normal(size=weight.shape) for weight in plain.get_weights()])
    fast: Any = with_fast_kernels(plain)
    images = rng.normal(size=(3, side, side + 1, 4)).astype(np.float32)
    upstream = rng.normal(size=plain(images).shape).astype(np.float32)

    assert type(fast.get_layer("kernels")) is not type(plain.get_layer("kernels"))
    assert [variable.path for variable in fast.variables] == [variable.path for variable in plain.variables]
    np.testing.assert_allclose(fast(images), plain(images), atol=1e-5)
    pairs = zip(gradients(fast, images, upstream), gradients(plain, images, upstream), strict=True)
    for received, expected in pairs:
        # Sums of some hundred float32 products.
        np.testing.assert_allclose(received, expected, atol=1e-4)
        assert np.abs(expected).max() > 0.1


def test_narrow_kernels_and_large_maps_are_left_to_tensorflow() -> None:
    side = round(MOST_PAIRS**0.25) + 1
    for model in (network(6, 1, 3), network(side, 1, 5)):
        assert with_fast_kernels(model) is model
