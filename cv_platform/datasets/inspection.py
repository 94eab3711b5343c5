"""What the bytes of an image file say: a row of the manifest before it is known where it belongs."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cv_platform import images
from cv_platform.datasets.near_copies import OVERVIEW_PX, THUMBNAIL_PX, thumbnail
from cv_platform.errors import EmptyImageError, ImageError, ImageTooLargeError
from cv_platform.files import file_sha256
from cv_platform.images.files import has_more_pictures

_FEW_LEVELS = 64
"""A quarter of the 256 that 8 bits have, which is all that 14-bit data in 16 bits come to."""
_EVEN_LEVELS = 8
"""An image whose thumbnail differs by more is not of one colour; another may be, which all of its pixels say."""
_FORMATS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
}


@dataclass(frozen=True, slots=True)
class Inspected:
    """One file: columns of the manifest, see `manifest.build_manifest`; `problem_kind` is one of quarantine's kinds."""

    sha256: str
    bytes: int
    width_px: int = 0
    height_px: int = 0
    format: str | None = None
    channels: int | None = None
    bit_depth: int | None = None
    orientation: int | None = None
    problem: str | None = None
    problem_kind: str | None = None
    damage: str | None = None
    animated: str | None = None
    constant: str | None = None
    largest_sample: int | None = None
    narrow_range: str | None = None
    clipped: str | None = None
    wrong_suffix: str | None = None
    thumbnail: bytes | None = None
    overview: NDArray[np.uint8] | None = None
    """`(32, 32, 3)`, of which the properties are taken."""


def inspect_file(name: str, data: bytes, max_pixels: int, sample_bits: int | None = None) -> Inspected:
    """Describes one file; one that does not decode is described by its problem.

    Args:
        name: of the file, for its suffix.
        data: its bytes.
        max_pixels: above which it is not decoded.
        sample_bits: see `images.Preprocessing`.
    """
    sha256, made = hashlib.sha256(data).hexdigest(), images.Preprocessing(sample_bits=sample_bits)
    try:
        image = images.read_image(data, max_pixels=max_pixels, preprocessing=made, overview_px=OVERVIEW_PX)
        small = images.resize(image.pixels, (THUMBNAIL_PX, THUMBNAIL_PX))
        levels = thumbnail(small)
        is_even = bool(levels.max() - levels.min() <= _EVEN_LEVELS)
        if is_even and image.pixels.shape[:2] != (image.height_px, image.width_px):
            image = images.read_image(data, max_pixels=max_pixels, preprocessing=made)
    except ImageError as err:
        image_format, height_px, width_px = _header(data)
        problem = f"{type(err).__name__}: {err}"
        return Inspected(
            sha256, len(data), width_px, height_px, image_format, problem=problem, problem_kind=_kind_of(err)
        )
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122
    return Inspected(
        sha256,
        len(data),
        image.width_px,
        image.height_px,
        image.format,
        image.channels,
        image.bit_depth,
        image.orientation,
        damage=image.damage,
        animated=f"a {image.format} of several pictures, of which the first counts"
        if has_more_pictures(data, image.format)
        else None,
        wrong_suffix=f"a {image.format} that is called {suffix}"
        if _FORMATS.get(suffix, image.format) != image.format
        else None,
        constant=_constant(image) if is_even else None,
        largest_sample=image.sample_range and image.sample_range[1],
        narrow_range=_narrow_range(image) if sample_bits is None else None,
        clipped=None if sample_bits is None else _clipped(image, sample_bits),
        thumbnail=levels.tobytes(),
        overview=small,
    )


def describe_undecoded(path: Path, why: str) -> Inspected:
    """Describes a file by its bytes alone, and by the problem that nobody can decode it."""
    problem = f"UnsupportedImageError: Expected an image that can be decoded. Received: one that {why}. Save it anew."
    return Inspected(file_sha256(path), path.stat().st_size, problem=problem, problem_kind="unreadable")


def _header(data: bytes) -> tuple[str | None, int, int]:
    """Returns the format and the sides that a header promises, as far as one can be read."""
    try:
        return images.read_size(data, max_pixels=images.MAX_LOCAL_PIXELS)
    except ImageError:
        return None, 0, 0


def _constant(image: images.DecodedImage) -> str | None:
    first = image.pixels[0, 0]
    return f"all of it is RGB {tuple(map(int, first))}" if bool((image.pixels == first).all()) else None


def _narrow_range(image: images.DecodedImage) -> str | None:
    if image.sample_range is None:
        return None
    smallest, largest = image.sample_range
    levels = (largest >> 8) - (smallest >> 8) + 1
    if levels > _FEW_LEVELS:
        return None
    return f"{image.bit_depth}-bit samples from {smallest} to {largest}: {levels} of 256 levels are seen"


def _clipped(image: images.DecodedImage, sample_bits: int) -> str | None:
    if image.sample_range is None or image.sample_range[1] < 2**sample_bits:
        return None
    return f"samples up to {image.sample_range[1]}, where model.sample_bits: {sample_bits} ends at {2**sample_bits - 1}"


def _kind_of(err: ImageError) -> str:
    if isinstance(err, EmptyImageError):
        return "zero_size"
    return "absurd_size" if isinstance(err, ImageTooLargeError) else "unreadable"
