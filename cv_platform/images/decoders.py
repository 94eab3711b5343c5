"""Decodes images of one format or another to upright RGB, without a word on stderr: a decoder's complaint is returned.

What may be decoded at all is judged before, in the package and in `files`; which decoder takes what, the package says.
JPEG goes through libjpeg-turbo (https://gitlab.com/jfolz/simplejpeg), which tells its warnings and can decode to a
half, a quarter or an eighth; WebP and BMP through OpenCV; the rest through Pillow.
"""

from __future__ import annotations

import ctypes
import io
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from cv_platform.errors import TruncatedImageError, UnsupportedImageError
from cv_platform.images.files import PLANAR, has_all_png_rows, has_all_scans, has_jpeg_end, no_end

_BAND_PIXELS = 2**18
"""Of a band, which is what is converted at a time; of deep samples a quarter, as they take more on their way."""
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
DAMAGES = (
    *(OSError, ValueError, SyntaxError, struct.error, zlib.error, EOFError, TypeError),
    Image.DecompressionBombError,
)
OTHER_BREAKS = (MemoryError, OverflowError, RuntimeError, LookupError, AttributeError, ZeroDivisionError)
"""A hostile file can break any of Pillow's parsers in its own way."""
cv2.setLogLevel(1)
# For the whole process: `catch_warnings` is not safe in threads, which decode, and left other filters behind.
warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
if hasattr(_pillow := ctypes.CDLL(Image.core.__file__), "TIFFSetErrorHandler"):
    # libtiff tells stderr of each damaged strip; what Pillow raises says that there is one.
    _pillow.TIFFSetErrorHandler(None)


def decode_sound_jpeg(data: bytes, size: tuple[int, int], *, scan_at: int, reduction: int) -> NDArray[np.uint8] | None:
    """Decodes a JPEG; None: its end is missing, or its decoder has something to say.

    Args:
        data: its bytes.
        size: height and width of all of it.
        scan_at: where its headers end.
        reduction: see `decode_jpeg`.
    """
    if not has_jpeg_end(data, scan_at):
        return None
    height_px, width_px = (-(-side // reduction) for side in size)
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height_px, min_width=width_px)
    except (ValueError, KeyError):
        return None
    return _flat(pixels) if pixels.shape[:2] == (height_px, width_px) else None


def decode_jpeg(
    picture: ImageFile.ImageFile, data: bytes, *, reduction: int
) -> tuple[NDArray[np.uint8], str | None] | None:
    """Decodes a JPEG; what its decoder warns of is told, not raised.

    Args:
        picture: its header.
        data: its bytes.
        reduction: 1, or 2, 4 or 8 for sides that are shorter by as much (rounded up), which is done while decoding.

    Returns:
        The pixels, and the damage that the decoder went on after. None: it is of a kind that only Pillow may know.

    Raises:
        TruncatedImageError: the end is missing, and not only the two bytes that mark it.
    """
    has_end = has_jpeg_end(data)
    damage = None
    if not has_end:
        data += b"\xff\xd9"
    try:
        height_px, width_px, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        if (width_px, height_px) != picture.size:
            return None
        options = {
            "colorspace": "CMYK" if space == "CMYK" else "RGB",
            "min_height": -(-int(height_px) // reduction),
            "min_width": -(-int(width_px) // reduction),
        }
        try:
            pixels = simplejpeg.decode_jpeg(data, **options)
        except ValueError as err:
            damage = f"its decoder goes on after: {err}"
            # Black where it stops: simplejpeg would leave what the memory held before.
            channels = 4 if space == "CMYK" else 3
            shape = (options["min_height"], options["min_width"], channels)
            pixels = simplejpeg.decode_jpeg(data, strict=False, buffer=np.zeros(shape, np.uint8), **options)
    except (ValueError, KeyError):  # A KeyError for a rare subsampling.
        return None
    if not has_end:
        if damage or not has_all_scans(data, getattr(picture, "layers", 0)):
            raise no_end(data, "JPEG")
        damage = "the two bytes that mark its end are missing; every row decodes"
    pixels = _cmyk_to_rgb(pixels) if space == "CMYK" else _flat(pixels)
    # Looking for nothing is a tenth of the overhead for a small file.
    return _upright(pixels, lambda: _jpeg_exif(picture)) if picture.info.get("exif") else pixels, damage


def _flat(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns `(H, W)` of `(H, W, 1)`; RGB as it is."""
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


def _jpeg_exif(picture: ImageFile.ImageFile) -> Image.Exif:
    """Reads EXIF; `getexif` would believe XMP where there is none, which neither OpenCV nor browsers do."""
    exif = Image.Exif()
    exif.load(picture.info.get("exif", b""))
    return exif


def _cmyk_to_rgb(cmyk: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Converts as OpenCV does, which decoded JPEG up to version 2 of the preprocessing; the samples are inverted."""
    rgb = np.empty((*cmyk.shape[:2], 3), dtype=np.uint8)
    for top, bottom in _bands(*cmyk.shape[:2]):
        black = cmyk[top:bottom, :, 3:].astype(np.uint16)
        rgb[top:bottom] = black - ((255 - cmyk[top:bottom, :, :3]) * black >> 8)
    return rgb


def decode_with_opencv(
    picture: ImageFile.ImageFile, data: bytes, *, reduction: int, keeps_alpha: bool
) -> NDArray[np.uint8] | None:
    """Decodes a WebP or BMP; None: OpenCV does not know it.

    Raises:
        TruncatedImageError: OpenCV refuses it.
    """
    # Not as BGR, to be exchanged afterwards: that takes as long again as reading a BMP.
    flags = cv2.IMREAD_UNCHANGED if keeps_alpha else cv2.IMREAD_COLOR_RGB
    try:
        pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
    except cv2.error as err:  # Its text names files of the machine that OpenCV was built on.
        raise TruncatedImageError(
            f"Expected a complete {picture.format}. Received: {len(data)} bytes that its decoder refuses. "
            "Send the file again."
        ) from err
    if pixels is None:
        return None
    pixels = np.asarray(pixels, dtype=np.uint8)
    if keeps_alpha and pixels.shape[2] == 3:  # Pillow looks for alpha in the frame, OpenCV in the extended header.
        return decode_with_opencv(picture, data, reduction=reduction, keeps_alpha=False)
    if keeps_alpha or reduction > 1:
        bgra = pixels
        pixels = _banded(
            bgra.shape[:2],
            reduction,
            lambda top, bottom: on_white(bgra[top:bottom, :, [2, 1, 0, 3]]) if keeps_alpha else bgra[top:bottom],
        )
    # OpenCV 4.11 turns a JPEG only. Bit 3 of the extended header says that there is EXIF.
    has_exif = picture.format == "WEBP" and data[12:16] == b"VP8X" and data[20] & 0x08
    return _upright(pixels, picture.getexif) if has_exif else pixels


def decode_with_pillow(
    picture: ImageFile.ImageFile,
    data: bytes,
    *,
    bits: int,
    reduction: int,
    keeps_alpha: bool,
    used_bits: int | None,
) -> tuple[NDArray[np.uint8], tuple[int, int] | None]:
    """Decodes anything; stricter, slower.

    Args:
        picture: its header; it is changed.
        data: its bytes.
        bits: each sample's.
        reduction: by how much sides are shortened.
        keeps_alpha: what is transparent lies on white.
        used_bits: `Preprocessing.sample_bits`.

    Returns:
        The pixels, and of samples of more than 8 bits the smallest and the largest: None, too, where all of it is
        transparent. Where a pixel has several samples, and `used_bits` is None, only their upper eight bits are known:
        then it is the smallest and the largest that they may be.

    Raises:
        TruncatedImageError, UnsupportedImageError: it does not decode.
    """
    with refusals(data):
        deep = _DeepSamples(picture, used_bits) if 8 < bits <= 16 else None
        for one in (picture,) if deep is None or deep.lower is None else (picture, deep.lower):
            one.load()
            # Here rather than by `_upright`, which would need a third image of that size.
            with suppress(*DAMAGES, *OTHER_BREAKS):
                ImageOps.exif_transpose(one, in_place=True)
        if isinstance(picture, PngImageFile) and _lacks_rows(picture, data):
            raise no_end(data, "PNG")
        if picture.mode in {"I", "F"}:
            raise UnsupportedImageError(
                "Expected 8 or 16 bits per sample. Received: an image with 32. Convert it to 8 bits, with the "
                "range of values that the training images have."
            )
        if isinstance(picture, PngImageFile):
            _scale_transparent_colour(picture, bits, has_lower=deep is not None and deep.lower is not None)
        # Band by band: the whole image's conversion, copies and buffers are four more of its size.
        width_px, height_px = picture.size

        def band(top: int, bottom: int) -> NDArray[np.uint8]:
            box = (0, top, width_px, bottom)
            part = picture.crop(box)
            return deep.to_rgb(part, box, keeps_alpha=keeps_alpha) if deep else _to_rgb(part, keeps_alpha=keeps_alpha)

        pixels = _banded((height_px, width_px), reduction, band, band_pixels=_BAND_PIXELS // (4 if deep else 1))
        return pixels, deep and deep.range


def _lacks_rows(picture: PngImageFile, data: bytes) -> bool:
    """Tells whether the compressed data end before the last row does: Pillow leaves the rest 0, and says nothing."""
    width_px, height_px = picture.size
    if not picture.info.get("interlace") and np.asarray(picture.crop((0, height_px - 1, width_px, height_px))).any():
        return False
    return not has_all_png_rows(data)


def _scale_transparent_colour(picture: PngImageFile, bits: int, *, has_lower: bool) -> None:
    """Gives the colour that a tRNS chunk makes transparent in the 8 bits that Pillow gives the pixels."""
    colour = picture.info.get("transparency")
    if picture.mode == "L" and isinstance(colour, int):
        picture.info["transparency"] = colour * 255 // (2**bits - 1)
    elif picture.mode == "RGB" and isinstance(colour, tuple) and bits == 16 and not has_lower:
        picture.info["transparency"] = tuple(value >> 8 for value in colour)


class _DeepSamples:
    """Brings samples of 9 to 16 bits to 8, and notes the smallest and the largest that are seen.

    Of pixels with several samples, Pillow keeps the upper bytes. The raw mode says which those are: with the other one,
    the same decoder, as strict as before, reads the lower bytes.

    Attributes:
        lower: a second picture, of the lower bytes; None where they are not asked for, or `picture` has them.
        range: see `decode_with_pillow`.
    """

    _LOWER: ClassVar = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}

    def __init__(self, picture: ImageFile.ImageFile, used_bits: int | None) -> None:
        self.lower: ImageFile.ImageFile | None = None
        self.range: tuple[int, int] | None = None
        self._shift = (used_bits or 16) - 8
        self._channels = [0, 1, 2, 3]
        self._is_premultiplied = False
        self._plane_order = ""
        self._grey = picture.mode if picture.mode.startswith("I;16") else ""
        if isinstance(picture, TiffImageFile) and picture.tag_v2.get(PLANAR) == 2 and len(picture.getbands()) > 1:
            self._plane_order = "L" if picture.tag_v2.prefix == b"II" else "B"
        if used_bits is not None and not picture.mode.startswith("I"):
            assert isinstance(picture.fp, io.BytesIO)
            self.lower = Image.open(io.BytesIO(picture.fp.getvalue()), formats=(str(picture.format),))
        for one in (picture, self.lower) if self.lower else (picture,):
            one.tile = [tile._replace(args=self._args(tile.args, is_lower=one is self.lower)) for tile in one.tile]

    def _args(self, args: Any, *, is_lower: bool) -> Any:
        """Returns what a decoder is told, with the raw mode of the upper bytes, or of the lower ones."""
        raw, rest = (args, None) if isinstance(args, str) else (args[0], args[1:])
        if self._grey and raw == "I":  # What Pillow would read a single plane by, if it is said to be one.
            return self._grey if rest is None else (self._grey, *rest)
        if self._plane_order and len(raw) == 1:  # Pillow would read such planes as if they had 8 bits.
            raw = f"{raw};16{self._plane_order}"
        elif self._plane_order and is_lower:
            raise UnsupportedImageError(
                "Expected 16-bit samples that lie pixel by pixel, or are not compressed, to be scaled by "
                "model.sample_bits. Received: a TIFF of compressed planes. Save it anew, or as PNG."
            )
        name, _, order = raw.partition(";16")
        if self.lower is not None:
            if name == "RGBa":  # Pillow would divide by the upper byte of alpha, or by the lower one.
                name, self._is_premultiplied = "RGBA", True
            raw = f"{name};16{self._LOWER[order] if is_lower else order}"
            if name == "LA" and is_lower:  # There is no such mode: both bytes of both samples are read.
                raw, self._channels = "RGBA", [1, 1, 1, 3]
        return raw if rest is None else (raw, *rest)

    def to_rgb(self, part: Image.Image, box: tuple[int, int, int, int], *, keeps_alpha: bool) -> NDArray[np.uint8]:
        """Returns `(H, W, 3)` uint8 of `part`, which is `box` of the picture."""
        samples = upper = np.asarray(part)
        if self.lower is not None:
            lower = np.asarray(self.lower.crop(box))[..., self._channels[: upper.shape[2]]]
            samples = upper.astype(np.uint16)
            samples <<= 8
            samples |= lower
        is_whole = samples.dtype.itemsize == 2
        if self._is_premultiplied:
            alpha = np.maximum(samples[..., 3:], 1).astype(np.uint32)
            samples[..., :3] = np.minimum(samples[..., :3].astype(np.uint32) * 65535 // alpha, 65535)
        colour = part.info.get("transparency") if keeps_alpha and part.mode in {"I;16", "RGB"} else None
        is_hidden = None
        if colour is not None:
            is_hidden = samples == colour if samples.ndim == 2 else (samples == colour).all(axis=2)
        self._note(samples, part.mode, is_hidden if part.mode != "RGBA" else upper[..., 3] == 0, is_whole=is_whole)
        if not is_whole:
            return _to_rgb(part, keeps_alpha=keeps_alpha)
        samples = samples >> self._shift
        scaled = np.minimum(samples, 255, out=samples).astype(np.uint8)
        if part.mode == "RGBA":
            scaled[..., 3] = upper[..., 3]
        mode = "L" if scaled.ndim == 2 else part.mode
        rgb = _to_rgb(Image.frombytes(mode, part.size, scaled.tobytes()), keeps_alpha=keeps_alpha)
        return rgb if is_hidden is None else np.where(is_hidden[..., np.newaxis], np.uint8(255), rgb)

    def _note(self, samples: NDArray[Any], mode: str, is_hidden: NDArray[np.bool_] | None, *, is_whole: bool) -> None:
        colours = samples[..., :3] if mode == "RGBA" else samples
        if is_hidden is not None:
            colours = colours[~is_hidden]
        if colours.size:
            ends = (int(colours.min()), int(colours.max()))
            ends = ends if is_whole else (256 * ends[0], 256 * ends[1] + 255)
            self.range = ends if self.range is None else (min(self.range[0], ends[0]), max(self.range[1], ends[1]))


def _to_rgb(picture: Image.Image, *, keeps_alpha: bool) -> NDArray[np.uint8]:
    if keeps_alpha and picture.has_transparency_data:
        return on_white(np.asarray(picture.convert("RGBA")))
    return np.asarray(picture.convert("RGB"))


def on_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lays `(H, W, 4)` uint8 RGBA, alpha not multiplied in, on white: `(H, W, 3)` uint8, rounded."""
    rgb, alpha = rgba[..., :3], rgba[..., 3:].astype(np.uint16)
    if alpha.min() == 255:
        return rgb
    return ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _upright(pixels: NDArray[np.uint8], read_exif: Callable[[], Image.Exif]) -> NDArray[np.uint8]:
    """Turns an image as its EXIF says; broken EXIF says nothing."""
    try:
        turn = _TURNS.get(read_exif().get(ExifTags.Base.Orientation, 1))
    except (*DAMAGES, *OTHER_BREAKS):
        return pixels
    return np.asarray(turn(pixels), dtype=np.uint8) if turn else pixels


def _bands(height_px: int, width_px: int, multiple: int = 1, band_pixels: int = _BAND_PIXELS) -> list[tuple[int, int]]:
    """Cuts an image into bands of about so many pixels, whose heights (but for the last) are multiples."""
    rows = max(1, band_pixels // (width_px * multiple)) * multiple
    return [(top, min(top + rows, height_px)) for top in range(0, height_px, rows)]


def _banded(
    shape: tuple[int, ...],
    reduction: int,
    band: Callable[[int, int], NDArray[np.uint8]],
    band_pixels: int = _BAND_PIXELS,
) -> NDArray[np.uint8]:
    """Puts an image together from bands of RGB, each pixel the mean of `reduction` by `reduction`."""
    height_px, width_px = shape
    rgb = np.empty((-(-height_px // reduction), -(-width_px // reduction), 3), dtype=np.uint8)
    for top, bottom in _bands(height_px, width_px, reduction, band_pixels):
        pixels = band(top, bottom)
        if reduction > 1:
            pixels = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).reduce(reduction))
        rgb[top // reduction : -(-bottom // reduction)] = pixels
    return rgb


@contextmanager
def refusals(data: bytes) -> Generator[None]:
    """Turns whatever Pillow raises for a hostile file into an `ImageError`."""
    try:
        yield
    except DAMAGES as err:
        raise TruncatedImageError(
            f"Expected a complete image. Received: {len(data)} bytes that decode only in part ({err}). Send it again."
        ) from err
    except OTHER_BREAKS as err:
        raise UnsupportedImageError(f"Expected a readable image. Received: a broken one ({err}).") from err
