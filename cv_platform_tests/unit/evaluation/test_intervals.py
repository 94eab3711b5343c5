from __future__ import annotations

import numpy as np
import pytest

from cv_platform.evaluation.intervals import class_intervals, mean_intervals, wilson
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
