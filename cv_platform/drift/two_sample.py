"""What tests of two samples are made of: Kolmogorov–Smirnov per dimension, a Gaussian kernel, Holm's correction.

Pure functions of arrays; which tests make up the verdict is decided in `family.py`. All of them give the same answer
for the same rows in any order, so that a report can be repeated from a database that returns rows as it likes.

Sources:
    Rabanser et al. 2019, "Failing Loudly", arXiv 1810.11953: KS per dimension with Bonferroni.
    Gretton et al. 2012, "A Kernel Two-Sample Test", JMLR 13: median heuristic.
    Massart 1990, "The Tight Constant in the Dvoretzky–Kiefer–Wolfowitz Inequality", Annals of Probability 18(3).
    Holm 1979, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cv_platform.drift.sample import Float32Matrix
from cv_platform.drift.scipy_tests import ks_two_sample

Float64Vector = NDArray[np.float64]
_MAX_BANDWIDTH_ROWS = 500
_FARTHEST_BANDWIDTHS = 1e6
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


def ks_bounds(distance: float, dimensions: int, rows: tuple[int, int]) -> tuple[float, float]:
    """Returns bounds that hold the largest KS distance of the distributions themselves in at least 95 % of all cases.

    By the Dvoretzky–Kiefer–Wolfowitz inequality, which holds for any distributions and any number of rows.

    Args:
        distance: the largest of the two samples, 0–1.
        dimensions: of how many.
        rows: of the two samples.
    """
    reach = sum(float(np.sqrt(np.log(4.0 * dimensions / 0.05) / (2.0 * count))) for count in rows)
    return max(0.0, distance - reach), min(1.0, distance + reach)


def median_bandwidth(rows: Float32Matrix, others: Float32Matrix | None = None) -> float:
    """Returns the median of the non-zero distances between rows (Gretton et al. 2012: the median heuristic).

    Where all rows are the same, those with the others decide; 0.0 where these are all the same too. At most 500 rows
    take part, evenly spaced in sorted order.
    """
    for some in (rows, rows if others is None else np.concatenate([rows, others])):
        ordered = some[sorted_order(some)]
        spaced = ordered[np.linspace(0, len(some) - 1, min(len(some), _MAX_BANDWIDTH_ROWS)).astype(np.intp)]
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
    left = scaled(rows, bandwidth, centre)
    right = left if columns is None else scaled(columns, bandwidth, centre)
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


def scaled(rows: Float32Matrix, bandwidth: float, centre: Float64Vector) -> Float32Matrix:
    """Returns the rows from `centre` on in units of the bandwidth, within what float32 can square."""
    units = (rows.astype(np.float64) - centre) / bandwidth
    # The kernel of what is farther away is 0 either way.
    return np.clip(units, -_FARTHEST_BANDWIDTHS, _FARTHEST_BANDWIDTHS).astype(np.float32)


def sorted_order(rows: Float32Matrix) -> NDArray[np.intp]:
    """Returns an order of the rows that does not depend on the one that they are in: by their bytes.

    A hundredth of the time of a sort by columns, where there are a thousand of them.
    """
    contiguous = np.ascontiguousarray(rows + np.float32(0.0))  # Without the sign of −0, which equals 0.
    whole_rows = contiguous.view(np.dtype((np.void, contiguous.itemsize * contiguous.shape[1])))
    return np.argsort(whole_rows.ravel(), kind="stable")


def _distances(rows: Float32Matrix) -> Float64Vector:
    """Returns the distances between all pairs of different rows; 0 where nothing but rounding tells them apart."""
    centred = rows.astype(np.float64)
    centred -= np.median(centred, axis=0)
    norms = np.square(centred).sum(axis=1)
    left, right = np.triu_indices(len(rows), 1)
    lengths = (norms[:, None] + norms[None, :])[left, right]
    squares = lengths - 2.0 * (centred @ centred.T)[left, right]
    return np.sqrt(np.where(squares > _ROUNDING * lengths, squares, 0.0))
