"""From trained Keras files to one SavedModel whose single signature answers everything that serving needs.

    serve(images uint8 (N, H, W, 3), class_index int32 (N,)) ->
        probabilities (N, C), features (N, F), uae (N, D), cam (N, h, w), all float32

Grad-CAM (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391, section 3) is part of the signature, in the guided
form of the system that users know: with the last feature map f and g = ∂score/∂f, a channel's weight is the mean over
space of relu(g)·[f > 0]; the map is relu of the weighted sum, scaled to 0–1 per image.

Exported with https://keras.io/api/models/model_saving_apis/export/.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from cv_platform.errors import ExportError
from cv_platform.serving.runtime import GOLDEN, PREDICTED_CLASS, SAVED_MODEL, Prediction
from cv_platform.serving.runtime_tensorflow import ENDPOINT, TensorFlowRuntime

logger = logging.getLogger(__name__)

PROBABILITY_TOLERANCE = 1e-4
CAM_TOLERANCE = 1e-3
_LOW_PRECISION_TOLERANCES = (2e-2, 5e-2)
"""A model that computes in 16 bits rounds differently on each kind of CPU."""
_PARITY = 1e-5
"""Largest difference between the export's probabilities and Keras's own, in the same process."""


class ExportedModel(BaseModel):
    """What was exported, as read from the model itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    saved_model: Path
    golden: Path
    image_size: tuple[int, int]
    classes: int
    feature_dims: int
    uae_dims: int
    cam_size: tuple[int, int]


def export_bundle(keras_path: Path, uae_path: Path, directory: Path, *, golden_images: np.ndarray) -> ExportedModel:
    """Writes `saved_model/` and `golden.npz` into `directory`.

    Args:
        keras_path: trained classifier, `.keras`: input uint8 RGB, a last 4-D feature map, a head with a layer
            "features" and an output layer "probabilities" (softmax or sigmoid).
        uae_path: untrained encoder, `.keras`, of the same input.
        directory: receives the files; exists.
        golden_images: `(G, H, W, 3)` uint8 RGB, G ≥ 1; kept with the answers for the self-test of every later load.

    Raises:
        ExportError: the files are no such models, or the export does not answer as Keras does.
    """
    import tensorflow as tf

    model, uae = _load(keras_path), _load(uae_path)
    _check_inputs(model, uae, golden_images)
    serve = _combined_signature(model, uae)
    height, width, channels = (int(side) for side in model.input_shape[1:])
    import keras

    archive: Any = keras.export.ExportArchive()
    archive.track(model)
    archive.track(uae)
    archive.add_endpoint(
        name=ENDPOINT,
        fn=serve,
        input_signature=[
            tf.TensorSpec((None, height, width, channels), tf.uint8, name="images"),
            tf.TensorSpec((None,), tf.int32, name="class_index"),
        ],
    )
    archive.write_out(str(directory / SAVED_MODEL), verbose=False)
    answer = _answer_golden(directory / SAVED_MODEL, golden_images)
    _check_parity(model, uae, golden_images, answer)
    np.savez_compressed(
        directory / GOLDEN,
        images=golden_images,
        # The classes are kept: a tie that another CPU rounds the other way must not compare maps of two classes.
        class_index=answer.probabilities.argmax(axis=1).astype(np.int32),
        tolerance=np.array(_tolerances(model), dtype=np.float64),
        probabilities=answer.probabilities,
        features=answer.features,
        uae=answer.uae,
        cam=answer.cam,
    )
    return ExportedModel(
        saved_model=directory / SAVED_MODEL,
        golden=directory / GOLDEN,
        image_size=(height, width),
        classes=answer.probabilities.shape[1],
        feature_dims=answer.features.shape[1],
        uae_dims=answer.uae.shape[1],
        cam_size=(answer.cam.shape[1], answer.cam.shape[2]),
    )


def _load(path: Path) -> Any:
    import keras

    try:
        # safe_mode refuses pickled code inside a file; compile would need the training's loss and optimizer.
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except (OSError, ValueError, TypeError, KeyError) as err:
        raise ExportError(
            f"Expected a Keras model at {path}. Received: {str(err).strip()[:500]}. Train it again."
        ) from err


def _check_inputs(model: Any, uae: Any, golden_images: np.ndarray) -> None:
    mistakes = [
        f"{name} takes {part.inputs[0].dtype} {tuple(part.inputs[0].shape)}; expected uint8 (None, height, width, 3)"
        for name, part in (("the classifier", model), ("the encoder", uae))
        if len(part.inputs) != 1 or str(part.inputs[0].dtype) != "uint8" or len(part.inputs[0].shape) != 4
    ]
    if tuple(model.input_shape) != tuple(uae.input_shape):
        mistakes.append(
            f"the classifier takes {model.input_shape} but the encoder {uae.input_shape}; expected the same"
        )
    if (
        golden_images.dtype != np.uint8
        or golden_images.shape[1:] != tuple(model.input_shape[1:])
        or not len(golden_images)
    ):
        received = f"{golden_images.dtype} {golden_images.shape}"
        mistakes.append(f"golden images are {received}; expected uint8 (G, height, width, 3), G ≥ 1")
    names = {layer.name for layer in model.layers}
    mistakes += [f"the classifier has no layer {name!r}" for name in ("features", "probabilities") if name not in names]
    if mistakes:
        raise ExportError("The models cannot be exported: " + "; ".join(mistakes) + ".")


def _combined_signature(model: Any, uae: Any) -> Any:
    """Returns `serve(images, class_index)`: one forward pass, and the map by a gradient through the head only."""
    import keras
    import tensorflow as tf

    maps = [
        layer
        for layer in model.layers
        if len(getattr(layer.output, "shape", ())) == 4 and layer.output is not model.input
    ]
    if not maps:
        raise ExportError("Expected a convolutional classifier. Received: one without a 4-D feature map to explain.")
    feature_map = maps[-1].output
    head = model.get_layer("probabilities")
    logits_of, activation = _logits(head)
    body = keras.Model(model.input, feature_map)
    # Each tensor once: Keras loses the first of two equal outputs when it clones the head's graph.
    wanted = [model.get_layer("features").output, head.input, model.output]
    outputs = list({id(tensor): tensor for tensor in wanted}.values())
    places = [next(i for i, tensor in enumerate(outputs) if tensor is one) for one in wanted]
    tail = keras.Model(feature_map, outputs)

    def serve(images: Any, class_index: Any) -> dict[str, Any]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            features_at_map = body(images, training=False)
            tape.watch(features_at_map)
            answers = tail(features_at_map, training=False)
            features, head_input, probabilities = (answers[place] for place in places)
            logits = logits_of(head_input)
        predicted = tf.argmax(probabilities, axis=1, output_type=tf.int32)
        chosen = tf.one_hot(tf.where(class_index < 0, predicted, class_index), tf.shape(logits)[1], dtype=tf.float32)
        direction = chosen
        if activation == "softmax":
            # The gradient of p_c by the logits is p_c(1−p_c) times this. The factor cancels in the scaling below, but a
            # confident model rounds it to 0 and would lose the map.
            others = tf.where(chosen > 0, tf.fill(tf.shape(logits), tf.float32.min), logits)
            direction = chosen - tf.nn.softmax(others)
        gradient = tape.gradient(logits, features_at_map, output_gradients=direction)
        feature_values = tf.cast(features_at_map, tf.float32)
        guided = tf.nn.relu(tf.cast(gradient, tf.float32)) * tf.cast(feature_values > 0, tf.float32)
        weights = tf.reduce_mean(guided, axis=(1, 2), keepdims=True)
        # Scaled before the sum: weights of a confident model may be too small for the products' range.
        weights = tf.math.divide_no_nan(weights, tf.reduce_max(weights, axis=3, keepdims=True))
        cam = tf.nn.relu(tf.reduce_sum(weights * feature_values, axis=3))
        cam = tf.math.divide_no_nan(cam, tf.reduce_max(cam, axis=(1, 2), keepdims=True))
        return {
            "probabilities": tf.cast(probabilities, tf.float32),
            "features": tf.cast(features, tf.float32),
            "uae": tf.cast(uae(images, training=False), tf.float32),
            "cam": cam,
        }

    return serve


def _logits(head: Any) -> tuple[Any, str]:
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


def _answer_golden(saved_model: Path, golden_images: np.ndarray) -> Prediction:
    runtime = TensorFlowRuntime(saved_model)
    return runtime(golden_images, np.full(len(golden_images), PREDICTED_CLASS, dtype=np.int32))


def _check_parity(model: Any, uae: Any, golden_images: np.ndarray, answer: Prediction) -> None:
    tolerance = _PARITY * _tolerances(model)[0] / PROBABILITY_TOLERANCE
    expected = np.asarray(model(golden_images, training=False), dtype=np.float32)
    encoded = np.asarray(uae(golden_images, training=False), dtype=np.float32)
    probabilities_off = float(np.abs(expected - answer.probabilities).max())
    encoding_off = float(np.abs(encoded - answer.uae).max()) / max(1.0, float(np.abs(encoded).max()))
    if not (probabilities_off <= tolerance and encoding_off <= tolerance):
        raise ExportError(
            f"Expected the exported model to answer as Keras does, within {tolerance:g}. Received: probabilities off "
            f"by {probabilities_off:.2g}, embeddings by {encoding_off:.2g}. A layer of this model does not export."
        )


def _tolerances(model: Any) -> tuple[float, float]:
    low = any(str(layer.compute_dtype) in {"bfloat16", "float16"} for layer in model.layers)
    return _LOW_PRECISION_TOLERANCES if low else (PROBABILITY_TOLERANCE, CAM_TOLERANCE)
