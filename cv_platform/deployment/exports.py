"""Files of a model for other devices, each measured beside the model itself on the test split.

All take `images` uint8 `(N, H, W, 3)` RGB, preprocessed as the bundle's metadata say, and answer `probabilities`
float32 `(N, C)`. One that loses more than the config allows is measured, and not kept. LiteRT is what was called
TensorFlow Lite: https://ai.google.dev/edge/litert.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cv_platform.config import DeployConfig, ExportFormat, Threshold
from cv_platform.datasets.packing import PackedSplit
from cv_platform.deployment.int8 import INT8, open_int8
from cv_platform.deployment.onnx_export import write_classifier
from cv_platform.deployment.quantization import calibration_images, quantise
from cv_platform.errors import ExportError
from cv_platform.evaluation.classifier import load_classifier, predict
from cv_platform.evaluation.latency import Answer, compiled, milliseconds
from cv_platform.files import exclusive, file_sha256, whole_directory
from cv_platform.predictions import known_labels, one_hot, predicted_flags
from cv_platform.records import Export, ReferenceData, Task, TrainedModel

logger = logging.getLogger(__name__)

SUFFIXES: Mapping[ExportFormat, str] = {
    "onnx": ".onnx",
    "onnx_int8": "_int8.onnx",
    "litert": ".tflite",
    "litert_int8": "_int8.tflite",
}
MOST_IMAGES = 2000
_BATCH = 32


@dataclass(frozen=True)
class Measured:
    """The model beside which exports are measured, and on what.

    Attributes:
        images: `(N, H, W, 3)` uint8, of the test split.
        truth: `(N, C)` bool.
        known: `(N, C)` bool, see `predictions.known_labels`; of each image a label is.
        task: decides how probabilities become classes, with `threshold`.
        probabilities: the model's own, `(N, C)`.
    """

    images: np.ndarray
    truth: np.ndarray
    known: np.ndarray
    task: Task
    threshold: Threshold
    model: Any
    probabilities: np.ndarray

    def right(self, probabilities: np.ndarray) -> np.ndarray:
        """Returns which images are right, as far as their labels are known, `(N,)` bool."""
        return ((self.decided(probabilities) & self.known) == self.truth).all(axis=1)

    def decided(self, probabilities: np.ndarray) -> np.ndarray:
        """Returns the predicted classes, `(N, C)` bool."""
        return predicted_flags(probabilities, self.task.classifier_type, self.threshold)


def beside(trained: TrainedModel, test: PackedSplit, threshold: Threshold) -> Measured:
    """Loads a model and lets it answer at most 2,000 images of the test split with a known label, a seeded choice."""
    classes, targets = len(trained.task.class_names), np.asarray(test.targets)
    judged = np.flatnonzero(known_labels(targets, classes).any(axis=1))
    rows = judged[np.sort(np.random.default_rng(0).permutation(len(judged))[:MOST_IMAGES])]
    images, targets = np.asarray(test.images[rows]), targets[rows]
    model = load_classifier(trained.keras_path, classes=classes)
    known, truth = known_labels(targets, classes), one_hot(targets, classes).astype(bool)
    return Measured(images, truth, known, trained.task, threshold, model, predict(model, images))


def write_exports(
    trained: TrainedModel, deploy: DeployConfig, *, test: PackedSplit, train: PackedSplit, threshold: Threshold
) -> tuple[Export, ...]:
    """Writes what `deploy.exports` names to `trained.exports_directory`, all at once, and returns what was measured.

    Args:
        trained: the model.
        deploy: which files, and what they may lose (`max_export_loss`).
        test: what they are measured on.
        train: calibrates those in 8 bits.
        threshold: of multi-label decisions.

    Raises:
        TrainingError: the model's file is none.
    """
    if not deploy.exports:
        return ()
    measured, calibration = beside(trained, test, threshold), calibration_images(train)
    target = trained.exports_directory
    with exclusive(target.with_name(f".{target.name}.lock")), whole_directory(target) as folder:
        made = [
            _export(kind, folder / f"{trained.model.model_name}{SUFFIXES[kind]}", measured, calibration, deploy)
            for kind in deploy.exports
        ]
    for export in made:
        if export.refused:
            logger.warning("The export %s is not kept: %s", export.format, export.refused)
    return tuple(made)


def measure_int8(
    trained: TrainedModel, reference: ReferenceData, deploy: DeployConfig, *, test: PackedSplit, threshold: Threshold
) -> Export:
    """Returns what the graph reaches on the test split, beside the model.

    Args:
        trained: the model, whose `int8_path` it is.
        reference: what the graph has answered.
        deploy: `max_export_loss`.
        test: what it is measured on.
        threshold: of multi-label decisions.

    Raises:
        ExportError: the graph is not there, another one has answered the reference data, or it loses too much.
        CorruptBundleError: the file is no graph with the combined signature.
    """
    path = trained.int8_path
    if not path.is_file() or file_sha256(path) != reference.int8_sha256:
        raise ExportError(
            f"Expected reference data that {path.name} has answered, as deploy.runtime is {INT8}. Received: "
            f"{'those of another graph' if path.is_file() else 'no such graph'}. Materialise reference_data again."
        )
    answer = open_int8(path)
    export = measure(
        f"{INT8}, served",
        lambda images: answer(images)[0],
        path,
        beside(trained, test, threshold),
        most_loss=deploy.max_export_loss,
    )
    if export.refused:
        raise ExportError(f"deploy.runtime: {INT8} is refused: {export.refused} Raise that limit, or set auto.")
    return export


def _export(
    kind: ExportFormat, path: Path, measured: Measured, calibration: np.ndarray, deploy: DeployConfig
) -> Export:
    try:
        if kind.startswith("onnx"):
            _write_onnx(measured.model, path, calibration if kind == "onnx_int8" else None)
            answer = open_onnx(path)
        else:
            path.write_bytes(_litert(measured.model, calibration if kind == "litert_int8" else None))
            answer = _open_litert(path)
        export = measure(kind, answer, path, measured, most_loss=deploy.max_export_loss)
    except ExportError as err:
        export = Export(format=kind, refused=str(err))
    if export.refused:
        path.unlink(missing_ok=True)
    return export


def measure(kind: str, answer: Answer, path: Path, measured: Measured, *, most_loss: float) -> Export:
    """Returns what an export reaches beside the model, and why it is refused, if it is.

    Args:
        kind: its name.
        answer: the export.
        path: its file.
        measured: the model.
        most_loss: share of right images that it may lose.
    """
    starts = range(0, len(measured.images), _BATCH)
    probabilities = np.concatenate([answer(measured.images[start : start + _BATCH]) for start in starts])
    right, right_before = measured.right(probabilities), measured.right(measured.probabilities)
    accuracy, before = float(right.mean()), float(right_before.mean())
    # Both saw the same images: what is right in both or in none says nothing of the difference.
    error = float(np.std(right_before.astype(float) - right) / np.sqrt(len(right)))
    same = (measured.decided(probabilities) == measured.decided(measured.probabilities)).all(axis=1)
    model_ms, export_ms = milliseconds([compiled(measured.model), answer], measured.images)
    difference = float(np.abs(probabilities - measured.probabilities).max())
    refused = ""
    # 0.98 − 0.97 is 0.010000000000000009 in floating point. A NaN is refused, too.
    if not (before - accuracy <= most_loss + 1e-9 and np.isfinite(difference)):
        refused = (
            f"{accuracy:.4f} of {len(measured.images)} test images are right, and {before:.4f} by the model itself: "
            f"{before - accuracy:.4f} less (standard error {error:.4f}), more than deploy.max_export_loss "
            f"{most_loss:g}."
        )
    return Export(
        format=kind,
        file="" if refused else path.name,
        images=len(measured.images),
        accuracy=accuracy,
        model_accuracy=before,
        loss_error=error,
        largest_difference=difference,
        agreement=float(same.mean()),
        cpu_ms=export_ms,
        model_cpu_ms=model_ms,
        megabytes=path.stat().st_size / 1e6,
        refused=refused,
    )


def _write_onnx(model: Any, path: Path, calibration: np.ndarray | None) -> None:
    write_classifier(model, path)
    if calibration is not None:
        quantise(path, path, calibration)


def open_onnx(path: Path) -> Answer:
    """Returns an ONNX file of `write_exports` as a function, on one core."""
    import onnxruntime  # pyright: ignore[reportMissingTypeStubs]

    ort: Any = onnxruntime
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probabilities"], {"images": images})[0]


def _litert(model: Any, calibration: np.ndarray | None) -> bytes:
    import keras
    import tensorflow as tf

    signature = tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8, name="images")
    archive: Any = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", lambda images: {"probabilities": model(images, training=False)}, [signature])
    with tempfile.TemporaryDirectory(prefix="cv-litert-") as folder:
        archive.write_out(folder, verbose=False)
        converter: Any = tf.lite.TFLiteConverter.from_saved_model(folder)
        if calibration is not None:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.representative_dataset = lambda: ([image[np.newaxis]] for image in calibration)
        try:
            return converter.convert()
        # The converter meets foreign layers with errors of many unrelated classes.
        except Exception as err:
            line = (str(err).strip() or type(err).__name__).splitlines()[0][:300]
            raise ExportError(f"Expected layers that convert to LiteRT. Received: {line}") from err


def _open_litert(path: Path) -> Answer:
    import tensorflow as tf

    with warnings.catch_warnings():
        # TensorFlow has its own interpreter still, and points to a package that would do the same.
        warnings.filterwarnings("ignore", ".*tf.lite.Interpreter is deprecated", UserWarning)
        interpreter: Any = tf.lite.Interpreter(model_path=str(path), num_threads=1)
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()

    def answer(images: np.ndarray) -> np.ndarray:
        if tuple(interpreter.get_input_details()[0]["shape"]) != images.shape:
            interpreter.resize_tensor_input(taken["index"], images.shape)
            interpreter.allocate_tensors()
        interpreter.set_tensor(taken["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(given["index"]).copy()

    interpreter.allocate_tensors()
    return answer
