"""Finds images whose label is likely wrong: those that the other images of the dataset would label otherwise.

A linear discriminant is fitted on what the images show, the vectors of the pretrained encoder beside the pixels'
principal components, and asked about images that it was not fitted on; identical copies stay together. From its
calibrated probabilities, and from how often labels contradict where it is most confident, follows for each image how
likely its label is wrong, by the class-conditional noise of confident learning (Northcutt et al. 2021, "Confident
Learning: Estimating Uncertainty in Dataset Labels"). A label is suspected where wrong is more likely than right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from typing_extensions import override

from cv_platform.compute.blas import one_blas_thread
from cv_platform.config import ClassifierType
from cv_platform.validation.checks import Check, Finding, Subject
from cv_platform.validation.label_review import write_review_page
from cv_platform.validation.sample import ImageSample

FOLDS = 5
DRAWS, DRAWN_IMAGES = 5, 10_000
"""Of the folds, whose logits are averaged: of few images a single draw decides too much. Fewer of more than 2,000."""
MIN_IMAGES = 10
MIN_PER_CLASS = 5
"""Images of smaller classes are not judged: some fold would have none to learn from."""
MIN_ACCURACY = 0.5
"""Balanced accuracy below which labels are not judged. Measured: 0.74 on CIFAR-10 (5,000 images), 0.98 on digits."""
CONFIDENT_SHARE = 0.2
"""Of the images: the most confident ones, where a contradiction is the label's fault rather than the model's."""
DIMENSIONS = 128
RESAMPLES = 200
"""Of the bootstrap of the noise rate (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13)."""
SHRINKAGE = 0.3
"""Of the discriminant's covariance. Measured with 5 % of CIFAR-10's labels made wrong: average precision 0.72 to 0.74
from 0.1 to 0.6, and logistic regression the same, at several times the cost."""


@dataclass(frozen=True)
class Suspicion:
    """One image whose label is likely wrong.

    Attributes:
        position: of the image in the sample.
        given: the label it has (multi-label: `cat` or `no cat`).
        suggested: the label that the others would give it.
        confidence: probability that the given label is wrong; 0.5–1.
        labels: all labels that the image would have with the suggested one.
    """

    position: int
    given: str
    suggested: str
    confidence: float
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelProbe:
    """What the images say about the labels.

    Attributes:
        accuracy: balanced accuracy on images not fitted on (multi-label: mean over the classes), 0–1; none without.
        judged: images whose label could be judged.
        wrong_fraction: how many of these labels are wrong, as expected of their probabilities; 0–1.
        wrong_interval: of that, 95 %: what other images of the same kind would have given.
        suspicions: most confident first.
        chances: `(N,)` that a label of each image of the sample is wrong; 0 of those that are not judged.
    """

    accuracy: float | None
    judged: int
    wrong_fraction: float
    wrong_interval: tuple[float, float]
    suspicions: tuple[Suspicion, ...]
    chances: NDArray[np.float64]

    def confusion(self) -> list[tuple[str, str, int]]:
        """Returns which label is suspected to be which, and how often; most often first."""
        pairs = Counter((s.given, s.suggested) for s in self.suspicions)
        return sorted(((*pair, count) for pair, count in pairs.items()), key=lambda row: (-row[2], row))


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
                "Not judged: what the images show predicts the labels too poorly (balanced accuracy "
                f"{probe.accuracy:.2f}, needs {MIN_ACCURACY})."
            )
        if probe.suspicions:
            write_review_page(subject, probe)
        suspected = {suspicion.position for suspicion in probe.suspicions}
        fraction = len(suspected) / probe.judged
        low, high = probe.wrong_interval
        paths = sample.rows["path"].to_numpy()
        return Finding(
            f"{len(suspected)} of {probe.judged} labels are likely wrong ({fraction:.2%}), and about "
            f"{probe.wrong_fraction:.1%} in all ({low:.1%} to {high:.1%}); images predict the labels of others with a "
            f"balanced accuracy of {probe.accuracy:.3f}, over {sample.description}.",
            fraction,
            [
                f"{paths[s.position]}: labelled {s.given}, looks like {s.suggested} ({s.confidence:.2f})"
                for s in probe.suspicions
            ],
        )


def probe_labels(sample: ImageSample, class_names: Sequence[str], classifier_type: ClassifierType) -> LabelProbe:
    """Asks for each image's label those that were not fitted on it.

    Multi-label data are judged class by class ("cat" or "no cat"), without classes that cannot be told.
    """
    groups = pd.factorize(sample.rows["sha256"])[0]
    vectors = _vectors(sample)
    accuracies: list[float] = []
    suspicions: list[Suspicion] = []
    judged: set[int] = set()
    wrong = np.zeros(RESAMPLES + 1)
    likely = np.zeros(len(sample.rows))
    questions = 0
    labelled: list[tuple[str, ...]] = [tuple(row) for row in sample.rows["labels"]]
    unknown: list[list[str]] = sample.rows["unknown_labels"].tolist()
    for positions, given, names in label_questions(labelled, class_names, classifier_type, unknown):
        # Copies of one image with one label are one: they would outvote the others.
        _, first, copies = np.unique(
            np.stack([groups[positions], given]), axis=1, return_index=True, return_inverse=True
        )
        labels = given[first]
        probabilities = out_of_fold(vectors[positions[first]], labels, groups[positions[first]])
        accuracies.append(balanced_accuracy(labels, probabilities))
        if accuracies[-1] < MIN_ACCURACY or (chances := wrong_label_chances(labels, probabilities)) is None:
            continue
        questions += len(given)
        wrong += len(given) * _resampled(labels, probabilities, np.bincount(copies), chances)
        probabilities[np.arange(len(labels)), labels] = -1.0
        suggested = probabilities.argmax(axis=1)
        chances, suggested = chances[copies], suggested[copies]
        judged.update(positions.tolist())
        likely[positions] = np.maximum(likely[positions], chances)
        suspicions += [
            Suspicion(
                int(positions[at]),
                names[int(given[at])],
                names[int(suggested[at])],
                float(chances[at]),
                _corrected(sample.rows["labels"].iat[positions[at]], names, int(suggested[at]), classifier_type),
            )
            for at in np.flatnonzero(chances > 0.5)
        ]
    return LabelProbe(
        float(np.mean(accuracies)) if accuracies else None,
        len(judged),
        wrong[0] / max(1, questions),
        (
            float(np.quantile(wrong[1:], 0.025)) / max(1, questions),
            float(np.quantile(wrong[1:], 0.975)) / max(1, questions),
        ),
        tuple(sorted(suspicions, key=lambda s: (-s.confidence, s.position))),
        likely,
    )


def _corrected(
    labels: Sequence[str], names: Sequence[str], suggested: int, classifier_type: ClassifierType
) -> tuple[str, ...]:
    """Returns an image's labels with the suggested answer; see `label_questions` for `names` of multi-label data."""
    if classifier_type == "multi-class":
        return (names[suggested],)
    return tuple(sorted({*labels} | {names[1]} if suggested else {*labels} - {names[1]}))


def _resampled(
    given: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    weights: NDArray[np.int64],
    chances: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Returns `(1 + RESAMPLES,)`: the share of wrong labels, and the same of images drawn anew, with replacement.

    Args:
        given: `(N,)` labels.
        probabilities: `(N, C)`, see `wrong_label_chances`.
        weights: `(N,)`: of how many copies each image stands.
        chances: `(N,)` that the label is wrong.
    """
    generator = np.random.default_rng(0)
    shares = np.full(1 + RESAMPLES, np.average(chances, weights=weights))
    answers = _Answers.of(given, probabilities)
    for resample in range(1, 1 + RESAMPLES):
        drawn = generator.integers(0, len(given), len(given))
        found = answers.drawn(drawn).wrong_label_chances()
        if found is not None:
            shares[resample] = np.average(found, weights=weights[drawn])
    return shares


def label_questions(
    labels: Sequence[Sequence[str]],
    class_names: Sequence[str],
    classifier_type: ClassifierType,
    unknown: Sequence[Sequence[str]] | None = None,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], Sequence[str]]]:
    """Yields what can be asked: positions of images, `(N,)` the labels they have, 0…C-1, and the labels' names.

    Of a multi-label class only the images of which it is known are asked; `unknown` names the classes it is not.
    """
    if classifier_type == "multi-class":
        counts: Counter[str] = Counter(row[0] for row in labels if len(row) == 1)
        names = [name for name in class_names if counts[name] >= MIN_PER_CLASS]
        index = {name: at for at, name in enumerate(names)}
        positions = np.array([at for at, row in enumerate(labels) if len(row) == 1 and row[0] in index], dtype=np.int64)
        if len(positions) > MIN_IMAGES and len(names) > 1:
            yield positions, np.array([index[labels[int(at)][0]] for at in positions]), names
        return
    for name in class_names:
        positions = np.array(
            [at for at in range(len(labels)) if not unknown or name not in unknown[at]], dtype=np.int64
        )
        given = np.array([int(name in labels[at]) for at in positions.tolist()], dtype=np.int64)
        if len(given) > MIN_IMAGES and min(given.sum(), len(given) - given.sum()) >= MIN_PER_CLASS:
            yield positions, given, (f"no {name}", name)


@one_blas_thread()
def _vectors(sample: ImageSample) -> NDArray[np.float32]:
    """Returns `(N, D ≤ 128)` float32: vectors and pixels count the same, as either is the better one on some data."""
    from sklearn.decomposition import PCA

    parts = [sample.embeddings.astype(np.float32), sample.components]
    parts = [part - part.mean(axis=0) for part in parts if part.size]
    spread = [float(np.square(part).sum(axis=1).mean()) for part in parts]
    scaled = [part / np.sqrt(s) for part, s in zip(parts, spread, strict=True) if s > 0]
    if not scaled:
        return np.zeros((len(sample.rows), 1), np.float32)
    joined = np.hstack(scaled)
    if min(joined.shape) > DIMENSIONS:
        joined = PCA(DIMENSIONS, svd_solver="covariance_eigh").fit_transform(joined)
    return np.asarray(joined, dtype=np.float32)


@one_blas_thread()
def out_of_fold(
    vectors: NDArray[np.float32],
    given: NDArray[np.int64],
    groups: NDArray[np.int64],
    calibrated_on: NDArray[np.bool_] | None = None,
) -> NDArray[np.float64]:
    """Returns the class probabilities of images that a discriminant was not fitted on, calibrated.

    Args:
        vectors: `(N, D)`.
        given: `(N,)` labels, 0…C-1, at least `MIN_PER_CLASS` of each.
        groups: `(N,)`; images of one group are fitted on together or not at all.
        calibrated_on: `(N,)`, the images whose labels are not in question; None: all of them.

    Returns:
        `(N, C)` float64, of logits averaged over up to `DRAWS` of the folds: one temperature makes them fit the labels
        best.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    draws = max(1, min(DRAWS, DRAWN_IMAGES // len(given)))
    logits = np.full((len(given), int(given.max()) + 1), -30.0 * draws)
    for draw in range(draws):
        fold_of = even_folds(given, groups, seed=draw)
        for fold in range(FOLDS):
            fitted, asked = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
            if len(asked) == 0 or len(known := np.unique(given[fitted])) < 2:
                continue  # Copies of one image are most of the data.
            model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE).fit(vectors[fitted], given[fitted])
            logits[np.ix_(asked, known)] += 30.0 + np.maximum(model.predict_log_proba(vectors[asked]), -30.0)
    logits /= draws
    rows = np.arange(len(given)) if calibrated_on is None or not calibrated_on.any() else np.flatnonzero(calibrated_on)

    def loss(log_temperature: float) -> float:
        fitted = log_softmax(logits[rows] / np.exp(log_temperature), axis=1)
        return -float(fitted[np.arange(len(rows)), given[rows]].mean())

    best: Any = minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded")
    return np.exp(log_softmax(logits / np.exp(best.x), axis=1))


def even_folds(given: NDArray[np.int64], groups: NDArray[np.int64], *, seed: int = 0) -> NDArray[np.int64]:
    """Deals images out to folds, so that each has as many of a class as another one, or one more.

    scikit-learn's StratifiedGroupKFold takes 1.1 s for 10,000 images, and up to 1.7 heeds no classes when it shuffles:
    https://github.com/scikit-learn/scikit-learn/pull/32540

    Args:
        given: `(N,)` labels, 0…C-1.
        groups: `(N,)`; images of one group are in one fold, which may then have more.
        seed: of the order in which they are dealt out.

    Returns:
        `(N,)` of 0 to `FOLDS` - 1, the same for the same arguments.
    """
    _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    counts = np.zeros((int(given.max()) + 1, FOLDS), np.int64)
    fold_of = np.empty(len(given), np.int64)
    for group in np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes > 1)]:
        images = np.flatnonzero(group_of == group)
        labels = given[images]
        fold_of[images] = fold = np.lexsort((counts.sum(axis=0), counts[labels].sum(axis=0)))[0]
        np.add.at(counts[:, fold], labels, 1)
    alone = np.random.default_rng(seed).permutation(np.flatnonzero(sizes[group_of] == 1))
    for label in range(len(counts)):
        images = alone[given[alone] == label]
        # The place that the next image of a class would have in each fold, the lowest first, and the emptiest fold.
        places = counts[label] + np.arange(len(images))[:, np.newaxis]
        emptier = np.broadcast_to(counts.sum(axis=0), places.shape)
        fold_of[images] = folds = np.lexsort((emptier.ravel(), places.ravel()))[: len(images)] % FOLDS
        counts[label] += np.bincount(folds, minlength=FOLDS)
    return fold_of


def wrong_label_chances(given: NDArray[np.int64], probabilities: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Returns how likely each label is wrong, if wrong labels fall on any image and any other class alike.

    Where the true class is t, a label is t with 1 − e and each other with e / (C − 1); `probabilities` are those of
    labels, so that of the true class follows, and by Bayes' rule that of the label being another one.

    Args:
        given: `(N,)` labels, 0…C-1.
        probabilities: `(N, C)` of labels, out of sample and calibrated.

    Returns:
        `(N,)` of 0 to 1; None: the most confident images contradict so often that e cannot be told.
    """
    return _Answers.of(given, probabilities).wrong_label_chances()


@dataclass(frozen=True)
class _Answers:
    """What `wrong_label_chances` looks at, `(N,)` each.

    Attributes:
        own: the label's probability.
        top: the highest probability.
        contradicts: whether that is another label's.
        classes: how many there are.
    """

    own: NDArray[np.float64]
    top: NDArray[np.float64]
    contradicts: NDArray[np.bool_]
    classes: int

    @classmethod
    def of(cls, given: NDArray[np.int64], probabilities: NDArray[np.float64]) -> _Answers:
        own = np.maximum(probabilities[np.arange(len(given)), given], 1e-12)
        return cls(own, probabilities.max(axis=1), probabilities.argmax(axis=1) != given, probabilities.shape[1])

    def drawn(self, rows: NDArray[np.int64]) -> _Answers:
        return _Answers(self.own[rows], self.top[rows], self.contradicts[rows], self.classes)

    def wrong_label_chances(self) -> NDArray[np.float64] | None:
        confident = min(len(self.top), max(MIN_IMAGES, int(CONFIDENT_SHARE * len(self.top))))
        least = np.partition(self.top, -confident)[-confident]
        surer = self.top > least
        tied = np.flatnonzero(self.top == least)[: confident - np.count_nonzero(surer)]
        contradicted = np.count_nonzero(self.contradicts[surer]) + np.count_nonzero(self.contradicts[tied])
        noise = (contradicted + 0.5) / (confident + 1)  # Of a few images, none need be wrong by chance.
        elsewhere = noise / (self.classes - 1)
        if noise + elsewhere > 0.7:
            return None
        true = np.clip((self.own - elsewhere) / (1 - noise - elsewhere), 0.0, 1.0)
        return np.clip(1.0 - true * (1 - noise) / self.own, 0.0, 1.0)


def balanced_accuracy(given: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """Returns the mean, over the classes that occur, of the share of their images that is predicted right."""
    from sklearn.metrics import recall_score

    return float(recall_score(given, probabilities.argmax(axis=1), average="macro", labels=np.unique(given)))
