"""Seven pixel statistics of an image, shared by validation, the request log and drift detection.

They are always computed on the preprocessed uint8 image (the very array that the model sees), so that a training row,
a reference row and a logged request are comparable. Which seven, and why: they see noise, blur, brightness, contrast
and colour shifts that embeddings miss (Rabanser et al. 2019, "Failing Loudly", section 4, uses comparable shifts).
"""

from __future__ import annotations

import math
from bisect import bisect_right
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
_LEVELS = 2 * _LAPLACIAN_MAX + 1
_MOMENTS = np.array([(level, level**2) for level in range(-_LAPLACIAN_MAX, _LAPLACIAN_MAX + 1)], dtype=np.float64).T
"""`(2, _LEVELS)`: each number that a Laplacian may have, and its square."""


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
    laplacian_variance, laplacian_mad = _spread(luma)
    channels = cv2.split(image)
    red, green, blue = (cv2.mean(channel)[0] for channel in channels)
    high, low = (pick(pick(channels[0], channels[1]), channels[2]) for pick in (cv2.max, cv2.min))
    return np.array(
        [
            luma_mean,
            luma_std,
            math.log1p(laplacian_variance),
            math.log1p(laplacian_mad),
            red - green,
            blue - (red + green) / 2,
            cv2.mean(cv2.subtract(high, low))[0],
        ],
        dtype=np.float32,
    )


def _spread(luma: NDArray[np.uint8] | cv2.typing.MatLike) -> tuple[float, float]:
    """Returns variance and median absolute deviation of the Laplacian of `(H, W)` uint8 grey levels, exactly.

    It has whole numbers within ±4·255, so counting them once takes the place of sorting the pixels twice.
    """
    shifted = np.asarray(cv2.Laplacian(luma, cv2.CV_16S, delta=_LAPLACIAN_MAX), dtype=np.int16).view(np.uint16)
    counts = cv2.calcHist([shifted], [0], None, [_LEVELS], [0, _LEVELS]).ravel().astype(np.float64)
    size = luma.size
    total, squares = (int(moment) for moment in _MOMENTS @ counts)  # Whole numbers, so that no processor rounds them.
    occurred = counts.cumsum()
    middle = (size - 1) // 2, size // 2
    lower, upper = (bisect_right(occurred, rank) for rank in middle)
    below, above = (lower + upper) // 2, (lower + upper + 1) // 2  # The median, or the numbers that it lies between.

    def within(steps: int) -> float:
        beyond = below - steps - 1
        return occurred[min(above + steps, _LEVELS - 1)] - (occurred[beyond] if beyond >= 0 else 0.0)

    near, far = (bisect_right(range(_LEVELS), rank, key=within) for rank in middle)
    return (squares * size - total**2) / size**2, (near + far + above - below) / 2


def batch_properties(images: Iterable[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Returns `(N, 7)` float32, a row of `image_properties` for each `(H, W, 3)` uint8 RGB image, in order."""
    rows = [image_properties(image) for image in images]
    return np.stack(rows) if rows else np.empty((0, len(PROPERTY_NAMES)), dtype=np.float32)


def stacked_properties(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Returns what `batch_properties` does of `(N, H, W, 3)` uint8 RGB images of 2 px or more: at 32 px much faster."""
    count, height, width, _ = images.shape
    luma = np.asarray(cv2.cvtColor(images.reshape(-1, width, 3), cv2.COLOR_RGB2GRAY)).reshape(count, height, width)
    levels = np.pad(luma, ((0, 0), (1, 1), (1, 1)), mode="reflect").astype(np.int16)
    around = levels[:, :-2, 1:-1] + levels[:, 2:, 1:-1] + levels[:, 1:-1, :-2] + levels[:, 1:-1, 2:]
    laplacian = (around - 4 * levels[:, 1:-1, 1:-1]).reshape(count, -1)
    deviations = np.abs(laplacian - np.median(laplacian, axis=1, keepdims=True))
    channels = [np.ascontiguousarray(images[..., at]).reshape(count, -1) for at in range(3)]
    red, green, blue = (channel.mean(axis=1) for channel in channels)
    high, low = np.maximum.reduce(channels), np.minimum.reduce(channels)
    flat = luma.reshape(count, -1)
    columns = [
        flat.mean(axis=1),
        flat.std(axis=1),
        np.log1p(laplacian.var(axis=1)),
        np.log1p(np.median(deviations, axis=1)),
        red - green,
        blue - (red + green) / 2,
        (high - low).mean(axis=1),
    ]
    return np.stack(columns, axis=1).astype(np.float32)
