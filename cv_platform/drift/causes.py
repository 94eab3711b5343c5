"""What kind of drift it is, and what to do: another mix of classes, other images of them, or something else entirely.

The mix is estimated from the probabilities alone, on the assumption that each class looks as before (label shift). The
reference, drawn anew with that mix, is then judged against the window once more. Where no drift is left, the mix
explains it. Where there is, the images that are like none of the reference are left out on both sides: if none is left
then, they explain it. Else the images of the classes have changed. An explanation of a verdict, never a verdict.

Sources:
    Saerens, Latinne & Decaestecker 2002, "Adjusting the Outputs of a Classifier to New a Priori Probabilities", Neural
    Computation 14(1): the mix by expectation maximisation, no less exact than the confusion matrix (Lipton et al. 2018)
    where a model is calibrated (Garg et al. 2020, "A Unified View of Label Shift Estimation", arXiv 2003.07554).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cv_platform.drift.family import DEFAULT_DETECTORS
from cv_platform.drift.sample import DriftSample, Float32Matrix
from cv_platform.drift.scipy_tests import binomial_at_least
from cv_platform.drift.verdict import judge
from cv_platform.records import ClassMix, DriftCause, DriftCauses

_ALPHA = 0.05
"""Level of the second judgements: what they ask is whether drift is left, and too small a level leaves none."""
_FEWEST_ROWS = 50
"""Of the reference, drawn with the estimated mix: fewer would find no drift for want of images."""
_MAY_LACK = 0.02
"""Share of the images whose classes the reference has too few of."""
_STEPS, _RESAMPLES = 200, 100
_MOST_ROWS = 2000
_NEIGHBOURS = 5
_ODD = 0.01
"""Share of the reference's own images that are far from the others, by features and by pixel statistics each."""


@dataclass(frozen=True)
class Labelled:
    """A reference whose classes are known.

    Attributes:
        sample: its rows.
        targets: `(N, C)` bool, one true class a row.
    """

    sample: DriftSample
    targets: NDArray[np.bool_]


def find_causes(
    reference: Labelled,
    current: DriftSample,
    *,
    class_names: tuple[str, ...],
    permutations: int,
    max_reference_rows: int,
    seed: int,
    detectors: Collection[str] = DEFAULT_DETECTORS,
) -> DriftCauses:
    """Says what explains that `current` has drifted from the reference; of a multi-class model.

    Args:
        reference: held-out rows of the model that made `current`.
        current: rows that are judged to have drifted.
        class_names: of the columns of `bbsd`.
        permutations, max_reference_rows, seed, detectors: of the second judgements, as in `verdict.judge`.

    Raises:
        InvalidSampleError: the samples cannot be compared.
    """

    def is_drift(left: DriftSample, right: DriftSample) -> bool | None:
        if len(left) < _FEWEST_ROWS or len(right) < _FEWEST_ROWS:
            return None
        effort = {"permutations": permutations, "max_reference_rows": max_reference_rows, "seed": seed}
        return judge(left, right, alpha=_ALPHA, detectors=detectors, **effort).drifted

    mix = estimate_mix(reference.sample, current, seed=seed)
    labels = reference.targets.argmax(axis=1)
    cause: DriftCause = "not told apart"
    remains = is_drift(reference.sample.take(_drawn_with(mix.shares, labels, seed=seed)), current)
    if remains is not None:
        cause = "images" if remains else "class mix"
    odd_before, odd = _odd_rows(reference.sample, current, seed=seed)
    expected = max(float(odd_before.mean()), 1 / len(labels))
    has_more = binomial_at_least(int(odd.sum()), len(odd), expected) <= _ALPHA
    if cause != "class mix" and has_more and np.count_nonzero(~odd) >= _FEWEST_ROWS:
        familiar = current.take(~odd)
        again = estimate_mix(reference.sample, familiar, seed=seed)
        rows = np.flatnonzero(~odd_before)
        rows = rows[_drawn_with(again.shares, labels[rows], seed=seed)]
        if is_drift(reference.sample.take(rows), familiar) is False:
            cause, mix = "unknown images", again
    before = reference.targets.mean(axis=0)
    classes = tuple(
        ClassMix(class_name=name, reference_share=float(before[i]), share=s, low=low, high=high)
        for i, (name, s, low, high) in enumerate(zip(class_names, *(a.tolist() for a in mix), strict=True))
    )
    return DriftCauses(cause=cause, class_mix=classes, unknown_share=float(odd.mean()))


@dataclass(frozen=True)
class Mix:
    """Shares of the classes, 0–1, and the bounds of their 95 % intervals; each `(C,)` float64."""

    shares: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    def __iter__(self) -> Iterator[NDArray[np.float64]]:
        return iter((self.shares, self.low, self.high))


def estimate_mix(reference: DriftSample, current: DriftSample, *, seed: int) -> Mix:
    """Estimates what share of the current images each class has, if each class looks as in the reference.

    Of the reference itself it is the mean probability, so that an unchanged mix is estimated as unchanged. The
    interval is a percentile bootstrap over the current rows; it knows nothing of errors of the model.

    Args:
        reference: a multi-class model's held-out rows.
        current: rows of the same model, at most 2,000 of which take part.
        seed: of those and the bootstrap.
    """
    rng = np.random.default_rng(seed)
    rows = current.bbsd if len(current) <= _MOST_ROWS else current.bbsd[rng.choice(len(current), _MOST_ROWS, False)]
    prior = np.maximum(reference.bbsd.mean(axis=0, dtype=np.float64), 1e-6)
    likelihoods = rows.astype(np.float64) / prior
    likelihoods /= np.maximum(likelihoods.max(axis=1, keepdims=True), 1e-300)
    # The first column is the estimate itself, the others the resampled ones.
    counts = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=_RESAMPLES).T
    weights = np.concatenate([np.ones((len(rows), 1)), counts], axis=1) / len(rows)
    shares = np.repeat(prior[:, None] / prior.sum(), _RESAMPLES + 1, axis=1)
    for _ in range(_STEPS):
        before = shares
        # Of each row, how likely it is under the present mix; of each class, its expected share of the rows.
        shares = before * (likelihoods.T @ (weights / np.maximum(likelihoods @ before, 1e-300)))
        if np.abs(shares - before).max() < 1e-4:
            break
    low, high = np.quantile(shares[:, 1:], [0.025, 0.975], axis=1)
    return Mix(shares[:, 0], low, high)


def _drawn_with(shares: NDArray[np.float64], labels: NDArray[np.intp], *, seed: int) -> NDArray[np.intp]:
    """Returns as many rows as there are for these shares of the classes, but for 2 % of the images, in order."""
    counts = np.bincount(labels, minlength=len(shares))
    sizes = np.minimum(len(labels), counts / np.maximum(shares, 1e-12))
    missing = [1.0 - np.minimum(counts, shares * size).sum() / max(size, 1.0) for size in sizes.tolist()]
    most = max((size for size, lacks in zip(sizes.tolist(), missing, strict=True) if lacks <= _MAY_LACK), default=0.0)
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = [order[labels[order] == i][: round(float(share * most))] for i, share in enumerate(shares)]
    return np.sort(np.concatenate(chosen)).astype(np.intp)


def _odd_rows(
    reference: DriftSample, current: DriftSample, *, seed: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Returns which rows of both are farther from the reference's than all but 1 % of its own, by either measure."""
    odd_before, odd = np.zeros(len(reference), dtype=np.bool_), np.zeros(len(current), dtype=np.bool_)
    anchors = np.sort(np.random.default_rng(seed).permutation(len(reference))[:_MOST_ROWS])
    spread = reference.properties.std(axis=0)
    properties = [s.properties / np.where(spread > 0, spread, 1.0).astype(np.float32) for s in (reference, current)]
    # The features' direction: their length says how sure the network is, and little of what it sees.
    directions = [
        s.features / np.maximum(np.linalg.norm(s.features, axis=1, keepdims=True), 1e-12) for s in (reference, current)
    ]
    for left, right in (properties, directions):
        own = _distances(left, left[anchors], itself=np.isin(np.arange(len(left)), anchors))
        limit = np.quantile(own, 1.0 - _ODD, method="higher")
        odd_before |= own > limit
        odd |= _distances(right, left[anchors]) > limit
    return odd_before, odd


def _distances(
    rows: Float32Matrix, anchors: Float32Matrix, *, itself: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Returns `(N,)`: each row's squared distance to its fifth nearest anchor; of rows `itself`, besides themselves."""
    centre = anchors.mean(axis=0)
    rows, anchors = rows - centre, anchors - centre
    nearest = np.full(len(rows), _NEIGHBOURS - 1) if itself is None else _NEIGHBOURS - 1 + itself
    nearest = np.minimum(nearest, len(anchors) - 1)
    result = np.empty(len(rows))
    for start in range(0, len(rows), _MOST_ROWS):
        block = slice(start, start + _MOST_ROWS)
        squares = (rows[block] ** 2).sum(axis=1)[:, None] - 2 * rows[block] @ anchors.T + (anchors**2).sum(axis=1)
        squares.sort(axis=1)
        result[block] = np.take_along_axis(squares, nearest[block, None], axis=1)[:, 0]
    return result
