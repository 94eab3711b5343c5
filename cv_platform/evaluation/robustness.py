"""How a model does when images get worse as they do outside: noise, blur, light, JPEG, rotation; one table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cv_platform.evaluation.intervals import wilson
from cv_platform.images.corruptions import corruptions
from cv_platform.records import Robustness


def measure_robustness(
    images: np.ndarray, predict: Callable[[np.ndarray], np.ndarray], is_right: Callable[[np.ndarray], np.ndarray]
) -> tuple[Robustness, ...]:
    """Returns the accuracy on corrupted copies of images; the first row is of the images as they are.

    Args:
        images: `(N, H, W, 3)` uint8; N ≥ 1.
        predict: from such images to `(N, C)` probabilities.
        is_right: from probabilities to `(N,)` bool.
    """
    rows = []
    for name, strength, corrupt in (("none", "", None), *corruptions(images.shape[1])):
        rng = np.random.default_rng(0)
        changed = images if corrupt is None else np.stack([corrupt(image, rng) for image in images])
        right = is_right(predict(changed))
        interval = wilson(int(right.sum()), len(right))
        assert interval is not None  # There are images.
        rows.append(
            Robustness(
                corruption=name,
                strength=strength,
                images=len(right),
                accuracy=float(right.mean()),
                low=interval[0],
                high=interval[1],
            )
        )
    return tuple(rows)
