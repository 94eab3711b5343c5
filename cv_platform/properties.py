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
_LAPLACIAN_MAX = 4 * 255
_LAPLACIANS = np.arange(-_LAPLACIAN_MAX, _LAPLACIAN_MAX + 1, dtype=np.float64)


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
    luma = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    luma_mean, luma_std = (float(value[0, 0]) for value in cv2.meanStdDev(luma))
    laplacian_variance, laplacian_mad = _spread(np.asarray(cv2.Laplacian(luma, cv2.CV_16S), dtype=np.int16))
    channels = cv2.split(image)
    red, green, blue = (cv2.mean(channel)[0] for channel in channels)
    high, low = (pick(pick(channels[0], channels[1]), channels[2]) for pick in (cv2.max, cv2.min))
    return np.array(
        [
            luma_mean,
            luma_std,
            np.log1p(laplacian_variance),
            np.log1p(laplacian_mad),
            red - green,
            blue - (red + green) / 2,
            cv2.mean(cv2.subtract(high, low))[0],
        ],
        dtype=np.float32,
    )


def _spread(laplacian: NDArray[np.int16]) -> tuple[float, float]:
    """Returns variance and median absolute deviation of `(H, W)` int16 Laplacians of grey levels, exactly.

    They are whole numbers within ±4·255, so counting them once takes the place of sorting the pixels twice.
    """
    counts = np.bincount((laplacian.ravel() + _LAPLACIAN_MAX).astype(np.intp), minlength=2 * _LAPLACIAN_MAX + 1)
    mean = float(counts @ _LAPLACIANS) / laplacian.size
    variance = float(counts @ (_LAPLACIANS - mean) ** 2) / laplacian.size
    deviations = np.abs(_LAPLACIANS - _median(_LAPLACIANS, counts))
    order = np.argsort(deviations, kind="stable")
    return variance, _median(deviations[order], counts[order])


def _median(values: NDArray[np.float64], counts: NDArray[np.intp]) -> float:
    """Returns the median of ascending `values`, each of which occurs `counts` times."""
    occurred = np.cumsum(counts)
    total = int(occurred[-1])
    lower, upper = values[np.searchsorted(occurred, [(total - 1) // 2, total // 2], side="right")]
    return float(lower + upper) / 2


def batch_properties(images: Iterable[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Returns `(N, 7)` float32, a row of `image_properties` for each `(H, W, 3)` uint8 RGB image, in order."""
    rows = [image_properties(image) for image in images]
    return np.stack(rows) if rows else np.empty((0, len(PROPERTY_NAMES)), dtype=np.float32)
