"""What the verdict notices and what it does not, on this model's own images: windows of the test split are judged.

Windows of its images as they are give the false-alarm rate; windows of images made worse, or without a class, the
power. Neither the model nor the reference has seen the test split. Where the dataset's own splits differ from each
other, windows of the test split are drift, and the rate says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
from numpy.typing import NDArray

from cv_platform.compute.blas import one_blas_thread
from cv_platform.drift.family import DEFAULT_DETECTORS
from cv_platform.drift.sample import DriftSample
from cv_platform.drift.scipy_tests import wilson_interval
from cv_platform.drift.verdict import judge
from cv_platform.records import DetectionRate

WINDOW_SIZES = (10, 50, 100, 500)
"""Images in a window, as traffic has them."""
UNCHANGED = "none"
TRIALS, SHIFTED_TRIALS = 40, 20
_FEWEST_WINDOWS = 4
"""Without a common image: of fewer, the rate would be of that one draw of images."""
_PERMUTATIONS = 99
"""Fewer than a report takes, for hundreds of verdicts: the power is understated a little."""


@one_blas_thread()
def detection_rates(
    reference: DriftSample,
    shifted: dict[tuple[str, str], DriftSample],
    *,
    alpha: float,
    seed: int,
    detectors: Collection[str] = DEFAULT_DETECTORS,
) -> tuple[DetectionRate, ...]:
    """Judges windows of each sample against the reference, and returns how often they are drift.

    Args:
        reference: held-out rows of a model.
        shifted: other rows of it by name and strength of what has been done to them; `UNCHANGED`: nothing.
        alpha: family-wise false-alarm rate of a verdict.
        seed: of the windows.
        detectors: those that make the verdict.

    Returns:
        A row for each sample and size of window of which the sample has four without a common image.
    """
    rows: list[DetectionRate] = []
    for (shift, strength), sample in shifted.items():
        for size in WINDOW_SIZES:
            independent, trials = len(sample) // size, TRIALS if shift == UNCHANGED else SHIFTED_TRIALS
            if independent < _FEWEST_WINDOWS:
                continue
            windows = _windows(len(sample), size, np.random.default_rng([seed, size]))
            alarms = 0
            for trial, window in zip(range(trials), windows, strict=False):
                alarms += judge(
                    reference,
                    sample.take(window),
                    alpha=alpha,
                    permutations=_PERMUTATIONS,
                    max_reference_rows=len(reference),
                    seed=trial,
                    detectors=detectors,
                ).drifted
            low, high = wilson_interval(alarms, trials)
            rows.append(
                DetectionRate(
                    shift=shift,
                    strength=strength,
                    images=size,
                    windows=trials,
                    independent=min(independent, trials),
                    rate=alarms / trials,
                    low=low,
                    high=high,
                )
            )
    return tuple(rows)


def _windows(rows: int, size: int, rng: np.random.Generator) -> Iterator[NDArray[np.intp]]:
    """Yields windows for ever: those of one shuffling have no common row."""
    while True:
        order = rng.permutation(rows)
        for start in range(0, rows - size + 1, size):
            yield order[start : start + size]
