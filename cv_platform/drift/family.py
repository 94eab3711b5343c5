"""The tests that make up the verdict, one detector each; `verdict.py` corrects for their number.

Sources: Rabanser et al. 2019, "Failing Loudly", arXiv 1810.11953; Lipton et al. 2018, "Detecting and Correcting for
Label Shift with Black Box Predictors", arXiv 1802.03916: where only the classes' shares move, the mean prediction moves
by as much times the confusion matrix, and its test has the power; see also `permutation.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from cv_platform.config import DetectorName, MonitorConfig
from cv_platform.drift.classifier_test import told_apart, told_apart_bounds
from cv_platform.drift.permutation import (
    Judged,
    Statistic,
    gaussian_features,
    largest_ks_distance,
    mean_distance,
    mean_distance_bounds,
    whitened,
)
from cv_platform.drift.sample import DriftSample, Float32Matrix
from cv_platform.drift.two_sample import KsResult, ks_bonferroni, ks_bounds

Split = NDArray[np.bool_]
"""`(N,)`: which rows of the pool are the current ones."""


@dataclass(frozen=True)
class Detector(ABC):
    """One test of whether two samples come from one distribution.

    How to add one: another instance of a subclass, or a subclass of your own, in `DETECTORS`, and its name in
    `config.DetectorName`. The verdict's correction, the measured rates, records and the report's table follow from
    there; `monitor.detectors` names those that take part.

    Attributes:
        name: in records, metrics and alerts.
        title: for people.
        columns: what it looks at, `(N, d)`.
    """

    name: DetectorName
    title: str
    columns: Callable[[DriftSample], Float32Matrix]

    def can_test(self, reference: DriftSample, current: DriftSample) -> bool:
        """Whether both sides have the two rows that any test needs; an image may be gone."""
        return min(len(self.columns(reference)), len(self.columns(current))) >= 2

    def prepared(self, rows: Float32Matrix, rng: np.random.Generator) -> Float32Matrix:
        """Returns of the pooled rows, `(N, d)`, what `statistic` and `bounds` take."""
        return rows

    @abstractmethod
    def statistic(self, rows: Float32Matrix) -> Statistic:
        """Returns what measures a split of the prepared rows; see `permutation.py`."""

    @abstractmethod
    def bounds(self, rows: Float32Matrix, split: Split, judged: Judged) -> tuple[float, float]:
        """Returns the 95 % interval of the statistic, in its own units."""

    def shown(self, value: float, judged: Judged) -> float:
        """Returns what people are told of a value of the statistic; it keeps their order."""
        return value


@dataclass(frozen=True)
class KsDetector(Detector):
    """The largest KS distance of a dimension, 0–1."""

    @override
    def statistic(self, rows: Float32Matrix) -> Statistic:
        return largest_ks_distance(rows)

    @override
    def bounds(self, rows: Float32Matrix, split: Split, judged: Judged) -> tuple[float, float]:
        current = int(split.sum())
        low, high = ks_bounds(float(np.sqrt(judged.observed)), rows.shape[1], (len(split) - current, current))
        return low**2, high**2

    @override
    def shown(self, value: float, judged: Judged) -> float:
        return float(np.sqrt(value))

    def compare(self, reference: DriftSample, current: DriftSample) -> KsResult:
        """Tests without permutations: exact for each dimension, by Bonferroni for all."""
        return ks_bonferroni(self.columns(reference), self.columns(current))


@dataclass(frozen=True)
class _DistanceOfMeans(Detector):
    @override
    def statistic(self, rows: Float32Matrix) -> Statistic:
        return mean_distance(rows)

    @override
    def bounds(self, rows: Float32Matrix, split: Split, judged: Judged) -> tuple[float, float]:
        return mean_distance_bounds(rows, split, judged)


@dataclass(frozen=True)
class MmdDetector(_DistanceOfMeans):
    """MMD² of a Gaussian kernel; told without what chance alone gives it, as the unbiased estimate is."""

    @override
    def prepared(self, rows: Float32Matrix, rng: np.random.Generator) -> Float32Matrix:
        return gaussian_features(rows, rng)

    @override
    def shown(self, value: float, judged: Judged) -> float:
        return value - judged.null_mean


@dataclass(frozen=True)
class MeanDetector(_DistanceOfMeans):
    """Hotelling's distance of means, which sees that columns no longer go together; told as a multiple of chance's."""

    @override
    def prepared(self, rows: Float32Matrix, rng: np.random.Generator) -> Float32Matrix:
        return whitened(rows)

    @override
    def shown(self, value: float, judged: Judged) -> float:
        return max(0.0, value) / judged.null_mean if judged.null_mean > 0 else 1.0


@dataclass(frozen=True)
class ClassifierDetector(Detector):
    """The classifier two-sample test; its statistic is the held-out share of pairs that are told apart, 0–1."""

    @override
    def statistic(self, rows: Float32Matrix) -> Statistic:
        return told_apart(rows)

    @override
    def bounds(self, rows: Float32Matrix, split: Split, judged: Judged) -> tuple[float, float]:
        return told_apart_bounds(rows, split, judged)


def settle_saturated(probabilities: Float32Matrix) -> Float32Matrix:
    """Merges probabilities that saturate, so that a last bit cannot look like drift.

    A confident model answers exactly 1.0 for many images; the same model in another batch size or runtime answers
    0.9999999 for some of them. KS compares ranks, so that would be a large distance.
    """
    return np.clip(probabilities, np.float32(1e-30), np.float32(1.0 - 1e-6))


def _probabilities(sample: DriftSample) -> Float32Matrix:
    return settle_saturated(sample.bbsd)


DETECTORS: tuple[Detector, ...] = (
    KsDetector("bbsd_ks", "Class probabilities (KS per class)", _probabilities),
    MeanDetector("bbsd_mean", "Mix of the classes (mean probabilities)", _probabilities),
    KsDetector("properties_ks", "Pixel statistics (KS per statistic)", lambda sample: sample.properties),
    MeanDetector("properties_mean", "Pixel statistics together (means)", lambda sample: sample.properties),
    MmdDetector("features_mmd", "Penultimate features (MMD)", lambda sample: sample.features),
    MmdDetector("uae_mmd", "Untrained embedding (MMD)", lambda sample: sample.uae),
    ClassifierDetector("classifier", "Penultimate features (classifier)", lambda sample: sample.features),
    MmdDetector("encoder_mmd", "Pretrained encoder (MMD)", lambda sample: sample.encoded_rows),
    ClassifierDetector("encoder_classifier", "Pretrained encoder (classifier)", lambda sample: sample.encoded_rows),
)
DETECTOR_NAMES = tuple(detector.name for detector in DETECTORS)
DEFAULT_DETECTORS = MonitorConfig().detectors
