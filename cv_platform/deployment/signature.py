"""The combined signature of a bundle, written twice: with a gradient tape, and as forward products alone.

    serve(images uint8 (N, H, W, 3), class_index int32 (N,)) ->
        probabilities (N, C), features (N, F), uae (N, D), cam (N, h, w), all float32

Grad-CAM (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391, section 3) is part of it, in the guided form of the
system that users know: with the last feature map f and g = ∂score/∂f, a channel's weight is the mean over space of
relu(g)·[f > 0]; the map is relu of the weighted sum, scaled to 0–1 per image.

Behind a global pooling the gradient has a closed form. With d = ∂score/∂(pooled f), found by a few products with the
transposed kernels of the dense layers, g is d/(h·w) everywhere for average pooling, and d, shared by the largest cells,
for max-pooling. So a channel's weight is relu(d) times the share of cells with f > 0, or relu(d)·[max f > 0], but for a
factor that the scaling cancels. Such a graph needs no gradient operator, which ONNX Runtime does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cv_platform.errors import ExportError

Signature = Callable[[Any, Any], dict[str, Any]]
"""`serve(images, class_index)` on TensorFlow tensors."""


def tape_signature(model: Any, uae: Any) -> Signature:
    """Returns the signature whose map comes from TensorFlow's gradient through the head; any head will do.

    Args:
        model: Keras classifier with the layers "features" and "probabilities".
        uae: Keras encoder of the same images.

    Raises:
        ExportError: there is no feature map to explain, or the output layer is of another kind.
    """
    import tensorflow as tf

    split = _split(model, [])

    def serve(images: Any, class_index: Any) -> dict[str, Any]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            feature_map = split.body(images, training=False)
            tape.watch(feature_map)
            (features, head_input, probabilities) = split.tail(feature_map)
            logits = split.logits(head_input)
        direction = _direction(logits, probabilities, class_index, split.activation)
        gradient = tape.gradient(logits, feature_map, output_gradients=direction)
        values = tf.cast(feature_map, tf.float32)
        guided = tf.nn.relu(tf.cast(gradient, tf.float32)) * tf.cast(values > 0, tf.float32)
        weights = tf.reduce_mean(guided, axis=(1, 2))
        return _answers(probabilities, features, uae(images, training=False), _heat_map(values, weights))

    return serve


def plain_signature(model: Any, uae: Any) -> Signature:
    """Returns the same signature without a gradient operator, for a head of global pooling and dense layers.

    Args:
        model: see `tape_signature`.
        uae: see `tape_signature`.

    Raises:
        ExportError: as `tape_signature`, or the head is of another kind; the message names the layer.
    """
    import keras
    import tensorflow as tf

    feature_map_tensor = _feature_map(model)
    chain = _head_chain(model, feature_map_tensor)
    pooling = chain.pop()
    slopes = [_slope(layer) for layer in chain]
    split = _split(model, [layer.output for layer in chain])
    output_layer = model.get_layer("probabilities")

    def serve(images: Any, class_index: Any) -> dict[str, Any]:
        feature_map = split.body(images, training=False)
        features, head_input, probabilities, *outputs = split.tail(feature_map)
        logits = split.logits(head_input)
        gradient = _direction(logits, probabilities, class_index, split.activation)
        gradient = _behind(output_layer, gradient)
        for layer, slope, output in zip(chain, slopes, outputs, strict=True):
            if slope is not None:
                gradient = gradient * slope(tf.cast(output, tf.float32))
            gradient = _behind(layer, gradient)
        values = tf.cast(feature_map, tf.float32)
        if isinstance(pooling, keras.layers.GlobalMaxPooling2D):
            active = tf.cast(tf.reduce_max(values, axis=(1, 2)) > 0, tf.float32)
        else:
            active = tf.reduce_mean(tf.cast(values > 0, tf.float32), axis=(1, 2))
        weights = tf.nn.relu(gradient) * active
        return _answers(probabilities, features, uae(images, training=False), _heat_map(values, weights))

    return serve


@dataclass(frozen=True)
class _Split:
    """A classifier cut at its last feature map."""

    body: Any
    tail: Callable[[Any], list[Any]]
    """Feature map to features, the output layer's input, probabilities, and what else was asked for."""
    logits: Callable[[Any], Any]
    activation: str


def _feature_map(model: Any) -> Any:
    maps = [
        layer.output
        for layer in model.layers
        if len(getattr(layer.output, "shape", ())) == 4 and layer.output is not model.input
    ]
    if not maps:
        raise ExportError("Expected a convolutional classifier. Received: one without a 4-D feature map to explain.")
    return maps[-1]


def _split(model: Any, further: list[Any]) -> _Split:
    import keras

    feature_map = _feature_map(model)
    head = model.get_layer("probabilities")
    logits, activation = _logits(head)
    # Each tensor once: Keras loses the first of two equal outputs when it clones the head's graph.
    wanted = [model.get_layer("features").output, head.input, model.output, *further]
    outputs = list({id(tensor): tensor for tensor in wanted}.values())
    places = [next(i for i, tensor in enumerate(outputs) if tensor is one) for one in wanted]
    clone: Any = keras.Model(feature_map, outputs)

    def tail(values: Any) -> list[Any]:
        answers = clone(values, training=False)
        return [answers[place] for place in places]

    return _Split(keras.Model(model.input, feature_map), tail, logits, activation)


def _logits(head: Any) -> tuple[Callable[[Any], Any], str]:
    """Returns a function from the output layer's input to float32 logits, and the activation that follows them."""
    import keras
    import tensorflow as tf

    if isinstance(head, keras.layers.Softmax):
        return lambda x: tf.cast(x, tf.float32), "softmax"
    activation = getattr(getattr(head, "activation", None), "__name__", None)
    if activation not in {"softmax", "sigmoid"}:
        raise ExportError(
            f"Expected an output layer with softmax or sigmoid. Received: {type(head).__name__}, {activation}."
        )
    if isinstance(head, keras.layers.Activation):
        return lambda x: tf.cast(x, tf.float32), activation
    if isinstance(head, keras.layers.Dense):
        dense: Any = head

        def logits(x: Any) -> Any:
            z = tf.matmul(tf.cast(x, tf.float32), tf.cast(tf.convert_to_tensor(dense.kernel), tf.float32))
            return z if dense.bias is None else z + tf.cast(tf.convert_to_tensor(dense.bias), tf.float32)

        return logits, activation
    raise ExportError(f"Expected a Dense or Activation layer called 'probabilities'. Received: {type(head).__name__}.")


def _head_chain(model: Any, feature_map: Any) -> list[Any]:
    """Returns the layers from the output layer (left out) back to the pooling behind `feature_map` (the last one)."""
    import keras

    by_output = {id(layer.output): layer for layer in model.layers}
    chain: list[Any] = []
    tensor = model.get_layer("probabilities").input
    while tensor is not feature_map:
        layer = by_output.get(id(tensor))
        if layer is None or isinstance(layer.input, list):
            raise _other_head(layer)
        pools = type(layer) in {keras.layers.GlobalAveragePooling2D, keras.layers.GlobalMaxPooling2D}
        if pools != (layer.input is feature_map) or (pools and layer.data_format != "channels_last"):
            raise _other_head(layer)
        chain.append(layer)
        tensor = layer.input
    if not chain:
        raise _other_head(None)
    return chain


def _slope(layer: Any) -> Callable[[Any], Any] | None:
    """Returns the derivative of a layer's activation as a function of its output; None for the constant 1."""
    import keras
    import tensorflow as tf

    of_output: dict[str, Callable[[Any], Any] | None] = {
        "linear": None,
        "relu": lambda y: tf.cast(y > 0, tf.float32),
        "tanh": lambda y: 1.0 - y * y,
    }
    if type(layer) is keras.layers.Dropout:
        return None
    if type(layer) is keras.layers.ReLU and not layer.negative_slope and not layer.threshold:
        if layer.max_value is None:
            return of_output["relu"]
    elif type(layer) in {keras.layers.Dense, keras.layers.Activation}:
        name = getattr(layer.activation, "__name__", None)
        if name in of_output:
            return of_output[name]
        raise ExportError(
            "Expected linear, relu or tanh in a head whose gradient is written as products. "
            f"Received: {name} in the layer {layer.name!r}."
        )
    raise _other_head(layer)


def _behind(layer: Any, gradient: Any) -> Any:
    """Returns the gradient by a layer's input from the one by its sums, `(N, units)`; only dense layers change it."""
    import keras
    import tensorflow as tf

    if not isinstance(layer, keras.layers.Dense):
        return gradient
    return tf.matmul(gradient, tf.cast(tf.convert_to_tensor(layer.kernel), tf.float32), transpose_b=True)


def _other_head(layer: Any) -> ExportError:
    received = "another graph" if layer is None else f"the layer {layer.name!r} ({type(layer).__name__})"
    return ExportError(
        "Expected a head of global pooling, then dense layers, to write its gradient as products. "
        f"Received: {received} between the last feature map and the output."
    )


def _direction(logits: Any, probabilities: Any, class_index: Any, activation: str) -> Any:
    """Returns the gradient of the explained score by the logits, `(N, C)`, but for a positive factor per image."""
    import tensorflow as tf

    predicted = tf.argmax(probabilities, axis=1, output_type=tf.int32)
    chosen = tf.one_hot(tf.where(class_index < 0, predicted, class_index), tf.shape(logits)[1], dtype=tf.float32)
    if activation != "softmax":
        return chosen
    # The gradient of p_c by the logits is p_c(1−p_c) times this. The factor cancels in the scaling of the map, but a
    # confident model rounds it to 0 and would lose the map.
    others = tf.where(chosen > 0, tf.fill(tf.shape(logits), tf.float32.min), logits)
    return chosen - tf.nn.softmax(others)


def _heat_map(values: Any, weights: Any) -> Any:
    """Returns the maps `(N, h, w)` of feature maps `(N, h, w, K)` and channel weights `(N, K)`."""
    import tensorflow as tf

    # Scaled before the sum: weights of a confident model may be too small for the products' range.
    weights = tf.math.divide_no_nan(weights, tf.reduce_max(weights, axis=1, keepdims=True))
    cam = tf.nn.relu(tf.reduce_sum(weights[:, tf.newaxis, tf.newaxis, :] * values, axis=3))
    return tf.math.divide_no_nan(cam, tf.reduce_max(cam, axis=(1, 2), keepdims=True))


def _answers(probabilities: Any, features: Any, uae: Any, cam: Any) -> dict[str, Any]:
    import tensorflow as tf

    return {
        "probabilities": tf.cast(probabilities, tf.float32),
        "features": tf.cast(features, tf.float32),
        "uae": tf.cast(uae, tf.float32),
        "cam": cam,
    }
