"""The verdict: one family-wise test at `alpha` over the detectors of `family.py`.

They are judged by the same permutations, which keeps the chance of any false alarm in a report at `alpha`: what the
detectors have in common is not paid for twice. Those of images that are not all there have permutations of their own,
and Bonferroni's correction beside the others. Effect sizes, classes and images
are in `localisation.py`; they explain a verdict and never make one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from cv_platform.drift.family import DEFAULT_DETECTORS, DETECTORS, Detector, KsDetector, MmdDetector
from cv_platform.drift.permutation import Judged, judge_together
from cv_platform.drift.sample import DriftSample, require_comparable
from cv_platform.drift.two_sample import holm, sorted_order, subsample
from cv_platform.errors import InvalidSampleError

_MOST_PERMUTATIONS = 19_999
_RESOLUTION = 5
"""So many permutations may reach what is still an alarm: with one, chance would decide by a single draw."""
_MOST_CURRENT_ROWS = 5000
MIN_ROWS = 2
"""Fewer rows on either side cannot be judged at all; what is too few to be useful is the caller's decision."""


class DriftVerdict(BaseModel):
    """What the family of tests says about one current sample.

    Attributes:
        drifted: an adjusted p-value is at most `alpha`.
        alpha: family-wise false-alarm rate.
        p_values: per detector alone.
        adjusted_p_values: of all of them together.
        statistics: per detector: the largest KS distance (0–1), the MMD² without what chance gives it, a distance of
            means as a multiple of chance's; of a classifier the held-out share of pairs that it tells apart.
        intervals: of each statistic, 95 %.
        standardised: per MMD detector: standard deviations of its permutation null above that null's mean.
        reference_rows, current_rows: rows given.
        permutations: at most; fewer were drawn where that settled it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    drifted: bool
    alpha: float
    p_values: dict[str, float]
    adjusted_p_values: dict[str, float]
    statistics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
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
    detectors: Collection[str] = DEFAULT_DETECTORS,
) -> DriftVerdict:
    """Tests whether `current` still comes from the distribution of `reference`.

    The same rows in any order, with the same seed, give the same verdict.

    Args:
        reference: held-out rows of the model that made `current`.
        current: the window's rows, of which 5,000 take part, seeded.
        alpha: family-wise false-alarm rate, between 0 and 1.
        permutations: at least. Raised where `alpha` is small, up to 19,999 (alpha 0.00005); below that, only the KS
            tests can alarm, which need none, corrected by Holm.
        max_reference_rows: seeded subsample of the reference that takes part.
        seed: of subsamples and permutations.
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
    pools: dict[tuple[int, int], list[Detector]] = {}
    for one in family:
        # As many rows are the same rows: the encoder's are those that have an image.
        pools.setdefault((len(one.columns(reference)), len(one.columns(current))), []).append(one)
    needed = math.ceil(len(pools) / alpha)
    permutations = max(permutations, min(_MOST_PERMUTATIONS, _RESOLUTION * needed - 1))
    found: dict[str, Judged] = {}
    bounds: dict[str, tuple[float, float]] = {}
    for number, pool in enumerate(pools.values()):
        rng = np.random.default_rng((seed, number))
        level = alpha / len(pools)
        for one, judged, ends in _judge_pool(pool, reference, current, max_reference_rows, level, permutations, rng):
            found[one.name] = judged
            bounds[one.name] = (one.shown(ends[0], judged), one.shown(ends[1], judged))
    p_values = {one.name: found[one.name].p_value for one in family}
    adjusted = {one.name: min(1.0, len(pools) * found[one.name].adjusted_p_value) for one in family}
    if needed - 1 > _MOST_PERMUTATIONS:
        p_values |= {one.name: one.compare(reference, current).p_value for one in family if isinstance(one, KsDetector)}
        adjusted = holm(p_values)
    return DriftVerdict(
        drifted=min(adjusted.values()) <= alpha,
        alpha=alpha,
        p_values=p_values,
        adjusted_p_values=adjusted,
        statistics={one.name: one.shown(found[one.name].observed, found[one.name]) for one in family},
        intervals=bounds,
        standardised={
            one.name: (found[one.name].observed - found[one.name].null_mean) / found[one.name].null_spread
            if found[one.name].null_spread > 0
            else 0.0
            for one in family
            if isinstance(one, MmdDetector)
        },
        reference_rows=len(reference),
        current_rows=len(current),
        permutations=permutations,
    )


def _judge_pool(
    detectors: Sequence[Detector],
    reference: DriftSample,
    current: DriftSample,
    max_reference_rows: int,
    level: float,
    permutations: int,
    rng: np.random.Generator,
) -> list[tuple[Detector, Judged, tuple[float, float]]]:
    """Judges detectors that have the same rows, and returns beside each its statistic's interval."""
    widths = np.cumsum([one.columns(reference).shape[1] for one in detectors])[:-1]
    left, right = (np.concatenate([one.columns(side) for one in detectors], axis=1) for side in (reference, current))
    left, right = subsample(left, max_reference_rows, rng), subsample(right, _MOST_CURRENT_ROWS, rng)
    pooled = np.concatenate([left, right])
    order = sorted_order(pooled)  # The rows' order within the pool must not matter.
    parts = np.split(pooled[order], widths, axis=1)
    prepared = [one.prepared(rows, rng) for one, rows in zip(detectors, parts, strict=True)]
    statistics = [one.statistic(rows) for one, rows in zip(detectors, prepared, strict=True)]
    split = order >= len(left)
    judged = judge_together(statistics, split, level=level, permutations=permutations, rng=rng)
    return [
        (one, each, one.bounds(rows, split, each)) for one, rows, each in zip(detectors, prepared, judged, strict=True)
    ]
