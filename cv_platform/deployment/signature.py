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

A map is scaled to 1 whatever its size, so one that is only rounding error would look like any other, and otherwise on
each CPU: behind units that are all saturated, the slope 1 − y² is what rounding left of it. Such a map is blank, in
every runtime alike; `noise_share` says where that begins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cv_platform.errors import ExportError

Signature = Callable[[Any, Any], dict[str, Any]]
"""`serve(images, class_index)` on TensorFlow tensors."""
_EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7}


def epsilon(model: Any) -> float:
    """Returns the distance of 1 to the next number in the coarsest dtype that a layer of the model computes in."""
    single = float(np.finfo(np.float32).eps)
    return max(_EPSILON.get(str(layer.compute_dtype), single) for layer in model.layers)


def noise_share(model: Any) -> float:
    """Returns the noise floor: a map whose largest value is a smaller share of the terms behind it is blank.

    A slope such as 1 − y², or a sum, is right to some four units in the last place of its largest terms, not of itself:
    where a share x of the terms is left, rounding changes it by 4ε/x of its size. At √(4ε) half of the digits are lost,
    and what is shown is still the same on every CPU within √(4ε). In 32 bits that is 7e-4, less than what the export,
    and each load of a bundle, allow.
    """
    return float(np.sqrt(4 * epsilon(model)))


def tape_signature(model: Any, uae: Any) -> Signature:
    """Returns the signature whose map comes from TensorFlow's gradient through the head; any head will do.

    Args:
        model: Keras classifier with the layers "features" and "probabilities".
        uae: Keras encoder of the same images.

    Raises:
        ExportError: there is no feature map to explain, or the output layer is of another kind.
    """
    import tensorflow as tf

    try:
        plain = _plain_head(model)
    except ExportError:
        plain = None
    split = _split(model, [layer.output for layer in plain.chain] if plain else [])
    share = noise_share(model)

    def serve(images: Any, class_index: Any) -> dict[str, Any]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            feature_map = split.body(images, training=False)
            tape.watch(feature_map)
            features, head_input, probabilities, *outputs = split.tail(feature_map)
            logits = split.logits(head_input)
        direction = _direction(logits, probabilities, class_index, split.activation)
        gradient = tape.gradient(logits, feature_map, output_gradients=direction)
        values = tf.cast(feature_map, tf.float32)
        guided = tf.nn.relu(tf.cast(gradient, tf.float32)) * tf.cast(values > 0, tf.float32)
        if plain:
            terms = _map_terms(values, plain.gradient(direction, outputs)[1] * plain.active(values))
        else:
            # The layers between are unknown. In this unit a map sums up to what the image adds to the score.
            terms = tf.reduce_sum(tf.abs(direction) * split.logit_terms(head_input), axis=1)
        cam = _heat_map(values, tf.reduce_sum(guided, axis=(1, 2)), share * terms)
        return _answers(probabilities, features, uae(images, training=False), cam)

    return serve


def plain_signature(model: Any, uae: Any) -> Signature:
    """Returns the same signature without a gradient operator, for a head of global pooling and dense layers.

    Args:
        model: see `tape_signature`.
        uae: see `tape_signature`.

    Raises:
        ExportError: as `tape_signature`, or the head is of another kind; the message names the layer.
    """
    import tensorflow as tf

    plain = _plain_head(model)
    split = _split(model, [layer.output for layer in plain.chain])
    share = noise_share(model)

    def serve(images: Any, class_index: Any) -> dict[str, Any]:
        feature_map = split.body(images, training=False)
        features, head_input, probabilities, *outputs = split.tail(feature_map)
        direction = _direction(split.logits(head_input), probabilities, class_index, split.activation)
        gradient, terms = plain.gradient(direction, outputs)
        values = tf.cast(feature_map, tf.float32)
        active = plain.active(values)
        cam = _heat_map(values, tf.nn.relu(gradient) * active, share * _map_terms(values, terms * active))
        return _answers(probabilities, features, uae(images, training=False), cam)

    return serve


@dataclass(frozen=True)
class _Split:
    """A classifier cut at its last feature map."""

    body: Any
    tail: Callable[[Any], list[Any]]
    """Feature map to features, the output layer's input, probabilities, and what else was asked for."""
    logits: Callable[[Any], Any]
    logit_terms: Callable[[Any], Any]
    """The output layer's input to the magnitude of what each logit sums."""
    activation: str


@dataclass(frozen=True)
class _PlainHead:
    """A head of global pooling and dense layers."""

    output_layer: Any
    chain: list[Any]
    """The layers between pooling and output layer, the last one first."""
    slopes: list[Callable[[Any], Any] | None]
    pooling: Any

    def gradient(self, direction: Any, outputs: list[Any]) -> tuple[Any, Any]:
        """Returns the gradient of the score by the pooled feature map, and the magnitude of its terms, both `(N, K)`.

        Terms are added as squares: rounding errors are independent of each other. A unit's term counts in full before
        its slope, whose error does not shrink with it.

        Args:
            direction: the gradient by the logits, `(N, C)`.
            outputs: of the layers of the chain.
        """
        import tensorflow as tf

        gradient, squares = _behind(self.output_layer, direction, direction**2)
        for layer, slope, output in zip(self.chain, self.slopes, outputs, strict=True):
            if slope is not None:
                factor = slope(tf.cast(output, tf.float32))
                squares = squares * factor**2 + gradient**2
                gradient = gradient * factor
            gradient, squares = _behind(layer, gradient, squares)
        return gradient, tf.sqrt(squares)

    def active(self, values: Any) -> Any:
        """Returns what the pooling leaves of the gate [f > 0], `(N, K)`, 0–1."""
        import keras
        import tensorflow as tf

        if isinstance(self.pooling, keras.layers.GlobalMaxPooling2D):
            return tf.cast(tf.reduce_max(values, axis=(1, 2)) > 0, tf.float32)
        return tf.reduce_mean(tf.cast(values > 0, tf.float32), axis=(1, 2))


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
    logits, logit_terms, activation = _logits(head)
    # Each tensor once: Keras loses the first of two equal outputs when it clones the head's graph.
    wanted = [model.get_layer("features").output, head.input, model.output, *further]
    outputs = list({id(tensor): tensor for tensor in wanted}.values())
    places = [next(i for i, tensor in enumerate(outputs) if tensor is one) for one in wanted]
    clone: Any = keras.Model(feature_map, outputs)

    def tail(values: Any) -> list[Any]:
        answers = clone(values, training=False)
        return [answers[place] for place in places]

    return _Split(keras.Model(model.input, feature_map), tail, logits, logit_terms, activation)


def _logits(head: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any], str]:
    """Returns functions from the output layer's input to float32 logits and to their terms, and the activation."""
    import keras
    import tensorflow as tf

    def same(x: Any) -> Any:
        return tf.cast(x, tf.float32)

    def magnitude(x: Any) -> Any:
        return tf.abs(same(x))

    if isinstance(head, keras.layers.Softmax):
        return same, magnitude, "softmax"
    activation = getattr(getattr(head, "activation", None), "__name__", None)
    if activation not in {"softmax", "sigmoid"}:
        raise ExportError(
            f"Expected an output layer with softmax or sigmoid. Received: {type(head).__name__}, {activation}."
        )
    if isinstance(head, keras.layers.Activation):
        return same, magnitude, activation
    if isinstance(head, keras.layers.Dense):
        dense: Any = head

        def affine(x: Any, part: Callable[[Any], Any]) -> Any:
            z = tf.matmul(part(x), part(tf.convert_to_tensor(dense.kernel)))
            return z if dense.bias is None else z + part(tf.convert_to_tensor(dense.bias))

        def logits(x: Any) -> Any:
            return affine(x, same)

        def terms(x: Any) -> Any:
            return affine(x, magnitude)

        return logits, terms, activation
    raise ExportError(f"Expected a Dense or Activation layer called 'probabilities'. Received: {type(head).__name__}.")


def _plain_head(model: Any) -> _PlainHead:
    *chain, pooling = _head_chain(model, _feature_map(model))
    return _PlainHead(model.get_layer("probabilities"), chain, [_slope(layer) for layer in chain], pooling)


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


def _behind(layer: Any, gradient: Any, squares: Any) -> tuple[Any, Any]:
    """Returns gradient and squared terms by a layer's input from those by its sums; only dense layers change them."""
    import keras
    import tensorflow as tf

    if not isinstance(layer, keras.layers.Dense):
        return gradient, squares
    kernel = tf.cast(tf.convert_to_tensor(layer.kernel), tf.float32)
    return tf.matmul(gradient, kernel, transpose_b=True), tf.matmul(squares, kernel**2, transpose_b=True)


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


def _map_terms(values: Any, terms: Any) -> Any:
    """Returns the magnitude of the terms of the largest cell, `(N,)`, from those of the channel weights, `(N, K)`."""
    import tensorflow as tf

    cells = tf.reduce_sum((terms[:, tf.newaxis, tf.newaxis, :] * values) ** 2, axis=3)
    return tf.sqrt(tf.reduce_max(cells, axis=(1, 2)))


def _heat_map(values: Any, weights: Any, floor: Any) -> Any:
    """Returns the maps `(N, h, w)` of feature maps `(N, h, w, K)` and channel weights `(N, K)`.

    A map with no value above its noise floor `(N,)` is all zero.
    """
    import tensorflow as tf

    # Scaled before the sum: weights of a confident model may be too small for the products' range.
    scale = tf.reduce_max(weights, axis=1, keepdims=True)
    weights = tf.math.divide_no_nan(weights, scale)
    cam = tf.nn.relu(tf.reduce_sum(weights[:, tf.newaxis, tf.newaxis, :] * values, axis=3))
    largest = tf.reduce_max(cam, axis=(1, 2), keepdims=True)
    is_shown = largest * scale[:, :, tf.newaxis] > floor[:, tf.newaxis, tf.newaxis]
    return tf.where(is_shown, tf.math.divide_no_nan(cam, largest), tf.zeros_like(cam))


def _answers(probabilities: Any, features: Any, uae: Any, cam: Any) -> dict[str, Any]:
    import tensorflow as tf

    return {
        "probabilities": tf.cast(probabilities, tf.float32),
        "features": tf.cast(features, tf.float32),
        "uae": tf.cast(uae, tf.float32),
        "cam": cam,
    }
