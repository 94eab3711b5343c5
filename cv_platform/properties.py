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
    laplacian_variance, laplacian_mad = _spread(luma)
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


def _spread(luma: NDArray[np.uint8] | cv2.typing.MatLike) -> tuple[float, float]:
    """Returns variance and median absolute deviation of the Laplacian of `(H, W)` uint8 grey levels, exactly.

    It has whole numbers within ±4·255, so counting them once takes the place of sorting the pixels twice.
    """
    shifted = np.asarray(cv2.Laplacian(luma, cv2.CV_16S, delta=_LAPLACIAN_MAX), dtype=np.int16).view(np.uint16)
    levels = len(_LAPLACIANS)
    counts = cv2.calcHist([shifted], [0], None, [levels], [0, levels]).ravel().astype(np.float64)
    mean = float(counts @ _LAPLACIANS) / luma.size
    variance = float(counts @ (_LAPLACIANS - mean) ** 2) / luma.size
    # Twice the median, which may lie between two numbers; as often as each number below it, that above it deviates.
    twice = sum(_middle(counts))
    at = twice // 2
    deviations = np.zeros(levels + 1)
    deviations[: at + 1] = counts[at::-1]
    above, first = counts[at + 1 :], 1 - twice % 2
    deviations[first : first + len(above)] += above
    return variance, sum(_middle(deviations)) / 2 + (twice % 2) / 2


def _middle(counts: NDArray[np.float64]) -> tuple[int, int]:
    """Returns where the two middle ones are of things that are counted in order; twice the same, if they are odd."""
    occurred = counts.cumsum()
    total = int(occurred[-1])
    lower, upper = occurred.searchsorted([(total - 1) // 2, total // 2], side="right")
    return int(lower), int(upper)


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
