"""Seven pixel statistics of an image, shared by validation, the request log and drift detection.

They are always computed on the preprocessed uint8 image (the very array that the model sees), so that a training row,
a reference row and a logged request are comparable. Which seven, and why: they see noise, blur, brightness, contrast
and colour shifts that embeddings miss (Rabanser et al. 2019, "Failing Loudly", section 4, uses comparable shifts).
"""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
from numpy.typing import NDArray

PROPERTY_NAMES: tuple[str, ...] = (
    "luma_mean",
    "luma_std",
    "log_laplacian_variance",
    "log_laplacian_mad",
    "red_green",
    "blue_yellow",
    "saturation",
)


def image_properties(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Returns the seven statistics of one image.

    Args:
        image: `(H, W, 3)` uint8, RGB.

    Returns:
        `(7,)` float32 in the order of `PROPERTY_NAMES`: luma mean and standard deviation (grey levels, 0–255), the
        natural log of 1 + the Laplacian's variance, of 1 + its median absolute deviation, the means of R−G and of
        B−(R+G)/2 (grey levels, signed), and the mean saturation (max−min over channels, grey levels).
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"Expected one (H, W, 3) uint8 RGB image. Received: {image.dtype} {image.shape}.")
    luma = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    laplacian = cv2.Laplacian(luma, cv2.CV_32F)
    deviation = np.abs(laplacian - np.median(laplacian))
    red, green, blue = (float(m) for m in image.reshape(-1, 3).mean(axis=0))
    saturation = image.max(axis=2).astype(np.float32) - image.min(axis=2)
    return np.array(
        [
            luma.mean(),
            luma.std(),
            np.log1p(laplacian.var()),
            np.log1p(np.median(deviation)),
            red - green,
            blue - (red + green) / 2,
            saturation.mean(),
        ],
        dtype=np.float32,
    )


def batch_properties(images: Iterable[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Returns `(N, 7)` float32, a row of `image_properties` for each `(H, W, 3)` uint8 RGB image, in order."""
    rows = [image_properties(image) for image in images]
    return np.stack(rows) if rows else np.empty((0, len(PROPERTY_NAMES)), dtype=np.float32)
