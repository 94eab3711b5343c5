from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from scipy import stats

from cv_platform.config import DetectorName
from cv_platform.drift.family import DEFAULT_DETECTORS, DETECTOR_NAMES, settle_saturated
from cv_platform.drift.sample import DriftSample
from cv_platform.drift.two_sample import holm, ks_bonferroni
from cv_platform.drift.verdict import DriftVerdict, judge
from cv_platform.errors import InvalidSampleError
from cv_platform_tests.support.drift_samples import draw_sample

TRIALS = 120
ALPHA = 0.05


def verdict(reference: DriftSample, current: DriftSample, **changes: object) -> DriftVerdict:
    settings = {"alpha": ALPHA, "permutations": 99, "max_reference_rows": 500, "seed": 0, **changes}
    return judge(reference, current, **settings)


def alarms(trials: int, reference_rows: int, current_rows: int, **shift: Any) -> int:
    count = 0
    for trial in range(trials):
        rng = np.random.default_rng((99, trial))
        reference, current = draw_sample(rng, reference_rows), draw_sample(rng, current_rows, **shift)
        count += verdict(reference, current, seed=trial).drifted
    return count


def test_false_alarms_stay_within_alpha() -> None:
    # A test of level .05 passes this bound in 999 of 1,000 such experiments.
    assert alarms(TRIALS, 100, 50) <= stats.binom.ppf(0.999, TRIALS, ALPHA)


def test_each_detector_alone_stays_within_alpha() -> None:
    judged = [name for name in DETECTOR_NAMES if not name.startswith("encoder_")]
    rejections = dict.fromkeys(judged, 0)
    for trial in range(TRIALS):
        rng = np.random.default_rng((7, trial))
        result = verdict(draw_sample(rng, 80), draw_sample(rng, 50), seed=trial, detectors=judged)
        for name, p in result.p_values.items():
            rejections[name] += p <= ALPHA
    bound = stats.binom.ppf(0.9999, TRIALS, ALPHA)
    assert all(count <= bound for count in rejections.values()), rejections


# Rates measured with 200 trials at these sizes: .985, 1.00, 1.00.
@pytest.mark.parametrize(
    ("shift", "power"),
    [({"shift": 0.6}, 0.85), ({"scale": 1.5}, 0.9), ({"without_class": 2}, 0.9)],
    ids=["mean", "variance", "class-missing"],
)
def test_detects_real_shifts(shift: dict[str, object], power: float) -> None:
    assert alarms(30, 300, 250, **shift) >= power * 30


def test_the_same_rows_in_any_order_give_the_same_verdict() -> None:
    rng = np.random.default_rng(1)
    reference, current = draw_sample(rng, 70), draw_sample(rng, 60, shift=0.3)
    mixed = reference.take(rng.permutation(70)), current.take(rng.permutation(60))
    first = verdict(reference, current, max_reference_rows=40)
    assert first.p_values == verdict(*mixed, max_reference_rows=40).p_values


def test_reports_every_detector_and_what_is_left_of_it_among_the_others() -> None:
    rng = np.random.default_rng(1)
    result = verdict(draw_sample(rng, 200), draw_sample(rng, 150, shift=1.0))
    assert set(result.p_values) == set(result.adjusted_p_values) == set(result.statistics) == set(DEFAULT_DETECTORS)
    assert result.drifted
    assert set(result.drifted_detectors) <= set(DEFAULT_DETECTORS)
    assert result.drifted_detectors[0] == min(result.adjusted_p_values, key=lambda d: result.adjusted_p_values[d])
    assert all(result.p_values[name] <= p for name, p in result.adjusted_p_values.items())
    assert (result.reference_rows, result.current_rows, result.permutations) == (200, 150, 99)
    assert DriftVerdict.model_validate_json(result.model_dump_json()) == result


def test_a_config_can_name_each_detector() -> None:
    assert get_args(DetectorName) == DETECTOR_NAMES


def test_the_encoder_s_tests_take_part_where_both_sides_have_images_and_cost_nothing_elsewhere() -> None:
    rng = np.random.default_rng(1)
    reference, current = draw_sample(rng, 60), draw_sample(rng, 40)
    vectors = rng.normal(size=(100, 6))
    vectors[60:] += 2.0
    gone = np.full((40, 6), np.nan)
    names = ("bbsd_ks", "encoder_mmd", "encoder_classifier")
    left = reference.with_encoded(vectors[:60])
    few = np.where(np.arange(40)[:, None] < 15, vectors[60:], np.nan)
    found = verdict(left, current.with_encoded(few), detectors=names)
    assert set(found.p_values) == set(names)
    assert set(found.drifted_detectors) == {"encoder_mmd", "encoder_classifier"}
    without = verdict(left, current.with_encoded(gone), detectors=names)
    assert without.adjusted_p_values == without.p_values
    assert found.adjusted_p_values["bbsd_ks"] == pytest.approx(min(1.0, 2 * found.p_values["bbsd_ks"]))
    with pytest.raises(InvalidSampleError, match="encoder_mmd"):
        verdict(left, current, detectors=("encoder_mmd",))
    with pytest.raises(InvalidSampleError, match="encoded: shape"):
        current.with_encoded(vectors)


def test_raises_permutations_until_the_level_is_within_reach_of_five_of_them() -> None:
    rng = np.random.default_rng(1)
    result = verdict(draw_sample(rng, 60), draw_sample(rng, 60, shift=3.0), alpha=0.01)
    assert result.permutations == 499
    assert result.adjusted_p_values["features_mmd"] == pytest.approx(1 / 500)


def test_a_level_that_no_permutations_reach_is_left_to_the_tests_that_need_none() -> None:
    rng = np.random.default_rng(1)
    reference, current = draw_sample(rng, 60), draw_sample(rng, 60, shift=3.0)
    result = verdict(reference, current, alpha=1e-6, detectors=("bbsd_ks", "properties_ks", "bbsd_mean"))
    exact = ks_bonferroni(reference.properties, current.properties).p_value
    assert result.p_values["properties_ks"] == exact
    assert result.adjusted_p_values == holm(result.p_values)
    assert set(result.drifted_detectors) == {"bbsd_ks", "properties_ks"}


def test_a_saturated_model_that_differs_in_its_last_bits_has_not_drifted() -> None:
    rng = np.random.default_rng(5)
    reference, current = draw_sample(rng, 100), draw_sample(rng, 100)
    certain = np.zeros((100, 5), dtype=np.float32)
    certain[:, 0] = 1.0
    nearly = certain.copy()
    nearly[:, 0] = np.nextafter(np.float32(1.0), np.float32(0.0))
    nearly[:, 1] = 1e-38
    first = DriftSample(certain, reference.features, reference.uae, reference.properties)
    second = DriftSample(nearly, current.features, current.uae, current.properties)
    assert verdict(first, second).p_values["bbsd_ks"] == 1.0
    assert settle_saturated(np.array([[0.25]], dtype=np.float32)).tolist() == [[0.25]]


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_judges_tiny_samples_without_alarm(rows: int) -> None:
    rng = np.random.default_rng(2)
    result = verdict(draw_sample(rng, 50), draw_sample(rng, rows))
    assert all(0 < p <= 1 for p in result.p_values.values())
    assert not result.drifted


def test_samples_without_any_variation_have_not_drifted() -> None:
    constant = draw_sample(np.random.default_rng(0), 1).take(np.zeros(30, dtype=np.intp))
    result = verdict(constant, constant.take(np.arange(20)))
    assert set(result.p_values.values()) == {1.0}


def test_one_image_sent_again_and_again_is_drift() -> None:
    rng = np.random.default_rng(0)
    reference = draw_sample(rng, 200)
    assert verdict(reference, reference.take(np.zeros(60, dtype=np.intp))).drifted


@pytest.mark.parametrize("rows", [0, 1])
def test_refuses_fewer_than_two_rows(rows: int) -> None:
    sample = draw_sample(np.random.default_rng(0), 30)
    with pytest.raises(InvalidSampleError, match=f"{rows} current rows"):
        verdict(sample, sample.take(np.arange(rows)))


def test_refuses_an_impossible_alpha() -> None:
    sample = draw_sample(np.random.default_rng(0), 30)
    with pytest.raises(ValueError, match="alpha"):
        verdict(sample, sample, alpha=0.0)


def test_every_statistic_is_told_with_an_interval_around_it() -> None:
    rng = np.random.default_rng(3)
    names = [name for name in DETECTOR_NAMES if not name.startswith("encoder_")]
    found = verdict(draw_sample(rng, 200), draw_sample(rng, 100, shift=0.6), detectors=names)
    assert found.intervals.keys() == found.statistics.keys() == set(names)
    for name, (low, high) in found.intervals.items():
        assert low <= found.statistics[name] <= high
        assert low < high
