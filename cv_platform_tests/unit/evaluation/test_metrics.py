from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn import metrics as oracle

from cv_platform.config import ClassifierType
from cv_platform.evaluation.metrics import (
    compute_metrics,
    confidence_of,
    confusion_matrix,
    expected_calibration_error,
    per_class_metrics,
    reliability,
    uncalibrated_error,
)
from cv_platform.predictions import predicted_flags


def _multi_class(seed: int, count: int = 300, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, classes, count)
    logits = generator.normal(size=(count, classes)) + 1.5 * np.eye(classes)[targets]
    odds = np.exp(logits)
    return targets, (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)


def _multi_label(seed: int, count: int = 300, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    targets = (generator.random((count, classes)) < 0.3).astype(np.float32)
    logits = generator.normal(size=(count, classes)) + 2 * targets - 1
    return targets, (1 / (1 + np.exp(-logits))).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_multi_class_metrics_agree_with_scikit_learn(seed):
    targets, probabilities = _multi_class(seed)
    predicted = probabilities.argmax(axis=1)
    precise = probabilities.astype(np.float64)
    found = compute_metrics(targets, probabilities, "multi-class")
    assert found["accuracy"] == pytest.approx(oracle.accuracy_score(targets, predicted))
    assert found["macro_f1"] == pytest.approx(oracle.f1_score(targets, predicted, average="macro"))
    assert found["log_loss"] == pytest.approx(
        oracle.log_loss(targets, precise / precise.sum(1, keepdims=True)), abs=1e-6
    )
    areas = [oracle.roc_auc_score(targets == k, precise[:, k]) for k in range(5)]
    assert found["auc_macro"] == pytest.approx(sum(map(float, areas)) / 5)
    table = per_class_metrics(targets, probabilities, "multi-class")
    expected = oracle.precision_recall_fscore_support(targets, predicted)
    for name, column in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [row[name] for row in table] == pytest.approx(np.asarray(column).tolist())
    matrix = confusion_matrix(targets, probabilities, "multi-class")
    assert np.array_equal(matrix, oracle.confusion_matrix(targets, predicted))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
def test_multi_label_metrics_agree_with_scikit_learn(threshold):
    targets, probabilities = _multi_label(7)
    predicted = probabilities >= np.float32(threshold)
    found = compute_metrics(targets, probabilities, "multi-label", threshold)
    accuracies = [oracle.accuracy_score(targets[:, k], predicted[:, k]) for k in range(4)]
    assert found["accuracy"] == pytest.approx(np.mean(accuracies))
    assert found["exact_match"] == pytest.approx(oracle.accuracy_score(targets, predicted))
    assert found["macro_f1"] == pytest.approx(oracle.f1_score(targets, predicted, average="macro"))
    assert found["auc_macro"] == pytest.approx(oracle.roc_auc_score(targets, probabilities))
    losses = [oracle.log_loss(targets[:, k], probabilities[:, k].astype(np.float64)) for k in range(4)]
    assert found["log_loss"] == pytest.approx(np.mean(losses), abs=1e-6)
    briers = [oracle.brier_score_loss(targets[:, k], probabilities[:, k]) for k in range(4)]
    assert found["brier"] == pytest.approx(np.mean(briers), abs=1e-6)
    matrix = confusion_matrix(targets, probabilities, "multi-label", threshold)
    assert np.array_equal(matrix, oracle.multilabel_confusion_matrix(targets, predicted).reshape(4, 4))


def test_multi_class_metrics_by_hand():
    targets = np.array([0, 1, 1])
    probabilities = np.array([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]])
    found = compute_metrics(targets, probabilities, "multi-class")
    assert found["accuracy"] == pytest.approx(2 / 3)
    # Class 0: one hit, two guesses, one image: F1 2/3. Class 1: one hit, one guess, two images: F1 2/3.
    assert found["macro_f1"] == pytest.approx(2 / 3)
    assert found["auc_macro"] == 1.0
    assert found["log_loss"] == pytest.approx(-(np.log(0.8) + np.log(0.4) + np.log(0.9)) / 3)
    # Squared errors: .04 + .04, .36 + .36, .01 + .01.
    assert found["brier"] == pytest.approx(0.82 / 3)
    # Each prediction is alone in its bin: |.8 − 1|, |.6 − 0|, |.9 − 1|.
    assert found["ece"] == pytest.approx((0.2 + 0.6 + 0.1) / 3)
    assert found["mean_confidence"] == pytest.approx((0.8 + 0.6 + 0.9) / 3)


def test_labels_that_belong_to_other_rows_ruin_every_metric():
    targets = np.arange(60) % 3
    probabilities = np.eye(3)[targets] * 0.97 + 0.01
    right = compute_metrics(targets, probabilities, "multi-class")
    assert (right["accuracy"], right["macro_f1"], right["auc_macro"]) == (1.0, 1.0, 1.0)
    shifted = compute_metrics(np.roll(targets, 1), probabilities, "multi-class")
    assert (shifted["accuracy"], shifted["macro_f1"]) == (0.0, 0.0)
    assert shifted["auc_macro"] < 0.5
    together = np.random.default_rng(0).permutation(60)
    assert compute_metrics(targets[together], probabilities[together], "multi-class") == pytest.approx(right)


def test_a_class_without_images_is_left_out_of_the_means_and_has_no_recall():
    targets, probabilities = _multi_class(1, classes=3)
    present = targets != 2
    targets, probabilities = targets[present], probabilities[present]
    predicted = probabilities.argmax(axis=1)
    found = compute_metrics(targets, probabilities, "multi-class")
    assert found["macro_f1"] == pytest.approx(oracle.f1_score(targets, predicted, average="macro", labels=[0, 1]))
    table = per_class_metrics(targets, probabilities, "multi-class")
    assert table[2]["support"] == 0
    assert table[2]["recall"] is None
    assert table[2]["auc"] is None
    assert table[2]["precision"] == 0.0
    assert all(np.isfinite(value) for value in found.values())


def test_a_split_with_one_class_has_no_auc():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2]])
    found = compute_metrics(np.array([0, 0]), probabilities, "multi-class")
    assert "auc_macro" not in found
    assert found["accuracy"] == found["macro_f1"] == 1.0
    never = per_class_metrics(np.array([0, 0]), probabilities, "multi-class")[1]
    assert never == {"precision": None, "recall": None, "f1": None, "auc": None, "support": 0.0}


def test_auc_counts_ties_half():
    table = per_class_metrics(np.array([1, 1, 0]), np.array([[0.1, 0.9], [0.5, 0.5], [0.5, 0.5]]), "multi-class")
    assert [row["auc"] for row in table] == [0.75, 0.75]


def test_a_perfect_and_confident_model_has_finite_losses():
    found = compute_metrics(np.array([0, 1]), np.array([[1.0, 0.0], [1.0, 0.0]]), "multi-class")
    assert found["log_loss"] == pytest.approx(-np.log(1e-7) / 2)


def test_the_threshold_belongs_to_the_positive_side_in_the_models_own_type():
    probabilities = np.array([[0.7, 0.69999]], dtype=np.float32)
    assert predicted_flags(probabilities, "multi-label", 0.7).tolist() == [[True, False]]
    assert predicted_flags(probabilities.astype(np.float64), "multi-label", 0.7).tolist() == [[True, False]]


def test_of_equal_probabilities_the_first_class_wins():
    assert predicted_flags(np.array([[0.25, 0.25, 0.25, 0.25]]), "multi-class").tolist() == [
        [True, False, False, False]
    ]


def test_confidence_of_a_set_is_the_product_of_its_decisions():
    probabilities = np.array([[0.9, 0.2, 0.5]])
    assert confidence_of(probabilities, "multi-label", 0.5) == pytest.approx([0.9 * 0.8 * 0.5])
    assert confidence_of(probabilities, "multi-class") == pytest.approx([0.9])


def test_reliability_puts_edges_into_the_lower_bin_and_keeps_every_prediction():
    targets = np.array([[1.0], [0.0], [1.0], [0.0]])
    probabilities = np.array([[1.0], [0.0], [0.5], [0.25]])
    table = reliability(targets, probabilities, "multi-label", bins=4)
    assert [row.count for row in table] == [2, 1, 0, 1]
    assert table[2].accuracy is None
    assert (table[0].confidence, table[0].accuracy) == (0.125, 0.0)
    assert (table[1].confidence, table[1].accuracy) == (0.5, 1.0)
    # (2 × .125 + 1 × .5 + 1 × 0) / 4
    assert expected_calibration_error(table) == pytest.approx(0.1875)


def test_a_calibrated_model_has_a_small_calibration_error():
    generator = np.random.default_rng(3)
    chance = generator.random((10_000, 2))
    targets = (generator.random((10_000, 2)) < chance).astype(np.float32)
    assert compute_metrics(targets, chance, "multi-label")["ece"] < 0.01
    assert compute_metrics(targets, np.sqrt(chance), "multi-label")["ece"] > 0.1


@pytest.mark.parametrize(
    ("targets", "probabilities", "kind"),
    [
        (np.zeros(0, int), np.zeros((0, 3)), "multi-class"),
        (np.zeros(2, int), np.zeros((3, 3)), "multi-class"),
        (np.zeros((3, 2)), np.zeros((3, 3)), "multi-label"),
        (np.zeros((3, 3)), np.zeros((3, 3)), "multi-class"),
    ],
)
def test_refuses_arrays_that_do_not_belong_together(targets, probabilities, kind):
    with pytest.raises(ValueError, match="Received: probabilities"):
        compute_metrics(targets, probabilities, kind)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_error_without_the_temperature_is_that_of_the_undivided_logits(temperature):
    generator = np.random.default_rng(4)
    logits, targets = generator.normal(size=(400, 5)) * 2, generator.integers(0, 5, 400)
    labels = (generator.random((400, 5)) < 0.4).astype(np.float32)

    def softmax(z):
        return np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    kinds: list[tuple[ClassifierType, Any, Any]] = [("multi-class", softmax, targets), ("multi-label", sigmoid, labels)]
    for kind, read, truth in kinds:
        expected = expected_calibration_error(reliability(truth, read(logits), kind))
        found = uncalibrated_error(truth, read(logits / temperature).astype(np.float32), kind, temperature)
        assert found == pytest.approx(expected, abs=1e-3)


UNKNOWN = np.nan
DOUBTFUL = np.array([[1, 0], [0, UNKNOWN], [UNKNOWN, 1], [1, 0]], np.float32)
ANSWERS = np.array([[0.9, 0.6], [0.2, 0.9], [0.1, 0.8], [0.4, 0.3]], np.float32)


def test_metrics_of_several_labels_are_those_of_the_known_ones_by_hand():
    found = compute_metrics(DOUBTFUL, ANSWERS, "multi-label")
    # Known and decided: 1 as 1, 0 as 1; 0 as 0; 1 as 1; 1 as 0, 0 as 0.
    assert found["known_label_share"] == pytest.approx(6 / 8)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["exact_match"] == pytest.approx(2 / 4)
    right = np.array([0.9, 0.4, 0.8, 0.8, 0.4, 0.7])
    assert found["log_loss"] == pytest.approx(-np.log(right).mean(), abs=1e-6)
    assert found["brier"] == pytest.approx(((1 - right) ** 2).mean(), abs=1e-6)
    assert found["macro_recall"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["macro_precision"] == pytest.approx((1 + 1 / 2) / 2)
    # Each class is ranked among the images of which it is known.
    first, second = DOUBTFUL[[0, 1, 3], 0], DOUBTFUL[[0, 2, 3], 1]
    scores = ANSWERS[[0, 1, 3], 0], ANSWERS[[0, 2, 3], 1]
    for name, measure in (
        ("auc_macro", oracle.roc_auc_score),
        ("mean_average_precision", oracle.average_precision_score),
    ):
        each = [float(measure(*pair)) for pair in zip((first, second), scores, strict=True)]
        assert found[name] == pytest.approx(sum(each) / 2)
    assert confusion_matrix(DOUBTFUL, ANSWERS, "multi-label").tolist() == [[1, 0, 1, 1], [1, 1, 0, 1]]
    rows = per_class_metrics(DOUBTFUL, ANSWERS, "multi-label")
    assert [(row["support"], row["known"]) for row in rows] == [(2, 3), (1, 3)]
    assert sum(row.count for row in reliability(DOUBTFUL, ANSWERS, "multi-label")) == 6


def test_a_class_of_which_nothing_is_known_has_no_metrics_and_spoils_no_mean():
    found = compute_metrics(np.array([[1, UNKNOWN], [0, UNKNOWN]]), ANSWERS[:2], "multi-label")
    assert (found["auc_macro"], found["macro_f1"], found["accuracy"]) == (1.0, 1.0, 1.0)
    nothing = per_class_metrics(np.array([[1, UNKNOWN], [0, UNKNOWN]]), ANSWERS[:2], "multi-label")[1]
    assert nothing == dict.fromkeys(("precision", "recall", "f1", "auc")) | {"support": 0.0, "known": 0.0}


def test_an_image_of_which_nothing_is_known_is_not_measured():
    with pytest.raises(ValueError, match="Expected a known label of each image"):
        compute_metrics(np.full((2, 2), UNKNOWN), ANSWERS[:2], "multi-label")


def test_hidden_labels_leave_the_metrics_of_all_in_expectation():
    targets, probabilities = _multi_label(1, count=4000)
    whole = compute_metrics(targets, probabilities, "multi-label")
    hidden = np.where(np.random.default_rng(2).random(targets.shape) < 0.3, UNKNOWN, targets)
    judged = ~np.isnan(hidden).all(axis=1)
    found = compute_metrics(hidden[judged], probabilities[judged], "multi-label")
    for name in ("accuracy", "macro_f1", "auc_macro", "mean_average_precision", "log_loss", "brier", "ece"):
        assert found[name] == pytest.approx(whole[name], abs=0.015), name
    as_no = compute_metrics(np.nan_to_num(hidden), probabilities, "multi-label")
    assert as_no["macro_precision"] < whole["macro_precision"] - 0.1
