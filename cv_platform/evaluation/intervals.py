"""How sure a metric is: Wilson's interval for shares of images, a bootstrap over images for means over classes.

https://docs.scipy.org/doc/scipy/reference/generated/scipy.stats._result_classes.BinomTestResult.proportion_ci.html
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
_RESAMPLES = 1000
_RANKED = 200
"""Of what has to be ranked: as many classes as there are take as many times as long."""
_AT_ONCE = 100
"""Resamples that are held in memory together, each a float32 per image."""

Interval = tuple[float, float]


def wilson(successes: int, count: int) -> Interval | None:
    """Returns the interval of a share, 0–1; None of nothing."""
    if not count:
        return None
    interval = stats.binomtest(successes, count).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def class_intervals(truth: np.ndarray, decisions: np.ndarray) -> list[dict[str, Interval | None]]:
    """Returns the intervals of precision, recall and F1 per class, in order; None where the metric is.

    Args:
        truth: `(N, C)` bool.
        decisions: `(N, C)` bool, those about known labels (`predictions.known_decisions`).
    """
    f1s = _bootstrap(truth, decisions, _f1)
    return [
        {
            "precision": wilson(int((of & by).sum()), int(by.sum())),
            "recall": wilson(int((of & by).sum()), int(of.sum())),
            "f1": _unless_certain(_percentiles(column), of) if of.any() or by.any() else None,
        }
        for of, by, column in zip(truth.T, decisions.T, f1s.T, strict=True)
    ]


def mean_intervals(truth: np.ndarray, decisions: np.ndarray) -> dict[str, Interval]:
    """Returns the intervals of `macro_precision`, `macro_recall` and `macro_f1`; arguments as in `class_intervals`."""
    supported = truth.any(axis=0)
    measures = {"macro_precision": _precision, "macro_recall": _recall, "macro_f1": _f1}
    found = {}
    for name, measure in measures.items():
        # A resample may lack a class, of which its mean then says nothing.
        ends = _percentiles(_known_mean(_bootstrap(truth, decisions, measure)[:, supported].T))
        found[name] = _unless_certain(ends, truth[:, supported])
    return {name: interval for name, interval in found.items() if interval is not None}


def score_intervals(
    truth: np.ndarray, probabilities: np.ndarray, known: np.ndarray | None = None
) -> tuple[list[Interval | None], dict[str, Interval]]:
    """Returns the intervals of what ranks images by a class's probability, of the same resamples for all classes.

    Args:
        truth: `(N, C)` bool.
        probabilities: `(N, C)`.
        known: `(N, C)` bool: the labels that are known; None: all.

    Returns:
        Of each class's AUC, None where it has none; and of `auc_macro` and `mean_average_precision`.
    """
    known = np.ones_like(truth, dtype=bool) if known is None else known
    curves = [_Curve(*column) for column in zip(truth.T, probabilities.T, known.T, strict=True)]
    weights = list(itertools.islice(_weights(len(truth)), _RANKED // _AT_ONCE))
    found = np.array([np.concatenate([curve.areas(part) for part in weights], axis=1) for curve in curves])
    names = ("auc_macro", "mean_average_precision")
    ranked = np.isfinite(found[:, 0]).any(axis=1), truth.any(axis=0)
    tried = [(truth[:, of], known[:, of]) for of in ranked]
    means = {
        name: _unless_certain(_percentiles(_known_mean(found[:, at])), *tried[at], has_ranks=not at)
        for at, name in enumerate(names)
    }
    aucs = [
        _unless_certain(_percentiles(row[0]), *column, has_ranks=True)
        for row, *column in zip(found, truth.T, known.T, strict=True)
    ]
    return aucs, {name: ends for name, ends in means.items() if ends is not None}


class _Curve:
    """The images by their scores for one class, of which equal ones are one step of its curves."""

    def __init__(self, positive: np.ndarray, scores: np.ndarray, known: np.ndarray) -> None:
        order = np.argsort(-scores, kind="stable")
        self._order = order[known[order]]
        self._positive = positive[self._order]
        self._ends = np.append(np.flatnonzero(np.diff(scores[self._order])), len(self._order) - 1)

    def areas(self, weights: np.ndarray) -> np.ndarray:
        """Returns `(2, R)`: the area under ROC and the average precision of `(R, N)` resamples; NaN where none is."""
        if not len(self._order):
            return np.full((2, len(weights)), np.nan)
        ranked = weights[:, self._order]
        hits = np.cumsum(ranked * self._positive, axis=1)[:, self._ends]
        false = np.cumsum(ranked, axis=1)[:, self._ends] - hits
        steps, wrong_steps = (np.diff(values, prepend=0.0, axis=1) for values in (hits, false))
        area = (wrong_steps * (hits - steps / 2)).sum(axis=1)
        precision = (steps * np.divide(hits, np.maximum(hits + false, 1))).sum(axis=1)
        return np.stack([_share(area, hits[:, -1] * false[:, -1]), _share(precision, hits[:, -1])])


def mean_interval(values: np.ndarray, counts: np.ndarray | None = None, *, are_shares: bool = False) -> Interval | None:
    """Returns the interval of the mean of `(N,)` values, one of each image; of shares, 1 is without an error.

    With `counts`, `(N,)`, each value is itself the mean of so many, and weighs as much.
    """
    sums = values if counts is None else values * counts
    means = (
        weights @ sums / (len(values) if counts is None else np.maximum(weights @ counts, 1))
        for weights in _weights(len(values))
    )
    ends = _percentiles(np.concatenate(list(means)))
    return _unless_certain(ends, np.ones(len(values), bool)) if are_shares else ends


def calibration_interval(gaps: np.ndarray, bins: np.ndarray) -> Interval | None:
    """Returns the interval of the expected calibration error.

    Resamples have a larger error than the images themselves, as what is noise in a bin counts again: that is taken off.

    Args:
        gaps: `(N, K)`, of each decision about an image: its confidence minus whether it is right.
        bins: `(N, K)` int, of the confidence; −1 where it is not known whether it is right.
    """
    known = bins >= 0
    count = int(known.sum())
    table = np.zeros((len(gaps), int(bins.max()) + 1), np.float32)
    np.add.at(table, (np.arange(len(gaps))[:, None], np.maximum(bins, 0)), np.where(known, gaps, 0.0))
    errors = np.concatenate([np.abs(weights @ table).sum(axis=1) for weights in _weights(len(gaps))]) / count
    excess = float(errors.mean()) - float(np.abs(table.sum(axis=0)).sum()) / count
    return _percentiles(np.maximum(errors - excess, 0.0))


def _weights(count: int) -> Iterator[np.ndarray]:
    """Yields how often each image is in a resample, `(R, N)` float32, some resamples at a time, always the same."""
    rng = np.random.default_rng(0)
    for _ in range(0, _RESAMPLES, _AT_ONCE):
        yield rng.multinomial(count, np.full(count, 1 / count), size=_AT_ONCE).astype(np.float32)


def _known_mean(values: np.ndarray) -> np.ndarray:
    """Returns the means over the first axis of what is known there."""
    known = np.isfinite(values)
    means = np.where(known, values, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return np.where(known.any(axis=0), means, np.nan)


def _bootstrap(
    truth: np.ndarray, decisions: np.ndarray, measure: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Returns `(R, C)`: `measure` of (hits, images of the class, decisions for it) in each resample of the images."""
    tables = [table.astype(np.float32) for table in (truth & decisions, truth, decisions)]
    return np.concatenate(
        [measure(*(weights @ table for table in tables)) for weights in _weights(len(truth))],
    )


def _precision(hits: np.ndarray, _: np.ndarray, decided: np.ndarray) -> np.ndarray:
    return _share(hits, decided)


def _recall(hits: np.ndarray, support: np.ndarray, _: np.ndarray) -> np.ndarray:
    return _share(hits, support)


def _f1(hits: np.ndarray, support: np.ndarray, decided: np.ndarray) -> np.ndarray:
    return _share(2 * hits, support + decided)


def _unless_certain(
    ends: Interval | None, truth: np.ndarray, known: np.ndarray | None = None, *, has_ranks: bool = False
) -> Interval | None:
    """Returns an interval; of a score that is 1, or 0, in every resample, as wide as the images seen leave open.

    Without an error in n images of each of C classes, the mean rate of errors may be as large as Wilson's interval says
    of nC of nC: errors that are spread evenly are likeliest to be missed. The smallest class counts for all.

    Args:
        ends: those of the resamples.
        truth: `(N,)` or `(N, C)` bool, of the class, or of the classes of whose scores `ends` is the mean.
        known: the same, of which images that is known; None: of all.
        has_ranks: the images with the class are compared with those without: as many pairs are independent as the fewer
            have images.
    """
    if ends not in {(1.0, 1.0), (0.0, 0.0)}:
        return ends
    with_class = truth.sum(axis=0)
    images = len(truth) if known is None else known.sum(axis=0)
    fewest = int(np.min(np.minimum(with_class, images - with_class) if has_ranks else with_class))
    tries = fewest * with_class.size
    # Without any, the class has no image, only answers.
    return wilson(tries if ends[0] else 0, tries) if tries else ends


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _percentiles(values: np.ndarray) -> Interval | None:
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
