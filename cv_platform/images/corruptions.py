"""How images get worse outside: noise, blur, light, JPEG, rotation, at two strengths each.

In the spirit of Hendrycks and Dietterich (2019, https://arxiv.org/abs/1903.12261). Blur goes by the image's size, so
that it takes as much from small images as from large ones.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Corruption = Callable[[Pixels, np.random.Generator], Pixels]
"""From `(H, W, 3)` uint8 to the same."""


def corruptions(height: int) -> list[tuple[str, str, Corruption]]:
    """Returns name, strength and function of each, two strengths of a name; for images of this height in pixels."""
    return [
        *[("noise", f"sd {sd} grey levels", _noise(sd)) for sd in (12, 30)],
        *[("blur", f"sigma {share:.1%} of the height", _blur(share * height)) for share in (0.015, 0.04)],
        *[("darker", f"by {share:.0%}", _light(1 - share)) for share in (0.3, 0.6)],
        *[("brighter", f"by {share:.0%}", _light(1 + share)) for share in (0.3, 0.6)],
        *[("JPEG", f"quality {quality}", _jpeg(quality)) for quality in (40, 10)],
        *[("rotation", f"by {degrees}°", _rotation(degrees)) for degrees in (10, 30)],
    ]


def _noise(sd: float) -> Corruption:
    return lambda image, rng: np.clip(image + rng.normal(0, sd, image.shape), 0, 255).astype(np.uint8)


def _blur(sigma: float) -> Corruption:
    return lambda image, _: np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), dtype=np.uint8)


def _light(factor: float) -> Corruption:
    return lambda image, _: np.clip(image * factor, 0, 255).astype(np.uint8)


def _jpeg(quality: int) -> Corruption:
    def corrupt(image: Pixels, rng: np.random.Generator) -> Pixels:
        _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), dtype=np.uint8)

    return corrupt


def _rotation(degrees: float) -> Corruption:
    def corrupt(image: Pixels, rng: np.random.Generator) -> Pixels:
        height, width = image.shape[:2]
        sign = 1 if rng.random() < 0.5 else -1
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), sign * degrees, 1.0)
        turned = cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101)
        return np.asarray(turned, dtype=np.uint8)

    return corrupt
