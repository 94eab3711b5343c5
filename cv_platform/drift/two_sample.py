"""Two-sample tests: Kolmogorov–Smirnov per dimension, the MMD permutation test, and Holm's correction.

Pure functions of arrays; which tests make up the verdict is decided in `verdict.py`. All of them give the same answer
for the same rows in any order, so that a report can be repeated from a database that returns rows as it likes.

Sources:
    Rabanser et al. 2019, "Failing Loudly", arXiv 1810.11953: KS per dimension with Bonferroni, MMD on embeddings.
    Gretton et al. 2012, "A Kernel Two-Sample Test", JMLR 13: MMD (lemma 6: the unbiased estimate), median heuristic.
    Phipson & Smyth 2010, "Permutation p-values should never be zero", SAGMB 9(1): p = (1 + #{≥}) / (B + 1).
    Holm 1979, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cv_platform.drift.sample import Float32Matrix
from cv_platform.drift.scipy_tests import ks_two_sample

Float64Vector = NDArray[np.float64]
MAX_CURRENT_ROWS = 5000
"""Current rows in kernel tests: with 2,000 reference rows the kernel matrix then takes 196 MB."""
_MAX_BANDWIDTH_ROWS = 1000
_BLOCK = 500
"""Permutations per matrix product; bounds memory where a small alpha asks for many."""
_FARTHEST_BANDWIDTHS = 1e6
# Sums of float32 products differ in their last bits with the order of addition. A permutation that ties with the
# observed split must count as reaching it, whatever the rounding: the error is on the side of a larger p.
TIE_TOLERANCE = 1e-6
_ROUNDING = 1e-12


@dataclass(frozen=True)
class KsResult:
    """KS tests of d dimensions with Bonferroni's correction.

    Attributes:
        distances: `(d,)` float64, the largest gap between the two empirical distribution functions, 0–1.
        p_values: `(d,)` float64, uncorrected.
        p_value: of the family: the smallest times d, at most 1.
    """

    distances: Float64Vector
    p_values: Float64Vector
    p_value: float

    @property
    def largest(self) -> int:
        """The dimension with the largest distance."""
        return int(np.argmax(self.distances))


@dataclass(frozen=True)
class MmdResult:
    """An MMD permutation test.

    Attributes:
        mmd_squared: the unbiased estimate of MMD²; may be slightly negative.
        p_value: (1 + #{permutations that reach it}) / (permutations + 1).
        standardised: standard deviations of the permutation null between its mean and `mmd_squared`.
        bandwidth: of the Gaussian kernel exp(−d²/2σ²), in the units of the rows.
        reference_rows, current_rows: how many took part, after subsampling.
    """

    mmd_squared: float
    p_value: float
    standardised: float
    bandwidth: float
    reference_rows: int
    current_rows: int


def ks_bonferroni(reference: Float32Matrix, current: Float32Matrix) -> KsResult:
    """Tests each dimension with the two-sample KS test, and the family with Bonferroni's correction.

    p-values are exact up to 10,000 rows and asymptotic beyond. Ties (constant or discrete columns) make them too
    large, never too small; a column that is the same constant on both sides has distance 0 and p 1.

    Args:
        reference: `(n, d)` float32.
        current: `(m, d)` float32.
    """
    distances, p_values = ks_two_sample(reference, current)
    # Exact p-values can exceed 1 or reach 0 by rounding alone.
    p_values = np.clip(p_values, np.finfo(np.float64).tiny, 1.0)
    return KsResult(distances, p_values, float(min(1.0, p_values.min() * len(p_values))))


def mmd_permutation_test(
    reference: Float32Matrix,
    current: Float32Matrix,
    *,
    permutations: int,
    seed: int | Sequence[int],
    max_reference_rows: int,
    max_current_rows: int = MAX_CURRENT_ROWS,
    bandwidth: float | None = None,
) -> MmdResult:
    """Tests whether two samples come from one distribution, with the unbiased MMD² of a Gaussian kernel.

    Permutations are evaluated in one matrix product: with K the kernel of the pooled rows (zero diagonal) and Z the
    0/1 indicator of "current" (a row per permutation), the sums over pairs are
    `yy = Σ Z∘(ZK)`, `xy = Z·rowsum(K) − yy` and `xx = ΣK − 2xy − yy`.

    The bandwidth is the reference's median distance, so that windows are measured on one scale. It depends on the
    reference alone, which makes the test exact only up to that estimate; the calibration tests measure its level.

    Args:
        reference: `(n, d)` float32, n ≥ 2.
        current: `(m, d)` float32, m ≥ 2.
        permutations: B; the smallest possible p-value is 1/(B+1).
        seed: of the subsamples and permutations.
        max_reference_rows: above it, a seeded subsample of the reference takes part.
        max_current_rows: the same for the current sample; bounds memory.
        bandwidth: None takes `median_bandwidth`.

    Returns:
        The result; p-value 1 where no two rows differ at all.
    """
    rng = np.random.default_rng(seed)
    reference = subsample(reference, max_reference_rows, rng)
    current = subsample(current, max_current_rows, rng)
    n, m = len(reference), len(current)
    sigma = median_bandwidth(reference, current) if bandwidth is None else bandwidth
    if sigma == 0.0:
        return MmdResult(0.0, 1.0, 0.0, 0.0, n, m)
    pooled = np.concatenate([reference, current])
    # The rows' order within the pool must not matter: the permutations are drawn over the sorted pool.
    order = sorted_order(pooled)
    kernel = gaussian_kernel(pooled[order], bandwidth=sigma, centre=np.median(reference, axis=0))
    np.fill_diagonal(kernel, 0.0)
    row_sums = kernel.sum(axis=1, dtype=np.float64)
    split = (order >= n).astype(np.float32)[None, :]
    observed = _mmd_squared(kernel, row_sums, split, n, m)[0]
    null = np.concatenate(
        [
            _mmd_squared(kernel, row_sums, random_splits(rng, min(_BLOCK, permutations - start), n, m), n, m)
            for start in range(0, permutations, _BLOCK)
        ]
    )
    p_value = (1 + int(np.count_nonzero(null >= observed - TIE_TOLERANCE))) / (permutations + 1)
    spread = float(null.std())
    standardised = float((observed - null.mean()) / spread) if spread > 0 else 0.0
    return MmdResult(float(observed), p_value, standardised, sigma, n, m)


def median_bandwidth(reference: Float32Matrix, current: Float32Matrix | None = None) -> float:
    """Returns the median of the non-zero distances between reference rows (Gretton et al. 2012: the median heuristic).

    Where all reference rows are the same, the pooled rows decide; 0.0 where those are all the same too. At most 1,000
    rows take part, evenly spaced in sorted order.
    """
    for rows in (reference, reference if current is None else np.concatenate([reference, current])):
        ordered = rows[sorted_order(rows)]
        spaced = ordered[np.linspace(0, len(rows) - 1, min(len(rows), _MAX_BANDWIDTH_ROWS)).astype(np.intp)]
        distances = _distances(spaced)
        positive = distances[distances > 0]
        if positive.size:
            return float(np.median(positive))
    return 0.0


def gaussian_kernel(
    rows: Float32Matrix, columns: Float32Matrix | None = None, *, bandwidth: float, centre: Float64Vector
) -> Float32Matrix:
    """Returns exp(−‖x−y‖²/2σ²) as `(len(rows), len(columns))` float32; `columns` defaults to `rows`.

    Distances do not depend on `centre`, but ‖x‖²+‖y‖²−2x·y in float32 is only accurate near it.
    """
    left = _scaled(rows, bandwidth, centre)
    right = left if columns is None else _scaled(columns, bandwidth, centre)
    kernel = left @ right.T
    kernel *= 2
    kernel -= np.square(left).sum(axis=1)[:, None]
    kernel -= np.square(right).sum(axis=1)[None, :]
    np.minimum(kernel, 0, out=kernel)  # Rounding can make a squared distance negative.
    kernel *= 0.5
    return np.exp(kernel, out=kernel)


def subsample(rows: Float32Matrix, max_rows: int, rng: np.random.Generator) -> Float32Matrix:
    """Returns `rows`, or `max_rows` of them drawn without replacement, independent of their order."""
    if len(rows) <= max_rows:
        return rows
    chosen = np.sort(rng.choice(len(rows), size=max_rows, replace=False))
    return rows[sorted_order(rows)[chosen]]


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Returns Holm's adjusted p-values (1979): rejecting those ≤ alpha keeps the family-wise error rate at alpha.

    Valid under any dependence between the tests. The order of the keys is kept.

    Raises:
        ValueError: a p-value is outside 0–1 or not a number.
    """
    wrong = {name: p for name, p in p_values.items() if not 0.0 <= p <= 1.0}
    if wrong:
        raise ValueError(f"Expected p-values between 0 and 1. Received: {wrong}.")
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, p * (len(p_values) - rank)))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}


def _mmd_squared(
    kernel: Float32Matrix, row_sums: Float64Vector, indicator: Float32Matrix, n: int, m: int
) -> Float64Vector:
    """Returns the unbiased MMD² of each row of `indicator` `(B, N)`; see `mmd_permutation_test`."""
    products = indicator @ kernel
    within_current = (indicator * products).sum(axis=1, dtype=np.float64)
    from_current = indicator.astype(np.float64) @ row_sums
    between = from_current - within_current
    within_reference = row_sums.sum() - 2 * from_current + within_current
    return within_reference / (n * (n - 1)) + within_current / (m * (m - 1)) - 2 * between / (n * m)


def random_splits(rng: np.random.Generator, count: int, n: int, m: int) -> Float32Matrix:
    """Returns `(count, n + m)` float32 0/1, each row with m ones at random places."""
    indicator = np.zeros((count, n + m), dtype=np.float32)
    for split in indicator:
        split[rng.permutation(n + m)[:m]] = 1.0
    return indicator


def _scaled(rows: Float32Matrix, bandwidth: float, centre: Float64Vector) -> Float32Matrix:
    scaled = (rows.astype(np.float64) - centre) / bandwidth
    # Squares of what is farther away would overflow float32; the kernel is 0 there either way.
    return np.clip(scaled, -_FARTHEST_BANDWIDTHS, _FARTHEST_BANDWIDTHS).astype(np.float32)


def sorted_order(rows: Float32Matrix) -> NDArray[np.intp]:
    """Returns an order of the rows that does not depend on the one that they are in: by their bytes.

    A hundredth of the time of a sort by columns, where there are a thousand of them.
    """
    contiguous = np.ascontiguousarray(rows + np.float32(0.0))  # Without the sign of −0, which equals 0.
    whole_rows = contiguous.view(np.dtype((np.void, contiguous.itemsize * contiguous.shape[1])))
    return np.argsort(whole_rows.ravel(), kind="stable")


def _distances(rows: Float32Matrix) -> Float64Vector:
    """Returns the distances between all pairs of different rows; 0 where nothing but rounding tells them apart."""
    centred = rows.astype(np.float64) - np.median(rows, axis=0)
    norms = np.square(centred).sum(axis=1)
    left, right = np.triu_indices(len(rows), 1)
    lengths = (norms[:, None] + norms[None, :])[left, right]
    squares = lengths - 2.0 * (centred @ centred.T)[left, right]
    return np.sqrt(np.where(squares > _ROUNDING * lengths, squares, 0.0))
