from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as np_arrays
from scipy import stats

from cv_platform.drift.two_sample import (
    gaussian_kernel,
    holm,
    ks_bonferroni,
    median_bandwidth,
    mmd_permutation_test,
    subsample,
)

# Few distinct values, so that ties, duplicates and constant columns occur often.
ROWS = st.integers(2, 12)
VALUES = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0])


def matrices(columns: int = 2) -> st.SearchStrategy[np.ndarray]:
    return ROWS.flatmap(lambda rows: np_arrays(np.float32, (rows, columns), elements=VALUES))


def naive_mmd_squared(reference: np.ndarray, current: np.ndarray, bandwidth: float) -> float:
    """Gretton et al. 2012, lemma 6, term by term."""

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.exp(-np.sum((x.astype(float) - y.astype(float)) ** 2) / (2 * bandwidth**2)))

    n, m = len(reference), len(current)
    xx = sum(k(reference[i], reference[j]) for i, j in itertools.permutations(range(n), 2)) / (n * (n - 1))
    yy = sum(k(current[i], current[j]) for i, j in itertools.permutations(range(m), 2)) / (m * (m - 1))
    xy = sum(k(x, y) for x in reference for y in current) / (n * m)
    return xx + yy - 2 * xy


def mmd(reference: np.ndarray, current: np.ndarray, **changes: object):
    settings = {"permutations": 99, "seed": 0, "max_reference_rows": 1000, **changes}
    return mmd_permutation_test(reference, current, **settings)


@settings(max_examples=60, deadline=None)
@given(matrices(), matrices())
def test_mmd_equals_the_sum_over_all_pairs(reference: np.ndarray, current: np.ndarray) -> None:
    result = mmd(reference, current)
    if result.bandwidth == 0.0:
        assert len(np.unique(np.concatenate([reference, current]), axis=0)) == 1
        assert (result.mmd_squared, result.p_value) == (0.0, 1.0)
    else:
        expected = naive_mmd_squared(reference, current, result.bandwidth)
        assert result.mmd_squared == pytest.approx(expected, abs=1e-5)  # A float32 kernel: 2.6e-6 has been seen.


def test_mmd_p_value_is_the_share_of_all_splits_that_reach_the_observed_one() -> None:
    # 5 + 3 rows have 56 splits: with many random ones, the p-value comes close to the exact one.
    rng = np.random.default_rng(3)
    reference = rng.normal(size=(5, 2)).astype(np.float32)
    current = (rng.normal(size=(3, 2)) + 1.0).astype(np.float32)
    result = mmd(reference, current, permutations=20_000)
    pooled = np.concatenate([reference, current])
    observed = naive_mmd_squared(reference, current, result.bandwidth)
    reached = [
        naive_mmd_squared(np.delete(pooled, chosen, axis=0), pooled[list(chosen)], result.bandwidth) >= observed - 1e-9
        for chosen in itertools.combinations(range(8), 3)
    ]
    exact = np.mean(reached)
    assert result.p_value == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 20_000))


@settings(max_examples=40, deadline=None)
@given(matrices(), matrices(), st.randoms(use_true_random=False))
def test_mmd_does_not_depend_on_the_order_of_rows(reference: np.ndarray, current: np.ndarray, random) -> None:
    mixed = [rows[random.sample(range(len(rows)), len(rows))] for rows in (reference, current)]
    first, second = mmd(reference, current), mmd(*mixed)
    assert first.p_value == second.p_value
    assert first.mmd_squared == pytest.approx(second.mmd_squared, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(matrices(), matrices())
def test_p_values_are_above_zero_and_at_most_one(reference: np.ndarray, current: np.ndarray) -> None:
    ks = ks_bonferroni(reference, current)
    assert 0 < ks.p_value <= 1
    assert ((ks.p_values > 0) & (ks.p_values <= 1)).all()
    assert ((ks.distances >= 0) & (ks.distances <= 1)).all()
    assert 1 / 100 <= mmd(reference, current).p_value <= 1


def test_mmd_of_equal_samples_never_rejects() -> None:
    rows = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    assert mmd(rows, rows).p_value > 0.5


def test_mmd_sees_that_a_constant_reference_was_left() -> None:
    reference = np.zeros((20, 3), dtype=np.float32)
    current = np.zeros((20, 3), dtype=np.float32)
    current[:, 0] = 1e-3
    assert mmd(reference, current).p_value == 1 / 100


def test_mmd_survives_values_at_the_end_of_float32() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(40, 2)).astype(np.float32)
    current = reference.copy()
    current[0, 0] = 3e38
    result = mmd(reference, current)
    assert np.isfinite([result.mmd_squared, result.p_value, result.standardised]).all()
    assert result.p_value > 0.05


def test_mmd_keeps_to_its_limits_of_rows() -> None:
    rows = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    result = mmd(rows, rows, max_reference_rows=25, max_current_rows=10)
    assert (result.reference_rows, result.current_rows) == (25, 10)


def test_median_bandwidth_is_the_median_distance_of_distinct_rows() -> None:
    rows = np.array([[0.0], [0.0], [1.0], [3.0]], dtype=np.float32)  # Distances 0, 1, 1, 3, 3, 2.
    assert median_bandwidth(rows) == pytest.approx(2.0)


def test_gaussian_kernel_is_accurate_far_from_the_origin() -> None:
    rows = np.array([[10_000.0], [10_001.0]], dtype=np.float32)
    kernel = gaussian_kernel(rows, bandwidth=1.0, centre=np.array([10_000.0]))
    assert kernel[0, 1] == pytest.approx(np.exp(-0.5), rel=1e-5)


def test_subsample_takes_the_same_rows_in_any_order() -> None:
    rows = np.arange(50, dtype=np.float32).reshape(25, 2)
    first = subsample(rows, 7, np.random.default_rng(1))
    second = subsample(rows[::-1], 7, np.random.default_rng(1))
    assert first.shape == (7, 2)
    assert first.tolist() == second.tolist()


def test_ks_agrees_with_scipy_column_by_column() -> None:
    rng = np.random.default_rng(0)
    reference, current = rng.normal(size=(70, 4)), rng.normal(loc=(0, 0.2, 0.5, 1.0), size=(50, 4))
    result = ks_bonferroni(reference.astype(np.float32), current.astype(np.float32))
    for column in range(4):
        oracle: Any = stats.ks_2samp(
            reference[:, column].astype(np.float32), current[:, column].astype(np.float32), method="exact"
        )
        assert result.distances[column] == pytest.approx(oracle.statistic)
        assert result.p_values[column] == pytest.approx(oracle.pvalue)
    assert result.p_value == pytest.approx(min(1.0, 4 * result.p_values.min()))
    assert result.largest == 3


def test_ks_distance_of_a_constant_column_is_zero_and_of_two_constants_one() -> None:
    reference = np.zeros((10, 2), dtype=np.float32)
    current = np.zeros((8, 2), dtype=np.float32)
    current[:, 1] = 5.0
    result = ks_bonferroni(reference, current)
    assert result.distances.tolist() == [0.0, 1.0]
    assert result.p_values[0] == 1.0
    assert result.p_value < 0.001


P_VALUES = st.dictionaries(st.text(max_size=3), st.floats(0.0, 1.0), min_size=1, max_size=8)


@given(P_VALUES)
def test_holm_is_monotone_and_lies_between_the_p_value_and_bonferroni(p_values: dict[str, float]) -> None:
    adjusted = holm(p_values)
    assert list(adjusted) == list(p_values)
    for name, p in p_values.items():
        assert p <= adjusted[name] <= min(1.0, p * len(p_values)) + 1e-12
    ordered = sorted(p_values, key=lambda name: p_values[name])
    assert [adjusted[name] for name in ordered] == sorted(adjusted.values())


@given(P_VALUES, st.floats(0.0, 1.0))
def test_holm_rises_when_a_p_value_rises(p_values: dict[str, float], larger: float) -> None:
    name = next(iter(p_values))
    raised = {**p_values, name: max(p_values[name], larger)}
    before, after = holm(p_values), holm(raised)
    assert all(after[key] >= before[key] - 1e-12 for key in p_values)


def test_holm_by_hand() -> None:
    # Sorted: .01×4, .02×3, .03×2 (held up to .06 by the one before), .9×1.
    assert holm({"a": 0.03, "b": 0.01, "c": 0.9, "d": 0.02}) == pytest.approx(
        {"a": 0.06, "b": 0.04, "c": 0.9, "d": 0.06}
    )


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_holm_refuses_what_is_no_p_value(p: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm({"a": p})
