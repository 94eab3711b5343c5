"""Which classes are predicted: one answer, whoever asks."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest

from cv_platform.drift.accuracy import confidences, decisions
from cv_platform.drift.localisation import class_movements
from cv_platform.drift.sample import DriftSample
from cv_platform.evaluation.metrics import confidence_of, confusion_matrix
from cv_platform.predictions import decide, known_decisions, known_labels, label_text, one_hot, predicted_flags
from cv_platform.serving.routes.answer import predicted_classes
from cv_platform.storage import BundleMetadata

THRESHOLD = 0.7
AT_THRESHOLD = np.float32(THRESHOLD)
BELOW = np.nextafter(AT_THRESHOLD, np.float32(0))
METADATA = BundleMetadata(
    model_name="cats",
    version="20260131T060000Z-1f3c9a2e",
    created_utc=datetime(2026, 1, 31, tzinfo=UTC),
    classifier_type="multi-label",
    class_names=("at", "below"),
    image_size=(8, 8),
    threshold=THRESHOLD,
    uae_dims=2,
    feature_dims=3,
    preprocessing_hash="p",
    encoder_hash="e",
    ds_name="cats",
    dvc_tag="v1",
    dvc_md5="m",
)


def test_at_the_threshold_every_path_predicts_and_just_below_none_does() -> None:
    assert float(AT_THRESHOLD) < THRESHOLD, "the case in which a comparison in float64 says otherwise"
    row = np.array([AT_THRESHOLD, BELOW], dtype=np.float32)
    rows = np.stack([row, row])
    everyone_right = np.array([[True, False]] * 2)

    # Evaluation: (true negatives, false positives, false negatives, true positives) of each class.
    assert confusion_matrix(everyone_right, rows, "multi-label", THRESHOLD).tolist() == [[0, 0, 0, 2], [2, 0, 0, 0]]
    expected = float(AT_THRESHOLD) * (1 - float(BELOW))
    assert confidence_of(rows, "multi-label", THRESHOLD) == pytest.approx([expected] * 2)
    # Drift.
    _, is_right = decisions(rows, everyone_right, "multi-label", THRESHOLD)
    assert is_right.all()
    assert confidences(rows, "multi-label", THRESHOLD) == pytest.approx([AT_THRESHOLD, 1 - float(BELOW)] * 2)
    sample = DriftSample(rows, rows, rows, np.zeros((2, 7), dtype=np.float32))
    movements = class_movements(
        sample, sample, class_names=("at", "below"), classifier_type="multi-label", threshold=THRESHOLD
    )
    assert {m.class_name: (m.reference_share, m.current_share) for m in movements} == {"at": (1, 1), "below": (0, 0)}
    # Serving.
    assert predicted_classes(row, METADATA) == ("at",)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_decision_does_not_depend_on_the_type_that_the_probability_is_held_in(dtype: type[np.generic]) -> None:
    probabilities = np.array([AT_THRESHOLD, BELOW, 1.0, 0.0]).astype(dtype)
    assert decide(probabilities, THRESHOLD).tolist() == [True, False, True, False]


def test_multi_class_predicts_one_class_whatever_the_threshold() -> None:
    probabilities = np.array([[0.4, 0.4, 0.2], [0.1, 0.2, 0.7]], dtype=np.float32)
    assert predicted_flags(probabilities, "multi-class", 0.9).tolist() == [[True, False, False], [False, False, True]]


def test_what_is_unknown_is_neither_right_nor_wrong_nor_decided():
    targets = np.array([[1, np.nan, 0], [np.nan, 0, 1]], np.float32)
    assert known_labels(targets, 3).tolist() == [[True, False, True], [False, True, True]]
    assert one_hot(targets, 3).tolist() == [[True, False, False], [False, False, True]]
    decisions = np.array([[True, True, False], [True, False, True]])
    assert known_decisions(decisions, targets).tolist() == one_hot(targets, 3).tolist()
    assert known_labels(np.array([2, 0]), 3).all()
    assert (label_text(["cat", "dog"]), label_text([], ["emu"])) == ("cat|dog", "no label (unknown: emu)")
