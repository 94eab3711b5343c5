from __future__ import annotations

import pytest

from cv_platform.config import EvaluateConfig
from cv_platform.evaluation.gate import judge_promotion

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
    verdict = judge_promotion(GOOD, EvaluateConfig(min_accuracy=0.98, min_macro_f1=0.99, max_regression=0.0), 0.99)
    assert [reason.split()[0] for reason in verdict.reasons] == ["accuracy", "macro", "accuracy"]


@pytest.mark.parametrize(
    ("champion", "allowed", "passed"),
    [
        (0.98, 0.01, True),  # 0.98 − 0.97 is slightly above 0.01 in floating point
        (0.98, 0.0099, False),
        (0.98, 0.0, False),
        (0.97, 0.0, True),
        (0.90, 0.0, True),
        (1.0, 1.0, True),
    ],
)
def test_regression_against_production_is_limited(champion, allowed, passed):
    verdict = judge_promotion(GOOD, EvaluateConfig(max_regression=allowed), champion)
    assert verdict.passed is passed


def test_says_what_is_lost_against_production():
    verdict = judge_promotion(GOOD, EvaluateConfig(max_regression=0.005), 0.99)
    expected = "accuracy 0.9700 against 0.9900 in production loses 0.0200, more than max_regression 0.0050"
    assert verdict.reasons == (expected,)


def test_a_metric_that_could_not_be_computed_fails_a_limit_and_passes_without_one():
    assert judge_promotion({"accuracy": 1.0}, EvaluateConfig(), None).passed
    verdict = judge_promotion({"accuracy": 1.0}, EvaluateConfig(min_macro_f1=0.5), None)
    assert verdict.reasons == ("macro f1 could not be computed; min_macro_f1 is 0.5000",)
