"""Finds images whose label is likely wrong: those whose look-alikes agree on another one.

Each image gets the class probabilities of its nearest neighbours in the space of the pixels' principal components,
itself and its identical copies left out (so every probability is out of sample, and nothing is random). Confident
learning (Northcutt et al. 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels") then suspects an
image when a class other than its label is more likely, and at least as likely as among its own images on average.

Pixels say little about the classes of photographs. Where the neighbours do not predict the labels well, the probe says
so and suspects nobody, instead of naming every hard image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from typing_extensions import override

from cv_platform.config import ClassifierType
from cv_platform.validation.checks import Check, Finding, Subject
from cv_platform.validation.sample import ImageSample

NEIGHBOURS = 10
MIN_PER_CLASS = 5
"""With fewer images than this, a class has no neighbourhood of its own and its images are not suspected."""
MIN_PROBE_ACCURACY = 0.8
"""Balanced accuracy of the neighbours below which they are no witness. Measured: 0.985 on scikit-learn's digits (0.89
with a tenth of their labels made wrong), 0.35 on CIFAR-10. With 89 wrong labels among 1,797 digits, 72 were suspected,
71 of them rightly."""


@dataclass(frozen=True)
class Suspicion:
    """One image whose label is likely wrong.

    Attributes:
        position: of the image in the sample.
        given: the label it has (multi-label: `cat` or `no cat`).
        suggested: the label its neighbours have.
        confidence: share of the neighbours, weighted by closeness, that have the suggested label; 0–1.
    """

    position: int
    given: str
    suggested: str
    confidence: float


@dataclass(frozen=True)
class LabelProbe:
    """What the neighbours say about the labels.

    Attributes:
        accuracy: balanced accuracy of the neighbours (multi-label: mean over the classes), 0–1; none without images.
        judged: images whose label could be judged.
        suspicions: most confident first.
    """

    accuracy: float | None
    judged: int
    suspicions: tuple[Suspicion, ...]


class LabelIssues(Check):
    """The share of likely wrong labels."""

    name, limit = "label_issues", "max_label_issue_fraction"

    @override
    def look(self, subject: Subject) -> Finding:
        sample = subject.sample
        probe = probe_labels(sample, subject.class_names, subject.classifier_type)
        if probe.accuracy is None:
            return Finding("Not judged: too few images.")
        if probe.judged == 0:
            return Finding(
                "Not judged: look-alikes predict the labels too poorly (balanced accuracy "
                f"{probe.accuracy:.2f}, needs {MIN_PROBE_ACCURACY})."
            )
        suspected = {suspicion.position for suspicion in probe.suspicions}
        fraction = len(suspected) / probe.judged
        paths = sample.rows["path"].to_numpy()
        return Finding(
            f"{len(suspected)} of {probe.judged} labels are likely wrong ({fraction:.2%}); look-alikes predict the "
            f"labels with a balanced accuracy of {probe.accuracy:.3f}, over {sample.description}.",
            fraction,
            [
                f"{paths[s.position]}: labelled {s.given}, looks like {s.suggested} ({s.confidence:.2f})"
                for s in probe.suspicions
            ],
        )


def probe_labels(sample: ImageSample, class_names: Sequence[str], classifier_type: ClassifierType) -> LabelProbe:
    """Asks each image's neighbours for its label.

    Multi-label data are judged class by class ("cat" or "no cat"), without classes that the neighbours do not predict.
    """
    labels: list[tuple[str, ...]] = [tuple(row) for row in sample.rows["labels"]]
    hashes = sample.rows["sha256"].to_numpy()
    if classifier_type == "multi-class":
        index = {name: i for i, name in enumerate(class_names)}
        usable = np.array([i for i, row in enumerate(labels) if len(row) == 1 and row[0] in index], dtype=np.int64)
        if len(usable) <= NEIGHBOURS:
            return LabelProbe(None, 0, ())
        given = np.array([index[labels[i][0]] for i in usable])
        neighbours = _Neighbours(sample.components[usable], hashes[usable])
        probabilities = neighbours.vote(given, len(class_names))
        accuracy = balanced_accuracy(given, probabilities)
        if accuracy < MIN_PROBE_ACCURACY:
            return LabelProbe(accuracy, 0, ())
        suspicions = [
            Suspicion(int(usable[i]), class_names[int(given[i])], class_names[j], float(probabilities[i, j]))
            for i, j in confident_disagreements(given, probabilities)
        ]
        return LabelProbe(accuracy, len(usable), tuple(sorted(suspicions, key=lambda s: (-s.confidence, s.position))))
    if len(labels) <= NEIGHBOURS:
        return LabelProbe(None, 0, ())
    neighbours = _Neighbours(sample.components, hashes)
    suspicions, accuracies, judged_classes = [], [], 0
    for name in class_names:
        given = np.array([int(name in row) for row in labels])
        if min(given.sum(), len(given) - given.sum()) < MIN_PER_CLASS:
            continue
        probabilities = neighbours.vote(given, 2)
        accuracies.append(balanced_accuracy(given, probabilities))
        if accuracies[-1] < MIN_PROBE_ACCURACY:
            continue
        judged_classes += 1
        words = (f"no {name}", name)
        suspicions += [
            Suspicion(i, words[given[i]], words[j], float(probabilities[i, j]))
            for i, j in confident_disagreements(given, probabilities)
        ]
    accuracy = float(np.mean(accuracies)) if accuracies else None
    ranked = tuple(sorted(suspicions, key=lambda s: (-s.confidence, s.position)))
    return LabelProbe(accuracy, len(labels) if judged_classes else 0, ranked)


def balanced_accuracy(given: np.ndarray, probabilities: np.ndarray) -> float:
    """Returns the mean, over the classes that occur, of the share of their images that is predicted right."""
    right = probabilities.argmax(axis=1) == given
    return float(np.mean([right[given == label].mean() for label in np.unique(given)]))


def confident_disagreements(given: np.ndarray, probabilities: np.ndarray) -> list[tuple[int, int]]:
    """Applies the rule of confident learning.

    Args:
        given: `(N,)` the labels, 0…C-1.
        probabilities: `(N, C)` out-of-sample class probabilities.

    Returns:
        `(image, suggested class)` for each image of a class with at least `MIN_PER_CLASS` images for which the most
        probable class among those that reach their own threshold is not its label.
    """
    counts = np.bincount(given, minlength=probabilities.shape[1])
    thresholds = np.array(
        [probabilities[given == label, label].mean() if counts[label] else np.inf for label in range(len(counts))]
    )
    candidates = np.where(probabilities >= thresholds, probabilities, -1.0)
    suggested = candidates.argmax(axis=1)
    own = probabilities[np.arange(len(given)), given]
    best = candidates.max(axis=1)
    suspected = (suggested != given) & (best > own) & (counts[given] >= MIN_PER_CLASS)
    return [(int(i), int(suggested[i])) for i in np.flatnonzero(suspected)]


class _Neighbours:
    """The nearest neighbours of each image, where identical images (by hash) are one.

    A copy would confirm its own wrong label, and a frequent image would outvote all others around it.
    """

    def __init__(self, components: np.ndarray, sha256: np.ndarray) -> None:
        from sklearn.neighbors import NearestNeighbors

        self._codes, hashes = pd.factorize(sha256)
        first = np.zeros(len(hashes), dtype=np.int64)
        first[self._codes[::-1]] = np.arange(len(sha256))[::-1]
        distinct = components[first]
        asked = min(NEIGHBOURS + 1, len(distinct))
        distances, self._positions = NearestNeighbors(n_neighbors=asked).fit(distinct).kneighbors(distinct)
        foreign = self._positions != np.arange(len(distinct))[:, None]
        nearest = foreign & (np.cumsum(foreign, axis=1) <= NEIGHBOURS)
        # Distances of 0–1 pixels over hundreds of them are far larger: the constant only avoids a division by zero.
        self._weights = nearest / (distances + 1e-3)

    def vote(self, labels: np.ndarray, classes: int) -> np.ndarray:
        """Returns `(N, classes)` probabilities: the neighbours' labels (`(N,)`, 0…classes-1), weighted by closeness."""
        shares = np.zeros((len(self._positions), classes))
        np.add.at(shares, (self._codes, labels), 1.0)
        shares /= shares.sum(axis=1, keepdims=True)
        votes = np.zeros_like(shares)
        for neighbour, weight in zip(self._positions.T, self._weights.T, strict=True):
            votes += weight[:, None] * shares[neighbour]
        return (votes / np.maximum(votes.sum(axis=1, keepdims=True), 1e-12))[self._codes]
