"""Small pictures in files, each of seeded noise."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np


def picture(seed: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """Returns a PNG of seeded noise, `size` = (height, width)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    encoded, png = cv2.imencode(".png", pixels)
    assert encoded
    return png.tobytes()


def write_pictures(root: Path, names: Iterable[str], *, first_seed: int = 0) -> Path:
    """Writes a different picture at each relative path."""
    for seed, name in enumerate(names, start=first_seed):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(seed))
    return root


def class_folders(root: Path, per_class: int = 10, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    return write_pictures(root, [f"{name}/{i}.png" for name in classes for i in range(per_class)])
