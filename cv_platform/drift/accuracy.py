"""Estimates of the accuracy on images without labels, from the model's own confidence.

Each has an interval: what it would be for other images of the same kinds, drawn anew on both sides. They hold while the
model is as well calibrated as on the reference, which is exactly what drift breaks: under heavy noise a measured
accuracy of .11 was estimated above .84. So every estimate carries `is_reliable`, false while drift fires.

Sources:
    Hendrycks & Gimpel 2017, arXiv 1610.02136 (average confidence); NannyML's CBPE is its calibrated form.
    Guillory et al. 2021, "Predicting with Confidence on Unseen Distributions", arXiv 2107.03315 (DoC).
    Garg et al. 2022, "Leveraging Unlabeled Data to Predict Out-of-Distribution Performance", arXiv 2201.04234 (ATC).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cv_platform.config import ClassifierType, Threshold
from cv_platform.drift.sample import Float32Matrix
from cv_platform.predictions import decide
from cv_platform.records import AccuracyEstimate

_RESAMPLES = 200


def estimate_accuracy(
    reference_probabilities: Float32Matrix,
    reference_targets: NDArray[np.bool_],
    current_probabilities: Float32Matrix,
    *,
    classifier_type: ClassifierType,
    threshold: Threshold = 0.5,
    has_drifted: bool,
    reference_known: NDArray[np.bool_] | None = None,
) -> AccuracyEstimate:
    """Estimates the accuracy on the current images.

    Args:
        reference_probabilities: `(N, C)` float32.
        reference_targets: `(N, C)` bool, the true classes of each reference image (one per row for multi-class).
        current_probabilities: `(M, C)` float32.
        classifier_type: see `decisions`.
        threshold: multi-label only.
        has_drifted: the verdict on the current images.
        reference_known: `(N, C)` bool, which of the targets are known (multi-label); None: all. The others' decisions
            count for nothing.

    Raises:
        ValueError: there is no row on one side, or shapes differ, or no target is known.
    """
    if reference_probabilities.shape != reference_targets.shape:
        raise ValueError(
            f"Expected targets of shape {reference_probabilities.shape}. Received: {reference_targets.shape}."
        )
    if not len(reference_probabilities) or not len(current_probabilities):
        raise ValueError("Expected at least one reference and one current row. Received: none on one side.")
    counted = None
    if classifier_type == "multi-label" and reference_known is not None and not reference_known.all():
        told = reference_known.any(axis=1)
        if not told.any():
            raise ValueError("Expected reference rows with known labels. Received: none.")
        reference_probabilities, reference_targets = reference_probabilities[told], reference_targets[told]
        counted = reference_known[told]
    known, is_right = decisions(reference_probabilities, reference_targets, classifier_type, threshold)
    current = confidences(current_probabilities, classifier_type, threshold)
    # An image's decisions are drawn together.
    known, is_right = known.reshape(len(reference_targets), -1), is_right.reshape(len(reference_targets), -1)
    current, rng = current.reshape(len(current_probabilities), -1), np.random.default_rng(0)

    def counting(rows: NDArray[np.intp]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        inside = slice(None) if counted is None else counted[rows]
        return known[rows][inside], is_right[rows][inside]

    drawn = [
        _estimates(*counting(rows), current[rng.choice(len(current), len(current))])
        for rows in (rng.choice(len(known), len(known)) for _ in range(_RESAMPLES))
    ]
    known, is_right = counting(np.arange(len(known)))
    estimates = _estimates(known, is_right, current)
    bounds = {name: np.quantile([one[name] for one in drawn], (0.025, 0.975)).tolist() for name in estimates}
    return AccuracyEstimate(
        **estimates,
        reference_accuracy=float(is_right.mean()),
        is_reliable=not has_drifted,
        intervals={name: (low, high) for name, (low, high) in bounds.items()},
    )


def _estimates(
    known: NDArray[np.float64], is_right: NDArray[np.bool_], current: NDArray[np.float64]
) -> dict[str, float]:
    """Returns the three of `AccuracyEstimate` from the decisions of a reference and those to judge."""
    accuracy = float(is_right.mean())
    difference = accuracy + float(current.mean()) - float(known.mean())
    return {
        "average_confidence": float(current.mean()),
        "difference_of_confidences": min(1.0, max(0.0, difference)),
        "thresholded_confidence": _thresholded(known.ravel(), accuracy, current),
    }


def confidences(
    probabilities: Float32Matrix, classifier_type: ClassifierType, threshold: Threshold
) -> NDArray[np.float64]:
    """Returns the model's confidence in each decision: `(N,)` for multi-class, `(N·C,)` for multi-label."""
    values = probabilities.astype(np.float64)
    if classifier_type == "multi-class":
        return values.max(axis=1)
    return np.where(decide(probabilities, threshold), values, 1.0 - values).ravel()


def decisions(
    probabilities: Float32Matrix, targets: NDArray[np.bool_], classifier_type: ClassifierType, threshold: Threshold
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Returns each decision's confidence, and whether it is right.

    A multi-class model makes one decision per image, a multi-label model one per image and class.
    """
    if classifier_type == "multi-class":
        is_right = targets[np.arange(len(targets)), probabilities.argmax(axis=1)]
    else:
        is_right = (decide(probabilities, threshold) == targets).ravel()
    return confidences(probabilities, classifier_type, threshold), is_right


def _thresholded(reference: NDArray[np.float64], accuracy: float, current: NDArray[np.float64]) -> float:
    """ATC: the share of current decisions at or above the confidence that `accuracy` of the reference ones reach."""
    right = round(accuracy * len(reference))
    if right == 0:
        return 0.0
    return float((current >= np.partition(reference, len(reference) - right)[len(reference) - right]).mean())
