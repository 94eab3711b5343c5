"""Image files whose pixels are read by who goes through them: what processes that embed are given.

Imports little, as each of them does it anew.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cv_platform.errors import ImageError, InvalidDatasetError
from cv_platform.images import MAX_LOCAL_PIXELS, Preprocessing, preprocess

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFiles:
    """Some files of a checkout, each of which has to be the one that the manifest describes.

    Going through them gives `(side_px, side_px, 3)` uint8 RGB of each, or None where it does not decode.

    Raises:
        InvalidDatasetError: (while they are read) a file has other bytes.
        OSError: it is gone.
    """

    directory: Path
    paths: tuple[str, ...]
    sha256: tuple[str, ...]
    side_px: int
    sample_bits: int | None = None

    def __iter__(self) -> Iterator[NDArray[np.uint8] | None]:
        size, made = (self.side_px, self.side_px), Preprocessing(sample_bits=self.sample_bits)
        for path, sha256 in zip(self.paths, self.sha256, strict=True):
            data = (self.directory / path).read_bytes()
            if hashlib.sha256(data).hexdigest() != sha256:
                raise InvalidDatasetError(
                    f"Expected {path} in {self.directory} as the manifest describes it. Received: other bytes. "
                    "Materialise the dataset again."
                )
            try:
                yield preprocess(data, size, max_pixels=MAX_LOCAL_PIXELS, preprocessing=made)
            except ImageError as err:
                logger.warning("%s has no embedding: %s", path, err)
                yield None
