"""How sure a metric is: Wilson's interval for shares of images, a bootstrap over images for means over classes.

https://docs.scipy.org/doc/scipy/reference/generated/scipy.stats._result_classes.BinomTestResult.proportion_ci.html
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
_RESAMPLES = 1000
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
        decisions: `(N, C)` bool.
    """
    f1s = _bootstrap(truth, decisions, _f1)
    return [
        {
            "precision": wilson(int((of & by).sum()), int(by.sum())),
            "recall": wilson(int((of & by).sum()), int(of.sum())),
            "f1": _percentiles(column) if of.any() or by.any() else None,
        }
        for of, by, column in zip(truth.T, decisions.T, f1s.T, strict=True)
    ]


def mean_intervals(truth: np.ndarray, decisions: np.ndarray) -> dict[str, Interval]:
    """Returns the intervals of `macro_precision`, `macro_recall` and `macro_f1`; arguments as in `class_intervals`."""
    supported = truth.any(axis=0)
    measures = {"macro_precision": _precision, "macro_recall": _recall, "macro_f1": _f1}
    found = {}
    for name, measure in measures.items():
        values = _bootstrap(truth, decisions, measure)[:, supported]
        # A resample may lack a class, of which its mean then says nothing.
        known = np.isfinite(values)
        means = np.where(known, values, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
        found[name] = _percentiles(means)
    return {name: interval for name, interval in found.items() if interval is not None}


def _bootstrap(
    truth: np.ndarray, decisions: np.ndarray, measure: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Returns `(R, C)`: `measure` of (hits, images of the class, decisions for it) in each resample of the images."""
    rng = np.random.default_rng(0)
    count = len(truth)
    tables = [table.astype(np.float32) for table in (truth & decisions, truth, decisions)]
    parts = []
    for _ in range(0, _RESAMPLES, _AT_ONCE):
        weights = rng.multinomial(count, np.full(count, 1 / count), size=_AT_ONCE).astype(np.float32)
        parts.append(measure(*(weights @ table for table in tables)))
    return np.concatenate(parts)


def _precision(hits: np.ndarray, _: np.ndarray, decided: np.ndarray) -> np.ndarray:
    return _share(hits, decided)


def _recall(hits: np.ndarray, support: np.ndarray, _: np.ndarray) -> np.ndarray:
    return _share(hits, support)


def _f1(hits: np.ndarray, support: np.ndarray, decided: np.ndarray) -> np.ndarray:
    return _share(2 * hits, support + decided)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _percentiles(values: np.ndarray) -> Interval | None:
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
