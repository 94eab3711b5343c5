from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from cv_platform.drift.permutation import (
    Judged,
    Statistic,
    gaussian_features,
    judge_together,
    largest_ks_distance,
    mean_distance,
    mean_distance_bounds,
    whitened,
)
from cv_platform.drift.two_sample import ks_bonferroni, median_bandwidth


def judged(
    statistics: list[Statistic], current: int, rows: int, *, permutations: int = 99, seed: int = 0
) -> list[Judged]:
    split = np.arange(rows) >= rows - current
    return judge_together(statistics, split, level=1.0, permutations=permutations, rng=np.random.default_rng(seed))


def three_kinds(rows: np.ndarray) -> list[Statistic]:
    features = gaussian_features(rows, np.random.default_rng(0))
    return [largest_ks_distance(rows), mean_distance(whitened(rows)), mean_distance(features)]


def centred(rows: np.ndarray) -> np.ndarray:
    return (rows - rows.mean(axis=0)).astype(np.float32)


def test_p_values_are_the_shares_of_all_splits_that_reach_the_observed_one() -> None:
    # 5 + 3 rows have 56 splits: with many random ones, the p-value comes close to the exact one.
    rows = centred(np.random.default_rng(3).normal(size=(8, 2)) + np.repeat([[0.0], [0.8]], [5, 3], axis=0))

    def distance(chosen: tuple[int, ...]) -> float:
        others = np.delete(rows, chosen, axis=0)
        return float(((rows[list(chosen)].mean(axis=0) - others.mean(axis=0)) ** 2).sum())

    (found,) = judged([mean_distance(rows)], 3, 8, permutations=20_000)
    observed = distance((5, 6, 7))
    assert found.observed == pytest.approx(observed, rel=1e-5)
    exact = np.mean([distance(chosen) >= observed - 1e-6 for chosen in itertools.combinations(range(8), 3)])
    assert found.p_value == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 20_000))
    assert found.adjusted_p_value == found.p_value


def test_the_same_statistic_twice_costs_nothing_and_independent_ones_what_they_must() -> None:
    rng = np.random.default_rng(1)
    rows = centred(rng.normal(size=(90, 4)) + np.repeat([[0.0], [0.45]], [60, 30], axis=0))
    same = judged([mean_distance(rows), mean_distance(rows)], 30, 90, permutations=999)
    assert [one.adjusted_p_value for one in same] == [one.p_value for one in same]
    found = judged([mean_distance(rows[:, [column]]) for column in range(4)], 30, 90, permutations=999)
    found.sort(key=lambda one: one.p_value)
    adjusted = [one.adjusted_p_value for one in found]
    assert adjusted == sorted(adjusted)
    assert all(one.p_value <= one.adjusted_p_value for one in found)
    # Šidák's correction is that of independent tests.
    assert adjusted[0] == pytest.approx(1 - (1 - found[0].p_value) ** 4, abs=0.03)


def test_false_alarms_of_the_family_are_at_the_level_whatever_the_statistics_have_in_common() -> None:
    alarms = 0
    for trial in range(200):
        rows = np.random.default_rng((3, trial)).standard_exponential((40, 3)).astype(np.float32)
        found = judged(three_kinds(rows), 12, 40, seed=trial)
        alarms += min(one.adjusted_p_value for one in found) <= 0.05
    low, high = stats.binom.ppf([0.0005, 0.9995], 200, 0.05)
    assert low <= alarms <= high


def test_ends_early_only_where_no_alarm_is_possible_any_more() -> None:
    rows = centred(np.random.default_rng(0).normal(size=(40, 1)))
    drawn: list[int] = []

    def counted(splits: np.ndarray) -> np.ndarray:
        drawn.append(len(splits))
        return mean_distance(rows)(splits)

    split = np.arange(40) >= 30
    (usual,) = judge_together([counted], split, level=0.001, permutations=5_000, rng=np.random.default_rng(0))
    assert usual.adjusted_p_value > 0.001
    assert sum(drawn) == 200 + 1 + 500
    drawn.clear()
    rows[30:] += 9.0
    rows -= rows.mean(axis=0)
    (moved,) = judge_together([counted], split, level=0.001, permutations=5_000, rng=np.random.default_rng(0))
    assert moved.adjusted_p_value == pytest.approx(1 / 5_001)
    assert sum(drawn) == 200 + 1 + 5_000


def test_the_largest_ks_distance_is_scipy_s_ties_included() -> None:
    rng = np.random.default_rng(4)
    reference = np.round(rng.normal(size=(50, 3)), 1).astype(np.float32)
    current = np.round(rng.normal(loc=(0, 0.3, 0.6), size=(20, 3)), 1).astype(np.float32)
    (found,) = judged([largest_ks_distance(np.concatenate([reference, current]))], 20, 70)
    assert np.sqrt(found.observed) == pytest.approx(ks_bonferroni(reference, current).distances.max(), abs=1e-5)


def test_the_distance_of_gaussian_features_is_the_mmd_of_the_kernel() -> None:
    rng = np.random.default_rng(5)
    rows = (rng.normal(size=(300, 4)) + np.repeat([[0.0], [1.0]], [200, 100], axis=0)).astype(np.float32)
    squares = ((rows[:, None] - rows[None]) ** 2).sum(axis=2) / median_bandwidth(rows) ** 2
    kernel, weights = np.exp(-squares / 2), np.repeat([-1 / 200, 1 / 100], [200, 100])
    (found,) = judged([mean_distance(gaussian_features(rows, rng))], 100, 300)
    # Of 256 random frequencies; the median distance is that of 500 rows at most, here of all.
    assert found.observed == pytest.approx(weights @ kernel @ weights, rel=0.2)


def test_whitened_means_are_hotelling_s_but_for_the_ridge() -> None:
    rng = np.random.default_rng(6)
    rows = rng.normal(size=(400, 3)) @ np.array([[1.0, 0.5, 0], [0, 2.0, 0.3], [0, 0, 0.7]])
    rows[300:] += 0.2
    (found,) = judged([mean_distance(whitened(rows.astype(np.float32)))], 100, 400)
    gap = rows[300:].mean(axis=0) - rows[:300].mean(axis=0)
    assert found.observed == pytest.approx(gap @ np.linalg.solve(np.cov(rows.T, bias=True), gap), rel=0.05)


def test_sees_that_two_columns_no_longer_go_together() -> None:
    rng = np.random.default_rng(7)
    first = rng.normal(size=(200, 1))
    rows = np.concatenate([first, first + 0.05 * rng.normal(size=(200, 1))], axis=1).astype(np.float32)
    rows[150:, 1] += 0.1
    (found,) = judged([mean_distance(whitened(rows))], 50, 200)
    assert found.p_value == pytest.approx(0.01)
    # Each column alone has hardly moved: by a tenth of its spread.
    assert np.abs(rows[150:, 1].mean() - rows[150:, 0].mean()) < 0.2 * rows[:, 0].std()


@pytest.mark.parametrize("value", [0.0, 0.1, 3e38])
def test_rows_that_are_all_the_same_differ_by_nothing(value: float) -> None:
    rows = np.full((30, 3), value, np.float32)
    assert [one.p_value for one in judged(three_kinds(rows), 10, 30)] == [1.0] * 3


def test_one_value_at_the_end_of_float32_is_no_alarm() -> None:
    rows = np.random.default_rng(0).normal(size=(80, 2)).astype(np.float32)
    rows[79, 0] = 3e38
    for one in judged(three_kinds(rows), 40, 80):
        assert np.isfinite([one.observed, one.null_mean, one.null_spread]).all()
        assert one.p_value > 0.01


@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])
def test_the_interval_of_a_distance_of_means_holds_what_it_estimates(shift: float) -> None:
    held = 0
    for trial in range(100):
        rng = np.random.default_rng((9, trial))
        rows = centred(rng.normal(size=(350, 6)) + np.repeat([[0.0], [shift / 6**0.5]], [300, 50], axis=0))
        (found,) = judged([mean_distance(rows)], 50, 350, seed=trial)
        low, high = mean_distance_bounds(rows, np.arange(350) >= 300, found)
        held += low - found.null_mean <= shift**2 <= high - found.null_mean
    assert held >= stats.binom.ppf(0.001, 100, 0.95)
