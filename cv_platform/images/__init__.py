"""From uploaded or stored bytes to the uint8 RGB array that every model sees: the one preprocessing there is.

Training (through packed pixels), reference data and serving all call `preprocess`, so they cannot differ. The policy:

* JPEG, PNG, WebP, BMP, TIFF (no fax pages) and GIF (first frame); anything else is refused.
* The size is read from the header and judged before a pixel is decoded; so is what else makes a small file costly: the
  number of its chunks, segments, blocks and scans, the size of its tiles, and a compression whose decoder goes on after
  every damaged row. Of a PNG, only what its first picture is made of is read; compressed data past the picture's last
  row are not inflated.
* Channels are RGB; grey becomes three equal channels; 16-bit samples become their upper 8 bits, or, where
  `model.sample_bits` says that they use fewer, the upper 8 of those: see `Preprocessing`.
* What is transparent lies on white, as in a browser (up to version 2, alpha was dropped).
* Above `MAX_PIXELS`, which only local files may have, sides are shortened to a half, a quarter or an eighth while
  decoding, so that memory stays bounded (up to version 2, they were not). It depends on the file alone.
* A damaged JPEG counts as long as its decoder goes on, one without the two bytes at its end when every row decodes.
* EXIF orientation is applied, so that an image is seen the way a person sees it.
* Resizing is by `INTER_AREA` when both sides shrink, by `INTER_LINEAR` otherwise. `model.resize` says what becomes of
  other proportions than the input's: see `Framing`.

`PREPROCESSING_VERSION` rises with every change that alters a pixel; `preprocessing_hash` carries it into caches,
bundles and reference data, so that rows made under different policies are never mixed. Models of an earlier version in
`KNOWN_VERSIONS` go on being served with its pixels; training takes the latest.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import struct
import threading
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from cv_platform.errors import EmptyImageError, ImageTooLargeError, TruncatedImageError, UnsupportedImageError
from cv_platform.images.decoders import (
    DAMAGES,
    OTHER_BREAKS,
    decode_jpeg,
    decode_sound_jpeg,
    decode_with_opencv,
    decode_with_pillow,
)
from cv_platform.images.files import (
    SUPPORTED_FORMATS,
    TILE_LENGTH,
    TILE_WIDTH,
    GifStream,
    essential_png,
    format_by_signature,
    plain_jpeg_header,
    refuse_costly_jpeg,
    refuse_costly_png,
    refuse_patient_tiff,
    refuse_truncated,
    tiff_tags,
)

if TYPE_CHECKING:  # Each process that decodes imports this module, and has no need of pydantic.
    from cv_platform.config import ModelConfig

PREPROCESSING_VERSION = 3
KNOWN_VERSIONS = (2, 3)
MAX_PIXELS = 40_000_000
"""Default limit: 40 megapixels decode to 120 MB. What has more, and is allowed to, is decoded to fewer."""
MAX_LOCAL_PIXELS = 2**30
"""The most that a limit for local files may be."""
MAX_SIDE_PX = 65_535
"""What a JPEG can have at most; longer sides are only met in attacks, and every row costs."""

Framing = Literal["stretch", "crop", "pad"]
"""What becomes of an image with other proportions than the model's input.

stretch: its proportions change. crop: they stay, and what is too long is cut off at both ends. pad: they stay, and grey
fills what is left at two sides.
"""
FRAMINGS: tuple[Framing, ...] = ("stretch", "crop", "pad")
SAMPLE_BITS = range(9, 16)
"""What `model.sample_bits` may be, but for 16, which is what is taken without it."""
PADDING_GREY = 127
"""Half of white, which networks take for nothing."""

_BITS_PER_SAMPLE = 258
"""The tag of a TIFF."""
_one_large_image = threading.Lock()
"""Above `MAX_PIXELS`, a decoder may need gigabytes: one at a time."""
# What Pillow would log, as on stderr, of a file that it refuses; the exceptions say it.
logging.getLogger("PIL").setLevel(logging.CRITICAL)
Image.MAX_IMAGE_PIXELS = None  # Pillow would refuse from 179 megapixels on; `_judge` has a limit of ours.


@dataclass(frozen=True)
class DecodedImage:
    """An image as models see it, but for the size.

    Attributes:
        format: one of `SUPPORTED_FORMATS`.
        pixels: `(H, W, 3)` uint8, RGB, upright.
        height_px: of the upright image; `pixels` has less where it was reduced.
        width_px: as `height_px`.
        bit_depth: of the file's samples, 1 to 16.
        sample_range: the smallest and the largest sample of a file of more than 8 bits, see
            `decoders.decode_with_pillow`; None of other files.
        damage: what the decoder went on after; None if nothing.
        channels: of the file: 1 grey, 2 grey and alpha, 3 RGB (or a palette), 4 RGB and alpha or CMYK.
        orientation: of EXIF, 1 to 8, that `pixels` were turned by; 1 where there is none.
    """

    format: str
    pixels: NDArray[np.uint8]
    height_px: int
    width_px: int
    bit_depth: int
    sample_range: tuple[int, int] | None
    damage: str | None
    channels: int
    orientation: int


@dataclass(frozen=True)
class Preprocessing:
    """What decides the pixels that a model sees of a file, but for their number.

    Attributes:
        version: one of `KNOWN_VERSIONS`.
        framing: see `Framing`.
        sample_bits: those that samples of files of more than 8 bits use, 9 to 15: their range becomes 0 to 255, and
            larger values 255; alpha keeps the file's range. None: 16.
    """

    version: int = PREPROCESSING_VERSION
    framing: Framing = "stretch"
    sample_bits: int | None = None

    @classmethod
    def of(cls, model: ModelConfig) -> Self:
        """Returns what a config asks for."""
        return cls(framing=model.resize, sample_bits=model.sample_bits)


LATEST = Preprocessing()


def preprocessing_hash(image_size: tuple[int, int], preprocessing: Preprocessing = LATEST) -> str:
    """Returns 16 hex digits that change whenever `preprocess` would give other pixels for `image_size` (h, w)."""
    policy: dict[str, object] = {
        "version": preprocessing.version,
        "height_px": image_size[0],
        "width_px": image_size[1],
    }
    # What there was before there was a choice keeps its hash.
    if preprocessing.framing != "stretch":
        policy["framing"] = preprocessing.framing
    if preprocessing.sample_bits is not None:
        policy["sample_bits"] = preprocessing.sample_bits
    return hashlib.sha256(json.dumps(policy, sort_keys=True).encode()).hexdigest()[:16]


def find_preprocessing(known_hash: str, image_size: tuple[int, int]) -> Preprocessing | None:
    """Returns that whose `preprocessing_hash` for `image_size` is `known_hash`; None: not one of ours."""
    choices = itertools.product((None, *SAMPLE_BITS), KNOWN_VERSIONS, FRAMINGS)
    known = (Preprocessing(version, framing, bits) for bits, version, framing in choices)
    return next((one for one in known if preprocessing_hash(image_size, one) == known_hash), None)


def read_size(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[str, int, int]:
    """Reads `(format, height_px, width_px)` from an image's header, decoding no pixel.

    Raises:
        EmptyImageError: there are no bytes.
        TruncatedImageError: the bytes begin as one, but the header is cut off or damaged.
        UnsupportedImageError: the bytes are not an image of a supported format, or one in so many parts (PNG chunks,
            JPEG segments or scans, GIF blocks) that it can only be an attack, or a TIFF compressed as fax pages are.
        ImageTooLargeError: the header promises more than `max_pixels`, in the image or in its tiles, or a side of more
            than `MAX_SIDE_PX`.
    """
    with _open(data) as picture:
        return _judge(picture, data, max_pixels)


def count_decoded_pixels(data: bytes, *, max_pixels: int = MAX_PIXELS) -> int:
    """Counts, by its header, the pixels that decoding an image makes: of a tiled TIFF those of whole tiles.

    Raises:
        ImageError: see `read_size`.
    """
    if (plain := _plain_jpeg(data, max_pixels)) is not None:
        return plain[0] * plain[1]
    with _open(data) as picture:
        _, height_px, width_px = _judge(picture, data, max_pixels)
        is_tiff = isinstance(picture, TiffImageFile)
        return _count_tiled_pixels(picture, tiff_tags(data, picture.tag_v2.offset)) if is_tiff else height_px * width_px


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, preprocessing: Preprocessing = LATEST) -> NDArray[np.uint8]:
    """Decodes an image to `(H, W, 3)` uint8, RGB, upright; see `read_image`."""
    return read_image(data, max_pixels=max_pixels, preprocessing=preprocessing).pixels


def read_image(
    data: bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    preprocessing: Preprocessing = LATEST,
    overview_px: int | None = None,
) -> DecodedImage:
    """Decodes an image, and tells what else is known of it; nothing is written to stderr.

    Args:
        data: the file's bytes.
        max_pixels: the largest height × width accepted; judged on the header.
        preprocessing: that which a model was trained on; its framing is left to `resize`.
        overview_px: None, or what both sides have at least in an overview: of a JPEG, sides of a half, a quarter or an
            eighth, which leaves much of the decoding undone and finds the same damage.

    Raises:
        EmptyImageError, UnsupportedImageError, ImageTooLargeError: see `read_size`.
        TruncatedImageError: the data end before the image does, or were damaged where the format can tell.
    """
    version, sample_bits = preprocessing.version, preprocessing.sample_bits
    if version not in KNOWN_VERSIONS:
        raise ValueError(f"Expected one of the versions {KNOWN_VERSIONS}. Received: {version}.")
    if (plain := _read_plain_jpeg(data, max_pixels, overview_px)) is not None:
        return plain
    with _open(data) as picture:
        image_format, height_px, width_px = _judge(picture, data, max_pixels)
        refuse_truncated(data, image_format)
        bits, channels, orientation = _bit_depth(picture, data), _channels(picture), _orientation(picture)
        is_large = height_px * width_px > MAX_PIXELS
        reduction = 1
        while version > 2 and reduction < 8 and height_px * width_px > MAX_PIXELS * reduction**2:
            reduction *= 2
        if image_format == "JPEG":
            reduction = max(reduction, _overview_reduction(height_px, width_px, overview_px))
        with _one_large_image if is_large else nullcontext():
            found = decode_jpeg(picture, data, reduction=reduction) if image_format == "JPEG" else None
            sample_range = None
            if found is None:
                pixels, sample_range = _decode(picture, data, bits, reduction, sample_bits, keeps_alpha=version > 2)
                found = pixels, None
            pixels, damage = found
    reduced = (-(-height_px // reduction), -(-width_px // reduction))
    if pixels.shape[:2] != reduced or (reduced[0] == reduced[1] and orientation > 4):
        height_px, width_px = width_px, height_px
    return DecodedImage(image_format, pixels, height_px, width_px, bits, sample_range, damage, channels, orientation)


def _overview_reduction(height_px: int, width_px: int, least_px: int | None) -> int:
    """Returns by how much sides are shortened that still have `least_px` afterwards: 2, 4 or 8; else, or of None, 1."""
    return next((by for by in (8, 4, 2) if least_px is not None and min(height_px, width_px) >= by * least_px), 1)


def _plain_jpeg(data: bytes, max_pixels: int) -> tuple[int, int, int, int] | None:
    """Reads a JPEG's header, where it is a plain one, without Pillow, which would say the same and take longer.

    Returns:
        What `plain_jpeg_header` does. None: it is another file, or there is something to say of its size.

    Raises:
        UnsupportedImageError: it has too many segments or scans.
    """
    if not data.startswith(b"\xff\xd8\xff") or (header := plain_jpeg_header(data)) is None:
        return None
    height_px, width_px, _, scan_at = header
    if not 1 <= height_px * width_px <= min(max_pixels, MAX_PIXELS) or max(height_px, width_px) > MAX_SIDE_PX:
        return None
    refuse_costly_jpeg(data, scan_at)
    return header


def _read_plain_jpeg(data: bytes, max_pixels: int, overview_px: int | None) -> DecodedImage | None:
    """Reads a whole JPEG of a plain header; None: it is another file, or there is something to say of it."""
    if (header := _plain_jpeg(data, max_pixels)) is None:
        return None
    height_px, width_px, channels, scan_at = header
    reduction = _overview_reduction(height_px, width_px, overview_px)
    if (pixels := decode_sound_jpeg(data, (height_px, width_px), scan_at=scan_at, reduction=reduction)) is None:
        return None
    return DecodedImage("JPEG", pixels, height_px, width_px, 8, None, None, channels, 1)


def _decode(
    picture: ImageFile.ImageFile, data: bytes, bits: int, reduction: int, sample_bits: int | None, *, keeps_alpha: bool
) -> tuple[NDArray[np.uint8], tuple[int, int] | None]:
    """Returns the pixels of what is no JPEG, or one that only Pillow knows; and `DecodedImage.sample_range`.

    Each format goes to the decoder that is silent and bounded: of TIFF, OpenCV multiplies alpha into the colours and
    leaves holes where data are damaged; of PNG, it inflates what follows the last row, and a damaged animated one can
    end the process. Of WebP, Pillow would take 26 bytes for each pixel.
    """
    if picture.format in {"WEBP", "BMP"}:
        has_alpha = keeps_alpha and picture.has_transparency_data
        if picture.format == "WEBP" or not has_alpha:
            pixels = decode_with_opencv(picture, data, reduction=reduction, keeps_alpha=has_alpha)
            if pixels is not None:
                return pixels, None
    return decode_with_pillow(
        picture, data, bits=bits, reduction=reduction, keeps_alpha=keeps_alpha, used_bits=sample_bits
    )


def _bit_depth(picture: ImageFile.ImageFile, data: bytes) -> int:
    if picture.format == "PNG":
        return data[24]
    if isinstance(picture, TiffImageFile):
        return max(picture.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
    return 8


def _channels(picture: ImageFile.ImageFile) -> int:
    bands = len(picture.getbands())
    return bands + 2 if picture.mode in {"P", "PA"} else bands


def _orientation(picture: ImageFile.ImageFile) -> int:
    """Reads the orientation that stands before the pixels; what is broken says nothing."""
    if isinstance(picture, TiffImageFile):
        found = picture.tag_v2.get(ExifTags.Base.Orientation, 1)
    elif "exif" in picture.info:
        exif = Image.Exif()
        with suppress(*DAMAGES, *OTHER_BREAKS):
            exif.load(picture.info["exif"])
        found = exif.get(ExifTags.Base.Orientation, 1)
    else:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def resize(image: NDArray[np.uint8], image_size: tuple[int, int], *, framing: Framing = "stretch") -> NDArray[np.uint8]:
    """Resizes `(H, W, 3)` uint8 to `image_size` (height, width); the proportions are `framing`'s part."""
    if image.shape[:2] == image_size or framing == "stretch":
        return _stretch(image, image_size)
    top, left, bottom, right = seen_box(image.shape[:2], image_size, framing)
    if framing == "crop":
        return _stretch(np.ascontiguousarray(image[top:bottom, left:right]), image_size)
    (height, width), (wide_height, wide_width) = image_size, (bottom - top, right - left)
    inner = (
        max(1, round(height * image.shape[0] / wide_height)),
        max(1, round(width * image.shape[1] / wide_width)),
    )
    padded = np.full((height, width, 3), PADDING_GREY, dtype=np.uint8)
    above, before = (height - inner[0]) // 2, (width - inner[1]) // 2
    padded[above : above + inner[0], before : before + inner[1]] = _stretch(image, inner)
    return padded


def seen_box(shape: tuple[int, ...], image_size: tuple[int, int], framing: Framing) -> tuple[int, int, int, int]:
    """Returns the box of an image that a model sees: top, left, bottom and right, in the image's pixels.

    Args:
        shape: (height, width) of the image.
        image_size: (height, width) of the model's input.
        framing: with `crop` the box is inside the image, with `pad` it reaches beyond.
    """
    height, width = shape[:2]
    if framing == "stretch":
        return 0, 0, height, width
    scales = height / image_size[0], width / image_size[1]
    scale = min(scales) if framing == "crop" else max(scales)
    box = (max(1, round(image_size[0] * scale)), max(1, round(image_size[1] * scale)))
    top, left = (height - box[0]) // 2, (width - box[1]) // 2
    return top, left, top + box[0], left + box[1]


def _stretch(image: NDArray[np.uint8], image_size: tuple[int, int]) -> NDArray[np.uint8]:
    height, width = image_size
    if image.shape[:2] == (height, width):
        return image
    shrinks = image.shape[0] >= height and image.shape[1] >= width
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.asarray(resized, dtype=np.uint8)


def preprocess(
    data: bytes,
    image_size: tuple[int, int],
    *,
    max_pixels: int = MAX_PIXELS,
    preprocessing: Preprocessing = LATEST,
) -> NDArray[np.uint8]:
    """Decodes and resizes an image to what a model of `image_size` (height, width) takes.

    Returns:
        `(height, width, 3)` uint8, RGB, 0–255. Scaling to floats is the model's own first layer.

    Raises:
        ImageError: see `read_image`.
    """
    pixels = decode(data, max_pixels=max_pixels, preprocessing=preprocessing)
    return resize(pixels, image_size, framing=preprocessing.framing)


def _open(data: bytes) -> ImageFile.ImageFile:
    """Reads an image's header."""
    if not data:
        raise EmptyImageError("Expected an image. Received: 0 bytes. Send the file's content.")
    begins_as = format_by_signature(data)
    stream = io.BytesIO
    readable = data
    if begins_as == "JPEG":
        refuse_costly_jpeg(data)
    elif begins_as == "PNG":
        refuse_costly_png(data)
        readable = essential_png(data)
    elif begins_as == "GIF":
        stream = GifStream
    try:
        return Image.open(stream(readable), formats=SUPPORTED_FORMATS)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, struct.error, EOFError, TypeError) as err:
        if begins_as:
            raise TruncatedImageError(
                f"Expected a complete {begins_as}. Received: {len(data)} bytes that begin as one, but the header is "
                "cut off or damaged. Send the file again."
            ) from err
        known = ", ".join(SUPPORTED_FORMATS)
        raise UnsupportedImageError(
            f"Expected an image ({known}). Received: {len(data)} bytes starting with {data[:8].hex(' ')}, "
            "which is none of these. Convert the file, or check that the upload is complete."
        ) from err
    except (MemoryError, OverflowError, RuntimeError, KeyError, IndexError, AttributeError, ZeroDivisionError) as err:
        # A hostile header can break any of Pillow's parsers in its own way; none of it is an image for us.
        raise UnsupportedImageError(f"Expected a readable image header. Received: a broken one ({err}).") from err


def _judge(picture: ImageFile.ImageFile, data: bytes, max_pixels: int) -> tuple[str, int, int]:
    """Returns `(format, height_px, width_px)` of what may be decoded; raises what `read_size` says for the rest."""
    image_format, (width_px, height_px) = str(picture.format), picture.size
    # What phones call JPEG may hold further pictures (MPO); the first one is the image.
    image_format = "JPEG" if image_format == "MPO" else image_format
    if height_px < 1 or width_px < 1:
        raise UnsupportedImageError(f"Expected at least 1×1 pixels. Received: {width_px}×{height_px}.")
    if height_px * width_px > max_pixels:
        raise ImageTooLargeError(
            f"Expected at most {max_pixels} pixels. Received: {width_px}×{height_px} = {width_px * height_px}. "
            "Shrink the image before sending it."
        )
    if max(height_px, width_px) > MAX_SIDE_PX:
        raise ImageTooLargeError(
            f"Expected sides of at most {MAX_SIDE_PX} pixels. Received: {width_px}×{height_px}. "
            "Cut or shrink the image before sending it."
        )
    if isinstance(picture, TiffImageFile):
        tags = tiff_tags(data, picture.tag_v2.offset)
        refuse_patient_tiff(tags)
        padded_px = _count_tiled_pixels(picture, tags)
        if padded_px > max_pixels:
            tile_width_px, tile_height_px = tags[TILE_WIDTH], tags[TILE_LENGTH]
            raise ImageTooLargeError(
                f"Expected at most {max_pixels} pixels. Received: tiles of {tile_width_px}×{tile_height_px} that hold "
                f"{padded_px} for an image of {width_px}×{height_px}. Save it with smaller tiles, or with strips."
            )
    return image_format, height_px, width_px


def _count_tiled_pixels(picture: TiffImageFile, tags: Mapping[int, int]) -> int:
    width_px, height_px = picture.size
    tile_width_px, tile_height_px = tags.get(TILE_WIDTH, 1), tags.get(TILE_LENGTH, 1)
    return -(-width_px // tile_width_px) * tile_width_px * -(-height_px // tile_height_px) * tile_height_px
