"""From trained Keras files to one file whose single signature answers everything that serving needs.

The signature, with the map that explains an answer, is `signature`'s part. It is exported as an ONNX graph where the
head has a plain form and the graph answers as the gradient tape does on the golden images; else as a SavedModel with
the tape inside. https://keras.io/api/models/model_saving_apis/export/
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from cv_platform.deployment.onnx_export import write_onnx
from cv_platform.deployment.signature import Signature, epsilon, tape_signature
from cv_platform.errors import CorruptBundleError, ExportError
from cv_platform.serving.model.runtime import GOLDEN, PREDICTED_CLASS, Prediction
from cv_platform.serving.model.runtime_onnx import OnnxRuntime
from cv_platform.serving.model.runtime_tensorflow import ENDPOINT, TensorFlowRuntime
from cv_platform.storage import MODEL_PATHS

logger = logging.getLogger(__name__)

PROBABILITY_TOLERANCE = 1e-4
CAM_TOLERANCE = 1e-3
_LOW_PRECISION_TOLERANCES = (2e-2, 5e-2)
"""A model that computes in 16 bits, or 8, rounds differently on each kind of CPU."""
_PARITY = 1e-5
"""Largest difference between the export's probabilities and Keras's own, in the same process."""


class ExportedModel(BaseModel):
    """What was exported, as read from the model itself.

    Attributes:
        runtime: what runs it.
        runtime_reason: why that one.
        parity: differences of the ONNX graph from the gradient tape on the golden images, see `_measure_parity`; empty
            when there was no graph.
        golden: the file of golden images and answers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    runtime: Literal["tensorflow", "onnx"]
    runtime_reason: str
    parity: dict[str, float]
    golden: Path
    image_size: tuple[int, int]
    classes: int
    feature_dims: int
    uae_dims: int
    cam_size: tuple[int, int]


def export_bundle(
    keras_path: Path,
    uae_path: Path,
    directory: Path,
    *,
    golden_images: np.ndarray,
    runtime: Literal["auto", "onnx", "tensorflow"] = "auto",
    int8: tuple[Path, str] | None = None,
) -> ExportedModel:
    """Writes `model.onnx` or `saved_model/`, and `golden.npz`, into `directory`.

    Args:
        keras_path: trained classifier, `.keras`: input uint8 RGB, a last 4-D feature map, a head with a layer
            "features" and an output layer "probabilities" (softmax or sigmoid).
        uae_path: untrained encoder, `.keras`, of the same input.
        directory: receives the files; exists.
        golden_images: `(G, H, W, 3)` uint8 RGB, G ≥ 1; kept with the answers for the self-test of every later load.
        runtime: `auto` takes ONNX Runtime where the model converts and answers alike, else TensorFlow.
        int8: a graph in 8 bits that is taken instead, and why; see `int8`.

    Raises:
        ExportError: the files are no such models, the export does not answer as Keras does, or `runtime` is `onnx` and
            the model does not convert or answers otherwise.
    """
    model, uae = load_keras(keras_path), load_keras(uae_path)
    _check_inputs(model, uae, golden_images)
    serve = tape_signature(model, uae)
    chosen, parity = "tensorflow", dict[str, float]()
    if int8 is not None:
        chosen, reason = "onnx", int8[1]
        shutil.copyfile(int8[0], directory / MODEL_PATHS["onnx"])
    elif runtime == "tensorflow":
        reason = "deploy.runtime asks for TensorFlow."
    else:
        refusal, parity = _export_onnx(model, uae, serve, directory / MODEL_PATHS["onnx"], golden_images)
        if refusal is None:
            chosen, reason = "onnx", f"It answers as the gradient tape does on {len(golden_images)} golden images."
        elif runtime == "onnx":
            raise ExportError(f"{refusal} Set deploy.runtime to auto or tensorflow.")
        else:
            reason = f"No ONNX: {refusal}"
    logger.info("The runtime is %s. %s", chosen, reason)
    if chosen == "tensorflow":
        _write_saved_model(model, uae, serve, directory / MODEL_PATHS["tensorflow"])
        loaded = TensorFlowRuntime(directory / MODEL_PATHS["tensorflow"])
    else:
        loaded = OnnxRuntime(directory / MODEL_PATHS["onnx"])
    answer = loaded(golden_images, np.full(len(golden_images), PREDICTED_CLASS, dtype=np.int32))
    _check_keras_parity(model, uae, golden_images, answer, is_int8=int8 is not None)
    np.savez_compressed(
        directory / GOLDEN,
        images=golden_images,
        # The classes are kept: a tie that another CPU rounds the other way must not compare maps of two classes.
        class_index=answer.probabilities.argmax(axis=1).astype(np.int32),
        tolerance=np.array(_LOW_PRECISION_TOLERANCES if int8 else _tolerances(model), dtype=np.float64),
        probabilities=answer.probabilities,
        features=answer.features,
        uae=answer.uae,
        cam=answer.cam,
    )
    return ExportedModel(
        runtime=chosen,
        runtime_reason=reason,
        parity=parity,
        golden=directory / GOLDEN,
        image_size=(golden_images.shape[1], golden_images.shape[2]),
        classes=answer.probabilities.shape[1],
        feature_dims=answer.features.shape[1],
        uae_dims=answer.uae.shape[1],
        cam_size=(answer.cam.shape[1], answer.cam.shape[2]),
    )


def load_keras(path: Path) -> Any:
    """Loads a Keras file for an export.

    Raises:
        ExportError: the file is no such model.
    """
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


def _export_onnx(
    model: Any, uae: Any, tape: Signature, path: Path, golden_images: np.ndarray
) -> tuple[str | None, dict[str, float]]:
    """Leaves the graph at `path` and returns None when it answers as the tape; else why not. Both with its parity."""
    try:
        write_onnx(model, uae, path)
        parity = _measure_parity(OnnxRuntime(path), tape, golden_images, classes=int(model.output_shape[1]))
    except (ExportError, CorruptBundleError, ValueError) as err:
        path.unlink(missing_ok=True)
        return str(err), {}
    allowed = {"probabilities": PROBABILITY_TOLERANCE, "cam": CAM_TOLERANCE}
    wide = [
        f"{name} off by {value:.2g}, allowed {allowed.get(name, PROBABILITY_TOLERANCE):g}"
        for name, value in parity.items()
        if not value <= allowed.get(name, PROBABILITY_TOLERANCE)  # A NaN fails too.
    ]
    if not wide:
        return None, parity
    path.unlink()
    return f"Expected a graph that answers as the gradient tape. Received: {'; '.join(wide)}.", parity


def _measure_parity(
    runtime: OnnxRuntime, tape: Signature, golden_images: np.ndarray, *, classes: int
) -> dict[str, float]:
    """Returns the largest differences over the golden images, each explained for its predicted and another class.

    `probabilities` in absolute terms; `features` and `uae` as shares of their largest value (at least 1); `cam` of any
    one cell, as a share of its map's largest, which is 1: what is only rounding is blank in both, see
    `signature.noise_share`. Rounding could flip the gate of a cell that is all but 0, and
    so change a channel's weight by one cell's share; yet in 1,184 maps of four models (digits, animals10, CIFAR-10,
    ResNet50) no cell was off by more than 8e-7.
    """
    import tensorflow as tf

    images = np.concatenate([golden_images, golden_images])
    asked = np.concatenate([np.full(len(golden_images), PREDICTED_CLASS), np.arange(len(golden_images)) % classes])
    asked = asked.astype(np.int32)
    expected = {name: np.asarray(value) for name, value in tf.function(tape)(images, asked).items()}
    received = runtime(images, asked)
    off = {name: np.abs(getattr(received, name).astype(np.float64) - value) for name, value in expected.items()}
    scales = {name: max(1.0, float(np.abs(expected[name]).max())) for name in ("features", "uae")}
    return {
        "probabilities": float(off["probabilities"].max()),
        "features": float(off["features"].max()) / scales["features"],
        "uae": float(off["uae"].max()) / scales["uae"],
        "cam": float(off["cam"].max()),
    }


def _write_saved_model(model: Any, uae: Any, serve: Signature, folder: Path) -> None:
    import keras
    import tensorflow as tf

    archive: Any = keras.export.ExportArchive()
    archive.track(model)
    archive.track(uae)
    archive.add_endpoint(
        name=ENDPOINT,
        fn=serve,
        input_signature=[
            tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8, name="images"),
            tf.TensorSpec((None,), tf.int32, name="class_index"),
        ],
    )
    archive.write_out(str(folder), verbose=False)


def _check_keras_parity(model: Any, uae: Any, golden_images: np.ndarray, answer: Prediction, *, is_int8: bool) -> None:
    """Holds the export to Keras; what 8 bits may change of the probabilities is measured on the test split."""
    tolerance = _PARITY * _tolerances(model)[0] / PROBABILITY_TOLERANCE
    expected = np.asarray(model(golden_images, training=False), dtype=np.float32)
    encoded = np.asarray(uae(golden_images, training=False), dtype=np.float32)
    probabilities_off = 0.0 if is_int8 else float(np.abs(expected - answer.probabilities).max())
    encoding_off = float(np.abs(encoded - answer.uae).max()) / max(1.0, float(np.abs(encoded).max()))
    if not (probabilities_off <= tolerance and encoding_off <= tolerance):
        raise ExportError(
            f"Expected the exported model to answer as Keras does, within {tolerance:g}. Received: probabilities off "
            f"by {probabilities_off:.2g}, embeddings by {encoding_off:.2g}. A layer of this model does not export."
        )


def _tolerances(model: Any) -> tuple[float, float]:
    is_low = epsilon(model) > np.finfo(np.float32).eps
    return _LOW_PRECISION_TOLERANCES if is_low else (PROBABILITY_TOLERANCE, CAM_TOLERANCE)
