from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cv_platform.drift.classifier_test import told_apart, told_apart_bounds
from cv_platform.drift.permutation import Judged, judge_together


def draw(rng: np.random.Generator, rows: int, width: int, shift: float = 0.0) -> np.ndarray:
    return (rng.normal(size=(rows, width)) + shift).astype(np.float32)


def judged(reference: np.ndarray, current: np.ndarray, *, permutations: int, seed: int) -> Judged:
    split = np.repeat([False, True], [len(reference), len(current)])
    statistic = told_apart(np.concatenate([reference, current]))
    (one,) = judge_together([statistic], split, level=1.0, permutations=permutations, rng=np.random.default_rng(seed))
    return one


def told_apart_by_fitting_anew(reference: np.ndarray, current: np.ndarray) -> float:
    """The same statistic the long way: a ridge regression without each row, and all pairs of held-out scores."""
    rows = np.concatenate([reference, current]).astype(np.float64)
    rows = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    labels = np.repeat([0.0, 1.0], [len(reference), len(current)])
    scores = np.empty(len(rows))
    for row in range(len(rows)):
        others = np.arange(len(rows)) != row
        # Weights and a mean, of which only the weights are penalised; the rows' mean is 0 over all.
        design = np.column_stack([rows[others], np.ones(len(rows) - 1)])
        penalty = np.diag([float(len(rows))] * rows.shape[1] + [0.0])
        solved = np.linalg.solve(design.T @ design + penalty, design.T @ labels[others])
        scores[row] = np.append(rows[row], 1.0) @ solved
    pairs = scores[labels == 1][:, None] - scores[labels == 0][None, :]
    return float((pairs > 0).mean())


@pytest.mark.parametrize("width", [4, 90], ids=["more rows than columns", "more columns than rows"])
def test_the_closed_form_is_a_classifier_that_has_not_seen_the_row(width: int) -> None:
    rng = np.random.default_rng(3)
    reference, current = draw(rng, 40, width), draw(rng, 25, width, 0.2)
    found = judged(reference, current, permutations=19, seed=0)
    assert found.observed == pytest.approx(told_apart_by_fitting_anew(reference, current), abs=2e-3)


def test_false_alarms_stay_within_the_level_and_a_shift_of_one_column_is_found() -> None:
    alarms = 0
    for trial in range(100):
        rng = np.random.default_rng((5, trial))
        null = judged(draw(rng, 60, 20), draw(rng, 30, 20), permutations=39, seed=trial)
        alarms += null.p_value <= 0.05
    assert alarms <= stats.binom.ppf(0.999, 100, 0.05)
    rng = np.random.default_rng(1)
    moved = draw(rng, 80, 20)
    moved[:, 3] += 1.5
    found = judged(draw(rng, 200, 20), moved, permutations=99, seed=0)
    assert found.p_value == pytest.approx(0.01)
    assert found.observed > 0.7


def test_rows_that_are_all_the_same_are_told_apart_by_nothing() -> None:
    same = np.ones((30, 5), np.float32)
    assert judged(same, same[:10], permutations=19, seed=0).p_value == 1.0


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_the_interval_holds_the_share_of_pairs_that_the_best_classifier_tells_apart(shift: float) -> None:
    truth, held = stats.norm.cdf(shift / 2**0.5), 0
    for trial in range(60):
        rng = np.random.default_rng((2, trial))
        reference, current = draw(rng, 200, 2), draw(rng, 60, 2)
        current[:, 0] += shift
        rows, split = np.concatenate([reference, current]), np.arange(260) >= 200
        found = judged(reference, current, permutations=39, seed=trial)
        low, high = told_apart_bounds(rows, split, found)
        assert low <= found.observed <= high
        held += low <= truth <= high
    assert held >= stats.binom.ppf(0.001, 60, 0.95)
