"""Which probability makes a multi-label model name a class: for each class the one with the best F1 on held-out images.

Lipton et al. (2014, https://arxiv.org/abs/1402.1892) show that it is half of the F1 that it reaches, so that no common
threshold suits rare and frequent classes. A class with few images keeps the common one: the best on a handful is luck.
"""

from __future__ import annotations

import numpy as np

FEWEST = 20
"""Images that are known to show the class, and not to show it."""


def best_thresholds(
    truth: np.ndarray, probabilities: np.ndarray, common: float, known: np.ndarray | None = None
) -> tuple[float, ...]:
    """Returns a threshold for each class; of equally good ones that next to `common`.

    Args:
        truth: `(N, C)` bool.
        probabilities: `(N, C)`.
        common: 0–1, of classes that have too few images.
        known: `(N, C)` bool: the labels that are known, which alone count; None: all.
    """
    known = np.ones_like(truth, dtype=bool) if known is None else known
    return tuple(
        _best(shows[of], column[of].astype(np.float64), common)
        if min(int(shows[of].sum()), int((~shows[of]).sum())) >= FEWEST
        else common
        for shows, column, of in zip(truth.T, probabilities.T, known.T, strict=True)
    )


def _best(shows: np.ndarray, probabilities: np.ndarray, common: float) -> float:
    order = np.argsort(-probabilities)
    ranked, right = probabilities[order], np.cumsum(shows[order])
    predicted = np.arange(1, len(ranked) + 1)
    # Between two different probabilities; below the last one there is nothing to gain but for a class that all have.
    cuts = np.append(ranked[:-1] > ranked[1:], True)
    middles = (ranked + np.append(ranked[1:], 0.0)) / 2
    scores = np.where(cuts, 2 * right / (predicted + shows.sum()), -1.0)
    best = np.flatnonzero(scores >= scores.max() - 1e-12)
    nearest = best[np.abs(middles[best] - common).argmin()]
    # Whole float32 steps below 1 and above 0 stay what they are in the bundle's YAML.
    return round(float(np.clip(middles[nearest], 1e-6, 1 - 1e-6)), 6)
