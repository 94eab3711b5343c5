"""How a model does when images get worse as they do outside: noise, blur, light, JPEG, rotation; one table.

In the spirit of Hendrycks and Dietterich (2019, https://arxiv.org/abs/1903.12261), at two strengths each. Blur goes by
the image's size, so that it takes as much from small images as from large ones.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from cv_platform.evaluation.intervals import wilson
from cv_platform.records import Robustness

_Corruption = Callable[[np.ndarray, np.random.Generator], np.ndarray]


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


def corruptions(height: int) -> list[tuple[str, str, _Corruption]]:
    """Returns name, strength and function of each corruption of images of a height in pixels."""
    return [
        *[("noise", f"sd {sd} grey levels", _noise(sd)) for sd in (12, 30)],
        *[("blur", f"sigma {share:.1%} of the height", _blur(share * height)) for share in (0.015, 0.04)],
        *[("darker", f"by {share:.0%}", _light(1 - share)) for share in (0.3, 0.6)],
        *[("brighter", f"by {share:.0%}", _light(1 + share)) for share in (0.3, 0.6)],
        *[("JPEG", f"quality {quality}", _jpeg(quality)) for quality in (40, 10)],
        *[("rotation", f"by {degrees}°", _rotation(degrees)) for degrees in (10, 30)],
    ]


def _noise(sd: float) -> _Corruption:
    return lambda image, rng: np.clip(image + rng.normal(0, sd, image.shape), 0, 255).astype(np.uint8)


def _blur(sigma: float) -> _Corruption:
    return lambda image, _: cv2.GaussianBlur(image, (0, 0), sigma)


def _light(factor: float) -> _Corruption:
    return lambda image, _: np.clip(image * factor, 0, 255).astype(np.uint8)


def _jpeg(quality: int) -> _Corruption:
    def corrupt(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), dtype=np.uint8)

    return corrupt


def _rotation(degrees: float) -> _Corruption:
    def corrupt(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = image.shape[:2]
        sign = 1 if rng.random() < 0.5 else -1
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), sign * degrees, 1.0)
        turned = cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101)
        return np.asarray(turned, dtype=np.uint8)

    return corrupt
