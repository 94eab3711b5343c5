"""Photographs in HEIC and AVIF, as telephones and web sites make them: they become JPEG when they are imported.

Nothing behind the import takes them: their header does not bound what decoding the frame inside takes, so nobody may
upload one to the service; a folder of the user's own is another matter. AVIF is read by Pillow, HEIC by libheif
(https://github.com/bigcat88/pillow_heif, the decoder alone).
"""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, ImageOps

from cv_platform.images.files import read_head

SUFFIX = ".jpg"
"""Added to a converted file's name, so that `IMG_1.HEIC` may lie beside the `IMG_1.JPG` that a telephone made, too."""
GROWTH = 8
"""The most that a JPEG of this quality takes of the disk, in lengths of what it was made from."""
_BRANDS = frozenset({b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
"""https://nokiatech.github.io/heif/technical.html, https://aomediacodec.github.io/av1-avif/"""
_QUALITY = 95
_BREAKS = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, MemoryError, Image.DecompressionBombError)
"""What decoders raise for files that are damaged."""


def is_phone_photo(path: Path) -> bool:
    """Tells by the first bytes whether a file is HEIC or AVIF.

    Raises:
        OSError: it cannot be read.
    """
    return begins_as_phone_photo(read_head(path))


def begins_as_phone_photo(head: bytes) -> bool:
    """Tells whether these are the first bytes of HEIC or AVIF."""
    return head[4:8] == b"ftyp" and head[8:12] in _BRANDS


def to_jpeg(path: Path, target: Path) -> bool:
    """Writes a HEIC or AVIF as an upright JPEG, what is transparent on white; False: it does not decode."""
    try:
        _decoded(path).save(target, "JPEG", quality=_QUALITY, subsampling=0)
    except _BREAKS:
        target.unlink(missing_ok=True)
        return False
    return True


def decodes(path: Path) -> bool:
    """Tells whether `to_jpeg` can convert a file."""
    try:
        _decoded(path)
    except _BREAKS:
        return False
    return True


def _decoded(path: Path) -> Image.Image:
    import pi_heif

    pi_heif.register_heif_opener()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path, formats=["AVIF", "HEIF"]) as picture:
            upright = ImageOps.exif_transpose(picture)
    if upright.has_transparency_data:
        colours = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
    return upright.convert("RGB")
