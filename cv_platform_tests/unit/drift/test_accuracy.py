from __future__ import annotations

import numpy as np
import pytest

from cv_platform.drift.accuracy import estimate_accuracy


def multi_class(confidences: list[float]) -> np.ndarray:
    """Two classes; the first is predicted with these confidences."""
    return np.array([[c, 1 - c] for c in confidences], dtype=np.float32)


REFERENCE = multi_class([0.6, 0.7, 0.8, 0.9])
TARGETS = np.array([[False, True], [True, False], [True, False], [True, False]])  # The least confident is wrong.


def test_estimates_by_hand() -> None:
    estimate = estimate_accuracy(
        REFERENCE, TARGETS, multi_class([0.65, 0.95]), classifier_type="multi-class", has_drifted=False
    )
    assert estimate.reference_accuracy == 0.75
    assert estimate.average_confidence == pytest.approx(0.8)
    assert estimate.difference_of_confidences == pytest.approx(0.75 + 0.8 - 0.75)
    # Three of four reference images are right, so the threshold is the third largest confidence, .7.
    assert estimate.thresholded_confidence == 0.5
    assert estimate.is_reliable


def test_estimates_of_the_reference_itself_are_its_accuracy() -> None:
    estimate = estimate_accuracy(REFERENCE, TARGETS, REFERENCE, classifier_type="multi-class", has_drifted=False)
    assert estimate.difference_of_confidences == pytest.approx(0.75)
    assert estimate.thresholded_confidence == 0.75


def test_no_estimate_is_reliable_while_drift_fires() -> None:
    estimate = estimate_accuracy(REFERENCE, TARGETS, REFERENCE, classifier_type="multi-class", has_drifted=True)
    assert not estimate.is_reliable


def test_intervals_hold_the_true_accuracy_of_a_calibrated_model_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)

    def drawn(rows: int) -> tuple[np.ndarray, np.ndarray]:
        probabilities = multi_class(rng.uniform(0.5, 1.0, rows).tolist())
        is_first = rng.random(rows) < probabilities[:, 0]
        return probabilities, np.stack([is_first, ~is_first], axis=1)

    held = 0
    for _ in range(60):
        estimate = estimate_accuracy(*drawn(300), drawn(200)[0], classifier_type="multi-class", has_drifted=False)
        low, high = estimate.intervals["difference_of_confidences"]
        held += low <= 0.75 <= high  # The mean of the confidences, which are those of a coin that is as sure.
    assert 50 <= held <= 60  # Fewer than 51 of 60 have a chance of 1 in 1,000 at 95 %.


def test_an_estimate_from_one_image_knows_nothing() -> None:
    estimate = estimate_accuracy(REFERENCE, TARGETS, REFERENCE[:1], classifier_type="multi-class", has_drifted=False)
    low, high = estimate.intervals["difference_of_confidences"]
    assert low < estimate.difference_of_confidences < high


def test_multi_label_counts_single_decisions() -> None:
    reference = np.array([[0.9, 0.2], [0.4, 0.7]], dtype=np.float32)
    targets = np.array([[True, False], [True, True]])  # Of four decisions, only the .4 is wrong.
    current = np.array([[0.5, 0.1]], dtype=np.float32)
    estimate = estimate_accuracy(
        reference, targets, current, classifier_type="multi-label", threshold=0.5, has_drifted=False
    )
    assert estimate.reference_accuracy == 0.75
    assert estimate.average_confidence == pytest.approx((0.5 + 0.9) / 2)
    # Reference confidences .9, .8, .6, .7: three right ones reach .7; of the current ones .5 and .9, one does.
    assert estimate.thresholded_confidence == 0.5


def test_a_model_that_is_never_right_has_no_accuracy_to_expect() -> None:
    estimate = estimate_accuracy(REFERENCE, ~TARGETS, REFERENCE[:1], classifier_type="multi-class", has_drifted=False)
    assert estimate.reference_accuracy == 0.25
    wrong = np.zeros_like(TARGETS)
    nothing = estimate_accuracy(REFERENCE, wrong, REFERENCE, classifier_type="multi-class", has_drifted=False)
    assert (nothing.thresholded_confidence, nothing.difference_of_confidences) == (0.0, 0.0)


def test_refuses_misaligned_or_missing_rows() -> None:
    with pytest.raises(ValueError, match="Expected targets of shape"):
        estimate_accuracy(REFERENCE, TARGETS[:2], REFERENCE, classifier_type="multi-class", has_drifted=False)
    with pytest.raises(ValueError, match="at least one"):
        estimate_accuracy(REFERENCE, TARGETS, REFERENCE[:0], classifier_type="multi-class", has_drifted=False)


def test_unknown_labels_of_the_reference_count_for_nothing():
    rng = np.random.default_rng(4)
    probabilities = rng.random((300, 2)).astype(np.float32)
    targets = rng.random((300, 2)) < probabilities
    known = rng.random((300, 2)) < 0.6
    options = {"classifier_type": "multi-label", "has_drifted": False}
    hidden = estimate_accuracy(probabilities, targets & known, probabilities, **options, reference_known=known)
    spoilt = np.where(known, targets, ~targets)
    assert estimate_accuracy(probabilities, spoilt, probabilities, **options, reference_known=known) == hidden
    right = (probabilities >= 0.5) == targets
    assert hidden.reference_accuracy == pytest.approx(right[known].mean())
    whole = estimate_accuracy(probabilities, targets, probabilities, **options)
    assert estimate_accuracy(probabilities, targets, probabilities, **options, reference_known=known | True) == whole
    with pytest.raises(ValueError, match="Expected reference rows with known labels"):
        estimate_accuracy(probabilities, targets, probabilities, **options, reference_known=known & False)
