"""Metrics of predictions against targets, as plain functions of arrays.

`targets` is `(N,)` int64 class indices for multi-class and `(N, C)` for multi-label: 0, 1, or NaN where nobody knows;
what is measured of several labels is measured on the known ones. `probabilities` is `(N, C)`, of two classes or more.
Rows belong together by position and nothing here reorders them. What cannot be computed (the AUC of a class that the
split does not have, say) is None, or left out of a mean; it is never NaN. What scikit-learn has is scikit-learn's; its
log loss clips by the dtype, and it has no calibration error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, logit, softmax
from sklearn import metrics as sklearn_metrics

from cv_platform.config import ClassifierType, Threshold
from cv_platform.predictions import known_decisions, known_labels, one_hot, predicted_flags

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

    * `accuracy`: multi-class: share of right images; multi-label: share of right decisions about known labels, which is
      the mean over the classes of their accuracies where all are known.
    * `exact_match` (multi-label): share of images whose labels are all right, as far as they are known.
    * `top3_accuracy` (multi-class, more than three classes): share of images whose class is among the three likeliest.
    * `balanced_accuracy` (multi-class): mean recall of the classes that the split has, as `macro_recall` is.
    * `mean_average_precision` (multi-label): mean over the classes that the split has.
    * `macro_precision`, `macro_recall`, `macro_f1`: means of the classes that the split has.
    * `auc_macro`: mean one-versus-rest area under the ROC curve of the classes that have images with and without them.
    * `log_loss`, `brier`: multi-class: per image (Brier: summed over classes); multi-label: per known label.
    * `ece`: expected calibration error in 15 bins, of the predicted class or (multi-label) of each known label.
    * `mean_confidence`: of the predicted class (multi-label: of the predicted set, see `confidence_of`).
    * `known_label_share`: where labels are unknown, the share of the others.

    Raises:
        ValueError: there are no rows, one of them has no known label, or the shapes do not belong together.
    """
    _require_shapes(targets, probabilities, classifier_type)
    probabilities = probabilities.astype(np.float64)
    truth, known = one_hot(targets, probabilities.shape[1]), known_labels(targets, probabilities.shape[1])
    decisions = known_decisions(predicted_flags(probabilities, classifier_type, threshold), targets)
    table = per_class_metrics(targets, probabilities, classifier_type, threshold)
    exact = (decisions == truth).all(axis=1)
    metrics: dict[str, float | None] = {}
    if classifier_type == "multi-class":
        metrics["accuracy"] = float(exact.mean())
    else:
        metrics["accuracy"] = float((decisions == truth)[known].mean())
        metrics["exact_match"] = float(exact.mean())
    metrics |= {
        name: float(np.average(of_image, weights=label_counts(known)))
        for name, of_image in losses(truth, probabilities, classifier_type, known).items()
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
                float(sklearn_metrics.average_precision_score(positive[of], column[of])) if positive.any() else None
                for positive, column, of in zip(truth.T, probabilities.T, known.T, strict=True)
            ]
        )
    metrics["auc_macro"] = _mean([row["auc"] for row in table])
    metrics["ece"] = expected_calibration_error(reliability(targets, probabilities, classifier_type))
    metrics["mean_confidence"] = float(confidence_of(probabilities, classifier_type, threshold).mean())
    if not known.all():
        metrics["known_label_share"] = float(known.mean())
    return {name: value for name, value in metrics.items() if value is not None}


def label_counts(known: np.ndarray) -> np.ndarray | None:
    """Returns how many labels of each image are known, `(N,)`: the weights of its means; None where all are."""
    return None if known.all() else known.sum(axis=1)


def losses(
    truth: np.ndarray, probabilities: np.ndarray, classifier_type: ClassifierType, known: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns `log_loss` and `brier` of each image, `(N,)`, of several labels their means over the known ones.

    `truth` and `known` are `(N, C)` bool; each image has a known label.
    """
    squares = (probabilities - truth) ** 2
    if classifier_type == "multi-class":
        found = -np.log(np.clip(probabilities[truth], _SMALLEST, 1.0)), squares.sum(axis=1)
    else:
        chosen = np.clip(np.where(truth, probabilities, 1 - probabilities), _SMALLEST, 1.0)
        count = known.sum(axis=1).astype(squares.dtype)
        found = tuple((values * known).sum(axis=1) / count for values in (-np.log(chosen), squares))
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

    Where labels are unknown there is `known`, too: images of which it is known whether they show the class; the others
    count for nothing. Precision is None where the class is never predicted, recall where the split has no image of it,
    f1 where both are so, auc where every image or no image is of it.
    """
    truth, known = one_hot(targets, probabilities.shape[1]), known_labels(targets, probabilities.shape[1])
    decisions = known_decisions(predicted_flags(probabilities, classifier_type, threshold), targets)
    not_any: Any = np.nan  # The stubs of scikit-learn 1.7 know texts only.
    scores: Any = sklearn_metrics.precision_recall_fscore_support(truth, decisions, average=None, zero_division=not_any)
    aucs = [
        sklearn_metrics.roc_auc_score(positive[of], column[of]) if 0 < positive.sum() < of.sum() else np.nan
        for positive, column, of in zip(truth.T, probabilities.T, known.T, strict=True)
    ]
    columns = dict(zip(("precision", "recall", "f1", "support"), scores, strict=True)) | {"auc": aucs}
    columns |= {} if known.all() else {"known": known.sum(axis=0)}
    return [
        {name: None if np.isnan(value) else float(value) for name, value in zip(columns, row, strict=True)}
        for row in zip(*columns.values(), strict=True)
    ]


def confusion_matrix(
    targets: np.ndarray, probabilities: np.ndarray, classifier_type: ClassifierType, threshold: Threshold = 0.5
) -> np.ndarray:
    """Counts the decisions.

    Returns:
        Multi-class: `(C, C)` int64, row the true class, column the predicted one. Multi-label: `(C, 4)` int64, a row
        per class, of known labels: true negatives, false positives, false negatives, true positives.
    """
    classes = probabilities.shape[1]
    decisions = known_decisions(predicted_flags(probabilities, classifier_type, threshold), targets)
    if classifier_type == "multi-class":
        return sklearn_metrics.confusion_matrix(targets, decisions.argmax(axis=1), labels=np.arange(classes))
    counts = sklearn_metrics.multilabel_confusion_matrix(one_hot(targets, classes), decisions).reshape(classes, 4)
    counts[:, 0] -= (~known_labels(targets, classes)).sum(axis=0)
    return counts


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
    against whether the image has it, where that is known.
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
    """Returns each confidence of `reliability`, whether it is right, and its bin, `(N, 1)` or `(N, C)`.

    The bin is −1 where nobody knows what is right.
    """
    confidence, right = probabilities, one_hot(targets, probabilities.shape[1])
    if classifier_type == "multi-class":
        best = probabilities.argmax(axis=1)[:, None]
        confidence, right = (np.take_along_axis(values, best, axis=1) for values in (confidence, right))
    edges = np.linspace(0.0, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    return confidence, right, np.where(known_labels(targets, place.shape[1]), place, -1)


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
    if not known_labels(targets, probabilities.shape[1]).any(axis=1).all():
        raise ValueError("Expected a known label of each image. Received: images without one. Leave them out.")
