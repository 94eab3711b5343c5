"""Which images people are asked to label next: by reasons with quotas, near-copies once, and unlike each other.

The random ones come first and are left as they are drawn, so that they stay a sample of all. Of each other reason those
that score highest are a pool. Of the uncertain ones it is put into clusters by what the images show, weighted by
their uncertainty, and each cluster gives the image in its middle: the most uncertain ones alone are much alike
(Zhdanov 2019, "Diverse mini-batch Active Learning"; `python -m benchmarks labels` compares). Of the other reasons those
are taken that lie farthest from all that were taken before (greedy k-center: Sener and Savarese 2018, "Active Learning
for Convolutional Neural Networks: A Core-Set Approach").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RANDOM, UNCERTAIN = "random", "uncertain"
UNCERTAIN_POOL, _CLUSTERS = 5, 200
"""The pool of the uncertain ones is so many times their quota. Beyond so many clusters, each gives more images."""
POOL = 3
"""A reason's pool is so many times its quota: 1 would ask for the highest scores only, however alike they are."""

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Choice:
    """An image that is asked about: its position, why, and how strongly; higher is asked first."""

    position: int
    reason: str
    score: float


def choose(
    scores: Mapping[str, Floats],
    quotas: Mapping[str, int],
    vectors: Floats,
    groups: NDArray[np.int64],
    *,
    seed: int = 0,
) -> list[Choice]:
    """Chooses images by reason.

    Args:
        scores: by reason, `(N,)`; NaN: not for this reason.
        quotas: images by reason, in the order in which the reasons choose.
        vectors: `(N, D)`, finite: what the images show; k-center compares them by angle, clusters as they are.
        groups: `(N,)`: near-copies share a number.
        seed: of the clusters.

    Returns:
        Each image once. Fewer than the quotas where a reason has not enough; the last reason then gets what is left.
    """
    unit = _unit(vectors)
    # To the nearest image that was taken: 4 is the largest square between unit vectors.
    distances = np.full(len(unit), 4.0, np.float32)
    free = np.ones(len(unit), np.bool_)
    chosen: list[Choice] = []
    left = sum(quotas.values())
    for number, (reason, quota) in enumerate(quotas.items()):
        quota = left if number == len(quotas) - 1 else min(quota, left)
        score = np.asarray(scores.get(reason, np.full(len(unit), np.nan)), dtype=np.float64)
        order = np.argsort(-score, kind="stable")
        order = order[np.isfinite(score[order]) & free[order]]
        if reason == RANDOM:
            pool = order[:quota]
        elif reason == UNCERTAIN:
            pool = _once(order, groups)[: UNCERTAIN_POOL * quota]
            pool = _from_clusters(vectors, score, pool, quota, seed)
        else:
            pool = _once(order, groups)[: POOL * quota]
        for _ in range(min(quota, len(pool))):
            at = 0 if reason in (RANDOM, UNCERTAIN) else int(np.argmax(distances[pool]))
            position = int(pool[at])
            pool = np.delete(pool, at)
            chosen.append(Choice(position, reason, float(score[position])))
            free[groups == groups[position]] = False
            if reason == RANDOM:
                free[position] = False
            distances = np.minimum(distances, 2.0 - 2.0 * (unit @ unit[position]))
        left = sum(quotas.values()) - len(chosen)
    return chosen


def uncertainty(probabilities: Floats, thresholds: Floats | None = None) -> NDArray[np.float64]:
    """Returns `(N,)` of 0 to 1: how close the two best classes are, or the closest label is to its threshold.

    Args:
        probabilities: `(N, C)`.
        thresholds: `(C,)`, of labels, each a decision of its own; None: one of the classes is right.
    """
    shares = np.asarray(probabilities, np.float64)
    if thresholds is not None:
        room = np.where(shares < thresholds, thresholds, 1.0 - thresholds)
        return 1.0 - (np.abs(shares - thresholds) / np.maximum(room, 1e-12)).min(axis=1)
    best = np.sort(shares, axis=1)[:, -2:]
    return 1.0 - (best[:, -1] - (best[:, 0] if best.shape[1] > 1 else 0.0))


def novelty(vectors: Floats, known: Floats) -> NDArray[np.float64]:
    """Returns `(N,)`: 1 − the cosine to the most similar image that is known; 0 is the same, NaN without any.

    Args:
        vectors: `(N, D)`.
        known: `(M, D)`.
    """
    if not len(known):
        return np.full(len(vectors), np.nan)
    unit, targets = _unit(vectors), _unit(known)
    nearest = [(unit @ targets[start : start + 4096].T).max(axis=1) for start in range(0, len(targets), 4096)]
    return 1.0 - np.max(nearest, axis=0).astype(np.float64)


def _from_clusters(
    vectors: Floats, score: NDArray[np.float64], pool: NDArray[np.int64], count: int, seed: int
) -> NDArray[np.int64]:
    """Returns `count` positions of a pool, by score: of each cluster first the image nearest to its middle."""
    if len(pool) <= count or not count:
        return pool
    # It takes seconds to import, for which `cv-platform labels` need not wait.
    from sklearn.cluster import KMeans

    weights = np.maximum(score[pool], 1e-6)
    clusters = KMeans(min(count, _CLUSTERS), max_iter=20, random_state=seed)
    distances = clusters.fit_transform(vectors[pool], sample_weight=weights)
    member = distances.argmin(axis=1)
    nearest = np.lexsort((distances.min(axis=1), member))
    starts = np.flatnonzero(np.diff(member[nearest], prepend=-1))
    rank = np.empty(len(pool), np.int64)
    rank[nearest] = np.arange(len(pool)) - np.repeat(starts, np.diff(starts, append=len(pool)))
    return pool[np.sort(np.argsort(rank, kind="stable")[:count])]


def _once(order: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns of each group the image that comes first."""
    _, first = np.unique(groups[order], return_index=True)
    return order[np.sort(first)]


def _unit(vectors: Floats) -> NDArray[np.float32]:
    rows = np.asarray(vectors, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
