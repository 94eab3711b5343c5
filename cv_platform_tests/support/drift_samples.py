"""Made-up samples with the structure of real ones: classes, probabilities, features, embedding and properties."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cv_platform.drift.sample import DriftSample

CLASSES = ("ant", "bee", "cow", "dog", "elk")
_LATENT = 8


def draw_sample(
    rng: np.random.Generator,
    rows: int,
    *,
    shift: float = 0.0,
    scale: float = 1.0,
    without_class: int | None = None,
) -> DriftSample:
    """Draws `rows` images of five classes, all equally frequent.

    Args:
        rng: source of the images; the fixed maps from image to representations do not depend on it.
        rows: how many.
        shift: added to every latent variable (their standard deviation within a class is 1).
        scale: factor on every latent variable.
        without_class: a class that never occurs.
    """
    allowed = [c for c in range(len(CLASSES)) if c != without_class]
    return draw_classes(rng, rng.choice(allowed, size=rows), shift=shift, scale=scale)


def draw_classes(
    rng: np.random.Generator, labels: NDArray[np.intp], *, shift: float = 0.0, scale: float = 1.0
) -> DriftSample:
    """Draws an image of each of the `(N,)` classes; the other arguments as for `draw_sample`."""
    rows = len(labels)
    fixed = np.random.default_rng(2024)
    centres = fixed.normal(size=(len(CLASSES), _LATENT)) * 1.5
    to_features, to_uae = fixed.normal(size=(_LATENT, 12)), fixed.normal(size=(_LATENT, 6))
    latent = (centres[labels] + rng.normal(size=(rows, _LATENT))) * scale + shift
    logits = latent @ centres.T / 2
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    properties = np.abs(latent[:, :7]) * np.arange(1, 8)
    properties[:, 6] = 0.0  # Grey images have no saturation: a constant column is normal.
    return DriftSample(
        probabilities.astype(np.float32),
        np.maximum(latent @ to_features, 0).astype(np.float32),
        (latent @ to_uae).astype(np.float32),
        properties.astype(np.float32),
    )
