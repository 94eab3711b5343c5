"""From an image file to its packed pixels: the work of the processes that decode.

Imports little, as every one of them does it anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from cv_platform import images
from cv_platform.datasets.origins import Files
from cv_platform.errors import ImageError, InvalidDatasetError

JPEG_QUALITY = 90
Encoding = Literal["uint8", "jpeg"]


@dataclass(frozen=True)
class PackForm:
    """All that decides which pixels a decoded image becomes, besides the policy of `images`.

    A field that is added here changes the pack's key by `packing.pack_images`.
    """

    image_size: tuple[int, int]
    """(height, width) of what is packed, in pixels."""
    preprocessing: images.Preprocessing = images.LATEST
    """How they are made of a file."""

    @property
    def preprocessing_hash(self) -> str:
        """See `images.preprocessing_hash`."""
        return images.preprocessing_hash(self.image_size, self.preprocessing)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of a packed image."""
        return (*self.image_size, 3)

    @property
    def bytes(self) -> int:
        """Of one image as uint8."""
        return self.image_size[0] * self.image_size[1] * 3


def packed_pixels(data: bytes, form: PackForm) -> NDArray[np.uint8]:
    """Turns an image file's bytes into what a pack holds of it: `form.shape` uint8, RGB, 0–255.

    Raises:
        ImageError: see `images.read_image`; the size was judged by the manifest, by the config's limit.
    """
    limit = images.MAX_LOCAL_PIXELS
    return images.preprocess(data, form.image_size, max_pixels=limit, preprocessing=form.preprocessing)


def stored(pixels: NDArray[np.uint8], encoding: Encoding) -> bytes | memoryview:
    """Returns what a shard holds of an image's pixels."""
    return simplejpeg.encode_jpeg(pixels, JPEG_QUALITY, "RGB", "444") if encoding == "jpeg" else pixels.data


def read_pixels(files: Files, sha256: Sequence[str], form: PackForm) -> Iterator[NDArray[np.uint8]]:
    """Yields `form.shape` uint8, RGB, 0–255, of each image file.

    Raises:
        InvalidDatasetError: a file is not the one that the manifest describes, or does not decode.
        StorageError: see `Files`.
    """
    for path, data in files.described(sha256):
        try:
            pixels = np.ascontiguousarray(packed_pixels(data, form))
        except ImageError as err:
            raise InvalidDatasetError(f"Expected a readable image at {path}. Received: {err}") from err
        yield pixels
