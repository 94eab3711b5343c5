from __future__ import annotations

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
    ks_bounds,
    median_bandwidth,
    subsample,
)

# Few distinct values, so that ties, duplicates and constant columns occur often.
ROWS = st.integers(2, 12)
VALUES = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0])


def matrices(columns: int = 2) -> st.SearchStrategy[np.ndarray]:
    return ROWS.flatmap(lambda rows: np_arrays(np.float32, (rows, columns), elements=VALUES))


@settings(max_examples=60, deadline=None)
@given(matrices(), matrices())
def test_p_values_are_above_zero_and_at_most_one(reference: np.ndarray, current: np.ndarray) -> None:
    ks = ks_bonferroni(reference, current)
    assert 0 < ks.p_value <= 1
    assert ((ks.p_values > 0) & (ks.p_values <= 1)).all()
    assert ((ks.distances >= 0) & (ks.distances <= 1)).all()


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


def test_the_bounds_of_a_ks_distance_hold_that_of_the_distributions() -> None:
    # Of N(0, 1) and N(1, 1) it is 2Φ(1/2) − 1; of the columns that did not move, 0.
    truth, held = 2 * stats.norm.cdf(0.5) - 1, 0
    for trial in range(100):
        rng = np.random.default_rng((4, trial))
        reference, current = rng.normal(size=(400, 5)), rng.normal(size=(80, 5))
        current[:, 2] += 1.0
        found = ks_bonferroni(reference.astype(np.float32), current.astype(np.float32))
        low, high = ks_bounds(float(found.distances.max()), 5, (400, 80))
        held += low <= truth <= high
    assert held >= 95
    assert ks_bounds(0.02, 5, (400, 80))[0] == 0.0
    assert ks_bounds(0.99, 5, (400, 80))[1] == 1.0
