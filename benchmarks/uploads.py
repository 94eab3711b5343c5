"""Real images as users send them: 320×240 JPEG files made from what scikit-learn ships, so nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

WIDTH_PX, HEIGHT_PX = 320, 240
JPEG_QUALITY = 90


def write_uploads(kind: str, folder: Path, *, count: int, seed: int) -> list[Path]:
    """Writes `count` different JPEG files of 320×240 px and returns their paths.

    Args:
        kind: `photos` (seeded crops of scikit-learn's two photographs) or `digits` (its 8×8 scans, enlarged).
        folder: where they go; it is made.
        count: how many.
        seed: of the choice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"photos": _photos, "digits": _digits}[kind](count, np.random.default_rng(seed))
    paths = []
    for index, picture in enumerate(pictures):
        path = folder / f"{kind}-{index:03d}.jpg"
        if not cv2.imwrite(str(path), picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]):
            raise OSError(f"Expected OpenCV to write {path}. Received: a refusal.")
        paths.append(path)
    return paths


def _photos(count: int, generator: np.random.Generator) -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    crops = []
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        top = int(generator.integers(0, photograph.shape[0] - HEIGHT_PX + 1))
        left = int(generator.integers(0, photograph.shape[1] - WIDTH_PX + 1))
        crops.append(photograph[top : top + HEIGHT_PX, left : left + WIDTH_PX])
    return crops


def _digits(count: int, generator: np.random.Generator) -> list[np.ndarray]:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    scans = bunch.images
    chosen = generator.choice(len(scans), size=count, replace=False)
    grey = (scans[chosen] * 255 / 16).round().astype(np.uint8)
    enlarged = [cv2.resize(scan, (WIDTH_PX, HEIGHT_PX), interpolation=cv2.INTER_CUBIC) for scan in grey]
    return [np.repeat(scan[:, :, None], 3, axis=2) for scan in enlarged]
