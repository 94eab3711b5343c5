"""The classifier two-sample test: can a linear classifier tell an image of the window from one of the reference?

Each image is scored by a ridge regression that has not seen it (leave-one-out), which has a closed form: with the hat
matrix H of the pooled rows, the held-out scores of labels y are `(Hy − diag(H)·y) / (1 − diag(H))`. H does not depend
on the labels, so all permutations of them are one product of matrices, and the test is exact.

Sources:
    Lopez-Paz & Oquab 2017, "Revisiting Classifier Two-Sample Tests", arXiv 1610.06545.
    Hediger, Michel & Näf 2022, "On the Use of Random Forest for Two-Sample Testing", arXiv 1903.06287: held-out scores
    of all rows, by permutation.
    DeLong, DeLong & Clarke-Pearson 1988, "Comparing the Areas under Two or More Correlated ROC Curves", Biometrics
    44(3): the standard error of a share of pairs.
    Cook & Weisberg 1982, "Residuals and Influence in Regression", section 2.2: the closed form.
"""

# NumPy's linear algebra comes without complete types.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cv_platform.drift.permutation import Judged, Splits, Statistic
from cv_platform.drift.sample import Float32Matrix
from cv_platform.drift.scipy_tests import column_ranks

_PENALTY = 1.0
"""Of the squared weights, for a row and in units of the mean variance: what varies less is mostly left alone."""


def told_apart(rows: Float32Matrix) -> Statistic:
    """Returns the held-out accuracy of a classifier that is fitted to a split, 0–1, by chance a little under .5.

    Of pairs of a current and another row it is the share whose former has the higher score (the area under the ROC
    curve). Under .5 by chance, as a row is missing in its own class.

    Args:
        rows: `(N, d)` float32, the pool.
    """
    scores = _held_out_scores(rows)

    def statistic(splits: Splits) -> NDArray[np.float64]:
        ranks = column_ranks(scores(splits))
        m = float(splits[0].sum())
        return ((ranks * splits.T).sum(axis=0) - m * (m + 1) / 2) / (m * (splits.shape[1] - m))

    return statistic


def told_apart_bounds(rows: Float32Matrix, split: NDArray[np.bool_], judged: Judged) -> tuple[float, float]:
    """Returns the 95 % interval of the share of pairs that `told_apart` finds at the observed split, 0–1.

    By its standard error, as if the classifier were fixed, and what chance alone gives; what is missing to .5 by chance
    is added above.
    """
    scores = _held_out_scores(rows)(split.astype(np.float32)[None, :])
    everywhere = column_ranks(scores)[:, 0]
    # Of each row, the share of the other side's rows that it is above, or below.
    above, below = (
        (everywhere[side] - column_ranks(scores[side])[:, 0]) / np.count_nonzero(~side) for side in (split, ~split)
    )
    share = float(above.mean())
    error = 1.96 * float(np.sqrt(above.var() / len(above) + below.var() / len(below) + judged.null_spread**2))
    return max(0.0, share - error), min(1.0, share + error + max(0.0, 0.5 - judged.null_mean))


def _held_out_scores(rows: Float32Matrix) -> Callable[[Splits], NDArray[np.float64]]:
    fit, leverage = _regression(rows)

    def scores(splits: Splits) -> NDArray[np.float64]:
        labels = splits.T - splits.mean(axis=1)
        # Of equal rows the sums differ in their last bits.
        return np.round(((fit(labels) - leverage * labels) / (1.0 - leverage)).astype(np.float64), 5)

    return scores


def _regression(rows: Float32Matrix) -> tuple[Callable[[Float32Matrix], Float32Matrix], Float32Matrix]:
    """Returns what fits labels `(N, B)` of mean 0 by the rows, H as a product, and its diagonal `(N, 1)`."""
    x = rows.astype(np.float64)
    x -= x.mean(axis=0)
    spread = x.std(axis=0)
    x = np.clip(x / np.where(spread > 0, spread, 1.0), -1e3, 1e3).astype(np.float32)
    count, width = x.shape
    penalty = np.float32(_PENALTY * count)
    mean = np.float32(1.0 / count)  # It is fitted too.
    if width <= count:
        # H = X (XᵀX + λ)⁻¹ Xᵀ, without making H.
        solved: Float32Matrix = np.linalg.solve(x.T @ x + penalty * np.eye(width, dtype=np.float32), x.T)
        return lambda labels: x @ (solved @ labels), ((x * solved.T).sum(axis=1) + mean)[:, None]
    # The same by the rows' products: H = I − λ (XXᵀ + λ)⁻¹.
    inverse: Float32Matrix = np.linalg.inv(x @ x.T + penalty * np.eye(count, dtype=np.float32))
    return lambda labels: labels - penalty * (inverse @ labels), (1.0 - penalty * np.diag(inverse) + mean)[:, None]
