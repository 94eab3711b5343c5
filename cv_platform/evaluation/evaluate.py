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

from cv_platform.config import ExperimentConfig
from cv_platform.datasets.packing import PackedSplit, open_split
from cv_platform.errors import InvalidDatasetError, TrainingError
from cv_platform.evaluation.gate import Champion, judge_promotion
from cv_platform.evaluation.metrics import (
    compute_metrics,
    confidence_of,
    confusion_matrix,
    expected_calibration_error,
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
from cv_platform.evaluation.report import render_report
from cv_platform.files import exclusive, whole_directory
from cv_platform.predictions import label_texts, one_hot, predicted_flags
from cv_platform.records import Evaluation, PackedImages, Task, TrainedModel
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
    trained: TrainedModel,
    packed: PackedImages,
    config: ExperimentConfig,
    *,
    champion: Champion | None,
    directory: Path,
    run: MlflowRun | None,
) -> Evaluation:
    """Evaluates a model on the test split and judges whether it may be promoted.

    Writes evaluation.json, report.html, predictions.parquet and plots (PNG) to `directory/<model_name>/<version>/`, all
    at once. A second evaluation of the same version replaces it.

    Args:
        trained: the model; takes `(N, H, W, 3)` uint8, returns `(N, C)` probabilities. The metric `ece_uncalibrated`
            shows what its temperature brings.
        packed: the pixels that it was trained beside; the split `test` is read.
        config: `evaluate` has the gate's limits, `model` the threshold of multi-label decisions.
        champion: what the version in production decides about the same images; None where there is none.
        directory: `home/evaluation`.
        run: MLflow run that metrics, plots and report are logged to; None logs nothing.

    Returns:
        The evaluation. A model that misses a limit gives `passed=False`, never an exception.

    Raises:
        VerdictError: the model was trained beside other images.
        InvalidDatasetError: the test split has no images.
        TrainingError: the model does not fit the class names, or gives probabilities that are not finite.
    """
    started = time.monotonic()
    test = open_split(packed, TEST_SPLIT, beside=trained)
    if not len(test.paths):
        raise InvalidDatasetError(
            f"Expected images in the test split of {packed.provenance}. Received: none. "
            "Add some, or look at its validation report for quarantined ones."
        )
    task, threshold = trained.task, config.model.threshold
    probabilities = predict_split(trained.keras_path, test, classes=len(task.class_names))
    decided = (np.asarray(test.targets), probabilities, task.classifier_type)
    metrics = compute_metrics(*decided, threshold)
    gate = judge_promotion(
        metrics,
        config.evaluate,
        champion,
        truth=one_hot(decided[0], len(task.class_names)),
        decisions=predicted_flags(probabilities, task.classifier_type, threshold),
        class_names=task.class_names,
    )
    metrics["ece_uncalibrated"] = uncalibrated_error(*decided, trained.temperature)
    metrics["temperature"] = trained.temperature
    metrics["images"] = float(len(test.paths))
    classes = zip(task.class_names, per_class_metrics(*decided, threshold), strict=True)
    target = directory / trained.model.model_name / trained.model.version
    evaluation = Evaluation(
        model=trained.model,
        passed=gate.passed,
        reasons=gate.reasons,
        threshold=threshold,
        metrics=metrics,
        per_class=[{"class": name, **row} for name, row in classes],
        confusion=confusion_matrix(*decided, threshold).tolist(),
        directory=target,
        plot_names=(
            "confusion_matrix" if task.classifier_type == "multi-class" else "per_class",
            "reliability",
            *(["worst_errors"] if config.evaluate.worst_errors else []),
        ),
        comparison=gate.comparison,
        mlflow_run_id=None if run is None else run.run_id,
    )
    with exclusive(target.with_name(f".{target.name}.lock")), whole_directory(target) as folder:
        # What the record says of its folder holds of this one too, until it gets its name.
        unfinished = evaluation.model_copy(update={"directory": folder})
        predictions = _predictions(test, probabilities, task, threshold)
        write_predictions(unfinished.predictions_path, predictions)
        _draw(unfinished, test, predictions, task, config.evaluate.worst_errors)
        unfinished.report_path.write_text(render_report(unfinished, packed.provenance, task), encoding="utf-8")
        (folder / "evaluation.json").write_text(evaluation.local_json(), encoding="utf-8")
    if run is not None:
        _log(run, evaluation)
    logger.info(
        "evaluated %s on %d images in %.1f s: accuracy %.4f, %s",
        trained.model,
        len(test.paths),
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


def _predictions(test: PackedSplit, probabilities: np.ndarray, task: Task, threshold: float) -> _Predictions:
    truth = one_hot(np.asarray(test.targets), len(task.class_names))
    decisions = predicted_flags(probabilities, task.classifier_type, threshold)
    return _Predictions(
        paths=test.paths,
        sha256=test.sha256,
        label=label_texts(truth, task.class_names),
        predicted_class=label_texts(decisions, task.class_names),
        correct=(truth == decisions).all(axis=1),
        confidence=confidence_of(probabilities, task.classifier_type, threshold),
        probabilities=probabilities,
    )


def _draw(evaluation: Evaluation, test: PackedSplit, predictions: _Predictions, task: Task, worst_count: int) -> None:
    """Writes the plots that the evaluation names."""
    plots = evaluation.plots
    if task.classifier_type == "multi-class":
        save_confusion_matrix(plots["confusion_matrix"], np.array(evaluation.confusion), task.class_names)
    else:
        save_per_class(plots["per_class"], evaluation.per_class, task.class_names)
    table = reliability(np.asarray(test.targets), predictions.probabilities, task.classifier_type)
    save_reliability(plots["reliability"], table, expected_calibration_error(table))
    if "worst_errors" in plots:
        worst = worst_errors(predictions.correct, predictions.confidence, worst_count)
        captions = [
            caption(predictions.label[i], predictions.predicted_class[i], float(predictions.confidence[i]))
            for i in worst
        ]
        save_worst_errors(plots["worst_errors"], [np.asarray(test.images[i]) for i in worst], captions)


def _log(run: MlflowRun, evaluation: Evaluation) -> None:
    run.log_metrics(evaluation.metrics)
    for path in evaluation.plots.values():
        run.log_artifact(path, "plots")
    for path in (evaluation.report_path, evaluation.predictions_path):
        run.log_artifact(path, "evaluation")
