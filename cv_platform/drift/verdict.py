"""The verdict: one family-wise test at `alpha` over the detectors of `family.py`.

Holm's correction over them keeps the chance of any false alarm in a report at `alpha`. Effect sizes, classes and images
are in `localisation.py`; they explain a verdict and never make one.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from pydantic import BaseModel, ConfigDict

from cv_platform.drift.family import DEFAULT_DETECTORS, DETECTORS, Effort
from cv_platform.drift.sample import DriftSample, require_comparable
from cv_platform.drift.two_sample import MAX_CURRENT_ROWS, holm
from cv_platform.errors import InvalidSampleError

_MOST_PERMUTATIONS = 19_999
MIN_ROWS = 2
"""Fewer rows on either side cannot be judged at all; what is too few to be useful is the caller's decision."""


class DriftVerdict(BaseModel):
    """What the family of tests says about one current sample.

    Attributes:
        drifted: an adjusted p-value is at most `alpha`.
        alpha: family-wise false-alarm rate.
        p_values: per detector; for the KS detectors with Bonferroni's correction over their dimensions.
        adjusted_p_values: Holm's, over the detectors.
        statistics: per detector: the largest KS distance (0–1), the unbiased MMD²; of a classifier the
            held-out share of pairs that it tells apart.
        standardised: per MMD detector: standard deviations of its permutation null above that null's mean.
        reference_rows, current_rows: rows given.
        permutations: of the MMD tests, as used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    drifted: bool
    alpha: float
    p_values: dict[str, float]
    adjusted_p_values: dict[str, float]
    statistics: dict[str, float]
    standardised: dict[str, float]
    reference_rows: int
    current_rows: int
    permutations: int

    @property
    def drifted_detectors(self) -> tuple[str, ...]:
        """The detectors that reject, smallest adjusted p-value first."""
        rejected = [name for name, p in self.adjusted_p_values.items() if p <= self.alpha]
        return tuple(sorted(rejected, key=lambda name: self.adjusted_p_values[name]))


def judge(
    reference: DriftSample,
    current: DriftSample,
    *,
    alpha: float,
    permutations: int,
    max_reference_rows: int,
    seed: int,
    max_current_rows: int = MAX_CURRENT_ROWS,
    detectors: Collection[str] = DEFAULT_DETECTORS,
) -> DriftVerdict:
    """Tests whether `current` still comes from the distribution of `reference`.

    The same rows in any order, with the same seed, give the same verdict.

    Args:
        reference: held-out rows of the model that made `current`.
        current: the window's rows.
        alpha: family-wise false-alarm rate, between 0 and 1.
        permutations: of each MMD test. Raised where it is so small that an MMD test alone could never reach `alpha`
            after Holm's correction, up to 19,999 (alpha 0.0002); below that, the KS tests alone can.
        max_reference_rows: seeded subsample of the reference in the MMD tests (the KS tests take all rows).
        seed: of subsamples and permutations.
        max_current_rows: the same for the current rows; bounds memory.
        detectors: names of those that take part. One whose rows are not there, as images are gone, is left out; which
            it is does not depend on what the rows say, so that the correction for the others holds.

    Raises:
        InvalidSampleError: the samples have different columns, fewer than two rows, or none for these detectors.
        ValueError: `alpha` is not between 0 and 1.
    """
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"Expected alpha between 0 and 1. Received: {alpha}.")
    require_comparable(reference, current, min_rows=MIN_ROWS)
    family = [one for one in DETECTORS if one.name in detectors and one.can_test(reference, current)]
    if not family:
        raise InvalidSampleError(f"Expected rows for one of the detectors {', '.join(detectors)}. Received: none.")
    needed = math.ceil(len(family) / alpha) - 1
    if needed <= _MOST_PERMUTATIONS:
        permutations = max(permutations, needed)
    effort = Effort(permutations, max_reference_rows, max_current_rows, seed)
    tested = {detector.name: detector.test(reference, current, effort) for detector in family}
    p_values = {name: result.p_value for name, result in tested.items()}
    adjusted = holm(p_values)
    return DriftVerdict(
        drifted=min(adjusted.values()) <= alpha,
        alpha=alpha,
        p_values=p_values,
        adjusted_p_values=adjusted,
        statistics={name: result.statistic for name, result in tested.items()},
        standardised={name: r.standardised for name, r in tested.items() if r.standardised is not None},
        reference_rows=len(reference),
        current_rows=len(current),
        permutations=permutations,
    )
