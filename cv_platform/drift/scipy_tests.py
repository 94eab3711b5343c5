"""The functions of scipy that drift detection uses, with types: scipy has no stubs.

They are imported on first use: scipy.stats takes longer to import than the rest of the package together, and the
records of drift detection are imported by every process. Upstream: https://docs.scipy.org/doc/scipy/reference/stats.html.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import warnings
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray


def ks_two_sample(left: NDArray[Any], right: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns distances and p-values `(d,)` of the two-sided KS test of each column of `(n, d)` and `(m, d)`.

    p-values are exact up to 10,000 rows and asymptotic beyond.
    """
    from scipy import stats

    with warnings.catch_warnings():
        # With equal sizes and a distance near 0, rounding can lift the exact p-value over 1 (scipy 1.17). scipy then
        # takes the asymptotic one, which is 1 to all digits that matter, and warns.
        warnings.filterwarnings("ignore", "ks_2samp: Exact calculation unsuccessful", RuntimeWarning)
        result = cast(Any, stats).ks_2samp(left, right, axis=0, method="auto")
    return np.asarray(result.statistic, dtype=np.float64), np.asarray(result.pvalue, dtype=np.float64)


def fisher_exact(table: list[list[int]]) -> float:
    """Returns the two-sided p-value of a 2×2 table of counts."""
    from scipy import stats

    return float(cast(Any, stats).fisher_exact(table).pvalue)


def column_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the ranks from 1 of each column of `(n, k)`; equal values share the mean of theirs."""
    from scipy import stats

    return np.asarray(cast(Any, stats).rankdata(values, axis=0), dtype=np.float64)


def gamma_surprise(
    values: NDArray[np.float64], mean: NDArray[np.float64], variance: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Returns −log P(X ≥ value) of gamma distributions with these means and variances; 0 where nothing varies."""
    from scipy import stats

    varies = np.broadcast_to(variance > 1e-12 * mean**2, values.shape)
    shape, scale = mean**2 / np.where(variance > 0, variance, 1.0), variance / np.where(mean > 0, mean, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        tail = -np.asarray(cast(Any, stats).gamma.logsf(values, shape, scale=scale), dtype=np.float64)
    # What is farther than float64 can tell is as far; a statistic without variance says nothing.
    return np.where(varies, np.nan_to_num(tail, nan=0.0, posinf=1e3), 0.0)


def binomial_quantile(probability: float, trials: int, rate: float) -> int:
    """Returns the smallest count k with P(Binomial(trials, rate) ≤ k) ≥ probability."""
    from scipy import stats

    return int(cast(Any, stats).binom.ppf(probability, trials, rate))


def binomial_at_least(count: int, trials: int, rate: float) -> float:
    """Returns P(Binomial(trials, rate) ≥ count), the one-sided p-value of so many."""
    from scipy import stats

    return float(cast(Any, stats).binom.sf(count - 1, trials, rate))


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share, 0–1, of at least one trial."""
    from scipy import stats

    interval = cast(Any, stats).binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
