"""Checks of whether train and test are of one population: their labels, and their pixel statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import ks_2samp
from typing_extensions import override

from cv_platform.properties import PROPERTY_NAMES
from cv_platform.validation.checks import Check, Finding, Subject


class LabelDrift(Check):
    """Compares the labels of train and test by Cramér's V; for multi-label, class by class, the largest counting.

    Shares are those of the known labels.
    """

    name, limit = "label_drift", "max_label_drift"

    @override
    def look(self, subject: Subject) -> Finding:
        train, test = (subject.split(split)["labels"] for split in ("train", "test"))
        if train.empty or test.empty:
            return _not_judged("train" if train.empty else "test")
        names, limit = subject.class_names, subject.config.max_label_drift
        first, second = (np.array([sum(name in labels for labels in rows) for name in names]) for rows in (train, test))
        known, known_second = (
            np.array([len(rows) - sum(name in unknown for unknown in rows) for name in names])
            for rows in (subject.split(split)["unknown_labels"] for split in ("train", "test"))
        )
        share, share_second = first / np.maximum(known, 1), second / np.maximum(known_second, 1)
        # Of a class that a split says nothing of there is nothing to compare; `class_coverage` names it.
        shares = np.where((known > 0) & (known_second > 0), np.abs(share - share_second), 0.0)
        if subject.classifier_type == "multi-class":
            drift, words = cramers_v(first, second), "."
            drifted = np.argsort(-shares, kind="stable") if drift > limit else []
        else:
            pairs = zip(first, known, second, known_second, strict=True)
            drifts = np.array([cramers_v(np.array([a, n - a]), np.array([b, m - b])) for a, n, b, m in pairs])
            drift, words = float(drifts.max(initial=0.0)), " for the class that differs most."
            drifted = [i for i in np.argsort(-drifts, kind="stable") if drifts[i] > limit]
        return Finding(
            f"Cramér's V between the labels of train and test is {drift:.3f}{words}",
            drift,
            [f"{names[i]}: {share[i]:.1%} of train, {share_second[i]:.1%} of test" for i in drifted if shares[i] > 0],
        )


class PropertyDrift(Check):
    """Compares the pixel statistics of train and test by the Kolmogorov–Smirnov distance, the largest counting."""

    name, limit = "property_drift", "max_property_drift"

    @override
    def look(self, subject: Subject) -> Finding:
        train, test = (subject.split(name)[list(PROPERTY_NAMES)].dropna().to_numpy() for name in ("train", "test"))
        if not len(train) or not len(test):
            return _not_judged("test" if len(train) else "train")
        tests: list[Any] = [ks_2samp(a, b, method="asymp") for a, b in zip(train.T, test.T, strict=True)]
        distances = np.array([test.statistic for test in tests])
        largest = int(distances.argmax())
        return Finding(
            f"The largest distance between train and test is {distances[largest]:.3f} ({PROPERTY_NAMES[largest]}), "
            f"over {len(train) + len(test)} images.",
            float(distances[largest]),
            [
                f"{PROPERTY_NAMES[i]}: distance {distances[i]:.3f}, median {np.median(train[:, i]):.1f} in train, "
                f"{np.median(test[:, i]):.1f} in test"
                for i in np.argsort(-distances, kind="stable")
                if distances[i] > subject.config.max_property_drift
            ],
        )


def cramers_v(first: np.ndarray, second: np.ndarray) -> float:
    """Returns Cramér's V between the group (first or second) and the category, both groups weighing the same.

    Without equal weights, V would depend on how large the test split is. What chance alone gives on average is
    subtracted (Bergsma 2013), so that small splits of one population come out near 0; Deepchecks' LabelDrift takes no
    account of the size.

    Args:
        first: `(K,)` counts per category.
        second: `(K,)` counts per category.

    Returns:
        0 (same distribution) to 1 (no category in common); 0 when a group is empty.
    """
    sizes = float(first.sum()), float(second.sum())
    if min(sizes) == 0:
        return 0.0
    p, q = first / sizes[0], second / sizes[1]
    used = (p + q) > 0
    phi_squared = 0.5 * float((((p - q) ** 2)[used] / (p + q)[used]).sum())
    by_chance = (int(used.sum()) - 1) * (1 / sizes[0] + 1 / sizes[1]) / 4
    return float(np.sqrt(max(phi_squared - by_chance, 0.0)))


def _not_judged(split: str) -> Finding:
    return Finding(f"Not judged: {split} has no images (see class_coverage).")
