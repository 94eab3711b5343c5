from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cv_platform.drift.localisation import class_movements, effect_sizes, image_scores, nearest_rows
from cv_platform.drift.sample import DriftSample
from cv_platform.drift.verdict import DriftVerdict, judge
from cv_platform.predictions import predicted_flags
from cv_platform_tests.support.drift_samples import CLASSES, draw_sample


def verdict(reference: DriftSample, current: DriftSample) -> DriftVerdict:
    return judge(reference, current, alpha=0.05, permutations=99, max_reference_rows=500, seed=0)


def with_properties(sample: DriftSample, properties: np.ndarray) -> DriftSample:
    return DriftSample(sample.bbsd, sample.features, sample.uae, properties.astype(np.float32))


def test_property_shifts_are_in_reference_standard_deviations() -> None:
    rng = np.random.default_rng(0)
    base = draw_sample(rng, 4)
    before, after = np.zeros((4, 7)), np.zeros((4, 7))
    before[:, 0] = [8, 12, 8, 12]  # Mean 10, standard deviation 2.
    after[:, 0] = [10, 18, 10, 18]  # Mean 14, standard deviation 4.
    after[:, 1] = 5  # The reference is constant 0.
    reference, current = with_properties(base, before), with_properties(base, after)
    shifts = effect_sizes(reference, current, verdict(reference, current), class_names=CLASSES).property_shifts
    assert shifts[0].name == "luma_mean"
    assert (shifts[0].shift_sds, shifts[0].spread_ratio) == (2.0, 2.0)
    assert (shifts[0].reference_mean, shifts[0].current_mean) == (10.0, 14.0)
    # The means' standard errors are 2/√4 and 4/√4, together √5, which are √5/2 standard deviations of the reference.
    assert shifts[0].shift_interval == pytest.approx((2 - 1.96 * 5**0.5 / 2, 2 + 1.96 * 5**0.5 / 2))
    assert shifts[1].shift_interval is None
    assert (shifts[1].shift_sds, shifts[1].spread_ratio) == (None, 1.0)
    assert shifts[1].ks_distance == 1.0
    assert (shifts[2].shift_sds, shifts[2].spread_ratio, shifts[2].ks_distance) == (0.0, 1.0, 0.0)


def test_names_the_dimensions_with_the_largest_distances() -> None:
    rng = np.random.default_rng(0)
    reference, current = draw_sample(rng, 200), draw_sample(rng, 200, without_class=3)
    moved = current.properties.copy()
    moved[:, 4] += 100
    current = with_properties(current, moved)
    found = verdict(reference, current)
    effects = effect_sizes(reference, current, found, class_names=CLASSES)
    assert effects.properties.dimension == "red_green"
    assert effects.properties.ks_distance == 1.0
    assert effects.bbsd.ks_distance == pytest.approx(found.statistics["bbsd_ks"])
    assert effects.mmd["features_mmd"] == pytest.approx(max(0, found.statistics["features_mmd"]) ** 0.5)


def test_mmd_effect_does_not_grow_with_the_number_of_rows() -> None:
    rng = np.random.default_rng(0)
    sizes = {}
    for rows in (100, 400):
        reference, current = draw_sample(rng, rows), draw_sample(rng, rows, shift=1.5)
        sizes[rows] = effect_sizes(reference, current, verdict(reference, current), class_names=CLASSES)
    assert sizes[400].mmd["uae_mmd"] == pytest.approx(sizes[100].mmd["uae_mmd"], rel=0.5)
    assert sizes[400].mmd_standardised["uae_mmd"] > 2 * sizes[100].mmd_standardised["uae_mmd"]


def test_a_missing_class_comes_first_among_those_that_moved() -> None:
    rng = np.random.default_rng(4)
    movements = class_movements(
        draw_sample(rng, 400),
        draw_sample(rng, 400, without_class=1),
        class_names=CLASSES,
        classifier_type="multi-class",
    )
    assert movements[0].class_name == "bee"
    assert movements[0].has_moved
    assert movements[0].current_share < 0.05 < movements[0].reference_share
    assert [m.adjusted_p_value for m in movements] == sorted(m.adjusted_p_value for m in movements)
    assert {m.class_name for m in movements} == set(CLASSES)


def test_no_class_moves_between_halves_of_one_sample() -> None:
    rng = np.random.default_rng(8)
    movements = class_movements(
        draw_sample(rng, 300), draw_sample(rng, 300), class_names=CLASSES, classifier_type="multi-class"
    )
    assert not any(m.has_moved for m in movements)


def test_shares_of_multi_label_predictions_count_every_class_over_the_threshold() -> None:
    probabilities = np.array([[0.7, 0.6], [0.2, 0.6], [0.1, 0.1]], dtype=np.float32)
    assert predicted_flags(probabilities, "multi-label", 0.5).tolist() == [[True, True], [False, True], [False, False]]
    assert predicted_flags(probabilities, "multi-class", 0.5).tolist() == [[True, False], [False, True], [True, False]]


def test_ranks_the_shifted_images_first() -> None:
    rng = np.random.default_rng(0)
    reference, usual = draw_sample(rng, 300), draw_sample(rng, 180)
    strange = draw_sample(rng, 20, shift=3.0)
    current = DriftSample(
        *(np.concatenate([getattr(usual, n), getattr(strange, n)]) for n in ("bbsd", "features", "uae", "properties"))
    )
    scores = image_scores(reference, current, seed=0)
    is_strange = np.arange(200) >= 180
    # Area under the ROC curve: the share of pairs in which the strange image scores higher.
    assert np.mean(scores[is_strange][:, None] > scores[~is_strange][None, :]) > 0.9


def test_scores_follow_their_images() -> None:
    rng = np.random.default_rng(0)
    reference, current = draw_sample(rng, 100), draw_sample(rng, 50)
    order = rng.permutation(50)
    scores = image_scores(reference, current, seed=0)
    # Kernels are float32, and another order of the rows is another order of sums: single units of a score are right to
    # some tens of ε, wherever it lies.
    np.testing.assert_allclose(
        image_scores(reference, current.take(order), seed=0),
        scores[order],
        atol=100 * np.finfo(np.float32).eps * np.abs(scores).max(),
    )


def test_the_nearest_reference_rows_are_those_that_an_image_is_like_in_all_spaces() -> None:
    reference = draw_sample(np.random.default_rng(7), 60)
    nearest = nearest_rows(reference, reference.take(np.array([5, 17])), count=3)
    assert nearest.shape == (2, 3)
    assert nearest[:, 0].tolist() == [5, 17]
    # By hand: distances of 1, 2 and 3 in one space and none in the others.
    flat = DriftSample(*(np.full((3, width), 0.5, np.float32) for width in (2, 1, 1, 7)))
    line = dataclasses.replace(flat, features=np.array([[3.0], [1.0], [2.0]], np.float32))
    origin = dataclasses.replace(flat, features=np.zeros((3, 1), np.float32)).take(np.array([0]))
    assert nearest_rows(line, origin, count=9).tolist() == [[1, 2, 0]]


def test_scores_of_samples_without_variation_are_zero() -> None:
    constant = draw_sample(np.random.default_rng(0), 1).take(np.zeros(10, dtype=np.intp))
    assert image_scores(constant, constant, seed=0).tolist() == [0.0] * 10


def test_refuses_names_that_do_not_fit() -> None:
    sample = draw_sample(np.random.default_rng(0), 10)
    with pytest.raises(ValueError, match=r"5 class names\. Received: 2"):
        class_movements(sample, sample, class_names=("a", "b"), classifier_type="multi-class")
