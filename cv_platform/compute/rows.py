"""Rows of images as shards: what a network answers, in batches at the same positions whoever computes them.

TensorFlow uses all cores of a machine by itself (1.9 times as fast on two as on one), so that processes beside this one
gain nothing: only other machines are asked, those of a Ray cluster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cv_platform.compute.engine import Engine
from cv_platform.compute.local import LocalEngine

BATCH_ROWS = 256
_SHARD_ROWS = 4 * BATCH_ROWS
WORTH_SECONDS = 24.0
"""Of a network's answers, from which other machines are asked: each needs 4 to 7 s to load TensorFlow and it."""


class ImageRows(Protocol):
    """`(N, H, W, 3)` uint8 RGB, in memory or on the disk: a number, a slice or an array of rows reads them."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> NDArray[np.uint8]: ...


@dataclass(frozen=True, eq=False)
class Rows:
    """Some images of a split: a shard.

    Attributes:
        pixels: of the split, which pickle takes by the names of its files.
        rows: of the images, ascending.
    """

    pixels: ImageRows
    rows: NDArray[np.intp]

    @property
    def name(self) -> str:
        """Its first and its last row."""
        return f"rows {self.rows[0]} to {self.rows[-1]}" if len(self.rows) else "no rows"

    @property
    def images(self) -> int:
        """How many it has."""
        return len(self.rows)

    def batches(self, size: int = BATCH_ROWS) -> Iterator[NDArray[np.uint8]]:
        """Yields `(n, H, W, 3)` uint8, of no rows one without images."""
        for start in range(0, max(1, len(self.rows)), size):
            rows = self.rows[start : start + size]
            is_run = len(rows) and rows[-1] - rows[0] == len(rows) - 1
            yield np.asarray(self.pixels[rows[0] : rows[-1] + 1] if is_run else self.pixels[rows])  # A view, if it can.


def row_shards(pixels: ImageRows, rows: NDArray[np.intp] | None = None) -> Iterator[Rows]:
    """Yields shards of the images at `rows`, ascending, or of all; at least one, which may be empty."""
    rows = np.arange(len(pixels)) if rows is None else rows
    for start in range(0, max(1, len(rows)), _SHARD_ROWS):
        yield Rows(pixels, rows[start : start + _SHARD_ROWS])


@dataclass(frozen=True)
class Device:
    """Where a network computes: as in the process that gives out the shards, as another device rounds otherwise."""

    is_gpu: bool

    @classmethod
    def here(cls) -> Device:
        """Returns this process's."""
        import tensorflow as tf

        return cls(bool(tf.config.list_physical_devices("GPU")))

    def alone_seconds(self, engine: Engine | None) -> float:
        """Returns how much work this process does before it asks an engine: all, but with Ray and without a GPU."""
        is_here = engine is None or isinstance(engine, LocalEngine)
        return math.inf if is_here or self.is_gpu else WORTH_SECONDS

    def use(self) -> None:
        """Hides the GPUs of a worker from TensorFlow where this is none; call it before the first network is loaded."""
        import tensorflow as tf

        if not self.is_gpu and tf.config.list_physical_devices("GPU"):
            tf.config.set_visible_devices([], "GPU")
