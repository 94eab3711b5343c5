"""Evaluates one model version: `evaluate_model` predicts the test split in one ordered pass and writes what it found.

Labels, paths and probabilities come from the same pass over the same order, so a row can never be paired with another
image's label.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cv_platform.compute.engine import Engine
from cv_platform.config import ClassifierType, ExperimentConfig, Threshold
from cv_platform.datasets.manifest import read_manifest
from cv_platform.datasets.packing import PackedSplit, open_split
from cv_platform.errors import InvalidDatasetError
from cv_platform.evaluation.classifier import Classifier, answer_split, predict, predict_split
from cv_platform.evaluation.gate import Champion, judge_promotion
from cv_platform.evaluation.heat_maps import grad_cam, overlay
from cv_platform.evaluation.intervals import (
    Interval,
    calibration_interval,
    class_intervals,
    mean_interval,
    mean_intervals,
    score_intervals,
    wilson,
)
from cv_platform.evaluation.latency import compiled, milliseconds
from cv_platform.evaluation.metrics import (
    TOP,
    binned,
    compute_metrics,
    confidence_of,
    confusion_matrix,
    expected_calibration_error,
    in_top,
    label_counts,
    losses,
    per_class_metrics,
    reliability,
    uncalibrated,
    uncalibrated_error,
)
from cv_platform.evaluation.neighbours import Neighbours
from cv_platform.evaluation.plots import (
    caption,
    save_confusion_matrix,
    save_per_class,
    save_reliability,
    save_worst_errors,
)
from cv_platform.evaluation.report import render_report
from cv_platform.evaluation.robustness import measure_robustness
from cv_platform.evaluation.slices import judge_slices, slice_columns
from cv_platform.evaluation.thresholds import best_thresholds
from cv_platform.files import exclusive, whole_directory
from cv_platform.predictions import (
    UNKNOWN_LABELS,
    known_decisions,
    known_labels,
    label_texts,
    one_hot,
    predicted_flags,
)
from cv_platform.records import Evaluation, PackedImages, Robustness, Task, TrainedModel
from cv_platform.tracking import MlflowRun

logger = logging.getLogger(__name__)

TEST_SPLIT = "test"


@dataclass(frozen=True)
class _Predictions:
    """One row per image of the test split, in its order; those that are `judged` have a known label."""

    paths: Sequence[str]
    sha256: Sequence[str]
    label: list[str]
    unknown_labels: list[str]
    predicted_class: list[str]
    judged: np.ndarray
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
    manifest: Path | None = None,
    neighbours: Neighbours | None = None,
    engine: Engine | None = None,
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
        manifest: of the images, whose columns give slices; None: only their pixels do.
        neighbours: finds the training images beside the worst errors; None shows none.
        engine: whose machines predict a split that takes long; None: this process alone.

    Returns:
        The evaluation. A model that misses a limit gives `passed=False`, never an exception.

    Raises:
        VerdictError: the model was trained beside other images.
        InvalidDatasetError: the test split has no images, or no label of them is known.
        TrainingError: the model does not fit the class names, or gives probabilities that are not finite.
    """
    started = time.monotonic()
    test = open_split(packed, TEST_SPLIT, beside=trained)
    if not len(test.paths):
        raise InvalidDatasetError(
            f"Expected images in the test split of {packed.provenance}. Received: none. "
            "Add some, or look at its validation report for quarantined ones."
        )
    targets = np.asarray(test.targets)
    judged = known_labels(targets, len(trained.task.class_names)).any(axis=1)
    if not judged.any():
        raise InvalidDatasetError(
            f"Expected known labels in the test split of {packed.provenance}. Received: {len(judged)} images, of which "
            "no label is known. Label some: cells that are blank or −1 say nothing."
        )
    classifier = Classifier.of(trained)
    probabilities, properties = answer_split(classifier, test, engine)
    model = classifier.model
    target = directory / trained.model.model_name / trained.model.version
    threshold = _threshold(classifier, trained, packed, config, engine)
    (cpu_ms,) = milliseconds([compiled(model)], np.asarray(test.images[:8]))
    if champion is not None and champion.decisions is not None:
        decisions = known_decisions(champion.decisions, targets)[judged]
        champion = replace(champion, decisions=decisions, seen=None if champion.seen is None else champion.seen[judged])
    measured = targets[judged], probabilities[judged]
    evaluation = _measured(trained, *measured, config, champion, threshold, cpu_ms).model_copy(
        update={
            "directory": target,
            "mlflow_run_id": None if run is None else run.run_id,
            "parameters": model.count_params(),
            "keras_bytes": trained.keras_path.stat().st_size,
            "robustness": _robustness(model, trained.task, test, judged, config, threshold),
        }
    )
    predictions = _predictions(test, probabilities, trained.task, evaluation.threshold)
    columns = slice_columns(properties, _rows(manifest, test.paths)).loc[judged].reset_index(drop=True)
    evaluation = evaluation.model_copy(update={"slices": judge_slices(columns, predictions.correct[judged])})
    with exclusive(target.with_name(f".{target.name}.lock")), whole_directory(target) as folder:
        # What the record says of its folder holds of this one too, until it gets its name.
        unfinished = evaluation.model_copy(update={"directory": folder})
        write_predictions(unfinished.predictions_path, predictions)
        _draw(unfinished, test, predictions, trained, worst_sheet(model, test, predictions, config, neighbours))
        page = render_report(unfinished, packed.provenance, trained.task)
        unfinished.report_path.write_text(page, encoding="utf-8")
        (folder / "evaluation.json").write_text(evaluation.local_json(), encoding="utf-8")
    if run is not None:
        _log(run, evaluation)
    logger.info(
        "evaluated %s on %d images in %.1f s: accuracy %.4f, %s",
        trained.model,
        len(test.paths),
        time.monotonic() - started,
        evaluation.metrics["accuracy"],
        "passed" if evaluation.passed else "; ".join(evaluation.reasons),
    )
    return evaluation


def _measured(
    trained: TrainedModel,
    targets: np.ndarray,
    probabilities: np.ndarray,
    config: ExperimentConfig,
    champion: Champion | None,
    threshold: Threshold,
    cpu_ms: float,
) -> Evaluation:
    """Returns the metrics with their intervals, and the gate's verdict; of images with a known label."""
    task = trained.task
    decided = (targets, probabilities, task.classifier_type)
    truth = one_hot(targets, len(task.class_names))
    decisions = known_decisions(predicted_flags(probabilities, task.classifier_type, threshold), targets)
    metrics = compute_metrics(*decided, threshold)
    gate = judge_promotion(
        metrics | {"cpu_ms": cpu_ms},
        config.evaluate,
        champion,
        truth=truth,
        decisions=decisions,
        class_names=task.class_names,
    )
    metrics["ece_uncalibrated"] = uncalibrated_error(*decided, trained.temperature)
    metrics["temperature"] = trained.temperature
    metrics["images"] = float(len(truth))
    aucs, ranked = score_intervals(truth, probabilities, known_labels(targets, len(task.class_names)))
    rows = zip(
        task.class_names,
        per_class_metrics(*decided, threshold),
        [ends | {"auc": auc} for ends, auc in zip(class_intervals(truth, decisions), aucs, strict=True)],
        strict=True,
    )
    return Evaluation(
        model=trained.model,
        passed=gate.passed,
        reasons=gate.reasons,
        threshold=threshold,
        metrics=metrics,
        intervals={
            name: ends
            for name, ends in (ranked | _intervals(*decided, threshold, truth, decisions)).items()
            if name in metrics
        },
        per_class=[
            {"class": name, **row, "intervals": {key: list(ends) for key, ends in intervals.items() if ends}}
            for name, row, intervals in rows
        ],
        confusion=confusion_matrix(*decided, threshold).tolist(),
        directory=trained.directory,
        plot_names=(
            "confusion_matrix" if task.classifier_type == "multi-class" else "per_class",
            "reliability",
            *(["worst_errors"] if config.evaluate.worst_errors else []),
        ),
        comparison=gate.comparison,
        cpu_ms=cpu_ms,
        mlflow_run_id=None,
    )


def _threshold(
    classifier: Classifier,
    trained: TrainedModel,
    packed: PackedImages,
    config: ExperimentConfig,
    engine: Engine | None,
) -> Threshold:
    """Returns the config's, or those that suit each class on the split that has chosen the model."""
    task, common = trained.task, config.model.threshold
    if config.evaluate.thresholds == "fixed" or task.classifier_type != "multi-label":
        return common
    valid = open_split(packed, "valid", beside=trained)
    targets, classes = np.asarray(valid.targets), len(task.class_names)
    probabilities = predict_split(classifier, valid, engine)
    return best_thresholds(one_hot(targets, classes), probabilities, common, known_labels(targets, classes))


def _intervals(
    targets: np.ndarray,
    probabilities: np.ndarray,
    kind: ClassifierType,
    threshold: Threshold,
    truth: np.ndarray,
    decisions: np.ndarray,
) -> dict[str, Interval]:
    exact, known = (truth == decisions).all(axis=1), known_labels(targets, truth.shape[1])
    counts = label_counts(known)
    found: dict[str, Interval | None] = dict(mean_intervals(truth, decisions))
    shares = {"accuracy" if kind == "multi-class" else "exact_match": exact}
    if kind == "multi-class":
        found["balanced_accuracy"] = found["macro_recall"]
        if probabilities.shape[1] > TOP:
            shares[f"top{TOP}_accuracy"] = in_top(targets, probabilities)
    else:
        right = ((truth == decisions) & known).sum(axis=1) / known.sum(axis=1)
        found["accuracy"] = mean_interval(right, counts, are_shares=True)
    confidence, right, place = binned(targets, probabilities, kind)
    intervals = {
        **{name: wilson(int(right.sum()), len(right)) for name, right in shares.items()},
        **{name: mean_interval(each, counts) for name, each in losses(truth, probabilities, kind, known).items()},
        "ece": calibration_interval(confidence - right, place),
        "mean_confidence": mean_interval(confidence_of(probabilities, kind, threshold)),
    }
    return {name: ends for name, ends in (found | intervals).items() if ends is not None}


def _robustness(
    model: Any, task: Task, test: PackedSplit, judged: np.ndarray, config: ExperimentConfig, threshold: Threshold
) -> tuple[Robustness, ...]:
    """Measures a seeded sample of the `judged` test images, the same for every model of a data version."""
    rows = np.flatnonzero(judged)
    wanted = min(config.evaluate.robustness_images, len(rows))
    if not wanted:
        return ()
    chosen = rows[np.sort(np.random.default_rng(0).permutation(len(rows))[:wanted])]
    targets = np.asarray(test.targets)[chosen]
    truth = one_hot(targets, len(task.class_names))

    def is_right(probabilities: np.ndarray) -> np.ndarray:
        flags = predicted_flags(probabilities, task.classifier_type, threshold)
        return (known_decisions(flags, targets) == truth).all(axis=1)

    return measure_robustness(np.asarray(test.images[chosen]), lambda images: predict(model, images), is_right)


def _rows(manifest: Path | None, paths: Sequence[str]) -> pd.DataFrame:
    """Returns the manifest's rows of these images, in their order; of no manifest, rows without columns."""
    if manifest is None:
        return pd.DataFrame(index=range(len(paths)))
    return read_manifest(manifest).set_index("path").loc[list(paths)].reset_index(drop=True)


def worst_sheet(
    model: Any,
    test: PackedSplit,
    predictions: _Predictions,
    config: ExperimentConfig,
    neighbours: Neighbours | None,
) -> tuple[list[np.ndarray], list[str]]:
    """Returns the images of the most confident mistakes with their captions.

    Each is beside its heat map, and the training image that looks most like it.
    """
    worst = worst_errors(predictions.correct, predictions.confidence, config.evaluate.worst_errors)
    images = np.asarray(test.images[worst])
    heat = grad_cam(model, images)
    sheets = (
        list(images)
        if heat is None
        else [np.hstack([image, overlay(image, cell)]) for image, cell in zip(images, heat, strict=True)]
    )
    captions = [
        caption(predictions.label[i], predictions.predicted_class[i], float(predictions.confidence[i]))
        + (f"\nnot known: {predictions.unknown_labels[i]}" if predictions.unknown_labels[i] else "")
        for i in worst
    ]
    if neighbours is not None and worst:
        names, train = config.model.classes, neighbours.train
        for at, row in enumerate(neighbours.nearest([test.paths[i] for i in worst])):
            if row is not None:
                sheets[at] = np.hstack([sheets[at], train.images[row]])
                shown = label_texts(one_hot(np.asarray(train.targets[row : row + 1]), len(names)), names)[0]
                captions[at] += f"\nnearest training image: {shown or 'none'}"
    return sheets, captions


def worst_errors(correct: np.ndarray, confidence: np.ndarray, count: int) -> list[int]:
    """Returns the positions of up to `count` mistakes, the most confident first, equals in order."""
    mistakes = np.flatnonzero(~correct)
    ranked = mistakes[np.argsort(-confidence[mistakes], kind="stable")]
    return [int(i) for i in ranked[:count]]


def write_predictions(path: Path, predictions: _Predictions) -> None:
    """Writes the parquet of predictions: a row per image, in the order of the split.

    `correct` is null of an image of which no label is known. Where labels are unknown a column names them.
    """
    width = predictions.probabilities.shape[1]
    flat = pa.array(np.ascontiguousarray(predictions.probabilities, dtype=np.float32).ravel())
    table = pa.table(
        {
            "path": pa.array(predictions.paths, pa.string()),
            "sha256": pa.array(predictions.sha256, pa.string()),
            "label": pa.array(predictions.label, pa.string()),
            **(
                {UNKNOWN_LABELS: pa.array(predictions.unknown_labels, pa.string())}
                if any(predictions.unknown_labels)
                else {}
            ),
            "predicted_class": pa.array(predictions.predicted_class, pa.string()),
            "correct": pa.array(predictions.correct, pa.bool_(), mask=~predictions.judged),
            "confidence": pa.array(predictions.confidence.astype(np.float32), pa.float32()),
            "probabilities": pa.FixedSizeListArray.from_arrays(flat, width),
        }
    )
    pq.write_table(table, path, compression="zstd")


def _predictions(test: PackedSplit, probabilities: np.ndarray, task: Task, threshold: Threshold) -> _Predictions:
    targets, names = np.asarray(test.targets), task.class_names
    truth, known = one_hot(targets, len(names)), known_labels(targets, len(names))
    decisions = predicted_flags(probabilities, task.classifier_type, threshold)
    return _Predictions(
        paths=test.paths,
        sha256=test.sha256,
        label=label_texts(truth, names),
        unknown_labels=label_texts(~known, names),
        predicted_class=label_texts(decisions, names),
        judged=known.any(axis=1),
        correct=(truth == known_decisions(decisions, targets)).all(axis=1),
        confidence=confidence_of(probabilities, task.classifier_type, threshold),
        probabilities=probabilities,
    )


def _draw(
    evaluation: Evaluation,
    test: PackedSplit,
    predictions: _Predictions,
    trained: TrainedModel,
    worst: tuple[list[np.ndarray], list[str]],
) -> None:
    """Writes the plots that the evaluation names."""
    plots, task = evaluation.plots, trained.task
    if task.classifier_type == "multi-class":
        save_confusion_matrix(plots["confusion_matrix"], np.array(evaluation.confusion), task.class_names)
    else:
        save_per_class(plots["per_class"], evaluation.per_class, task.class_names)
    targets, kind = np.asarray(test.targets), task.classifier_type
    table = reliability(targets, predictions.probabilities, kind)
    before = reliability(targets, uncalibrated(predictions.probabilities, kind, trained.temperature), kind)
    error = expected_calibration_error(table)
    save_reliability(plots["reliability"], table, error, before if trained.temperature != 1.0 else ())
    if "worst_errors" in plots:
        save_worst_errors(plots["worst_errors"], *worst)


def _log(run: MlflowRun, evaluation: Evaluation) -> None:
    run.log_metrics(evaluation.metrics)
    for path in evaluation.plots.values():
        run.log_artifact(path, "plots")
    for path in (evaluation.report_path, evaluation.predictions_path):
        run.log_artifact(path, "evaluation")
