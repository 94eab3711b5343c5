"""Depthwise convolutions whose kernels learn at a fraction of TensorFlow's CPU time, for the time of a training.

oneDNN has no fast gradient by the kernel of a depthwise convolution wider than 3: TensorFlow's own takes as long as the
rest of the layer's work five times over. On a small feature map it is a product of matrices instead: for each channel,
what every pixel of the input has to do with every pixel of the output, of which an element of the kernel is the sum
over the pairs at its offset. The result is the same but for the order of additions. Elsewhere TensorFlow's is taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras

MOST_PAIRS = 10_000
"""Pairs of an input pixel and an output pixel up to which the product is the faster way: maps of 10×10."""


def with_fast_kernels(network: keras.Model) -> keras.Model:
    """Returns the network with the same weights, in which wide depthwise kernels on small maps learn faster.

    On a GPU, which has fast gradients, and where no layer is such a one, it is the network itself. What is trained is
    written and read under the same names; a model that is kept has Keras's own layers again (`fitting`).
    """
    import keras
    import tensorflow as tf

    wide = {layer.name for layer in network.layers if _is_wide(layer)}
    if not wide or tf.config.list_physical_devices("GPU"):
        return network

    # By the name of its class Keras finds a layer in a file of weights.
    class DepthwiseConv2D(keras.layers.DepthwiseConv2D):
        def call(self, inputs: Any) -> Any:
            kernel = tf.convert_to_tensor(self.kernel)
            outputs = tf.nn.bias_add(_convolve(inputs, kernel, self.strides[0]), tf.convert_to_tensor(self.bias))
            return self.activation(outputs)

    def copied(layer: keras.Layer) -> keras.Layer:
        kind = DepthwiseConv2D if layer.name in wide else type(layer)
        return kind.from_config(layer.get_config())

    fast: Any = keras.models.clone_model(network, clone_function=copied)
    fast.set_weights(network.get_weights())
    return fast


def _is_wide(layer: Any) -> bool:
    import keras

    if not isinstance(layer, keras.layers.DepthwiseConv2D) or layer.padding != "same" or not layer.use_bias:
        return False
    is_plain = layer.depth_multiplier == 1 and layer.dilation_rate == (1, 1) and layer.data_format == "channels_last"
    maps: Any = (layer.input, layer.output)
    pairs = int(np.prod([side for shown in maps for side in shown.shape[1:3]]))
    return is_plain and layer.strides[0] == layer.strides[1] and max(layer.kernel_size) > 3 and pairs <= MOST_PAIRS


def _convolve(images: Any, kernel: Any, stride: int) -> Any:
    """Returns what TensorFlow's depthwise convolution does, SAME, of `(N, H, W, C)` and `(k, k, C, 1)`."""
    import tensorflow as tf

    strides = [1, stride, stride, 1]

    @tf.custom_gradient
    def convolve(images: Any, kernel: Any) -> Any:
        def gradients(upstream: Any) -> tuple[Any, Any]:
            by_image = tf.nn.depthwise_conv2d_backprop_input(tf.shape(images), kernel, upstream, strides, "SAME")
            return by_image, _by_kernel(images, upstream, tuple(kernel.shape[:2]), stride)

        return tf.nn.depthwise_conv2d(images, kernel, strides, "SAME"), gradients

    return convolve(images, kernel)


def _by_kernel(images: Any, upstream: Any, size: tuple[int, int], stride: int) -> Any:
    """Returns the gradient by the kernel, `(k, k, C, 1)`."""
    import tensorflow as tf

    (height, width, channels), (rows, columns) = images.shape[1:], upstream.shape[1:3]
    before = tf.transpose(tf.reshape(images, [-1, height * width, channels]), [2, 1, 0])
    after = tf.transpose(tf.reshape(upstream, [-1, rows * columns, channels]), [2, 0, 1])
    pairs = tf.reshape(tf.matmul(before, after), [channels, -1])
    down, across = (_offsets(*sides, stride) for sides in ((height, rows, size[0]), (width, columns, size[1])))
    offsets = np.einsum("yri,xcj->yxrcij", down, across).reshape(-1, size[0] * size[1])
    summed = tf.matmul(tf.constant(offsets, pairs.dtype), pairs, transpose_a=True, transpose_b=True)
    return tf.reshape(summed, [*size, channels, 1])


def _offsets(side: int, steps: int, size: int, stride: int) -> np.ndarray:
    """Returns `(side, steps, size)` 0/1: which element of a kernel meets a place of the input at which step."""
    margin = max((steps - 1) * stride + size - side, 0) // 2
    places, at = np.arange(side)[:, None, None], np.arange(steps)[None, :, None]
    return (places == at * stride + np.arange(size) - margin).astype(np.float32)
