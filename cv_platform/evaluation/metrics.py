"""Metrics of predictions against targets, as plain functions of arrays.

`targets` is `(N,)` int64 class indices for multi-class and `(N, C)` 0/1 for multi-label; `probabilities` is `(N, C)`,
of two classes or more. Rows belong together by position and nothing here reorders them. What cannot be computed (the
AUC of a class that the split does not have, say) is None, or left out of a mean; it is never NaN. What scikit-learn has
is scikit-learn's; its log loss clips by the dtype, and it has no calibration error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, logit, softmax
from sklearn import metrics as sklearn_metrics

from cv_platform.config import ClassifierType, Threshold
from cv_platform.predictions import one_hot, predicted_flags

CALIBRATION_BINS = 15
TOP = 3
_SMALLEST = 1e-7
"""Probabilities are kept this far from 0 and 1 in the log loss: the resolution of float32 near 1."""


@dataclass(frozen=True)
class ReliabilityBin:
    """One bin of a reliability diagram: predictions whose confidence is in (lower, upper]; the first bin includes 0.

    Attributes:
        lower: smallest confidence, 0–1.
        upper: largest confidence, 0–1.
        count: predictions in the bin.
        confidence: their mean confidence; none for an empty bin.
        accuracy: the share of them that is right; none for an empty bin.
    """

    lower: float
    upper: float
    count: int
    confidence: float | None
    accuracy: float | None


def compute_metrics(
    targets: np.ndarray, probabilities: np.ndarray, classifier_type: ClassifierType, threshold: Threshold = 0.5
) -> dict[str, float]:
    """Returns the scalar metrics, all in natural units (0–1, nats for the log loss).

    * `accuracy`: multi-class: share of right images; multi-label: mean over the classes of their accuracies.
    * `exact_match` (multi-label): share of images whose whole set of labels is right.
    * `top3_accuracy` (multi-class, more than three classes): share of images whose class is among the three likeliest.
    * `balanced_accuracy` (multi-class): mean recall of the classes that the split has, as `macro_recall` is.
    * `mean_average_precision` (multi-label): mean over the classes that the split has.
    * `macro_precision`, `macro_recall`, `macro_f1`: means of the classes that the split has.
    * `auc_macro`: mean one-versus-rest area under the ROC curve of the classes that have images with and without them.
    * `log_loss`, `brier`: multi-class: per image (Brier: summed over classes); multi-label: per image and class.
    * `ece`: expected calibration error in 15 bins, of the predicted class or (multi-label) of each class.
    * `mean_confidence`: of the predicted class (multi-label: of the predicted set, see `confidence_of`).

    Raises:
        ValueError: there are no rows, or the shapes do not belong together.
    """
    _require_shapes(targets, probabilities, classifier_type)
    probabilities = probabilities.astype(np.float64)
    truth = one_hot(targets, probabilities.shape[1])
    decisions = predicted_flags(probabilities, classifier_type, threshold)
    table = per_class_metrics(targets, probabilities, classifier_type, threshold)
    exact = (decisions == truth).all(axis=1)
    metrics: dict[str, float | None] = {}
    if classifier_type == "multi-class":
        metrics["accuracy"] = float(exact.mean())
    else:
        metrics["accuracy"] = float((decisions == truth).mean())
        metrics["exact_match"] = float(exact.mean())
    metrics |= {
        name: float(of_image.mean()) for name, of_image in losses(truth, probabilities, classifier_type).items()
    }
    for name in ("precision", "recall", "f1"):
        metrics[f"macro_{name}"] = _mean([row[name] for row in table if row["support"]])
    if classifier_type == "multi-class":
        metrics["balanced_accuracy"] = metrics["macro_recall"]
        if probabilities.shape[1] > TOP:
            metrics[f"top{TOP}_accuracy"] = float(in_top(targets, probabilities).mean())
    else:
        metrics["mean_average_precision"] = _mean(
            [
                float(sklearn_metrics.average_precision_score(positive, column)) if positive.any() else None
                for positive, column in zip(truth.T, probabilities.T, strict=True)
            ]
        )
    metrics["auc_macro"] = _mean([row["auc"] for row in table])
    metrics["ece"] = expected_calibration_error(reliability(targets, probabilities, classifier_type))
    metrics["mean_confidence"] = float(confidence_of(probabilities, classifier_type, threshold).mean())
    return {name: value for name, value in metrics.items() if value is not None}


def losses(truth: np.ndarray, probabilities: np.ndarray, classifier_type: ClassifierType) -> dict[str, np.ndarray]:
    """Returns `log_loss` and `brier` of each image, `(N,)`; `truth` is `(N, C)` bool."""
    squares = (probabilities - truth) ** 2
    if classifier_type == "multi-class":
        found = -np.log(np.clip(probabilities[truth], _SMALLEST, 1.0)), squares.sum(axis=1)
    else:
        chosen = np.clip(np.where(truth, probabilities, 1 - probabilities), _SMALLEST, 1.0)
        found = -np.log(chosen).mean(axis=1), squares.mean(axis=1)
    return {"log_loss": found[0], "brier": found[1]}


def in_top(targets: np.ndarray, probabilities: np.ndarray, top: int = TOP) -> np.ndarray:
    """Returns `(N,)` bool: whether the class `targets` is among the `top` likeliest."""
    likeliest = np.argpartition(-probabilities, top - 1, axis=1)[:, :top]
    return (likeliest == targets[:, None]).any(axis=1)


def per_class_metrics(
    targets: np.ndarray,
    probabilities: np.ndarray,
    classifier_type: ClassifierType,
    threshold: Threshold = 0.5,
) -> list[dict[str, float | None]]:
    """Returns a row per class, in order: precision, recall, f1, auc (0–1) and support (images of the class).

    Precision is None where the class is never predicted, recall where the split has no image of it, f1 where both are
    so, auc where every image or no image is of it.
    """
    truth = one_hot(targets, probabilities.shape[1])
    decisions = predicted_flags(probabilities, classifier_type, threshold)
    not_any: Any = np.nan  # The stubs of scikit-learn 1.7 know texts only.
    scores: Any = sklearn_metrics.precision_recall_fscore_support(truth, decisions, average=None, zero_division=not_any)
    aucs = [
        sklearn_metrics.roc_auc_score(positive, column) if 0 < positive.sum() < len(positive) else np.nan
        for positive, column in zip(truth.T, probabilities.T, strict=True)
    ]
    names = ("precision", "recall", "f1", "support", "auc")
    return [
        {name: None if np.isnan(value) else float(value) for name, value in zip(names, row, strict=True)}
        for row in zip(*scores, aucs, strict=True)
    ]


def confusion_matrix(
    targets: np.ndarray, probabilities: np.ndarray, classifier_type: ClassifierType, threshold: Threshold = 0.5
) -> np.ndarray:
    """Counts the decisions.

    Returns:
        Multi-class: `(C, C)` int64, row the true class, column the predicted one. Multi-label: `(C, 4)` int64, a row
        per class: true negatives, false positives, false negatives, true positives.
    """
    classes = probabilities.shape[1]
    decisions = predicted_flags(probabilities, classifier_type, threshold)
    if classifier_type == "multi-class":
        return sklearn_metrics.confusion_matrix(targets, decisions.argmax(axis=1), labels=np.arange(classes))
    return sklearn_metrics.multilabel_confusion_matrix(one_hot(targets, classes), decisions).reshape(classes, 4)


def confidence_of(probabilities: np.ndarray, classifier_type: ClassifierType, threshold: Threshold = 0.5) -> np.ndarray:
    """Returns `(N,)`: how probable the model holds its own answer to be.

    Multi-class: the largest probability. Multi-label: the product over the classes of the probability of each decision,
    that is of the whole predicted set if the classes were independent.
    """
    if classifier_type == "multi-class":
        return probabilities.max(axis=1)
    decisions = predicted_flags(probabilities, classifier_type, threshold)
    return np.where(decisions, probabilities, 1 - probabilities).prod(axis=1)


def reliability(
    targets: np.ndarray, probabilities: np.ndarray, classifier_type: ClassifierType, bins: int = CALIBRATION_BINS
) -> list[ReliabilityBin]:
    """Compares confidence with accuracy in `bins` bins of equal width.

    Multi-class: the predicted class's probability against whether it is right. Multi-label: every class's probability
    against whether the image has it.
    """
    confidence, right, place = (values.ravel() for values in binned(targets, probabilities, classifier_type, bins))
    edges = np.linspace(0.0, 1.0, bins + 1)
    table = []
    for index in range(bins):
        inside = place == index
        count = int(inside.sum())
        table.append(
            ReliabilityBin(
                lower=float(edges[index]),
                upper=float(edges[index + 1]),
                count=count,
                confidence=float(confidence[inside].mean()) if count else None,
                accuracy=float(right[inside].mean()) if count else None,
            )
        )
    return table


def binned(
    targets: np.ndarray, probabilities: np.ndarray, classifier_type: ClassifierType, bins: int = CALIBRATION_BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns each confidence of `reliability`, whether it is right, and its bin, `(N, 1)` or `(N, C)`."""
    confidence, right = probabilities, one_hot(targets, probabilities.shape[1])
    if classifier_type == "multi-class":
        best = probabilities.argmax(axis=1)[:, None]
        confidence, right = (np.take_along_axis(values, best, axis=1) for values in (confidence, right))
    edges = np.linspace(0.0, 1.0, bins + 1)
    return confidence, right, np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)


def expected_calibration_error(table: list[ReliabilityBin]) -> float | None:
    """Returns the mean distance between confidence and accuracy, weighted by the bins' counts; None without any."""
    total = sum(row.count for row in table)
    if not total:
        return None
    gaps = [
        abs(row.confidence - row.accuracy) * row.count
        for row in table
        if row.confidence is not None and row.accuracy is not None
    ]
    return sum(gaps) / total


def uncalibrated(probabilities: np.ndarray, classifier_type: ClassifierType, temperature: float) -> np.ndarray:
    """Returns what `probabilities` would be without their temperature.

    Multi-class: `p ∝ softmax(z / T)`, so the logits are `T log p` but for a constant; multi-label: `T logit(p)`.
    """
    inside = np.clip(probabilities.astype(np.float64), _SMALLEST, 1 - _SMALLEST)
    if classifier_type == "multi-class":
        return softmax(temperature * np.log(inside), axis=1)
    return expit(temperature * logit(inside))


def uncalibrated_error(
    targets: np.ndarray, probabilities: np.ndarray, classifier_type: ClassifierType, temperature: float
) -> float:
    """Returns the expected calibration error that `probabilities` would have without their temperature."""
    before = uncalibrated(probabilities, classifier_type, temperature)
    error = expected_calibration_error(reliability(targets, before, classifier_type))
    assert error is not None  # There is a row: `compute_metrics` has seen to it.
    return error


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _require_shapes(targets: np.ndarray, probabilities: np.ndarray, classifier_type: ClassifierType) -> None:
    expected = (len(probabilities),) if classifier_type == "multi-class" else probabilities.shape
    if probabilities.ndim != 2 or not len(probabilities) or targets.shape != expected:
        raise ValueError(
            f"Expected (N, C) probabilities of one image or more and {classifier_type} targets for them. "
            f"Received: probabilities {probabilities.shape}, targets {targets.shape}."
        )
