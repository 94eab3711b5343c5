"""From uploaded or stored bytes to the uint8 RGB array that every model sees: the one preprocessing there is.

Training (through packed pixels), reference data and serving all call `preprocess`, so they cannot differ. The policy:

* JPEG, PNG, WebP, BMP, TIFF (no fax pages) and GIF (first frame); anything else is refused.
* The size is read from the header and judged before a pixel is decoded; so is what else makes a small file costly: the
  number of its chunks, segments, blocks and scans, the size of its tiles, and a compression whose decoder tells stderr
  of every damaged row. Of a PNG, only what its first picture is made of is read; compressed data past the picture's
  last row are not inflated.
* Channels are RGB; grey becomes three equal channels; alpha is dropped; 16-bit samples become 8-bit.
* EXIF orientation is applied, so that an image is seen the way a person sees it.
* Resizing ignores the aspect ratio: `INTER_AREA` when both sides shrink, `INTER_LINEAR` otherwise.

`PREPROCESSING_VERSION` rises with every change that alters a pixel; `preprocessing_hash` carries it into caches,
bundles and reference data, so that rows made under different policies are never mixed.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import struct
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from cv_platform.errors import EmptyImageError, ImageTooLargeError, TruncatedImageError, UnsupportedImageError
from cv_platform.image_files import (
    SUPPORTED_FORMATS,
    TILE_LENGTH,
    TILE_WIDTH,
    GifStream,
    essential_png,
    format_by_signature,
    png_chunks,
    refuse_costly_jpeg,
    refuse_costly_png,
    refuse_patient_tiff,
    refuse_truncated,
    tiff_tags,
)

PREPROCESSING_VERSION = 2
MAX_PIXELS = 40_000_000
"""Default limit: 40 megapixels decode to 120 MB."""
MAX_SIDE_PX = 65_535
"""What a JPEG can have at most; longer sides are only met in attacks, and every row costs."""
MAX_OPENCV_IDAT_BYTES = 2**16
"""Of a PNG's compressed pixels. OpenCV inflates them to their end, even far past the last row: 1032 bytes from each."""

_BAND_PIXELS = 2**20
_TURNS: dict[int, Callable[[cv2.typing.MatLike], cv2.typing.MatLike]] = {
    2: lambda image: cv2.flip(image, 1),
    3: lambda image: cv2.rotate(image, cv2.ROTATE_180),
    4: lambda image: cv2.flip(image, 0),
    5: cv2.transpose,
    6: lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
    7: lambda image: cv2.flip(cv2.transpose(image), -1),
    8: lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
}
"""EXIF's orientation to what undoes it."""
# OpenCV writes its decoder warnings to stderr; the exceptions below already name the image.
cv2.setLogLevel(1)
logging.getLogger("PIL").setLevel(logging.WARNING)


def preprocessing_hash(image_size: tuple[int, int]) -> str:
    """Returns 16 hex digits that change whenever `preprocess` would give other pixels for `image_size` (h, w)."""
    policy = {"version": PREPROCESSING_VERSION, "height_px": image_size[0], "width_px": image_size[1]}
    return hashlib.sha256(json.dumps(policy, sort_keys=True).encode()).hexdigest()[:16]


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
    with _open(data, max_pixels) as picture:
        return _judge(picture, data, max_pixels)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decodes an image.

    Args:
        data: the file's bytes.
        max_pixels: the largest height × width accepted; judged on the header.

    Returns:
        `(H, W, 3)` uint8, RGB, upright.

    Raises:
        EmptyImageError, UnsupportedImageError, ImageTooLargeError: see `read_size`.
        TruncatedImageError: the data end before the image does, or were damaged where the format can tell.
    """
    return decode_with_format(data, max_pixels=max_pixels)[1]


def decode_with_format(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[str, NDArray[np.uint8]]:
    """Decodes an image as `decode` does, and tells its format: for those who need both, the header is read once."""
    with _open(data, max_pixels) as picture:
        image_format, _, _ = _judge(picture, data, max_pixels)
        refuse_truncated(data, image_format)
        if _needs_pillow(data, image_format):
            return image_format, _decode_with_pillow(picture, data)
        if image_format == "PNG":
            data = essential_png(data)
        turn = _webp_turn(picture, data) if image_format == "WEBP" else None
        try:
            # Not as BGR, to be exchanged afterwards: that takes as long again as reading a BMP.
            rgb = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR_RGB)
        except cv2.error as err:  # Its text names files of the machine that OpenCV was built on.
            raise TruncatedImageError(
                f"Expected a complete {image_format}. Received: {len(data)} bytes that its decoder refuses. "
                "Send the file again."
            ) from err
        if rgb is None:
            return image_format, _decode_with_pillow(picture, data)
        return image_format, np.asarray(turn(rgb) if turn else rgb, dtype=np.uint8)


def resize(image: NDArray[np.uint8], image_size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resizes `(H, W, 3)` uint8 to `image_size` (height, width), ignoring the aspect ratio."""
    height, width = image_size
    if image.shape[:2] == (height, width):
        return image
    shrinks = image.shape[0] >= height and image.shape[1] >= width
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.asarray(resized, dtype=np.uint8)


def preprocess(data: bytes, image_size: tuple[int, int], *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decodes and resizes an image to what a model of `image_size` (height, width) takes.

    Returns:
        `(height, width, 3)` uint8, RGB, 0–255. Scaling to floats is the model's own first layer.

    Raises:
        ImageError: see `decode`.
    """
    return resize(decode(data, max_pixels=max_pixels), image_size)


def _open(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Reads an image's header; `max_pixels` is only for the message."""
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's bomb warning: `_judge` has a limit of ours.
            return Image.open(stream(readable), formats=SUPPORTED_FORMATS)
    except Image.DecompressionBombError as err:
        raise ImageTooLargeError(f"Expected at most {max_pixels} pixels. Received: {err}") from err
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
        tile_width_px, tile_height_px = tags.get(TILE_WIDTH, 1), tags.get(TILE_LENGTH, 1)
        padded_px = -(-width_px // tile_width_px) * tile_width_px * -(-height_px // tile_height_px) * tile_height_px
        if padded_px > max_pixels:
            raise ImageTooLargeError(
                f"Expected at most {max_pixels} pixels. Received: tiles of {tile_width_px}×{tile_height_px} that hold "
                f"{padded_px} for an image of {width_px}×{height_px}. Save it with smaller tiles, or with strips."
            )
    return image_format, height_px, width_px


def _needs_pillow(data: bytes, image_format: str) -> bool:
    """Tells what OpenCV 4.11 decodes otherwise than the policy says, or at any cost.

    GIF support depends on how it was built; TIFF comes with alpha multiplied into the colours, and with holes where the
    data are damaged. An animated PNG (`acTL`), when damaged, can end the process with a segmentation fault, and the
    16-bit samples of a whole one become noise. A large PNG may hold more than its rows: Pillow stops after the last
    one, and to find out where that is takes two thirds of the time of decoding.
    """
    if image_format == "PNG":
        idat_bytes = sum(end - at - 12 for kind, at, end in png_chunks(data) if kind == b"IDAT")
        return idat_bytes > MAX_OPENCV_IDAT_BYTES or any(kind == b"acTL" for kind, _, _ in png_chunks(data))
    return image_format in {"GIF", "TIFF"}


def _webp_turn(picture: ImageFile.ImageFile, data: bytes) -> Callable[[cv2.typing.MatLike], cv2.typing.MatLike] | None:
    """Returns what makes a decoded WebP upright: OpenCV 4.11 does so for a JPEG only. None: it is already.

    Bit 3 of the extended header says that there is EXIF. Pillow decodes the same pixels, in 26 bytes for each.
    """
    if data[12:16] != b"VP8X" or not data[20] & 0x08:
        return None
    with _refusals_of_pillow(data):
        return _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))


def _decode_with_pillow(picture: ImageFile.ImageFile, data: bytes) -> NDArray[np.uint8]:
    """Decodes what OpenCV cannot; stricter, slower. `picture` is what `_open` returned for `data`, and is changed."""
    with _refusals_of_pillow(data):
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
        if picture.mode in {"I", "F"}:
            raise UnsupportedImageError(
                "Expected 8 or 16 bits per sample. Received: an image with 32. Convert it to 8 bits, with the "
                "range of values that the training images have."
            )
        # Band by band: the whole image's conversion, copies and buffers are four more of its size.
        width_px, height_px = picture.size
        rows = max(1, _BAND_PIXELS // width_px)
        rgb = np.empty((height_px, width_px, 3), dtype=np.uint8)
        for top in range(0, height_px, rows):
            bottom = min(top + rows, height_px)
            rgb[top:bottom] = _to_rgb(picture.crop((0, top, width_px, bottom)))
        return rgb


def _to_rgb(picture: Image.Image) -> NDArray[np.uint8]:
    if picture.mode.startswith("I;16"):
        return (np.asarray(picture) >> 8).astype(np.uint8)[:, :, np.newaxis]
    return np.asarray(picture.convert("RGB"))


@contextmanager
def _refusals_of_pillow(data: bytes) -> Generator[None]:
    """Turns whatever Pillow raises for a hostile file into an `ImageError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (OSError, ValueError, SyntaxError, struct.error, EOFError, TypeError, Image.DecompressionBombError) as err:
        raise TruncatedImageError(
            f"Expected a complete image. Received: {len(data)} bytes that decode only in part ({err}). Send it again."
        ) from err
    except (MemoryError, OverflowError, RuntimeError, KeyError, IndexError, AttributeError, ZeroDivisionError) as err:
        raise UnsupportedImageError(f"Expected a readable image. Received: a broken one ({err}).") from err
