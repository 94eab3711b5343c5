"""What moved, by how much, in which classes and in which images: the explanation of a verdict, never a verdict.

Effect sizes do not grow with the number of rows (except `standardised`, which says how clear the evidence is), so they
can be compared between windows.

Sources: Gretton et al. 2012, "A Kernel Two-Sample Test", JMLR 13 (witness function); Fisher's exact test
for shares; Holm 1979 over classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cv_platform.config import ClassifierType, Threshold
from cv_platform.drift.family import settle_saturated
from cv_platform.drift.sample import DriftSample, Float32Matrix, require_comparable
from cv_platform.drift.scipy_tests import fisher_exact, wilson_interval
from cv_platform.drift.two_sample import gaussian_kernel, holm, ks_bonferroni, median_bandwidth, subsample
from cv_platform.drift.verdict import DriftVerdict
from cv_platform.predictions import predicted_flags
from cv_platform.properties import PROPERTY_NAMES
from cv_platform.records import ClassMovement, EffectSizes, LargestDistance, PropertyShift

_BLOCK_ROWS = 2000
"""Of a side at a time, as memory grows with their square; of the reference, in the witness, all that take part."""


def effect_sizes(
    reference: DriftSample, current: DriftSample, verdict: DriftVerdict, *, class_names: Sequence[str]
) -> EffectSizes:
    """Measures how large the difference is.

    Args:
        reference: the reference rows.
        current: the rows that `verdict` is about.
        verdict: of `judge`; gives the MMD statistics.
        class_names: names of the columns of `bbsd`.

    Raises:
        InvalidSampleError: the samples cannot be compared.
        ValueError: `class_names` does not name the columns of `bbsd`.
    """
    require_comparable(reference, current)
    _require_names(reference, class_names)
    bbsd = ks_bonferroni(settle_saturated(reference.bbsd), settle_saturated(current.bbsd))
    properties = ks_bonferroni(reference.properties, current.properties)
    left, right = reference.properties.astype(np.float64), current.properties.astype(np.float64)
    shifts = tuple(
        PropertyShift(
            name=name,
            reference_mean=float(left[:, i].mean()),
            current_mean=float(right[:, i].mean()),
            shift_sds=_ratio(float(right[:, i].mean() - left[:, i].mean()), _spread(left[:, i]), if_equal=0.0),
            shift_interval=_shift_interval(left[:, i], right[:, i]),
            spread_ratio=_ratio(_spread(right[:, i]), _spread(left[:, i]), if_equal=1.0),
            ks_distance=float(properties.distances[i]),
        )
        for i, name in enumerate(PROPERTY_NAMES)
    )
    return EffectSizes(
        bbsd=LargestDistance(
            dimension=class_names[bbsd.largest],
            ks_distance=float(bbsd.distances[bbsd.largest]),
            p_value=float(bbsd.p_values[bbsd.largest]),
        ),
        properties=LargestDistance(
            dimension=PROPERTY_NAMES[properties.largest],
            ks_distance=float(properties.distances[properties.largest]),
            p_value=float(properties.p_values[properties.largest]),
        ),
        mmd={name: math.sqrt(max(0.0, verdict.statistics[name])) for name in verdict.standardised},
        mmd_standardised=dict(verdict.standardised),
        property_shifts=shifts,
    )


def class_movements(
    reference: DriftSample,
    current: DriftSample,
    *,
    class_names: Sequence[str],
    classifier_type: ClassifierType,
    threshold: Threshold = 0.5,
    alpha: float = 0.05,
) -> tuple[ClassMovement, ...]:
    """Says for each class how its probability and its share of the predictions moved; the most significant first.

    Args:
        reference: the reference rows.
        current: the window's rows.
        class_names: names of the columns of `bbsd`.
        classifier_type: multi-class predicts the most probable class, multi-label all from `threshold`.
        threshold: multi-label only.
        alpha: family-wise, over both tests of all classes.

    Raises:
        InvalidSampleError: the samples cannot be compared.
        ValueError: `class_names` does not name the columns of `bbsd`.
    """
    require_comparable(reference, current)
    _require_names(reference, class_names)
    ks = ks_bonferroni(settle_saturated(reference.bbsd), settle_saturated(current.bbsd))
    left = predicted_flags(reference.bbsd, classifier_type, threshold).sum(axis=0)
    right = predicted_flags(current.bbsd, classifier_type, threshold).sum(axis=0)
    n, m = len(reference), len(current)
    share_p_values = [_fisher(int(a), n, int(b), m) for a, b in zip(left, right, strict=True)]
    classes = range(len(class_names))
    adjusted = holm(
        {f"ks {i}": float(ks.p_values[i]) for i in classes} | {f"share {i}": share_p_values[i] for i in classes}
    )
    movements = [
        ClassMovement(
            class_name=class_names[i],
            ks_distance=float(ks.distances[i]),
            ks_p_value=float(ks.p_values[i]),
            reference_share=float(left[i] / n),
            current_share=float(right[i] / m),
            current_share_interval=wilson_interval(int(right[i]), m),
            share_p_value=share_p_values[i],
            adjusted_p_value=min(adjusted[f"ks {i}"], adjusted[f"share {i}"]),
            has_moved=min(adjusted[f"ks {i}"], adjusted[f"share {i}"]) <= alpha,
        )
        for i in classes
    ]
    return tuple(sorted(movements, key=lambda c: (c.adjusted_p_value, -c.ks_distance, c.class_name)))


def image_scores(reference: DriftSample, current: DriftSample, *, seed: int) -> NDArray[np.float64]:
    """Scores each current image by how much it drives the difference; the highest are the ones to look at.

    The MMD witness function f(x) = mean k(x, current) − mean k(x, reference), without x itself, is large where current
    images are dense and reference images are not. It is taken over features, UAE embedding and properties (in reference
    standard deviations), put in units of its spread over the reference rows, and averaged.

    Returns:
        `(M,)` float64, aligned with the rows of `current`.

    Raises:
        InvalidSampleError: the samples cannot be compared.
    """
    require_comparable(reference, current)
    scores = [
        _witness(left, right, seed=(seed, stream)) for stream, (left, right) in enumerate(_spaces(reference, current))
    ]
    return np.mean(scores, axis=0)


def nearest_rows(reference: DriftSample, current: DriftSample, *, count: int) -> NDArray[np.intp]:
    """Returns for each current image the rows of the reference that are most like it, the nearest first.

    In the spaces of `image_scores`: squared distances, each in units of the median distance between reference rows.

    Returns:
        `(M, count)`, or fewer columns where the reference has fewer rows.

    Raises:
        InvalidSampleError: the samples cannot be compared.
    """
    require_comparable(reference, current, min_rows=1)
    distances = np.zeros((len(current), len(reference)))
    for left, right in _spaces(reference, current):
        bandwidth = median_bandwidth(left, right) or 1.0
        for row, image in enumerate(right):
            distances[row] += np.square((left - image) / bandwidth).sum(axis=1)
    return np.argsort(distances, axis=1, kind="stable")[:, :count]


def _spaces(reference: DriftSample, current: DriftSample) -> tuple[tuple[Float32Matrix, Float32Matrix], ...]:
    """Returns features, untrained embedding and pixel statistics, these in reference standard deviations."""
    spread = reference.properties.std(axis=0)
    scale = np.where(spread > 0, spread, 1.0).astype(np.float32)
    return (
        (reference.features, current.features),
        (reference.uae, current.uae),
        (reference.properties / scale, current.properties / scale),
    )


def _witness(reference: Float32Matrix, current: Float32Matrix, *, seed: Sequence[int]) -> NDArray[np.float64]:
    """Returns `(M,)` float64: the witness function at each current row, in units of its spread over the reference."""
    reference = subsample(reference, _BLOCK_ROWS, np.random.default_rng(seed))
    bandwidth = median_bandwidth(reference, current)
    if bandwidth == 0.0:
        return np.zeros(len(current))
    centre = np.median(reference.astype(np.float64), axis=0)
    n, m = len(reference), len(current)
    # Each row is its own neighbour with kernel 1; that term is taken out on both sides.
    within = gaussian_kernel(reference, bandwidth=bandwidth, centre=centre).sum(axis=1, dtype=np.float64) - 1.0
    towards_current = np.zeros(n)
    at_current = np.empty(m)
    for start in range(0, m, _BLOCK_ROWS):
        block = current[start : start + _BLOCK_ROWS]
        to_reference = gaussian_kernel(block, reference, bandwidth=bandwidth, centre=centre)
        to_current = gaussian_kernel(block, current, bandwidth=bandwidth, centre=centre)
        towards_current += to_reference.sum(axis=0, dtype=np.float64)
        at_current[start : start + len(block)] = (to_current.sum(axis=1, dtype=np.float64) - 1.0) / (
            m - 1
        ) - to_reference.mean(axis=1, dtype=np.float64)
    at_reference = towards_current / m - within / (n - 1)
    spread = float(at_reference.std())
    return (at_current - at_reference.mean()) / (spread if spread > 0 else 1.0)


def _fisher(reference_hits: int, reference_rows: int, current_hits: int, current_rows: int) -> float:
    table = [[reference_hits, reference_rows - reference_hits], [current_hits, current_rows - current_hits]]
    return float(min(1.0, fisher_exact(table)))


def _spread(values: NDArray[np.float64]) -> float:
    """Returns the standard deviation, exactly 0 for a constant column (rounding of the mean would leave a rest)."""
    return 0.0 if bool((values == values[0]).all()) else float(values.std())


def _shift_interval(left: NDArray[np.float64], right: NDArray[np.float64]) -> tuple[float, float] | None:
    """Returns the 95 % interval of the difference of means in standard deviations of `left`; Welch's, 1.96 wide."""
    spread = _spread(left)
    if spread == 0.0:
        return None
    shift = float(right.mean() - left.mean()) / spread
    error = math.sqrt(1 / len(left) + (_spread(right) / spread) ** 2 / len(right))
    return shift - 1.96 * error, shift + 1.96 * error


def _ratio(numerator: float, denominator: float, *, if_equal: float) -> float | None:
    if denominator > 0.0:
        return numerator / denominator
    return if_equal if numerator == 0.0 else None


def _require_names(sample: DriftSample, class_names: Sequence[str]) -> None:
    if len(class_names) != sample.bbsd.shape[1]:
        raise ValueError(f"Expected {sample.bbsd.shape[1]} class names. Received: {len(class_names)}.")
