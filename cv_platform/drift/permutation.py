"""Several statistics of two samples, judged together by the same permutations: one false-alarm rate for all of them.

A permutation deals the rows out anew, with everything that is known of an image. So the statistics keep what they have
to do with each other, and many that see the same cost little more than one; Bonferroni and Holm must allow for tests
that have nothing in common. Whatever the statistics are, the test is exact: the observed split is one of those that are
equally likely where nothing has changed.

Sources:
    Westfall & Young 1993, "Resampling-Based Multiple Testing", algorithm 2.8: step-down, strong control.
    Phipson & Smyth 2010, "Permutation p-values should never be zero", SAGMB 9(1): p = (1 + #{≥}) / (B + 1).
    Rahimi & Recht 2007, "Random Features for Large-Scale Kernel Machines"; Zhao & Meng 2015, "FastMMD", arXiv
    1405.2664: the MMD of a Gaussian kernel as a distance of means, in time linear in the rows.
    Gretton et al. 2012, "A Kernel Two-Sample Test", JMLR 13: MMD, median heuristic.
    Hotelling 1931, "The Generalization of Student's Ratio": means in units of how they vary together.
"""

# NumPy's linear algebra comes without complete types.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cv_platform.drift.sample import Float32Matrix
from cv_platform.drift.scipy_tests import gamma_surprise
from cv_platform.drift.two_sample import Float64Vector, median_bandwidth, scaled

Splits = Float32Matrix
"""`(B, N)` 0/1: 1 where a row of the pool counts as current; as many in each row."""
Statistic = Callable[[Splits], Float64Vector]
"""`(B,)`: how different the two parts of each split are, from 0."""
_BALANCING = 200
"""Permutations that only tell which values of a statistic are usual."""
_BLOCK = 500
"""Permutations at a time; bounds memory where a small alpha asks for many."""
_TIE = 1e-4
"""Sums of float32 differ in their last bits with the order of addition: what ties must count as reaching."""
_FREQUENCIES = 256
_RIDGE = 0.01
"""Of a column's variance: probabilities add up to 1, and a direction in which nothing varies says nothing."""


@dataclass(frozen=True)
class Judged:
    """One statistic's part in a joint test.

    Attributes:
        observed: its value.
        null_mean, null_spread: mean and standard deviation of its permutations.
        p_value: (1 + #{permutations that reach it}) / (permutations + 1).
        adjusted_p_value: the same for all statistics together, step-down.
    """

    observed: float
    null_mean: float
    null_spread: float
    p_value: float
    adjusted_p_value: float


def judge_together(
    statistics: Sequence[Statistic],
    split: NDArray[np.bool_],
    *,
    level: float,
    permutations: int,
    rng: np.random.Generator,
) -> list[Judged]:
    """Tests whether the observed split is like any other, by the largest of several statistics.

    To be compared, each is put on the scale of its own null: minus the logarithm of the chance of so large a value, by
    a gamma distribution with the mean and variance of permutations that are drawn for that alone.

    Args:
        statistics: of the same pool.
        split: `(N,)`: which rows of it are the current ones.
        level: at which all of them are judged.
        permutations: B; the smallest possible p-value is 1/(B+1). No more are drawn where so many have reached the
            observed split that no adjusted p-value can be at `level` any more.
        rng: of the permutations.
    """

    def of(splits: Splits) -> NDArray[np.float64]:
        return np.stack([statistic(splits) for statistic in statistics])

    rows, current = len(split), int(split.sum())
    usual = of(random_splits(rng, _BALANCING, rows - current, current))
    mean, variance = usual.mean(axis=1, keepdims=True), usual.var(axis=1, keepdims=True)
    observed = of(split.astype(np.float32)[None, :])
    seen = gamma_surprise(observed, mean, variance)[:, 0]
    blocks: list[NDArray[np.float64]] = []
    reached = 0
    for start in range(0, permutations, _BLOCK):
        blocks.append(of(random_splits(rng, min(_BLOCK, permutations - start), rows - current, current)))
        reached += np.count_nonzero(gamma_surprise(blocks[-1], mean, variance).max(axis=0) >= seen.max() - _TIE)
        if 1 + reached > level * (permutations + 1):
            break
    null = np.concatenate(blocks, axis=1)
    chance = gamma_surprise(null, mean, variance)
    p_values = _reached(chance, seen)
    # From the least surprising one up, each is compared with the largest of itself and those below.
    order = np.argsort(-seen, kind="stable")
    together = np.maximum.accumulate(chance[order[::-1]], axis=0)[::-1]
    adjusted = np.empty(len(seen))
    adjusted[order] = np.maximum.accumulate(_reached(together, seen[order]))
    return [
        Judged(
            float(observed[i, 0]), float(null[i].mean()), float(null[i].std()), float(p_values[i]), float(adjusted[i])
        )
        for i in range(len(statistics))
    ]


def _reached(null: NDArray[np.float64], seen: Float64Vector) -> Float64Vector:
    reached = np.count_nonzero(null >= seen[:, None] - _TIE, axis=1)
    return np.asarray((1 + reached) / (null.shape[1] + 1), np.float64)


def random_splits(rng: np.random.Generator, count: int, n: int, m: int) -> Splits:
    """Returns `(count, n + m)` float32 0/1, each row with m ones at random places."""
    indicator = np.zeros((count, n + m), dtype=np.float32)
    for split in indicator:
        split[rng.permutation(n + m)[:m]] = 1.0
    return indicator


def largest_ks_distance(rows: Float32Matrix) -> Statistic:
    """Returns the square of the largest KS distance of any column; its tail is nearly exponential."""
    columns: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    for column in rows.T:
        order = np.argsort(column, kind="stable")
        # Distribution functions are compared after the last of equal values.
        columns.append((order, np.flatnonzero(np.append(np.diff(column[order]) > 0, True))))

    def statistic(splits: Splits) -> Float64Vector:
        m = float(splits[0].sum())
        n = splits.shape[1] - m
        flags = np.ascontiguousarray(splits.T)
        largest = np.zeros(len(splits), np.float32)
        for order, last in columns:
            gap = np.cumsum(flags[order], axis=0)[last]  # Whole numbers, exact in float32.
            gap *= np.float32(1 / m + 1 / n)
            gap -= ((last + 1) / n).astype(np.float32)[:, None]
            largest = np.maximum(largest, np.maximum(gap.max(axis=0), -gap.min(axis=0)))
        return largest.astype(np.float64) ** 2

    return statistic


def mean_distance(rows: Float32Matrix) -> Statistic:
    """Returns the square of the distance between the two parts' means, of rows whose own mean is 0."""

    def statistic(splits: Splits) -> Float64Vector:
        m = float(splits[0].sum())
        n = splits.shape[1] - m
        differences = (splits @ rows) * np.float32(1 / m + 1 / n)
        return np.square(differences).sum(axis=1, dtype=np.float64)

    return statistic


def gaussian_features(rows: Float32Matrix, rng: np.random.Generator) -> Float32Matrix:
    """Returns `(N, 512)` whose inner products are near a Gaussian kernel's, with the pool's mean taken off.

    The kernel's bandwidth is the median distance of the pool, which no permutation changes. 0 where no rows differ.
    """
    bandwidth = median_bandwidth(rows)
    if bandwidth == 0.0:
        return np.zeros((len(rows), 1), np.float32)
    directions = rng.standard_normal((rows.shape[1], _FREQUENCIES), dtype=np.float32)
    phases = scaled(rows, bandwidth, np.median(rows.astype(np.float64), axis=0)) @ directions
    features = np.concatenate([np.cos(phases), np.sin(phases)], axis=1) / np.float32(np.sqrt(_FREQUENCIES))
    return features - features.mean(axis=0)


def mean_distance_bounds(rows: Float32Matrix, split: NDArray[np.bool_], judged: Judged) -> tuple[float, float]:
    """Returns the 95 % interval of `mean_distance`'s value at the observed split, in its own units.

    By its standard error: what the rows' spread along the difference of the means gives (the delta method), and beside
    that what chance alone gives. The rows are taken as given, as if nothing of them had been estimated from the pool.
    """
    current, reference = rows[split], rows[~split]
    difference = current.mean(axis=0) - reference.mean(axis=0)
    variance = sum(float((side @ difference).var()) / len(side) for side in (current, reference))
    error = 1.96 * float(np.sqrt(4.0 * variance + judged.null_spread**2))
    return judged.observed - error, judged.observed + error


def whitened(rows: Float32Matrix) -> Float32Matrix:
    """Returns the rows turned and scaled so that they vary by 1 in each direction, and by less where they hardly do.

    The distance of means is then Hotelling's, with the pool's covariance and a ridge. Constant columns are left out.
    """
    x = rows[:, (rows != rows[0]).any(axis=0)].astype(np.float64)
    if not x.shape[1]:
        return np.zeros((len(rows), 1), np.float32)
    x -= x.mean(axis=0)
    x /= np.maximum(x.std(axis=0), np.finfo(np.float64).tiny)
    covariance = x.T @ x / len(x) + _RIDGE * np.eye(x.shape[1])
    return np.linalg.solve(np.linalg.cholesky(covariance), x.T).T.astype(np.float32)
