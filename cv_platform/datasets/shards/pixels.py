"""From an image file to its packed pixels: the work of the processes that decode.

Imports little, as every one of them does it anew.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from cv_platform import images
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
    framing: images.Framing = "stretch"
    """How images of other proportions come to it."""

    @property
    def preprocessing_hash(self) -> str:
        """See `images.preprocessing_hash`."""
        return images.preprocessing_hash(self.image_size, framing=self.framing)

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
    return images.preprocess(data, form.image_size, max_pixels=images.MAX_LOCAL_PIXELS, framing=form.framing)


@dataclass(frozen=True)
class Piece:
    """Some consecutive rows of one shard: what one process makes at a time."""

    source: Path
    """What the paths are relative to."""
    paths: tuple[str, ...]
    sha256: tuple[str, ...]
    form: PackForm
    encoding: Encoding
    file: Path
    """The shard."""
    offset: int
    """Where uint8 rows lie in it, in bytes; JPEGs lie where those before them end."""


def make_piece(piece: Piece) -> list[bytes]:
    """Writes the rows of a uint8 piece into its shard, or returns those of a JPEG piece.

    Raises:
        InvalidDatasetError: a file is not the one that the manifest describes.
        OSError: the shard cannot be written.
    """
    rows = [_row(piece, path, sha256) for path, sha256 in zip(piece.paths, piece.sha256, strict=True)]
    if piece.encoding == "jpeg":
        return [simplejpeg.encode_jpeg(row, JPEG_QUALITY, "RGB", "444") for row in rows]
    # Written, not mapped: a full disk is then an error, where a memory map would be a SIGBUS.
    handle = os.open(piece.file, os.O_WRONLY)
    try:
        left, at = memoryview(b"".join(row.data for row in rows)), piece.offset
        while left:
            written = os.pwrite(handle, left, at)
            left, at = left[written:], at + written
    finally:
        os.close(handle)
    return []


def _row(piece: Piece, path: str, sha256: str) -> NDArray[np.uint8]:
    try:
        data = (piece.source / path).read_bytes()
    except OSError as err:
        raise InvalidDatasetError(f"Expected {path}. Received: {err}. Materialise the dataset again.") from err
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InvalidDatasetError(
            f"Expected {path} in {piece.source} as the manifest describes it. Received: other bytes. "
            "Materialise the dataset again."
        )
    try:
        return np.ascontiguousarray(packed_pixels(data, piece.form))
    except ImageError as err:
        raise InvalidDatasetError(f"Expected a readable image at {path}. Received: {err}") from err
