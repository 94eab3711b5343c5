"""Evaluates one model version: `evaluate_model` predicts the test split in one ordered pass and writes what it found.

Labels, paths and probabilities come from the same pass over the same order, so a row can never be paired with another
image's label.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cv_platform.config import EvaluateConfig
from cv_platform.datasets.packing import PackedImages, PackedSplit, open_split
from cv_platform.errors import InvalidDatasetError, TrainingError
from cv_platform.evaluation.gate import judge_promotion
from cv_platform.evaluation.metrics import (
    compute_metrics,
    confidence_of,
    confusion_matrix,
    expected_calibration_error,
    one_hot,
    per_class_metrics,
    reliability,
    uncalibrated_error,
)
from cv_platform.evaluation.plots import (
    caption,
    save_confusion_matrix,
    save_per_class,
    save_reliability,
    save_worst_errors,
)
from cv_platform.evaluation.report import Evaluation, render_report
from cv_platform.files import exclusive, whole_directory
from cv_platform.predictions import LABEL_SEPARATOR, ClassifierType, predicted_flags
from cv_platform.tracking import MlflowRun

logger = logging.getLogger(__name__)

BATCH_SIZE = 256
TEST_SPLIT = "test"


@dataclass(frozen=True)
class _Predictions:
    """One row per image of the test split, in the split's order."""

    paths: Sequence[str]
    sha256: Sequence[str]
    label: list[str]
    predicted_class: list[str]
    correct: np.ndarray
    confidence: np.ndarray
    probabilities: np.ndarray


def evaluate_model(
    *,
    keras_path: Path,
    model_name: str,
    version: str,
    class_names: Sequence[str],
    classifier_type: ClassifierType,
    threshold: float,
    packed: PackedImages,
    config: EvaluateConfig,
    champion_accuracy: float | None,
    directory: Path,
    run: MlflowRun | None,
    temperature: float = 1.0,
) -> Evaluation:
    """Evaluates a model on the test split and judges whether it may be promoted.

    Writes evaluation.json, report.html, predictions.parquet and plots (PNG) to `directory/<model_name>/<version>/`, all
    at once. A second evaluation of the same version replaces it.

    Args:
        keras_path: the `.keras` file; takes `(N, H, W, 3)` uint8, returns `(N, C)` probabilities.
        model_name: name of the model.
        version: its version.
        class_names: in the order of the outputs.
        classifier_type: multi-class or multi-label.
        threshold: multi-label: probability from which a class is predicted; ignored for multi-class.
        packed: the pixels; the split `test` is read.
        config: gate limits and the number of worst errors to show.
        champion_accuracy: accuracy of the model in production; None when there is none.
        directory: `home/evaluation`.
        run: MLflow run that metrics, plots and report are logged to; None logs nothing.
        temperature: that the model's logits are divided by already; the metric `ece_uncalibrated` shows what it brings.

    Returns:
        The evaluation. A model that misses a limit gives `passed=False`, never an exception.

    Raises:
        InvalidDatasetError: the test split has no images.
        TrainingError: the model does not fit the data or class names, or gives probabilities that are not finite.
    """
    started = time.monotonic()
    if tuple(class_names) != packed.class_names or classifier_type != packed.classifier_type:
        raise TrainingError(
            f"Expected packed images of the model's classes, {classifier_type}: {', '.join(class_names)}. "
            f"Received: {packed.classifier_type}: {', '.join(packed.class_names)}. Materialise both again."
        )
    test = open_split(packed, TEST_SPLIT)
    if not len(test.paths):
        raise InvalidDatasetError(
            f"Expected images in the test split of {packed.ds_name} {packed.dvc_tag}. Received: none. "
            "Add some, or look at its validation report for quarantined ones."
        )
    targets = np.asarray(test.targets)
    probabilities = predict_split(keras_path, test, classes=len(class_names))
    metrics = compute_metrics(targets, probabilities, classifier_type, threshold)
    gate = judge_promotion(metrics, config, champion_accuracy)
    metrics["ece_uncalibrated"] = uncalibrated_error(targets, probabilities, classifier_type, temperature)
    metrics["temperature"] = temperature
    metrics["images"] = float(len(targets))
    per_class = [
        {"class": name, **row}
        for name, row in zip(
            class_names, per_class_metrics(targets, probabilities, classifier_type, threshold), strict=True
        )
    ]
    confusion = confusion_matrix(targets, probabilities, classifier_type, threshold)
    predictions = _predictions(test, targets, probabilities, class_names, classifier_type, threshold)

    target = directory / model_name / version
    with exclusive(target.with_name(f".{version}.lock")), whole_directory(target) as folder:
        write_predictions(folder / "predictions.parquet", predictions)
        plots: dict[str, Path] = {}
        if classifier_type == "multi-class":
            plots["confusion_matrix"] = folder / "confusion_matrix.png"
            save_confusion_matrix(plots["confusion_matrix"], confusion, class_names)
        else:
            plots["per_class"] = folder / "per_class.png"
            save_per_class(plots["per_class"], per_class, class_names)
        table = reliability(targets, probabilities, classifier_type)
        plots["reliability"] = folder / "reliability.png"
        save_reliability(plots["reliability"], table, expected_calibration_error(table))
        if config.worst_errors:
            plots["worst_errors"] = folder / "worst_errors.png"
            worst = worst_errors(predictions.correct, predictions.confidence, config.worst_errors)
            save_worst_errors(
                plots["worst_errors"],
                [np.asarray(test.images[i]) for i in worst],
                [
                    caption(predictions.label[i], predictions.predicted_class[i], float(predictions.confidence[i]))
                    for i in worst
                ],
            )
        page = render_report(
            title=f"Evaluation of {model_name}",
            facts=[
                ("version", version),
                ("dataset", f"{packed.ds_name} {packed.dvc_tag} ({packed.dvc_md5})"),
                ("test images", str(len(targets))),
                (
                    "labels",
                    classifier_type if classifier_type == "multi-class" else f"multi-label, threshold {threshold}",
                ),
            ],
            passed=gate.passed,
            reasons=gate.reasons,
            metrics=metrics,
            per_class=per_class,
            plots=plots,
        )
        (folder / "report.html").write_text(page, encoding="utf-8")
        evaluation = Evaluation(
            model_name=model_name,
            version=version,
            passed=gate.passed,
            reasons=gate.reasons,
            metrics=metrics,
            per_class=per_class,
            confusion=confusion.tolist(),
            predictions_path=target / "predictions.parquet",
            plots={name: target / path.name for name, path in plots.items()},
            report_path=target / "report.html",
            mlflow_run_id=None if run is None else run.run_id,
        )
        (folder / "evaluation.json").write_text(evaluation.model_dump_json(indent=2), encoding="utf-8")
    if run is not None:
        _log(run, evaluation)
    logger.info(
        "evaluated %s %s on %d images in %.1f s: accuracy %.4f, %s",
        model_name,
        version,
        len(targets),
        time.monotonic() - started,
        metrics["accuracy"],
        "passed" if gate.passed else "; ".join(gate.reasons),
    )
    return evaluation


def predict_split(keras_path: Path, split: PackedSplit, *, classes: int, batch_size: int = BATCH_SIZE) -> np.ndarray:
    """Predicts every image of a split, in its order.

    Returns:
        `(N, C)` float32 probabilities.

    Raises:
        TrainingError: the file is no model for these images and classes, or gives probabilities that are not finite.
    """
    import keras

    try:
        model: Any = keras.models.load_model(keras_path, compile=False)
    except (OSError, ValueError, TypeError) as err:
        raise TrainingError(f"{keras_path}: expected a Keras model. Received: {err}. Train the model again.") from err
    shape = tuple(model.output_shape)
    if len(shape) != 2 or shape[1] != classes:
        raise TrainingError(
            f"{keras_path}: expected a model with {classes} outputs, one per class. Received: output shape {shape}. "
            "Train the model again with this config."
        )
    # One compiled call per batch shape (there are at most two); `model.predict` would set up a data adapter as well.
    batches = [np.asarray(model.predict_on_batch(images), dtype=np.float32) for images, _ in split.batches(batch_size)]
    probabilities = np.concatenate(batches)
    broken = int((~np.isfinite(probabilities).all(axis=1)).sum())
    if broken or len(probabilities) != len(split.paths):
        raise TrainingError(
            f"{keras_path}: expected finite probabilities of {len(split.paths)} images. "
            f"Received: {len(probabilities)} rows, {broken} of them not finite. "
            "The training has diverged: lower train.init_lr and train again."
        )
    return probabilities


def worst_errors(correct: np.ndarray, confidence: np.ndarray, count: int) -> list[int]:
    """Returns the positions of up to `count` mistakes, the most confident first, equals in order."""
    mistakes = np.flatnonzero(~correct)
    ranked = mistakes[np.argsort(-confidence[mistakes], kind="stable")]
    return [int(i) for i in ranked[:count]]


def write_predictions(path: Path, predictions: _Predictions) -> None:
    """Writes the parquet of predictions: a row per image, in the order of the split."""
    width = predictions.probabilities.shape[1]
    flat = pa.array(np.ascontiguousarray(predictions.probabilities, dtype=np.float32).ravel())
    table = pa.table(
        {
            "path": pa.array(predictions.paths, pa.string()),
            "sha256": pa.array(predictions.sha256, pa.string()),
            "label": pa.array(predictions.label, pa.string()),
            "predicted_class": pa.array(predictions.predicted_class, pa.string()),
            "correct": pa.array(predictions.correct, pa.bool_()),
            "confidence": pa.array(predictions.confidence.astype(np.float32), pa.float32()),
            "probabilities": pa.FixedSizeListArray.from_arrays(flat, width),
        }
    )
    pq.write_table(table, path, compression="zstd")


def _predictions(
    test: PackedSplit,
    targets: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    classifier_type: ClassifierType,
    threshold: float,
) -> _Predictions:
    truth = one_hot(targets, len(class_names))
    decisions = predicted_flags(probabilities, classifier_type, threshold)
    return _Predictions(
        paths=test.paths,
        sha256=test.sha256,
        label=_joined(truth, class_names),
        predicted_class=_joined(decisions, class_names),
        correct=(truth == decisions).all(axis=1),
        confidence=confidence_of(probabilities, classifier_type, threshold),
        probabilities=probabilities,
    )


def _joined(flags: np.ndarray, class_names: Sequence[str]) -> list[str]:
    """Names the positive classes of each row, joined by the separator; none is the empty string."""
    return [LABEL_SEPARATOR.join(class_names[int(i)] for i in np.flatnonzero(row)) for row in flags]


def _log(run: MlflowRun, evaluation: Evaluation) -> None:
    run.log_metrics(evaluation.metrics)
    for path in evaluation.plots.values():
        run.log_artifact(path, "plots")
    for path in (evaluation.report_path, evaluation.predictions_path):
        run.log_artifact(path, "evaluation")
