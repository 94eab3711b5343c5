"""Rows of images as shards: what a network answers, in batches of the same rows whoever computes them.

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
"""Other machines answer by a network from this much work on: each needs 4 to 7 s to load TensorFlow and the network."""


class ImageRows(Protocol):
    """`(N, H, W, 3)` uint8 RGB, in memory or on the disk: a number, a slice or an array of rows reads them."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> NDArray[np.uint8]: ...


def batch_slices(count: int, size: int = BATCH_ROWS) -> Iterator[slice]:
    """Yields where the batches of so many rows lie: `size` in each, in the last one fewer or one more.

    A last row by itself belongs to the batch before, as TensorFlow may round a batch of one row by the number of its
    threads. No rows are one batch without any.
    """
    starts = range(0, max(1, count - 1), size)
    return (slice(start, stop) for start, stop in zip(starts, [*starts[1:], count], strict=True))


@dataclass(frozen=True, eq=False)
class RowShard:
    """Some images of a split, by their rows: a shard.

    Attributes:
        pixels: of the split, which pickle takes by the names of its files.
        rows: of the images, ascending.
    """

    pixels: ImageRows
    rows: NDArray[np.intp]

    @property
    def name(self) -> str:
        """Returns its first and its last row, for the log."""
        return f"rows {self.rows[0]} to {self.rows[-1]}" if len(self.rows) else "no rows"

    @property
    def images(self) -> int:
        """Returns how many images it has."""
        return len(self.rows)

    def batches(self, size: int = BATCH_ROWS) -> Iterator[NDArray[np.uint8]]:
        """Yields `(n, H, W, 3)` uint8, as `batch_slices` says."""
        for batch in batch_slices(len(self.rows), size):
            rows = self.rows[batch]
            is_run = len(rows) and rows[-1] - rows[0] == len(rows) - 1
            yield np.asarray(self.pixels[rows[0] : rows[-1] + 1] if is_run else self.pixels[rows])  # A view, if it can.


def row_shards(pixels: ImageRows, rows: NDArray[np.intp] | None = None) -> Iterator[RowShard]:
    """Yields shards of the images at `rows`, ascending, or of all; at least one, which may be empty."""
    rows = np.arange(len(pixels)) if rows is None else rows
    return (RowShard(pixels, rows[part]) for part in batch_slices(len(rows), _SHARD_ROWS))


@dataclass(frozen=True)
class Device:
    """Where a network computes: as in the process that gives out the shards, as another device rounds otherwise."""

    is_gpu: bool

    @classmethod
    def here(cls) -> Device:
        """Returns what this process computes on."""
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
