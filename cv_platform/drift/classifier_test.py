"""The classifier two-sample test: can a linear classifier tell an image of the window from one of the reference?

Each image is scored by a ridge regression that has not seen it (leave-one-out), which has a closed form: with the hat
matrix H of the pooled rows, the held-out scores of labels y are `(Hy − diag(H)·y) / (1 − diag(H))`. H does not depend
on the labels, so all permutations of them are one product of matrices, and the test is exact.

Sources:
    Lopez-Paz & Oquab 2017, "Revisiting Classifier Two-Sample Tests", arXiv 1610.06545.
    Hediger, Michel & Näf 2022, "On the Use of Random Forest for Two-Sample Testing", arXiv 1903.06287: held-out scores
    of all rows, by permutation.
    Cook & Weisberg 1982, "Residuals and Influence in Regression", section 2.2: the closed form.
"""

# NumPy's linear algebra comes without complete types.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cv_platform.drift.sample import Float32Matrix
from cv_platform.drift.scipy_tests import column_ranks
from cv_platform.drift.two_sample import TIE_TOLERANCE, random_splits, sorted_order, subsample

MAX_ROWS = 2000
"""Of each side: the scores of 500 permutations then take a second of CPU."""
_PENALTY = 1.0
"""Of the squared weights, for a row and in units of the mean variance: what varies less is mostly left alone."""


@dataclass(frozen=True)
class ClassifierResult:
    """A classifier two-sample test.

    Attributes:
        told_apart: held-out accuracy: of pairs of a window's and a reference's image, the share whose former has the
            higher score (the area under the ROC curve), 0–1. By chance a little under .5, as a row is missing in its
            own class.
        p_value: (1 + #{permutations that reach it}) / (permutations + 1).
    """

    told_apart: float
    p_value: float


def classifier_test(
    reference: Float32Matrix,
    current: Float32Matrix,
    *,
    permutations: int,
    seed: int | Sequence[int],
    max_rows: int = MAX_ROWS,
) -> ClassifierResult:
    """Tests whether held-out images of two samples are told apart.

    Args:
        reference: `(n, d)` float32, n ≥ 2.
        current: `(m, d)` float32, m ≥ 2.
        permutations: B; the smallest possible p-value is 1/(B+1).
        seed: of the subsamples and permutations.
        max_rows: above it, a seeded subsample of a side takes part.
    """
    rng = np.random.default_rng(seed)
    reference, current = subsample(reference, max_rows, rng), subsample(current, max_rows, rng)
    n, m = len(reference), len(current)
    pooled = np.concatenate([reference, current])
    order = sorted_order(pooled)  # The rows' order within the pool must not matter.
    splits = np.concatenate([(order >= n).astype(np.float32)[None, :], random_splits(rng, permutations, n, m)])
    scores = _held_out_scores(pooled[order], splits.T)
    # Of equal rows the sums differ in their last bits.
    ranks = column_ranks(np.round(scores, 5))
    told_apart = ((ranks * splits.T).sum(axis=0) - m * (m + 1) / 2) / (n * m)
    reached = int(np.count_nonzero(told_apart[1:] >= told_apart[0] - TIE_TOLERANCE))
    return ClassifierResult(float(told_apart[0]), (1 + reached) / (permutations + 1))


def _held_out_scores(rows: Float32Matrix, labels: Float32Matrix) -> NDArray[np.float64]:
    """Returns `(N, B)`: the score of each row by the regression of the other rows' labels, for `(N, B)` labels."""
    x = rows.astype(np.float64)
    x -= x.mean(axis=0)
    spread = x.std(axis=0)
    x = np.clip(x / np.where(spread > 0, spread, 1.0), -1e3, 1e3).astype(np.float32)
    y = labels - labels.mean(axis=0)
    count, width = x.shape
    penalty = np.float32(_PENALTY * count)
    if width <= count:
        # H = X (XᵀX + λ)⁻¹ Xᵀ, without making H.
        solved: Float32Matrix = np.linalg.solve(x.T @ x + penalty * np.eye(width, dtype=np.float32), x.T)
        fitted, leverage = x @ (solved @ y), (x * solved.T).sum(axis=1)
    else:
        # The same by the rows' products: H = I − λ (XXᵀ + λ)⁻¹.
        inverse: Float32Matrix = np.linalg.inv(x @ x.T + penalty * np.eye(count, dtype=np.float32))
        fitted, leverage = y - penalty * (inverse @ y), 1.0 - penalty * np.diag(inverse)
    leverage = (leverage + 1.0 / count)[:, None]  # The mean is fitted too.
    return np.asarray((fitted - leverage * y) / (1.0 - leverage), dtype=np.float64)
