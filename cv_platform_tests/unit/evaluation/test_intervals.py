from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from cv_platform.evaluation.intervals import (
    _Curve,
    calibration_interval,
    class_intervals,
    mean_interval,
    mean_intervals,
    score_intervals,
    wilson,
)
from cv_platform.predictions import one_hot


def test_wilson_is_the_textbooks_interval_and_stays_within_bounds():
    # Newcombe 1998, table I: 81 of 263 is 0.2553 to 0.3662; 0 of 20 is 0 to 0.1611.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(0, 0) is None


def _answers(seed: int, count: int, accuracy: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    answers = np.where(rng.random(count) < accuracy, labels, (labels + 1) % 3)
    return one_hot(labels, 3), one_hot(answers, 3)


def test_the_bootstrap_covers_the_true_macro_f1_about_as_often_as_it_says():
    # Errors go to the next class alone, so that precision, recall and F1 of each class are 0.8.
    covered = 0
    for seed in range(60):
        low, high = mean_intervals(*_answers(seed, 300, 0.8))["macro_f1"]
        covered += low <= 0.8 <= high
    assert covered >= 52  # With 0.95, fewer would be seen once in 200 times.


def test_more_images_make_narrower_intervals():
    few, many = (mean_intervals(*_answers(0, count, 0.8))["macro_recall"] for count in (50, 5000))
    assert many[1] - many[0] < (few[1] - few[0]) / 5


def test_what_a_class_does_not_have_has_no_interval():
    truth = one_hot(np.array([0, 0, 1]), 3)
    rows = class_intervals(truth, one_hot(np.array([0, 1, 1]), 3))
    assert rows[2] == {"precision": None, "recall": None, "f1": None}
    assert rows[0]["recall"] == wilson(1, 2)
    assert rows[1]["precision"] == wilson(1, 2)
    assert rows[0]["f1"] is not None
    low, high = rows[0]["f1"]
    assert 0 <= low <= 2 / 3 <= high <= 1


def test_rankings_have_the_areas_of_scikit_learn_in_each_resample() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((40, 3)) < 0.4
    # Two digits: equal scores are common.
    scores = np.round(0.4 * truth + 0.6 * rng.random((40, 3)), 1)
    for column in range(3):
        weights = rng.multinomial(40, np.full(40, 1 / 40), size=5)
        found = _Curve(truth[:, column], scores[:, column], np.ones(40, bool)).areas(weights.astype(np.float32))
        for row, (area, precision) in zip(weights, found.T, strict=True):
            drawn = np.repeat(np.arange(40), row)
            given = truth[drawn, column], scores[drawn, column]
            assert area == pytest.approx(roc_auc_score(*given), abs=1e-5)
            assert precision == pytest.approx(average_precision_score(*given), abs=1e-5)


def test_rankings_cover_the_true_auc_about_as_often_as_they_say() -> None:
    # Normal scores one deviation apart: the area is Φ(1/√2).
    true, covered = float(stats.norm.cdf(0.5**0.5)), 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        truth = np.arange(200) % 2 == 0
        (ends,), means = score_intervals(truth[:, None], (rng.normal(size=200) + truth)[:, None])
        assert ends is not None
        assert means["auc_macro"] == ends
        covered += ends[0] <= true <= ends[1]
    assert covered >= 52


def test_a_class_that_all_images_show_has_no_ranking() -> None:
    truth = np.array([[True, False], [True, True], [True, False]])
    aucs, means = score_intervals(truth, np.array([[0.9, 0.1], [0.8, 0.7], [0.7, 0.3]]))
    # One image shows the second class: it alone is compared with others.
    low, _ = wilson(1, 1) or (0.0, 0.0)
    assert aucs == [None, (low, 1.0)]
    assert means["auc_macro"] == (low, 1.0)
    # The class that all show is found as well.
    assert means["mean_average_precision"] == wilson(2, 2)


def test_scores_without_an_error_are_no_certainty() -> None:
    truth = one_hot(np.repeat([0, 1, 2], [10, 50, 100]), 3)
    rows, means = class_intervals(truth, truth), mean_intervals(truth, truth)
    for row, count in zip(rows, (10, 50, 100), strict=True):
        assert row["f1"] == row["recall"] == wilson(count, count)
    # As if each class had ten images, like the smallest.
    assert set(means.values()) == {wilson(30, 30)}
    assert mean_interval(np.ones(50), are_shares=True) == wilson(50, 50)


def test_scores_of_which_nothing_is_right_are_no_certainty_either() -> None:
    truth = one_hot(np.repeat([0, 1], 20), 2)
    rows, means = class_intervals(truth, ~truth), mean_intervals(truth, ~truth)
    assert rows[0]["f1"] == pytest.approx(wilson(0, 20))
    assert means["macro_recall"] == pytest.approx(wilson(0, 40))
    # Of a class without images, an answer says nothing of how often it is right.
    assert class_intervals(np.zeros((4, 1), bool), np.ones((4, 1), bool))[0]["f1"] == (0.0, 0.0)


def test_what_no_error_leaves_open_holds_the_true_recall_wherever_the_errors_are() -> None:
    # Of images that are all right in one draw of forty, whether errors are spread evenly or are one class's: no truer
    # recall than the end is as rare.
    for classes, count in ((3, 10), (81, 2)):
        low, _ = mean_intervals(*[one_hot(np.repeat(np.arange(classes), count), classes)] * 2)["macro_recall"]
        evenly = 0.025 ** (1 / (classes * count))
        of_one = 1 - (1 - 0.025 ** (1 / count)) / classes
        assert low <= min(evenly, of_one) + 0.005  # Wilson's end is near the exact one.
        assert low == pytest.approx(evenly, abs=0.03)


def test_means_and_calibration_have_intervals_around_them() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 1.0, 400)
    low, high = mean_interval(values) or (0.0, 0.0)
    # The mean, and 1.96 standard errors of it, on both sides.
    assert (low, high) == pytest.approx((values.mean() - 0.098, values.mean() + 0.098), abs=0.02)
    right = rng.random((1000, 1)) < 0.8
    low, high = calibration_interval(0.9 - right, np.zeros((1000, 1), int)) or (0.0, 0.0)
    assert low < 0.1 < high
    assert high - low == pytest.approx(2 * 1.96 * (0.8 * 0.2 / 1000) ** 0.5, rel=0.2)
    # An error of 0 that is noise in each of 15 bins: what resamples add to it is not its own.
    chances = rng.random((300, 1))
    gaps, bins = chances - (rng.random((300, 1)) < chances), (chances * 15).astype(int)
    error = sum(abs(gaps[bins == index].sum()) for index in range(15)) / 300
    low, high = calibration_interval(gaps, bins) or (0.0, 0.0)
    assert low < error < high


def test_unknown_labels_have_no_part_in_intervals() -> None:
    rng = np.random.default_rng(3)
    truth, known = rng.random((400, 2)) < 0.4, rng.random((400, 2)) < 0.7
    scores = 0.5 * truth + 0.5 * rng.random((400, 2))
    noise = np.where(known, scores, rng.random((400, 2)))  # What is said of unknown labels changes nothing.
    assert score_intervals(truth, noise, known) == score_intervals(truth, scores, known)
    nothing = np.stack([known[:, 0], np.zeros(400, bool)], axis=1)
    assert score_intervals(truth & nothing, scores, nothing)[0][1] is None
    gaps, bins = np.full((400, 2), 0.1), np.where(known, 3, -1)
    low, high = calibration_interval(np.where(known, gaps, 0.9), bins) or (0.0, 0.0)
    assert (low, high) == pytest.approx((0.1, 0.1), abs=0.02)
    counts = known.sum(axis=1)
    values = np.where(counts > 0, 0.2, 0.9)
    assert mean_interval(values, counts) == pytest.approx((0.2, 0.2), abs=1e-6)
