"""The verdict: one family-wise test at `alpha` over four detectors.

    bbsd_ks         KS per class probability, Bonferroni inside (black-box shift detection)
    properties_ks   KS per pixel statistic, Bonferroni inside
    features_mmd    MMD permutation test on the penultimate layer
    uae_mmd         MMD permutation test on the untrained encoder's embedding

Holm's correction over the four keeps the chance of any false alarm in a report at `alpha`. Effect sizes, classes and
images are in `localisation.py`; they explain a verdict and never make one.

Sources: Rabanser et al. 2019, "Failing Loudly", arXiv 1810.11953; Lipton et al. 2018, "Detecting and Correcting for
Label Shift with Black Box Predictors", arXiv 1802.03916; see also `two_sample.py`.
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import BaseModel, ConfigDict

from cv_platform.drift.sample import DriftSample, Float32Matrix, require_comparable
from cv_platform.drift.two_sample import MAX_CURRENT_ROWS, holm, ks_bonferroni, mmd_permutation_test

DETECTORS: tuple[str, ...] = ("bbsd_ks", "properties_ks", "features_mmd", "uae_mmd")
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
        statistics: per detector: the largest KS distance (0–1), the unbiased MMD².
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
) -> DriftVerdict:
    """Tests whether `current` still comes from the distribution of `reference`.

    The same rows in any order, with the same seed, give the same verdict.

    Args:
        reference: held-out rows of the model that made `current`.
        current: the window's rows.
        alpha: family-wise false-alarm rate, between 0 and 1.
        permutations: of each MMD test. Raised where it is so small that an MMD test alone could never reach `alpha`
            after Holm's correction, up to 19,999 (alpha 0.0002).
        max_reference_rows: seeded subsample of the reference in the MMD tests (the KS tests take all rows).
        seed: of subsamples and permutations.
        max_current_rows: the same for the current rows; bounds memory.

    Raises:
        InvalidSampleError: the samples have different columns, or fewer than two rows.
        ValueError: `alpha` is not between 0 and 1.
    """
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"Expected alpha between 0 and 1. Received: {alpha}.")
    require_comparable(reference, current, min_rows=MIN_ROWS)
    needed = min(math.ceil(len(DETECTORS) / alpha) - 1, _MOST_PERMUTATIONS)
    permutations = max(permutations, needed)
    bbsd = ks_bonferroni(settle_saturated(reference.bbsd), settle_saturated(current.bbsd))
    properties = ks_bonferroni(reference.properties, current.properties)
    mmd = {
        name: mmd_permutation_test(
            left,
            right,
            permutations=permutations,
            # Each detector has a stream of its own: one unlucky set of permutations must not move both.
            seed=(seed, stream),
            max_reference_rows=max_reference_rows,
            max_current_rows=max_current_rows,
        )
        for stream, (name, left, right) in enumerate(
            (("features_mmd", reference.features, current.features), ("uae_mmd", reference.uae, current.uae))
        )
    }
    p_values = {
        "bbsd_ks": bbsd.p_value,
        "properties_ks": properties.p_value,
        **{name: result.p_value for name, result in mmd.items()},
    }
    adjusted = holm(p_values)
    return DriftVerdict(
        drifted=min(adjusted.values()) <= alpha,
        alpha=alpha,
        p_values=p_values,
        adjusted_p_values=adjusted,
        statistics={
            "bbsd_ks": float(bbsd.distances.max()),
            "properties_ks": float(properties.distances.max()),
            **{name: result.mmd_squared for name, result in mmd.items()},
        },
        standardised={name: result.standardised for name, result in mmd.items()},
        reference_rows=len(reference),
        current_rows=len(current),
        permutations=permutations,
    )


def settle_saturated(probabilities: Float32Matrix) -> Float32Matrix:
    """Merges probabilities that saturate, so that a last bit cannot look like drift.

    A confident model answers exactly 1.0 for many images; the same model in another batch size or runtime answers
    0.9999999 for some of them. KS compares ranks, so that would be a large distance.
    """
    return np.clip(probabilities, np.float32(1e-30), np.float32(1.0 - 1e-6))
