"""A packed split of the tiny model, in memory."""

from __future__ import annotations

import numpy as np

from cv_platform.datasets.packing import PackedSplit
from cv_platform_tests.support.tiny_models import CLASS_NAMES, tiny_images

VERSION = "20260131T060000Z-1f3c9a2e"


def make_split(count: int, *, multi_label: bool = False) -> PackedSplit:
    rng = np.random.default_rng(5)
    targets = rng.integers(0, len(CLASS_NAMES), count)
    if multi_label:
        targets = rng.integers(0, 2, (count, len(CLASS_NAMES))).astype(np.float32)
    return PackedSplit(
        images=tiny_images(count, seed=3),
        targets=targets,
        paths=[f"reference/{i:03}.png" for i in range(count)],
        sha256=[f"{i:064x}" for i in range(count)],
    )
