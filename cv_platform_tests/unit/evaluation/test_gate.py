from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest

from cv_platform.config import EvaluateConfig
from cv_platform.evaluation.gate import Champion, judge_promotion
from cv_platform.predictions import one_hot

GOOD = {"accuracy": 0.97, "macro_f1": 0.96}


def test_a_model_that_meets_its_limits_exactly_passes():
    verdict = judge_promotion(GOOD, EvaluateConfig(min_accuracy=0.97, min_macro_f1=0.96), None)
    assert verdict.passed
    assert verdict.reasons == (
        "accuracy 0.9700 reaches min_accuracy 0.9700",
        "macro f1 0.9600 reaches min_macro_f1 0.9600",
        "no version of this model is in production to compare with",
    )


def test_a_model_below_a_limit_fails_with_the_numbers():
    verdict = judge_promotion(GOOD, EvaluateConfig(min_accuracy=0.98, min_macro_f1=0.96), None)
    assert not verdict.passed
    assert verdict.reasons == ("accuracy 0.9700 is below min_accuracy 0.9800 by 0.0100",)


def test_every_missed_limit_is_named():
    verdict = _judge(range(60), (), min_accuracy=0.98, min_macro_f1=0.99)
    assert [reason.split()[0] for reason in verdict.reasons] == ["accuracy", "macro", "accuracy", "recall"]


CLASSES = ("cat", "dog")
NEW_YEAR = "20260101T000000Z-00000001"


def _decisions(truth: np.ndarray, wrong: Iterable[int]) -> np.ndarray:
    """Returns the labels, with those of the rows `wrong` swapped."""
    decisions = truth.copy()
    decisions[list(wrong)] = ~decisions[list(wrong)]
    return decisions


def _judge(challenger_wrong, champion_wrong, *, count=1000, seen=None, problem="", **limits):
    """Judges two models of `count` images, the first half cats, by the rows that each gets wrong."""
    truth = one_hot(np.repeat([0, 1], count // 2), 2)
    champion = Champion(NEW_YEAR, None if problem else _decisions(truth, champion_wrong), seen, problem)
    decisions = _decisions(truth, challenger_wrong)
    config = EvaluateConfig(**limits)
    return judge_promotion(GOOD, config, champion, truth=truth, decisions=decisions, class_names=CLASSES)


def test_a_worse_model_is_refused_and_told_by_how_much_and_how_surely():
    verdict = _judge(range(0, 60, 2), range(500, 510))
    assert not verdict.passed
    comparison = verdict.comparison
    assert comparison is not None
    assert (comparison.only_challenger_right, comparison.only_champion_right) == (10, 30)
    # By hand: 30 of 40 heads or more of a fair coin.
    assert comparison.p_value == pytest.approx(sum(math.comb(40, k) for k in range(30, 41)) / 2**40)
    assert comparison.outcome == "worse"
    assert comparison.low < -0.02 < comparison.high < 0
    assert "accuracy 0.9700 against 0.9900" in verdict.reasons[0]
    assert "loses 0.0200" in verdict.reasons[0]
    assert "more than max_regression 0.0100" in verdict.reasons[0]


def test_an_equal_model_passes_and_the_interval_has_no_difference_in_it():
    verdict = _judge(range(10), range(500, 510))
    assert verdict.passed
    assert verdict.comparison is not None
    assert verdict.comparison.low < 0 < verdict.comparison.high


def test_a_better_model_passes_without_doubt():
    verdict = _judge((), range(100), undecided="refuse")
    assert verdict.passed
    assert verdict.comparison is not None
    assert verdict.comparison.outcome == "not worse"
    assert "gains 0.1000" in verdict.reasons[-1]


def test_a_loss_within_max_regression_passes_however_sure_it_is():
    verdict = _judge(range(80), (), count=10_000, max_recall_regression=1.0)
    assert verdict.passed
    assert verdict.comparison is not None
    assert verdict.comparison.p_value < 1e-9


def test_a_loss_that_is_max_regression_exactly_passes():
    assert _judge(range(10), (), max_recall_regression=1.0).passed
    assert not _judge(range(11), (), max_recall_regression=1.0).passed


def test_too_few_images_to_tell_say_so_and_wait_only_where_the_config_wants_it():
    verdict = _judge((3, 17), (30,), count=40, undecided="promote")
    assert verdict.passed
    assert "too few images to rule out a loss above max_regression 0.0100" in verdict.reasons[-1]
    assert verdict.comparison is not None
    assert verdict.comparison.outcome == "undecided"
    assert 0.05 < verdict.comparison.detectable_loss < 0.5
    assert not _judge((3, 17), (30,), count=40, undecided="refuse").passed
    waits = _judge((3, 17), (30,), count=40)  # One of 40 lost is more than 0.01.
    assert not waits.passed
    assert "estimate: what they show is above it. More test images would tell" in waits.reasons[-1]
    assert _judge((3, 17), (30, 31), count=40).passed


def test_calibration_and_cost_have_budgets_and_what_was_not_measured_fails_them():
    limits = EvaluateConfig(max_ece=0.05, max_cpu_ms=10)
    assert judge_promotion({**GOOD, "ece": 0.05, "cpu_ms": 9.0}, limits).passed
    worse = judge_promotion({**GOOD, "ece": 0.0512, "cpu_ms": 12.5}, limits)
    assert worse.reasons == (
        "the expected calibration error, 0.0512, is above max_ece 0.05",
        "the CPU time of one image in milliseconds, 12.5, is above max_cpu_ms 10",
    )
    missing = judge_promotion({"accuracy": 0.97, "macro_f1": 0.96, "ece": float("nan")}, limits)
    assert missing.reasons == (
        "the expected calibration error, nan, is above max_ece 0.05",
        "the CPU time of one image in milliseconds could not be measured; max_cpu_ms is 10",
    )


def test_agreement_on_a_few_images_is_no_proof_of_agreement():
    verdict = _judge((), (), count=20, undecided="refuse")
    assert not verdict.passed
    assert verdict.comparison is not None
    assert verdict.comparison.low < -0.01


def test_a_class_whose_recall_falls_is_named_although_the_accuracy_rises():
    verdict = _judge(range(500, 560), range(100))
    assert not verdict.passed
    assert len(verdict.reasons) == 1
    assert verdict.reasons[0].startswith("recall of dog falls from 1.0000 to 0.8800 on its 500 test images")
    assert _judge(range(500, 560), range(100), max_recall_regression=0.12).passed


def test_a_model_in_production_that_cannot_be_asked_stops_the_new_one():
    verdict = _judge((), (), problem="it has other classes; the new model has no owl")
    assert not verdict.passed
    assert verdict.reasons == (
        f"{NEW_YEAR} in production cannot be compared with: it has other classes; the new model has no owl",
    )


def test_images_that_the_model_in_production_has_learned_do_not_count():
    seen = np.zeros(1000, dtype=bool)
    seen[:100] = True
    # It is right about all that it has learned; of the others, both get as many.
    verdict = _judge([*range(90), 600], [601], seen=seen)
    assert verdict.passed
    assert verdict.comparison is not None
    assert verdict.comparison.images == 900
    assert "100 test images that it was trained on are left out" in verdict.reasons[-1]
    assert not _judge([*range(90), 600], [601], seen=np.zeros(1000, dtype=bool)).passed
    assert "is not known" in _judge([600], [601]).reasons[-1]
    (reason,) = _judge((), (), seen=np.ones(1000, dtype=bool)).reasons
    assert "was trained on all 1000 test images" in reason


def test_sets_of_labels_are_right_as_a_whole():
    truth = np.array([[True, True], [True, False]] * 50)
    half = truth.copy()
    half[:, 1] = True  # Right of one label of every second image, and wrong as its set.
    champion = Champion(NEW_YEAR, truth)
    verdict = judge_promotion(GOOD, EvaluateConfig(), champion, truth=truth, decisions=half, class_names=CLASSES)
    assert verdict.comparison is not None
    assert verdict.comparison.only_champion_right == 50
    assert not verdict.passed


def test_a_metric_that_could_not_be_computed_fails_a_limit_and_passes_without_one():
    assert judge_promotion({"accuracy": 1.0}, EvaluateConfig(), None).passed
    verdict = judge_promotion({"accuracy": 1.0}, EvaluateConfig(min_macro_f1=0.5), None)
    assert verdict.reasons == ("macro f1 could not be computed; min_macro_f1 is 0.5000",)
