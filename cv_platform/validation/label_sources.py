"""Judges who labelled a batch of images by the other images: whose labels contradict them more often than they may.

As in `checks.label_issues`, each image is asked about that the discriminant was not fitted on. How often a right label
contradicts the most probable class follows from the calibrated probabilities: often where the images are hard, as those
of a labelling queue are, seldom where they are easy. The contradictions of a source are compared with the sum of these
chances for a source of whose labels as many are wrong as may be, a Poisson-binomial distribution.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cv_platform.config import ClassifierType
from cv_platform.validation.checks.label_issues import DIMENSIONS, label_questions, out_of_fold

ALPHA = 0.01
"""Of all sources together (Bonferroni)."""
MIN_LABELS = 5
"""Sources with fewer labels are not judged."""


@dataclass(frozen=True)
class SourceVerdict:
    """What the other images say about the labels of one source.

    Attributes:
        source: who said so.
        labels: of that source that could be judged.
        contradicted: of them, those whose image looks like another class.
        expected: how many of right labels would be.
        wrong_fraction: how many are wrong, as estimated from the two; 0–1.
        p_value: of that many contradictions or more, if no more labels were wrong than may be.
        examples: positions of the images that contradict most, the most certain first, with what they look like.
    """

    source: str
    labels: int
    contradicted: int
    expected: float
    wrong_fraction: float
    p_value: float
    examples: tuple[tuple[int, str], ...]

    def is_suspect(self, sources: int) -> bool:
        """Says whether more labels are wrong than may be, which is no chance in any of so many sources."""
        return self.p_value * sources <= ALPHA


@dataclass
class _Tally:
    contradicted: int = 0
    by_chance: list[float] = field(default_factory=list[float])
    if_wrong: list[float] = field(default_factory=list[float])
    images: list[tuple[float, int, str]] = field(default_factory=list[tuple[float, int, str]])


def judge_sources(
    vectors: NDArray[np.float32],
    labels: Sequence[Sequence[str]],
    sources: Sequence[str | None],
    *,
    class_names: Sequence[str],
    classifier_type: ClassifierType,
    max_wrong_fraction: float,
    unknown: Sequence[Sequence[str]] | None = None,
) -> list[SourceVerdict]:
    """Judges each source that has labelled at least `MIN_LABELS` of the images that can be judged.

    Args:
        vectors: `(N, D)` of the encoder, finite; no two images are copies of each other.
        labels: the class names of each.
        sources: who labelled each; None for the dataset's own.
        class_names: of the dataset; classes of few images are not judged.
        classifier_type: multi-label: each class is a question of its own.
        max_wrong_fraction: of a source's labels that may be wrong.
        unknown: the unknown labels of each; None: all are known.
    """
    reduced = _reduced(vectors)
    is_own = np.array([source is None for source in sources], dtype=np.bool_)
    tallies: dict[str, _Tally] = defaultdict(_Tally)
    for positions, given, names in label_questions(labels, class_names, classifier_type, unknown):
        # By the dataset's own labels: those that are judged would make themselves likely.
        probabilities = out_of_fold(reduced[positions], given, positions, is_own[positions])
        likely = probabilities.argmax(axis=1)
        top = probabilities.max(axis=1)
        for row, position in enumerate(positions.tolist()):
            if (source := sources[position]) is None:
                continue
            tally = tallies[source]
            tally.by_chance.append(float(1.0 - top[row]))
            # A wrong label agrees with the likely class only where that is wrong, and both in the same way.
            tally.if_wrong.append(float(top[row] + (1.0 - top[row]) * (1.0 - 1.0 / max(1, len(names) - 1))))
            if likely[row] != given[row]:
                tally.contradicted += 1
                tally.images.append((float(top[row]), position, names[int(likely[row])]))
    return sorted(
        (
            _verdict(source, tally, max_wrong_fraction)
            for source, tally in tallies.items()
            if len(tally.by_chance) >= MIN_LABELS
        ),
        key=lambda verdict: (verdict.p_value, verdict.source),
    )


def _verdict(source: str, tally: _Tally, max_wrong_fraction: float) -> SourceVerdict:
    from scipy.stats import poisson_binom

    chances, if_wrong = np.asarray(tally.by_chance), np.asarray(tally.if_wrong)
    expected = float(chances.sum())
    room = float(if_wrong.sum()) - expected
    allowed = np.clip((1.0 - max_wrong_fraction) * chances + max_wrong_fraction * if_wrong, 0.0, 1.0)
    wrong = (tally.contradicted - expected) / room if room > 0 else 0.0
    shown = sorted(tally.images, key=lambda image: (-image[0], image[1]))[:10]
    return SourceVerdict(
        source=source,
        labels=len(chances),
        contradicted=tally.contradicted,
        expected=expected,
        wrong_fraction=float(np.clip(wrong, 0.0, 1.0)),
        p_value=float(poisson_binom.sf(tally.contradicted - 1, allowed)),
        examples=tuple((position, name) for _, position, name in shown),
    )


def _reduced(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    from sklearn.decomposition import PCA

    if min(vectors.shape) <= DIMENSIONS:
        return vectors
    return np.asarray(PCA(DIMENSIONS, svd_solver="covariance_eigh").fit_transform(vectors), dtype=np.float32)
