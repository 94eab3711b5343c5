"""A map of reference and window by their penultimate features, as a PNG.

It explains a verdict and never makes one: what lies apart in two directions differs, what does not may differ in
others. Drawn without pyplot, whose state all threads share.
"""

# Matplotlib and NumPy's linear algebra come without complete types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from cv_platform.drift.sample import DriftSample, Float32Matrix
from cv_platform.drift.two_sample import subsample

_MOST = 500
"""Points of each side."""


def draw_map(reference: DriftSample, current: DriftSample, *, seed: int) -> bytes:
    """Returns the picture; at most 500 images of each side, seeded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    axes = figure.subplots()
    for points, label, colour in zip(
        places(reference, current, seed=seed), ("reference", "window"), ("0.6", "C1"), strict=True
    ):
        axes.scatter(points[:, 0], points[:, 1], s=9, color=colour, alpha=0.6, linewidths=0, label=label)
    axes.set_xticks([])
    axes.set_yticks([])
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    target = BytesIO()
    figure.savefig(target, format="png", dpi=110)
    return target.getvalue()


def places(reference: DriftSample, current: DriftSample, *, seed: int) -> tuple[NDArray[np.float64], ...]:
    """Returns `(n, 2)` and `(m, 2)`: where the two sides' images lie in the directions in which all vary most."""
    rng = np.random.default_rng(seed)
    sides: list[Float32Matrix] = [subsample(side.features, _MOST, rng) for side in (reference, current)]
    pooled = np.concatenate(sides).astype(np.float64)
    pooled -= pooled.mean(axis=0)
    pooled /= np.maximum(pooled.std(axis=0), 1e-12)
    directions = np.linalg.eigh(pooled.T @ pooled)[1][:, ::-1][:, :2]
    found = pooled @ directions
    if found.shape[1] < 2:
        found = np.column_stack([found, np.zeros(len(found))])
    return tuple(np.split(found, [len(sides[0])]))
