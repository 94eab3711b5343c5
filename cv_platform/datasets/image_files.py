"""Image files whose pixels are read by who goes through them: what processes that embed are given.

Imports little, as each of them does it anew.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cv_platform.datasets.origins import Files
from cv_platform.errors import ImageError
from cv_platform.images import MAX_LOCAL_PIXELS, Preprocessing, preprocess

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFiles:
    """Some files of a checkout, each of which has to be the one that the manifest describes.

    Going through them gives `(side_px, side_px, 3)` uint8 RGB of each, or None where it does not decode.

    Raises:
        InvalidDatasetError, StorageError: (while they are read) see `Files.described`.
    """

    files: Files
    sha256: tuple[str, ...]
    side_px: int
    sample_bits: int | None = None

    def __iter__(self) -> Iterator[NDArray[np.uint8] | None]:
        size, made = (self.side_px, self.side_px), Preprocessing(sample_bits=self.sample_bits)
        for path, data in self.files.described(self.sha256):
            try:
                yield preprocess(data, size, max_pixels=MAX_LOCAL_PIXELS, preprocessing=made)
            except ImageError as err:
                logger.warning("%s has no embedding: %s", path, err)
                yield None
