"""The tests that make up the verdict, one detector each; `verdict.py` corrects for their number.

Sources: Rabanser et al. 2019, "Failing Loudly", arXiv 1810.11953; Lipton et al. 2018, "Detecting and Correcting for
Label Shift with Black Box Predictors", arXiv 1802.03916; see also `two_sample.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from cv_platform.config import DetectorName, MonitorConfig
from cv_platform.drift.classifier_test import MAX_ROWS, classifier_test
from cv_platform.drift.sample import DriftSample, Float32Matrix
from cv_platform.drift.two_sample import ks_bonferroni, mmd_permutation_test


@dataclass(frozen=True)
class Effort:
    """What a test may spend.

    Attributes:
        permutations: of a permutation test.
        max_reference_rows, max_current_rows: seeded subsamples where memory grows with the square of the rows.
        seed: of subsamples and permutations.
    """

    permutations: int
    max_reference_rows: int
    max_current_rows: int
    seed: int


@dataclass(frozen=True)
class Tested:
    """What a detector found.

    Attributes:
        p_value: corrected within the detector, if it makes several tests.
        statistic: of the test.
        standardised: of a permutation test: standard deviations of its null above that null's mean.
    """

    p_value: float
    statistic: float
    standardised: float | None = None


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

    @abstractmethod
    def test(self, reference: DriftSample, current: DriftSample, effort: Effort) -> Tested:
        """Tests the two samples; the same rows in any order give the same answer."""


@dataclass(frozen=True)
class KsDetector(Detector):
    """KS per dimension, with Bonferroni's correction inside; its statistic is the largest distance, 0–1."""

    @override
    def test(self, reference: DriftSample, current: DriftSample, effort: Effort) -> Tested:
        result = ks_bonferroni(self.columns(reference), self.columns(current))
        return Tested(result.p_value, float(result.distances.max()))


@dataclass(frozen=True)
class MmdDetector(Detector):
    """The MMD permutation test; its statistic is the unbiased MMD².

    Attributes:
        stream: of random numbers, its own: one unlucky set of permutations must not move two detectors.
    """

    stream: int

    @override
    def test(self, reference: DriftSample, current: DriftSample, effort: Effort) -> Tested:
        result = mmd_permutation_test(
            self.columns(reference),
            self.columns(current),
            permutations=effort.permutations,
            seed=(effort.seed, self.stream),
            max_reference_rows=effort.max_reference_rows,
            max_current_rows=effort.max_current_rows,
        )
        return Tested(result.p_value, result.mmd_squared, result.standardised)


@dataclass(frozen=True)
class ClassifierDetector(Detector):
    """The classifier two-sample test; its statistic is the held-out share of pairs that are told apart, 0–1.

    Attributes:
        stream: of random numbers, see `MmdDetector`.
    """

    stream: int

    @override
    def test(self, reference: DriftSample, current: DriftSample, effort: Effort) -> Tested:
        result = classifier_test(
            self.columns(reference),
            self.columns(current),
            permutations=effort.permutations,
            seed=(effort.seed, self.stream),
            max_rows=min(MAX_ROWS, effort.max_reference_rows),
        )
        return Tested(result.p_value, result.told_apart)


def settle_saturated(probabilities: Float32Matrix) -> Float32Matrix:
    """Merges probabilities that saturate, so that a last bit cannot look like drift.

    A confident model answers exactly 1.0 for many images; the same model in another batch size or runtime answers
    0.9999999 for some of them. KS compares ranks, so that would be a large distance.
    """
    return np.clip(probabilities, np.float32(1e-30), np.float32(1.0 - 1e-6))


DETECTORS: tuple[Detector, ...] = (
    KsDetector("bbsd_ks", "Class probabilities (KS per class)", lambda sample: settle_saturated(sample.bbsd)),
    KsDetector("properties_ks", "Pixel statistics (KS per statistic)", lambda sample: sample.properties),
    MmdDetector("features_mmd", "Penultimate features (MMD)", lambda sample: sample.features, stream=0),
    MmdDetector("uae_mmd", "Untrained embedding (MMD)", lambda sample: sample.uae, stream=1),
    ClassifierDetector("classifier", "Penultimate features (classifier)", lambda sample: sample.features, stream=2),
    MmdDetector("encoder_mmd", "Pretrained encoder (MMD)", lambda sample: sample.encoded_rows, stream=3),
    ClassifierDetector(
        "encoder_classifier", "Pretrained encoder (classifier)", lambda sample: sample.encoded_rows, stream=4
    ),
)
DETECTOR_NAMES = tuple(detector.name for detector in DETECTORS)
DEFAULT_DETECTORS = MonitorConfig().detectors
