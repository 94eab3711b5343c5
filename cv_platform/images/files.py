"""What a file of an image says of itself, read without decoding: its format, its end, and what would make it costly.

A small file may make a decoder work for seconds, take gigabytes, or write a line to stderr for each damaged row. Each
format is walked as its decoder walks it, so that none of them can be led where the other does not go.
"""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from cv_platform.errors import TruncatedImageError, UnsupportedImageError

SUPPORTED_FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
"""A file that is named like this is missed when it turns out to be no image."""
TEXT_SUFFIXES = frozenset(
    {".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".html", ".log", ".pdf", ".py", ".dvc"}
)
"""Of what accompanies images: never looked into, and nobody misses it among them."""
_RAW_SUFFIXES = frozenset({".dng", ".cr2", ".nef", ".arw", ".orf", ".rw2", ".pef", ".srw"})
"""Of cameras' own formats: they begin as a TIFF, whose picture is a small preview."""
_TELLING_SUFFIXES = IMAGE_SUFFIXES | TEXT_SUFFIXES | _RAW_SUFFIXES
_LITTER = frozenset(
    {
        *("@eadir", "@recycle", "#recycle", "#snapshot", "lost+found", "$recycle.bin", "system volume information"),
        *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
    }
)
"""What NAS, desktops and archivers leave behind, in lower case."""
HEAD_BYTES = 32
"""Of a file, in which its format announces itself."""
MAX_PARTS = 10_000
"""PNG chunks, JPEG segments or GIF blocks: walking them costs Python's time, however small they are."""
MAX_SCANS = 100
"""Of a progressive JPEG. Encoders write about ten; each makes the decoder visit the whole image again."""

_GIF_BLOCK_BYTES = 255
_INFLATED_BYTES = 2**20
_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""A pixel's, for each colour type."""
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""An interlaced PNG's passes: each one's first column, first row, and its steps."""
_COMPRESSION, _PHOTOMETRIC, PLANAR, TILE_WIDTH, TILE_LENGTH = 259, 262, 284, 322, 323
"""The tags of a TIFF that are judged."""
_TIFF_COMPRESSIONS = {
    1: "none",
    5: "LZW",
    7: "JPEG",
    8: "deflate",
    32773: "PackBits",
    32946: "deflate",
    34925: "LZMA",
    50000: "Zstandard",
}
"""Those whose decoder ends at the first damage. One for fax pages goes on, and tells stderr of every row."""
_BARE_JPEG_MARKERS = frozenset({0x00, 0x01, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)})
"""Those that no length follows, or that Pillow treats so."""
_PLAIN_FRAMES = frozenset({b"\xff\xc0", b"\xff\xc1", b"\xff\xc2"})
"""Baseline, extended and progressive, compressed by Huffman's code."""
_PLAIN_MARKERS = frozenset({b"\xff\xe0", b"\xff\xdb", b"\xff\xc4", b"\xff\xdd", b"\xff\xfe"})
"""JFIF's, tables, the interval of restarts, a comment."""
_PLAIN_SEGMENTS = 32
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""What ends a run of compressed data: neither an escaped 0xFF, nor a restart, nor padding."""


def is_litter(name: str) -> bool:
    """Tells whether a file or folder is hidden, or one that NAS, desktops and archivers leave behind."""
    return name.startswith(".") or name.lower() in _LITTER


def named_as_image(path: Path | str) -> bool | None:
    """Tells by its suffix whether a user would take a file for an image; None: it does not say."""
    # Not by a `Path`: one of each of very many files takes seconds, and Python's table of their names stays as large.
    suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122
    return suffix in IMAGE_SUFFIXES if suffix in _TELLING_SUFFIXES else None


def read_head(path: Path | str) -> bytes:
    """Returns the first `HEAD_BYTES` of a file.

    Raises:
        OSError: it cannot be read.
    """
    with Path(path).open("rb", buffering=0) as file:
        return file.read(HEAD_BYTES)


def seems_image(path: Path | str) -> bool:
    """Tells whether a user would take a file for an image: by its suffix if that says so, else by its first bytes.

    Raises:
        OSError: the file cannot be read.
    """
    by_name = named_as_image(path)
    return format_by_signature(read_head(path)) is not None if by_name is None else by_name


def format_by_signature(data: bytes) -> str | None:
    """Returns the format that the first bytes announce, for headers that Pillow does not accept."""
    signatures = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF87a": "GIF", b"GIF89a": "GIF"}
    signatures |= {b"II*\0": "TIFF", b"MM\0*": "TIFF"}
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:2] == b"BM" and data[6:10] == bytes(4):
        return "BMP"
    return next((name for signature, name in signatures.items() if data.startswith(signature)), None)


def refuse_truncated(data: bytes, image_format: str) -> None:
    """Looks for the end of a PNG or WebP, so that no decoder build decides what missing data look like."""
    complete = True
    if image_format == "PNG":
        complete = _is_whole_png(data)
    elif image_format == "WEBP":
        complete = len(data) >= 8 + int.from_bytes(data[4:8], "little")
    if not complete:
        raise no_end(data, image_format)


def no_end(data: bytes, image_format: str) -> TruncatedImageError:
    """Returns what is raised for an image whose end is missing."""
    return TruncatedImageError(
        f"Expected a complete {image_format}. Received: {len(data)} bytes without its end, or damaged on the way. "
        "Send the file again."
    )


def plain_jpeg_header(data: bytes) -> tuple[int, int, int, int] | None:
    """Returns height, width and components of a JPEG whose header holds what its pixels need, and where it ends.

    None: there is something else in it, as EXIF, another colour space or a preview, or it is not whole.
    """
    at, found = 2, None
    for _ in range(_PLAIN_SEGMENTS):
        marker, end = data[at : at + 2], _next_jpeg_segment(data, at) if at + 4 <= len(data) else len(data) + 1
        if end > len(data):
            return None
        if marker == b"\xff\xda":
            return found and (*found, at)
        if marker in _PLAIN_FRAMES and found is None and end >= at + 10 and data[at + 4] == 8:
            found = struct.unpack_from(">HHB", data, at + 5)
            if found[2] not in {1, 3}:
                return None
        elif marker not in _PLAIN_MARKERS:
            return None
        at = end
    return None


def has_jpeg_end(data: bytes, scan_at: int | None = None) -> bool:
    """Looks for the two bytes that end a JPEG, behind its headers (whose thumbnails have ends of their own).

    `scan_at` is where the headers end; None: they are walked through.
    """
    return data.rfind(b"\xff\xd9") > (_start_of_scan(data) if scan_at is None else scan_at)


def has_all_scans(data: bytes, components: int) -> bool:
    """Tells whether a JPEG's scans refine each of its components to the last bit.

    A progressive one that ends between two scans decodes without a warning, to a coarser picture.
    """
    refined: Counter[int] = Counter()
    at = _start_of_scan(data)
    for _ in range(MAX_PARTS):
        if data[at : at + 2] == b"\xff\xda" and at + 4 < len(data):
            count = data[at + 4]
            first, last, bits = data[at + 5 + 2 * count : at + 8 + 2 * count].ljust(3, b"\xff")
            if bits & 0x0F == 0:
                refined.update(dict.fromkeys(data[at + 5 : at + 5 + 2 * count : 2], last - first + 1))
        found = _JPEG_MARKER.search(data, _next_jpeg_segment(data, at))
        if found is None or found[0] == b"\xff\xd9":
            break
        at = found.start()
    return len(refined) == components and set(refined.values()) == {64}


def _is_whole_png(data: bytes) -> bool:
    """Walks the chunks to the last one; their checksums must fit."""
    for kind, at, end in png_chunks(data):
        if end > len(data):
            return False
        if zlib.crc32(memoryview(data)[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return False
        if kind == b"IEND":
            return True
    return False


def has_all_png_rows(data: bytes) -> bool:
    """Inflates a PNG's pixels, keeping none, until there are as many as its header promises."""
    width_px, height_px, bits, colour, _, _, is_interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    pixel_bits = bits * _PNG_SAMPLES[colour]
    missing = 0
    for left, top, step_x, step_y in _ADAM7 if is_interlaced else ((0, 0, 1, 1),):
        columns, rows = len(range(left, width_px, step_x)), len(range(top, height_px, step_y))
        missing += rows * (1 + (columns * pixel_bits + 7) // 8) if columns else 0
    inflater = zlib.decompressobj()
    for kind, at, end in png_chunks(data):
        pending: bytes | memoryview = memoryview(data)[at + 8 : end - 4] if kind == b"IDAT" else b""
        while pending and missing > 0:
            missing -= len(inflater.decompress(pending, min(missing, _INFLATED_BYTES)))
            pending = inflater.unconsumed_tail
    return missing <= 0


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields each chunk's kind, start and end, to the last one; a chunk that is cut off ends past the data."""
    at, kind = 8, b""
    while at + 12 <= len(data) and kind != b"IEND":
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield kind, at, end
        at = end


def essential_png(data: bytes) -> bytes:
    """Drops the chunks that no pixel depends on, whose contents the decoders would parse and inflate nevertheless.

    Kept are the critical ones (an upper-case first letter), transparency and orientation. What is left of an animated
    PNG is its first picture. Of those that there may be one of, the first is kept: libpng tells stderr of each other,
    and Pillow would take the last.
    """
    view, parts, start, single = memoryview(data), [], 0, {b"PLTE", b"tRNS", b"eXIf"}
    for kind, at, end in png_chunks(data):
        if kind in single:
            single.remove(kind)
        elif kind[0] & 0x20 or kind == b"PLTE":
            parts.append(view[start:at])
            start = end
    return b"".join([*parts, view[start:]]) if parts else data


def has_more_pictures(data: bytes, image_format: str) -> bool:
    """Tells whether there are pictures after the first one, which alone counts: an animation, or a TIFF's pages."""
    if image_format == "GIF":
        return _gif_has_more(data)
    if image_format == "PNG":
        counts = (data[at + 8 : at + 12] for kind, at, _ in png_chunks(data) if kind == b"acTL")
        return int.from_bytes(next(counts, b"")) > 1
    if image_format == "WEBP":
        return data[12:16] == b"VP8X" and bool(data[20] & 0x02)
    if image_format == "TIFF" and data[2:4] != b"+\0":
        order = "<" if data[:2] == b"II" else ">"
        try:
            (directory,) = struct.unpack_from(f"{order}L", data, 4)
            (entries,) = struct.unpack_from(f"{order}H", data, directory)
            return bool(struct.unpack_from(f"{order}L", data, directory + 2 + 12 * entries)[0])
        except struct.error:
            return False
    return False


def _gif_has_more(data: bytes) -> bool:
    """Walks a GIF's blocks to its second picture, or to where it ends or breaks off."""

    def table_bytes(flags: int) -> int:
        return 3 * 2 ** ((flags & 0x07) + 1) if flags & 0x80 else 0

    pictures = 0
    try:
        at = 13 + table_bytes(data[10])
        while data[at] != 0x3B:
            if data[at] == 0x2C:
                pictures += 1
                if pictures > 1:
                    return True
                at += 11 + table_bytes(data[at + 9])
            elif data[at] == 0x21:
                at += 2
            else:
                return False
            while data[at]:
                at += 1 + data[at]
            at += 1
    except IndexError:
        return False
    return False


def refuse_costly_png(data: bytes) -> None:
    """Counts the chunks, which Pillow walks one by one."""
    if next(islice(png_chunks(data), MAX_PARTS, None), None):
        raise UnsupportedImageError(
            f"Expected a PNG of at most {MAX_PARTS} chunks. Received: one of more. Save the image anew."
        )


def refuse_costly_jpeg(data: bytes, at: int = 2) -> None:
    """Walks the segments and scans to the image's end, as Pillow does before the first scan and libjpeg after it.

    `at` is where a segment begins before which few are.
    """
    for _ in range(MAX_PARTS):
        if at + 2 > len(data) or data[at : at + 2] == b"\xff\xda":
            break
        if data[at] != 0xFF or data[at + 1] == 0xFF:
            at += 1  # Pillow walks through padding byte by byte, so here it counts.
        else:
            at = _next_jpeg_segment(data, at)
    else:
        raise _too_many_segments()
    scans = 0
    for _ in range(MAX_PARTS):
        found = _JPEG_MARKER.search(data, at)
        if found is None or found[0] == b"\xff\xd9":
            return
        scans += found[0] == b"\xff\xda"
        if scans > MAX_SCANS:
            raise UnsupportedImageError(
                f"Expected a JPEG of at most {MAX_SCANS} scans. Received: one of more. Save the image anew."
            )
        at = _next_jpeg_segment(data, found.start())
    raise _too_many_segments()


def _next_jpeg_segment(data: bytes, at: int) -> int:
    """Returns where the segment ends whose marker is at `at`."""
    if data[at + 1] in _BARE_JPEG_MARKERS:
        return at + 2
    return at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))


def _too_many_segments() -> UnsupportedImageError:
    return UnsupportedImageError(
        f"Expected a JPEG of at most {MAX_PARTS} segments. Received: one of more. Save the image anew."
    )


class GifStream(io.BytesIO):
    """What Pillow reads a GIF from; ends it when there are very many blocks before the picture.

    Pillow lists the blocks of a comment and joins them, which takes 90 bytes for two of the file's. Counted are its own
    reads, two for a block, since a walk of ours could be led where Pillow does not go. The picture's data are read in
    larger pieces.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = 2 * MAX_PARTS

    def read(self, size: int | None = -1, /) -> bytes:
        """Returns the next bytes, and counts the reading of a block.

        Raises:
            UnsupportedImageError: these were too many.
        """
        if size is not None and 0 <= size <= _GIF_BLOCK_BYTES:
            self._left -= 1
            if self._left < 0:
                raise UnsupportedImageError(
                    f"Expected a GIF of at most {MAX_PARTS} blocks before its picture. Received: one of more. "
                    "Save the image anew."
                )
        return super().read(size)


def refuse_patient_tiff(tags: dict[int, int]) -> None:
    """Refuses what libtiff decodes to the end although it is damaged, with a line on stderr for each row or strip.

    These are fax pages, and YCbCr that is not converted within a JPEG: Pillow has it converted by an interface that
    skips damaged strips. Without compression, Pillow reads it by itself.
    """
    compression = tags.get(_COMPRESSION, 1)
    if compression not in _TIFF_COMPRESSIONS:
        known = ", ".join(dict.fromkeys(_TIFF_COMPRESSIONS.values()))
        raise UnsupportedImageError(
            f"Expected a TIFF of a compression for pictures ({known}). Received: compression {compression}, as "
            "fax pages have, or a rare one. Save the image anew, or as PNG."
        )
    is_ycbcr_of_jpeg = compression == 7 and tags.get(PLANAR, 1) == 1
    if tags.get(_PHOTOMETRIC) == 6 and compression != 1 and not is_ycbcr_of_jpeg:
        raise UnsupportedImageError(
            "Expected a TIFF whose YCbCr samples, if it has any, are compressed as one JPEG or not at all. Received: "
            f"such samples in compression {compression} ({_TIFF_COMPRESSIONS[compression]}). Save the image as RGB."
        )


def tiff_tags(data: bytes, directory: int) -> dict[int, int]:
    """Returns what the first directory says about compression, colours, planes and tiles, as far as it does.

    libtiff allocates a whole tile, however small the image. It takes the first of a tag's values and converts any type;
    Pillow takes the last, and skips types that it does not know. So the directory is read here, and whatever the two
    would understand differently is refused.

    Args:
        data: the file's bytes.
        directory: where its first directory begins.
    """
    order = "<" if data[:2] == b"II" else ">"
    is_big = data[2:4] == b"+\0"  # BigTIFF; Pillow reads the big-endian one as if it were none.
    start, step, value_at = (directory + 8, 20, 12) if is_big else (directory + 2, 12, 8)
    formats = {(3, 1): "H", (4, 1): "L"} | ({(16, 1): "Q"} if is_big else {})
    is_known = data[2:4] != b"\0+"
    values: dict[int, int] = {}
    try:
        (entries,) = struct.unpack_from(order + ("Q" if is_big else "H"), data, directory)
        for at in range(start, start + min(entries, (len(data) - start) // step) * step, step):
            tag, kind, count = struct.unpack_from(order + ("HHQ" if is_big else "HHL"), data, at)
            if tag in {_COMPRESSION, _PHOTOMETRIC, PLANAR, TILE_WIDTH, TILE_LENGTH}:
                value_format = formats.get((kind, count))
                is_known = is_known and value_format is not None and tag not in values
                (values[tag],) = struct.unpack_from(order + (value_format or "H"), data, at + value_at)
    except struct.error:
        is_known = False
    sides = [values[tag] for tag in (TILE_WIDTH, TILE_LENGTH) if tag in values]
    if not is_known or len(sides) == 1 or 0 in sides:
        raise UnsupportedImageError(
            "Expected a TIFF that says once, as one number, how it is compressed, coloured and laid out, and whose "
            "tiles, if it has any, have one width and one length of at least 1. Received: one that says otherwise. "
            "Save the image anew."
        )
    return values


def _start_of_scan(data: bytes) -> int:
    """Returns the offset of a JPEG's first scan, past its headers (whose thumbnails have ends of their own)."""
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return at
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker == 0xDA:
            return at
        elif marker == 0x01 or 0xD0 <= marker <= 0xD9:
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return len(data)
