from __future__ import annotations

import io
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from cv_platform import images
from cv_platform.errors import (
    EmptyImageError,
    ImageError,
    ImageTooLargeError,
    TruncatedImageError,
    UnsupportedImageError,
)
from cv_platform.images import files as image_files

LOSSLESS: dict[str, dict[str, Any]] = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {}}
FORMER = images.Preprocessing(version=2)
COMPRESSED_TIFF = {"compression": "tiff_lzw"}


def scene(height: int = 60, width: int = 80) -> np.ndarray:
    """A smooth, asymmetric picture whose red, green and blue are told apart easily."""
    y, x = np.mgrid[0:height, 0:width]
    return np.dstack([x * 255 // width, y * 255 // height, np.full_like(x, 40)]).astype(np.uint8)


def encode(image_format: str, picture: np.ndarray | Image.Image | None = None, **options: Any) -> bytes:
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(scene() if picture is None else picture)
    stream = io.BytesIO()
    picture.save(stream, format=image_format, **options)
    return stream.getvalue()


def largest_difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("image_format", LOSSLESS)
def test_decodes_lossless_formats_to_the_same_rgb(image_format: str) -> None:
    decoded = images.decode(encode(image_format, **LOSSLESS[image_format]))
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, scene())


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_decodes_jpeg_as_pillow_does(options: dict[str, Any]) -> None:
    data = encode("JPEG", **options)
    assert largest_difference(images.decode(data), np.asarray(Image.open(io.BytesIO(data)))) <= 2


def test_red_stays_red_in_every_format() -> None:
    red = np.zeros((16, 16, 3), dtype=np.uint8)
    red[..., 0] = 250
    for image_format in images.SUPPORTED_FORMATS:
        pixel = images.decode(encode(image_format, red))[8, 8].astype(int)
        assert pixel[0] > 240, image_format
        assert pixel[1:].max() < 15, image_format


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "TIFF"])
def test_takes_the_first_frame(image_format: str) -> None:
    frames = [Image.new("RGB", (10, 12), color) for color in ("white", "black")]
    data = encode(image_format, frames[0], save_all=True, append_images=frames[1:])
    assert images.decode(data).shape == (12, 10, 3)
    assert images.decode(data).min() > 250


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_applies_exif_orientation(image_format: str, orientation: int) -> None:
    if image_format == "TIFF":
        data = encode("TIFF", tiffinfo={0x0112: orientation})
    else:
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(image_format, exif=exif.tobytes(), **LOSSLESS.get(image_format, {}))
    # The meaning of the tag, by hand: rows and columns flipped or exchanged.
    upright = {
        1: scene(),
        2: scene()[:, ::-1],
        3: scene()[::-1, ::-1],
        4: scene()[::-1],
        5: scene().transpose(1, 0, 2),
        6: scene()[::-1].transpose(1, 0, 2),
        7: scene()[::-1, ::-1].transpose(1, 0, 2),
        8: scene()[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    assert largest_difference(images.decode(data), upright) <= (12 if image_format == "JPEG" else 0)
    exact = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert largest_difference(images.decode(data), exact) <= 2


def test_phone_pictures_with_a_second_picture_are_jpeg() -> None:
    data = encode("MPO", save_all=True, append_images=[Image.fromarray(255 - scene())])
    assert images.read_size(data) == ("JPEG", 60, 80)
    assert largest_difference(images.decode(data), images.decode(encode("JPEG"))) <= 8


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_grey_becomes_three_equal_channels(image_format: str) -> None:
    grey = scene()[..., 0]
    decoded = images.decode(encode(image_format, grey, **LOSSLESS.get(image_format, {})))
    np.testing.assert_array_equal(decoded, np.repeat(grey[..., None], 3, axis=2))


def alpha_options(image_format: str) -> dict[str, Any]:
    return {"lossless": True, "exact": True} if image_format == "WEBP" else {}


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF"])
def test_what_is_transparent_lies_on_white(image_format: str) -> None:
    alpha = np.tile(np.linspace(0, 255, 80).astype(np.uint8), (60, 1))
    data = encode(image_format, np.dstack([scene(), alpha]), **alpha_options(image_format))
    share = alpha[..., None].astype(float) / 255
    np.testing.assert_allclose(images.decode(data), scene() * share + 255 * (1 - share), rtol=0, atol=0.51)
    # Models of version 2 go on seeing what they were trained on.
    np.testing.assert_array_equal(images.decode(data, preprocessing=FORMER), scene())


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_drawing_in_the_alpha_channel_alone_is_seen(image_format: str, mode: str) -> None:
    is_ink = scene()[..., 0] > 100
    ink = Image.fromarray(np.where(is_ink, 255, 0).astype(np.uint8))
    picture = Image.new(mode, ink.size)
    picture.putalpha(ink)
    data = encode(image_format, picture, **alpha_options(image_format))
    np.testing.assert_array_equal(images.decode(data), np.where(is_ink, 0, 255)[..., None].repeat(3, axis=2))
    assert images.decode(data, preprocessing=FORMER).max() == 0


def test_alpha_that_the_header_of_a_webp_denies_is_none() -> None:
    data = bytearray(encode("WEBP", np.dstack([scene(), scene()[..., 0]]), quality=90))
    assert data[12:16] == b"VP8X"
    data[20] &= ~0x10
    pixels = images.decode(bytes(data)).astype(int)
    assert np.abs(pixels - scene()).mean() < 15
    np.testing.assert_array_equal(pixels, images.decode(bytes(data), preprocessing=FORMER))


@pytest.mark.parametrize("image_format", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_is_white(image_format: str) -> None:
    indices = Image.fromarray((scene()[..., 0] // 64).astype(np.uint8), mode="P")
    indices.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    data = encode(image_format, indices, transparency=2)
    colours = np.array([[10, 20, 30], [40, 50, 60], [255, 255, 255], [100, 110, 120]], dtype=np.uint8)
    np.testing.assert_array_equal(images.decode(data), colours[scene()[..., 0] // 64])
    assert images.decode(data, preprocessing=FORMER)[:, 45].tolist() == [[70, 80, 90]] * 60


def test_a_bitmap_with_an_alpha_mask_lies_on_white() -> None:
    # BITMAPV4HEADER, 32 bits by masks: one row of a transparent red and a solid green.
    masks = struct.pack("<4I", 0x00FF0000, 0x0000FF00, 0x000000FF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 2, 1, 1, 32, 3, 8, 0, 0, 0, 0) + masks + bytes(52)
    pixels = struct.pack("<II", 0x00FF0000, 0xFF00FF00)
    data = b"BM" + struct.pack("<IHHI", 122 + 8, 0, 0, 122) + header + pixels
    assert images.decode(data).tolist() == [[[255, 255, 255], [0, 255, 0]]]
    assert images.decode(data, preprocessing=FORMER).tolist() == [[[255, 0, 0], [0, 255, 0]]]


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_become_their_upper_eight(image_format: str, channels: int) -> None:
    deep = scene().astype(np.uint16) * 256 + 17
    deep = deep if channels == 3 else deep[..., 0]
    encoded, data = cv2.imencode("." + image_format.lower(), deep[..., ::-1] if channels == 3 else deep)
    assert encoded
    expected = scene() if channels == 3 else np.repeat(scene()[..., :1], 3, axis=2)
    np.testing.assert_array_equal(images.decode(data.tobytes()), expected)


def in_bits(bits: int) -> images.Preprocessing:
    return images.Preprocessing(sample_bits=bits)


def deep_png(samples: np.ndarray, *, transparent: tuple[int, ...] = (), is_interlaced: bool = False) -> bytes:
    """A PNG of 16 bits a sample: grey, grey and alpha, RGB or RGBA."""
    height, width = samples.shape[:2]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[1 if samples.ndim == 2 else samples.shape[2]]
    passes = ADAM7 if is_interlaced else [(0, 0, 1, 1)]
    parts = (samples[top::step_y, left::step_x] for left, top, step_x, step_y in passes)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for part in parts for row in part)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, is_interlaced))]
    chunks += [(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))] if transparent else []
    return png(*chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))


def deep_tiff(
    samples: np.ndarray, order: str = "<", *, photometric: int = 2, extra: int = 2, packs: bool = False, planes: int = 1
) -> bytes:
    """A TIFF of 16 bits a sample, in one strip for each plane: grey, RGB, RGBA or, with photometric 5, CMYK.

    `extra` says what the fourth sample of RGBA is: 0 nothing, 1 alpha that is multiplied in, 2 alpha.
    """
    height, width = samples.shape[:2]
    channels = 1 if samples.ndim == 2 else samples.shape[2]
    strips = [samples[..., at] for at in range(channels)] if planes == 2 and channels > 1 else [samples]
    contents = [np.ascontiguousarray(strip).astype(f"{order}u2").tobytes() for strip in strips]
    contents = [zlib.compress(content) if packs else content for content in contents]
    at, pieces = 8, [b"II*\0" if order == "<" else b"MM\0*", b""]

    def laid(content: bytes) -> int:
        nonlocal at
        pieces.append(content)
        at += len(content)
        return at - len(content)

    tags = {256: [width], 257: [height], 258: [16] * channels, 259: [8 if packs else 1]}
    tags |= {262: [photometric if channels > 1 else 1], 273: [laid(content) for content in contents], 277: [channels]}
    tags |= {278: [height], 279: [len(content) for content in contents], 284: [planes]}
    tags |= {338: [extra]} if channels == 4 and photometric == 2 else {}
    entries = b""
    for tag, values in sorted(tags.items()):
        value = struct.pack(f"{order}{len(values)}I", *values)
        entries += struct.pack(f"{order}HHI", tag, 4, len(values))
        entries += value if len(values) == 1 else struct.pack(f"{order}I", laid(value))
    pieces[1] = struct.pack(f"{order}I", laid(struct.pack(f"{order}H", len(tags)) + entries + bytes(4)))
    return b"".join(pieces)


def opencv(suffix: str, samples: np.ndarray) -> bytes:
    encoded, data = cv2.imencode(suffix, samples)
    assert encoded
    return data.tobytes()


RAMP = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)
"""256 steps of 12 bits."""


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_twelve_bits_that_are_declared_keep_all_their_levels(suffix: str, channels: int) -> None:
    data = opencv(suffix, RAMP if channels == 1 else cv2.merge([RAMP] * 3))
    steps = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    np.testing.assert_array_equal(images.decode(data, preprocessing=in_bits(12)), steps)
    np.testing.assert_array_equal(images.decode(data), steps // 16)
    found = images.read_image(data, preprocessing=in_bits(12))
    assert (found.bit_depth, found.sample_range) == (16, (0, 4080))
    # What does not lie in one sample a pixel is known by its upper bytes alone, where nobody asks for more.
    assert images.read_image(data).sample_range == ((0, 4080) if channels == 1 else (0, 4095))


def test_what_is_above_the_declared_range_is_white() -> None:
    row = np.array([[0, 15, 16, 4095, 4096, 65535]], dtype=np.uint16)
    for data in (deep_png(row), deep_tiff(row, ">"), deep_png(np.dstack([row, row, row]))):
        found = images.read_image(data, preprocessing=in_bits(12))
        assert found.pixels[0, :, 1].tolist() == [0, 0, 1, 255, 255, 255]
        assert found.sample_range == (0, 65535)


KINDS: dict[str, tuple[int, Any]] = {
    "grey PNG": (1, deep_png),
    "grey and alpha PNG": (2, deep_png),
    "RGB PNG": (3, deep_png),
    "RGBA PNG": (4, deep_png),
    "interlaced RGB PNG": (3, lambda samples: deep_png(samples, is_interlaced=True)),
    **{
        f"{name} {order} TIFF{', packed' if packs else ''}": (
            channels,
            lambda samples, order=order, packs=packs, options=options: deep_tiff(
                samples, order, packs=packs, **options
            ),
        )
        for order in "<>"
        for packs in (False, True)
        for name, channels, options in (
            ("grey", 1, {}),
            ("RGB", 3, {}),
            ("RGBA", 4, {}),
            ("RGB and more", 4, {"extra": 0}),
            ("CMYK", 4, {"photometric": 5}),
        )
    },
    **{
        f"grey, said to be in planes {order} TIFF{', packed' if packs else ''}": (
            1,
            lambda samples, order=order, packs=packs: deep_tiff(samples, order, packs=packs, planes=2),
        )
        for order in "<>"
        for packs in (False, True)
    },
    "RGB in planes < TIFF": (3, lambda samples: deep_tiff(samples, planes=2)),
    "RGB in planes > TIFF": (3, lambda samples: deep_tiff(samples, ">", planes=2)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [9, 10, 14])
def test_declared_bits_are_those_that_samples_scaled_by_hand_would_have(
    kind: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels, write = KINDS[kind]
    has_alpha = kind.startswith(("grey and", "RGBA"))
    samples = np.random.default_rng(bits).integers(0, 2**bits, (21, 34, channels), dtype=np.uint16)
    scaled = samples << (16 - bits)
    if has_alpha:  # Whose range is that of the file.
        scaled[..., -1] = samples[..., -1] = np.random.default_rng(1).integers(0, 65536, (21, 34), dtype=np.uint16)
    files = [write(part[..., 0] if channels == 1 else part) for part in (samples, scaled)]
    for limit in (10_000, 400):  # Decoded whole, and to a half of the sides.
        monkeypatch.setattr(images, "MAX_PIXELS", limit)
        declared = images.decode(files[0], max_pixels=10_000, preprocessing=in_bits(bits))
        np.testing.assert_array_equal(declared, images.decode(files[1], max_pixels=10_000))
        assert declared.shape[0] == (21 if limit == 10_000 else 11)
        assert (declared != images.decode(files[0], max_pixels=10_000)).mean() > 0.3


def test_alpha_of_declared_bits_lies_on_white_by_the_files_range() -> None:
    grey, alpha = [0, 2048, 4095, 9], [65535, 32768, 65535, 0]
    # 128 of 255 that are half opaque: (128·128 + 255·127) / 255.
    expected = [0, 191, 255, 255]
    row = np.array([list(zip(grey, alpha, strict=True))], dtype=np.uint16)
    found = images.read_image(deep_png(row), preprocessing=in_bits(12))
    assert found.pixels[0, :, 0].tolist() == expected
    assert found.sample_range == (0, 4095)
    former = images.Preprocessing(version=2, sample_bits=12)
    assert images.decode(deep_png(row), preprocessing=former)[0, :, 0].tolist() == [0, 128, 255, 0]
    # Multiplied in, as TIFF may have it: the same picture.
    multiplied = np.array([[(g * a // 65535,) * 3 + (a,) for g, a in zip(grey, alpha, strict=True)]], dtype=np.uint16)
    for packs in (False, True):
        data = deep_tiff(multiplied, extra=1, packs=packs)
        seen = images.decode(data, preprocessing=in_bits(12))[0, :, 0].astype(int)
        assert np.abs(seen - expected).max() <= 1


def test_a_transparent_colour_of_16_bits_is_compared_whole() -> None:
    grey = np.array([[16, 17, 4095]], dtype=np.uint16)
    found = images.read_image(deep_png(grey, transparent=(17,)), preprocessing=in_bits(12))
    assert found.pixels[0, :, 0].tolist() == [1, 255, 255]
    assert found.sample_range == (16, 4095)
    rgb = np.dstack([grey, grey, grey])
    found = images.read_image(deep_png(rgb, transparent=(17, 17, 17)), preprocessing=in_bits(12))
    assert found.pixels[0].tolist() == [[1, 1, 1], [255, 255, 255], [255, 255, 255]]
    assert found.sample_range == (16, 4095)
    hidden = images.read_image(deep_png(rgb[:, 1:2], transparent=(17, 17, 17)), preprocessing=in_bits(12))
    assert hidden.sample_range is None


def test_planes_of_16_bits_are_read_as_such() -> None:
    samples = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    for order in "<>":
        for packs in (False, True):
            data = deep_tiff(samples, order, planes=2, packs=packs)
            np.testing.assert_array_equal(images.decode(data), samples >> 8)
    # Pillow's decoder of these takes the upper bytes, whatever it is told.
    with pytest.raises(UnsupportedImageError, match="Received: a TIFF of compressed planes"):
        images.decode(deep_tiff(samples, planes=2, packs=True), preprocessing=in_bits(12))


@pytest.mark.parametrize("kind", ["RGB PNG", "grey and alpha PNG", "RGB < TIFF", "RGB < TIFF, packed"])
def test_a_deep_image_is_turned_by_its_exif_and_refused_where_it_ends_early(kind: str) -> None:
    channels, write = KINDS[kind]
    samples = np.random.default_rng(3).integers(0, 4096, (16, 9, channels), dtype=np.uint16)
    data = write(samples)
    for end in range(60, len(data) - (0 if kind.endswith("PNG") else 150), 97):
        with pytest.raises(ImageError):
            images.decode(data[:end], preprocessing=in_bits(12))
    if kind.endswith("PNG"):
        exif = Image.Exif()
        exif[0x0112] = 6
        chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
        written = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        turned = images.decode(data[:33] + written + data[33:], preprocessing=in_bits(12))
        np.testing.assert_array_equal(turned, np.rot90(images.decode(data, preprocessing=in_bits(12)), -1))


@pytest.mark.parametrize("image_format", images.SUPPORTED_FORMATS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_declared_bits_change_nothing_of_8_bits(image_format: str, mode: str) -> None:
    data = encode(image_format, Image.fromarray(scene()).convert(mode))
    assert images.read_image(data).sample_range is None
    np.testing.assert_array_equal(images.decode(data, preprocessing=in_bits(12)), images.decode(data))


@pytest.mark.parametrize("bits", [None, 12])
def test_refuses_samples_without_a_known_range(bits: int | None) -> None:
    data = encode("TIFF", Image.fromarray(scene()[..., 0].astype(np.float32) / 255))
    with pytest.raises(UnsupportedImageError, match="8 or 16 bits"):
        images.decode(data, preprocessing=images.Preprocessing(sample_bits=bits))


@pytest.mark.parametrize("mode", ["P", "1", "LA", "CMYK"])
def test_decodes_other_modes_as_pillow_converts_them(mode: str) -> None:
    picture = Image.fromarray(scene()).convert(mode)
    image_format = "JPEG" if mode == "CMYK" else "PNG"
    data = encode(image_format, picture)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert largest_difference(images.decode(data), expected) <= 2


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("TIFF", {}),
        ("TIFF", COMPRESSED_TIFF),
        ("BMP", {}),
    ],
)
@pytest.mark.parametrize("kept", [0.05, 0.3, 0.6, 0.95])
def test_truncated_images_are_refused(image_format: str, options: dict[str, Any], kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    data = encode(image_format, noise, **options)
    with pytest.raises(TruncatedImageError):
        images.decode(data[: int(len(data) * kept)])


JPEG_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "baseline": ("RGB", {"quality": 90}),
    "full colour": ("RGB", {"quality": 100, "subsampling": 0}),
    "progressive": ("RGB", {"progressive": True}),
    "grey": ("L", {}),
    "progressive grey": ("L", {"progressive": True}),
    "CMYK": ("CMYK", {"progressive": True}),
    "restart markers": ("RGB", {"restart_marker_rows": 1}),
}


def noisy_jpeg(kind: str, height: int = 60, width: int = 80) -> bytes:
    mode, options = JPEG_KINDS[kind]
    noise = np.random.default_rng(3).integers(0, 90, (height, width, 3), dtype=np.uint8)
    return encode("JPEG", Image.fromarray(scene(height, width) // 2 + noise).convert(mode), **options)


@pytest.mark.parametrize("kind", JPEG_KINDS)
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (61, 83)])
def test_jpeg_has_the_pixels_that_models_of_version_2_were_trained_on(kind: str, size: tuple[int, int]) -> None:
    data = noisy_jpeg(kind, *size)
    former = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    np.testing.assert_array_equal(images.decode(data, preprocessing=FORMER), former)
    np.testing.assert_array_equal(images.decode(data), former)


@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_jpeg_without_the_two_bytes_at_its_end_is_taken_and_said(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = noisy_jpeg(kind)
    assert data[-2:] == b"\xff\xd9"
    for cut in (data[:-2], data[:-1]):
        found = images.read_image(cut)
        assert found.damage == "the two bytes that mark its end are missing; every row decodes"
        np.testing.assert_array_equal(found.pixels, images.decode(data))
    for lost in (6, 40, 400):
        with pytest.raises(TruncatedImageError):
            images.decode(data[: -2 - lost])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["progressive", "progressive grey", "CMYK"])
def test_progressive_jpeg_that_ends_between_two_scans_is_refused(kind: str) -> None:
    data = noisy_jpeg(kind)
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    assert len(scans) > 3
    for at in scans[1:]:
        with pytest.raises(TruncatedImageError):
            images.decode(data[:at])


def test_jpeg_that_its_decoder_goes_on_after_is_taken_and_said(capfd: pytest.CaptureFixture[str]) -> None:
    sound = noisy_jpeg("baseline")
    start = sound.index(b"\xff\xda") + 14
    zeros = sound[: start + 300] + bytes(120) + sound[start + 420 :]
    lost = sound[: start + 300] + sound[start + 700 :]
    surplus = sound[:-2] + bytes(10) + sound[-2:]
    for damaged in (lost, surplus, zeros):
        found = images.read_image(damaged)
        assert str(found.damage).startswith("its decoder goes on after: Corrupt JPEG data")
        assert found.pixels.shape == (60, 80, 3)
    assert images.read_image(sound).damage is None
    assert images.read_image(sound + b"more").damage is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_turns_nothing(image_format: str) -> None:
    for exif in (b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"):
        data = encode(image_format, exif=exif, **LOSSLESS.get(image_format, {}))
        assert largest_difference(images.decode(data), scene()) <= 12


REDUCED: dict[str, dict[str, Any]] = LOSSLESS | {"GIF": {}, "JPEG": {"quality": 95, "subsampling": 0}}


@pytest.mark.parametrize("image_format", REDUCED)
@pytest.mark.parametrize("turn", [1, 6])
def test_images_above_the_limit_are_decoded_to_fewer_pixels(
    image_format: str, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 61×80 px to at most 400: an eighth would do for 320, a quarter for 1220.
    picture = scene(61, 80)
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encode(image_format, picture, exif=exif, **REDUCED[image_format])
    whole = images.read_image(data)
    for limit, reduction in ((61 * 80 - 1, 2), (61 * 80 // 4, 2), (61 * 80 // 4 - 1, 4), (400, 4), (300, 8), (1, 8)):
        monkeypatch.setattr(images, "MAX_PIXELS", limit)
        reduced = images.read_image(data)
        assert (reduced.height_px, reduced.width_px) == (whole.height_px, whole.width_px)
        turns = 1 if turn == 6 and image_format in {"JPEG", "WEBP"} else 0  # Pillow turns before.
        as_stored = Image.fromarray(np.ascontiguousarray(np.rot90(whole.pixels, turns)))
        means = np.rot90(np.asarray(as_stored.reduce(reduction)), -turns)
        assert largest_difference(reduced.pixels, means) <= (12 if image_format == "JPEG" else 1)
        # Neither the caller's limit nor the model's size decides: what trains on a file sees what serves it.
        np.testing.assert_array_equal(images.decode(data, max_pixels=61 * 80), reduced.pixels)
        assert images.decode(data, preprocessing=FORMER).shape == whole.pixels.shape
        with pytest.raises(ImageTooLargeError):
            images.decode(data, max_pixels=61 * 80 - 1)


def test_jpeg_with_a_thumbnail_is_refused_when_cut_after_the_thumbnails_end() -> None:
    thumbnail = encode("JPEG", scene(8, 8))
    data = encode("JPEG")
    segment = b"Exif\0\0" + thumbnail
    with_thumbnail = data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]
    assert images.decode(with_thumbnail).shape == (60, 80, 3)
    with pytest.raises(TruncatedImageError):
        images.decode(with_thumbnail[:-200])


def test_png_damaged_on_the_way_is_refused_without_a_word_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(encode("PNG"))
    data[len(data) // 2] ^= 0xFF
    for damaged in (bytes(data), encode("PNG")[:-1], encode("PNG")[:-12]):
        with pytest.raises(TruncatedImageError):
            images.decode(damaged)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_bytes_after_the_image_do_no_harm(image_format: str) -> None:
    data = encode(image_format)
    np.testing.assert_array_equal(images.decode(data + b"\0 appended"), images.decode(data))


@pytest.mark.parametrize("data", [b"hello", b"<svg/>", b"%PDF-1.7", b"\0" * 100, b"BM", b"RIFF0000WAVE"])
def test_other_bytes_are_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedImageError):
        images.read_size(data)


def test_no_bytes_are_empty() -> None:
    with pytest.raises(EmptyImageError):
        images.decode(b"")


@pytest.mark.parametrize("image_format", ["ICO", "PPM", "TGA"])
def test_formats_outside_the_policy_are_unsupported(image_format: str) -> None:
    with pytest.raises(UnsupportedImageError):
        images.decode(encode(image_format))


def no_decoder(*_: object) -> None:
    raise AssertionError("decoded")


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def test_a_palette_png_without_its_palette_is_decoded_as_ever() -> None:
    header = (b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 3, 0, 0, 0))
    data = png(header, (b"IDAT", zlib.compress(bytes(5) * 4)), (b"IEND", b""))
    np.testing.assert_array_equal(images.decode(data), images.decode(data, preprocessing=FORMER))


def png_header(width: int, height: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


def bomb_png(side: int) -> bytes:
    """A PNG header that promises side × side pixels, followed by next to nothing."""
    return png(png_header(side, side), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))


@pytest.mark.parametrize("side", [7_000, 12_000, 20_000, 60_000])
def test_bombs_are_refused_before_decoding(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", no_decoder)
    with pytest.raises(ImageTooLargeError, match="at most 40000000 pixels"):
        images.decode(bomb_png(side))


def test_the_limit_is_the_largest_size_accepted() -> None:
    data = encode("PNG")
    assert images.read_size(data, max_pixels=60 * 80) == ("PNG", 60, 80)
    with pytest.raises(ImageTooLargeError, match="80×60 = 4800"):
        images.read_size(data, max_pixels=60 * 80 - 1)


def test_animated_png_with_a_bad_filter_is_refused_without_a_crash() -> None:
    # 8×8 RGB: each row is one filter byte (0 to 4 are valid; the first row has 9) and 24 bytes.
    rows = zlib.compress(b"\x09" + bytes(24) + bytes(25) * 7)
    control = [(b"fcTL", struct.pack(">IIIIIHHBB", n, 8, 8, 0, 0, 1, 1, 0, 0)) for n in range(2)]
    data = png(
        png_header(8, 8),
        (b"acTL", struct.pack(">II", 2, 0)),
        control[0],
        (b"IDAT", rows),
        control[1],
        (b"fdAT", struct.pack(">I", 2) + rows),
        (b"IEND", b""),
    )
    # Whoever sends this to OpenCV 4.11 ends with the process, so another one does it.
    code = (
        "import sys\nfrom cv_platform import errors, images\n"
        "try:\n    images.decode(bytes.fromhex(sys.argv[1]))\n"
        "except errors.ImageError as err:\n    print(type(err).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, data.hex()], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "TruncatedImageError\n", "")


@pytest.mark.parametrize("is_deep", [False, True])
def test_animated_png_gives_its_first_frame(is_deep: bool) -> None:
    pixels = scene()[..., 0].astype(np.uint16) * 256 + 17 if is_deep else scene()
    data = encode("PNG", pixels, save_all=True, append_images=[Image.fromarray(pixels[::-1].copy())])
    assert b"acTL" in data
    expected = np.repeat(scene()[..., :1], 3, axis=2) if is_deep else scene()
    np.testing.assert_array_equal(images.decode(data), expected)


def test_jpeg_with_more_scans_than_any_encoder_writes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode("JPEG", scene()[..., 0], progressive=True)
    last = data.rindex(b"\xff\xda")
    scans = data.count(b"\xff\xda")
    assert scans > 1
    full = data[:-2] + data[last:-2] * (image_files.MAX_SCANS - scans) + data[-2:]
    assert images.read_size(full) == ("JPEG", 60, 80)
    # What follows the image's end (a phone's film) is not the decoder's.
    assert images.read_size(full + data[last:] * 200) == ("JPEG", 60, 80)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", no_decoder)
    with pytest.raises(UnsupportedImageError, match="at most 100 scans"):
        images.decode(full[:-2] + data[last:])


@pytest.mark.parametrize("part", [b"\xff\xe5\0\2", b"\xff", b"\xff\xd0", b"\xff\xf0", b"\xff\0", b"\xff\xd9"])
def test_jpeg_of_very_many_segments_is_refused_before_its_header_is_parsed(
    part: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode("JPEG")
    monkeypatch.setattr(Image, "open", no_decoder)
    with pytest.raises(UnsupportedImageError, match="at most 10000 segments"):
        images.read_size(data[:2] + b"\xff\xe5\0\2" + part * 10_001 + data[2:])


def test_jpeg_of_very_many_segments_between_its_scans_is_refused() -> None:
    data = encode("JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(UnsupportedImageError, match="at most 10000 segments"):
        images.read_size(data[:last] + b"\xff\xfe\0\2" * 10_001 + data[last:])


def test_png_of_very_many_chunks_is_refused_before_its_header_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (b"IDAT", zlib.compress(bytes(25) * 8))
    # With IHDR, IDAT and IEND, the first has as many chunks as are accepted.
    assert images.decode(png(png_header(8, 8), *[(b"prIv", b"")] * 9_997, rows, (b"IEND", b""))).shape == (8, 8, 3)
    monkeypatch.setattr(Image, "open", no_decoder)
    with pytest.raises(UnsupportedImageError, match="at most 10000 chunks"):
        images.read_size(png(png_header(8, 8), *[(b"prIv", b"")] * 9_998, rows, (b"IEND", b"")))


def test_png_data_past_the_last_row_are_not_inflated() -> None:
    # Behind some more rows, 0xFF begins a deflate block of a kind that there is none of: who inflates it, fails.
    stream = zlib.compressobj()
    rows = stream.compress((b"\0" + bytes([9] * 24)) * 8) + stream.flush(zlib.Z_FULL_FLUSH)
    surplus = stream.compress(bytes(2**20)) + stream.flush(zlib.Z_FULL_FLUSH) + b"\xff" * 2**16
    for idats in ([(b"IDAT", rows + surplus)], [(b"IDAT", rows), (b"IDAT", surplus)]):
        decoded = images.decode(png(png_header(8, 8), *idats, (b"IEND", b"")))
        np.testing.assert_array_equal(decoded, np.full((8, 8, 3), 9))


def test_png_texts_reach_no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two megabytes, which Pillow would refuse before the pixels and OpenCV would inflate after them.
    text = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 * 2**20)))
    rows = (b"IDAT", zlib.compress((b"\0" + bytes([9] * 24)) * 8))
    received = []
    original = Image.open
    monkeypatch.setattr(
        Image, "open", lambda stream, **options: received.append(stream.getvalue()) or original(stream, **options)
    )
    decoded = images.decode(png(png_header(8, 8), text, rows, *[text] * 900, (b"tEXt", b"a\0b"), (b"IEND", b"")))
    np.testing.assert_array_equal(decoded, np.full((8, 8, 3), 9))
    assert received == [png(png_header(8, 8), rows, (b"IEND", b""))]


ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
"""Each pass's first column, first row, and its steps."""
PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""A pixel's, for each colour type."""


@pytest.mark.parametrize("is_interlaced", [False, True])
def test_a_png_whose_pixels_end_early_is_refused_and_a_black_one_is_not(is_interlaced: bool) -> None:
    header = (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, int(is_interlaced)))
    # Interlaced, 15 rows of 64 pixels: 1, 1, 2, 4, 8, 16 and 32 of them in the seven passes.
    whole = bytes(64 * 3 + (15 if is_interlaced else 8))
    for row_bytes, is_whole in ((whole, True), (whole[:-1], False), (whole[:-40], False)):
        idat = zlib.compress(row_bytes)
        data = png(header, (b"IDAT", idat[:5]), (b"IDAT", idat[5:]), (b"IEND", b""))
        if is_whole:
            assert images.decode(data).max() == 0
        else:
            with pytest.raises(TruncatedImageError):
                images.decode(data)
    # What follows the last row is none of the image, nor is its checksum.
    idat = zlib.compress(whole + bytes(9000))
    longer = png(header, (b"IDAT", idat[:-1] + bytes([idat[-1] ^ 1])), (b"IEND", b""))
    assert images.decode(longer).max() == 0


PNG_KINDS = [(color, bits) for color in (0, 3) for bits in (1, 2, 4, 8)]
PNG_KINDS += [(0, 16)] + [(color, bits) for color in (2, 4, 6) for bits in (8, 16)]


@pytest.mark.parametrize("is_interlaced", [False, True])
@pytest.mark.parametrize(("color", "bits"), PNG_KINDS)
def test_a_png_of_every_kind_decodes_to_what_its_samples_say(color: int, bits: int, is_interlaced: bool) -> None:
    rng = np.random.default_rng(1)
    samples = rng.integers(0, 2**bits, (29, 37, PNG_SAMPLES[color]))
    rows = b""
    for left, top, step_x, step_y in ADAM7 if is_interlaced else [(0, 0, 1, 1)]:
        for row in samples[top::step_y, left::step_x]:
            flags = (row.reshape(-1, 1) >> np.arange(bits)[::-1]) & 1
            rows += b"\0" + np.packbits(flags.astype(np.uint8)).tobytes()
    header = (b"IHDR", struct.pack(">IIBBBBB", 37, 29, bits, color, 0, 0, int(is_interlaced)))
    palette = rng.integers(0, 256, (2**bits if color == 3 else 0, 3))
    # By the specification: 16 bits are scaled to 8 by their upper byte, fewer than 8 by repeating them.
    scaled = samples >> 8 if bits == 16 else samples * 255 // (2**bits - 1)
    opaque = np.full(samples.shape[:2], 255)
    shown: list[tuple[tuple[bytes, bytes] | None, np.ndarray, np.ndarray]] = []
    if color == 3:
        alphas = np.array([64, 128, *[255] * 254])
        colours = palette[samples[..., 0]]
        shown += [(None, colours, opaque), ((b"tRNS", b"\x40\x80"), colours, alphas[samples[..., 0]])]
        shown += [((b"tRNS", b"\0"), colours, np.where(samples[..., 0] == 0, 0, 255))]
    elif color in (0, 2):
        colours = scaled.repeat(3 if color == 0 else 1, axis=2)
        key = samples[7, 9]
        # Colours of 16 bits are compared by their upper bytes, like the pixels; grey of 16 bits by all of them.
        is_key = (scaled == scaled[7, 9] if color == 2 else samples == key).all(axis=2)
        chunk = (b"tRNS", b"".join(struct.pack(">H", int(value)) for value in key))
        shown += [(None, colours, opaque), (chunk, colours, np.where(is_key, 0, 255))]
    else:
        shown += [(None, scaled[..., :-1].repeat(3 if color == 4 else 1, axis=2), scaled[..., -1])]
    orientation = (b"eXIf", struct.pack("<4sIHHHIII", b"II*\0", 8, 1, 0x0112, 3, 1, 6, 0))
    for transparency, colours, alpha in shown:
        before = [(b"PLTE", palette.astype(np.uint8).tobytes())] if color == 3 else []
        before += [(b"gAMA", b"\0\0\x75\x30"), *([transparency] if transparency else [])]
        for last in ([], [orientation]):
            data = png(header, *before, (b"IDAT", zlib.compress(rows)), *last, (b"IEND", b""))
            share = alpha[..., None] / 255
            expected = np.floor(colours * share + 255 * (1 - share) + 0.5 + 1e-9)
            upright = np.rot90(expected, -1) if last else expected
            np.testing.assert_array_equal(images.decode(data), upright)
            # What models of version 2 were trained on came from OpenCV where the file was small.
            former = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
            np.testing.assert_array_equal(images.decode(data, preprocessing=FORMER), former)


@pytest.mark.parametrize("size", [(65_536, 1), (1, 65_536)])
def test_very_long_sides_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageTooLargeError, match="sides of at most 65535"):
        images.read_size(png(png_header(*size), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")))


def tiled_tiff(*tile_tags: tuple[int, int, int], is_big: bool = False) -> bytes:
    """A black 16×16 TIFF, compressed; each tile tag is (tag, type, value)."""
    content = zlib.compress(bytes(16 * 16))
    tags = [(256, 3, 16), (257, 3, 16), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1), *tile_tags]
    start = 24 + 20 * (len(tags) + 2) if is_big else 14 + 12 * (len(tags) + 2)
    tags += [(324, 4, start), (325, 4, len(content))]
    entry = "<HHQQ" if is_big else "<HHII"
    head = (
        b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, len(tags)) if is_big else b"II*\0" + struct.pack("<IH", 8, len(tags))
    )
    directory = b"".join(struct.pack(entry, tag, kind, 1, value) for tag, kind, value in tags)
    return (head + directory).ljust(start, b"\0") + content


@pytest.mark.parametrize("is_big", [False, True])
def test_tiles_count_as_pixels(is_big: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = tiled_tiff((322, 4, 16), (323, 3, 16), is_big=is_big)
    np.testing.assert_array_equal(images.decode(sound, max_pixels=256), np.zeros((16, 16, 3)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", no_decoder)
    with pytest.raises(ImageTooLargeError, match="20000×20000 that hold 400000000 for an image of 16×16"):
        images.decode(tiled_tiff((322, 4, 20_000), (323, 4, 20_000), is_big=is_big))
    # Two tiles of 10×16 for 16×16 pixels.
    assert images.count_decoded_pixels(tiled_tiff((322, 4, 10), (323, 3, 16), is_big=is_big)) == 2 * 10 * 16
    assert images.count_decoded_pixels(encode("PNG")) == scene().shape[0] * scene().shape[1]


@pytest.mark.parametrize("options", [{}, {"exif": b"Exif\0\0MM\0*\0\0\0\b\0\0"}], ids=["plain", "by Pillow"])
def test_a_jpeg_s_pixels_are_counted_by_its_header(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode("JPEG", **options)
    monkeypatch.setattr(ImageFile.ImageFile, "load", no_decoder)
    # Its pixels, cut off here, are the decoder's part.
    assert images.count_decoded_pixels(whole[:-40]) == 60 * 80
    with pytest.raises(ImageTooLargeError, match="80×60 = 4800"):
        images.count_decoded_pixels(whole, max_pixels=4799)


@pytest.mark.parametrize(
    "tile_tags",
    [
        [(322, 4, 20_000), (322, 4, 16), (323, 4, 16)],  # libtiff takes the first, Pillow the last.
        [(322, 17, 16), (323, 4, 16)],  # A type that libtiff knows and Pillow does not.
        [(322, 4, 16)],
        [(322, 4, 0), (323, 4, 16)],
    ],
)
def test_tiles_of_unclear_size_are_refused(tile_tags: list[tuple[int, int, int]]) -> None:
    with pytest.raises(UnsupportedImageError, match="one width and one length"):
        images.decode(tiled_tiff(*tile_tags))


def test_strips_longer_than_the_image_are_accepted() -> None:
    data = encode("TIFF", tiffinfo={278: 2**32 - 1}, compression="tiff_lzw")
    np.testing.assert_array_equal(images.decode(data), scene())


def striped_tiff(
    *tags: tuple[int, int, int], strips: int = 1, content: bytes = bytes(range(200)), is_big: bool = False
) -> bytes:
    """8×65535 px, each strip of which is the same noise; each tag is (tag, type, value)."""
    count, entry = ("<Q", "<HHQQ") if is_big else ("<H", "<HHII")
    at = (16 if is_big else 8) + len(content)
    offsets, sizes = struct.pack("<I", at - len(content)) * strips, struct.pack("<I", len(content)) * strips
    rows = -(-65_535 // strips)
    entries = [(tag, kind, 1, value) for tag, kind, value in [(256, 3, 8), (257, 3, 65_535), (278, 3, rows), *tags]]
    if strips == 1:
        entries += [(273, 4, 1, at - len(content)), (279, 4, 1, len(content))]
    else:
        entries += [(273, 4, strips, at), (279, 4, strips, at + len(offsets))]
        content += offsets + sizes
    directory = (16 if is_big else 8) + len(content)
    head = b"II+\0" + struct.pack("<HHQ", 8, 0, directory) if is_big else b"II*\0" + struct.pack("<I", directory)
    written = b"".join(struct.pack(entry, *each) for each in sorted(entries, key=lambda each: each[0]))
    return head + content + struct.pack(count, len(entries)) + written + bytes(8)


@pytest.mark.parametrize("is_big", [False, True])
@pytest.mark.parametrize("compression", [2, 3, 4, 32771])
def test_fax_pages_are_refused_without_a_word_on_stderr(
    compression: int, is_big: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    data = striped_tiff((258, 3, 1), (259, 3, compression), (262, 3, 1), (277, 3, 1), is_big=is_big)
    assert len(data) < 500
    with pytest.raises(UnsupportedImageError, match=rf"compression for pictures.*Received: compression {compression},"):
        images.decode(data)
    assert capfd.readouterr() == ("", "")


def test_whole_fax_pages_are_refused_too() -> None:
    with pytest.raises(UnsupportedImageError, match="compression 4,"):
        images.read_size(encode("TIFF", Image.fromarray(scene()).convert("1"), compression="group4"))


@pytest.mark.parametrize(
    "compressions",
    [
        [(259, 3, 3), (259, 3, 5)],  # libtiff takes the first, Pillow the last.
        [(259, 17, 3)],  # A type that libtiff knows and Pillow does not.
    ],
)
def test_tiffs_of_unclear_compression_are_refused(
    compressions: list[tuple[int, int, int]], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnsupportedImageError, match="says once, as one number, how it is compressed"):
        images.decode(striped_tiff((258, 3, 1), *compressions, (262, 3, 1), (277, 3, 1)))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("compression", [5, 8, 32773, 32946, 34925, 50000])
def test_damaged_strips_are_refused_without_a_word_on_stderr(
    compression: int, capfd: pytest.CaptureFixture[str]
) -> None:
    # Each strip is one byte: too little in any compression. YCbCr is what libtiff would go on with.
    for photometric, refused_as in ((1, TruncatedImageError), (6, UnsupportedImageError)):
        samples = 3 if photometric == 6 else 1
        tags = [(258, 3, 8), (259, 3, compression), (262, 3, photometric), (277, 3, samples)]
        with pytest.raises(refused_as):
            images.decode(striped_tiff(*tags, strips=65_535, content=b"\x80\0"))
    assert capfd.readouterr() == ("", "")


def test_ycbcr_in_a_jpeg_in_a_tiff_is_accepted() -> None:
    data = encode("TIFF", Image.fromarray(scene()).convert("YCbCr"), compression="jpeg", quality=95)
    assert largest_difference(images.decode(data), scene()) <= 20


def gif_with(extensions: bytes) -> bytes:
    """A GIF with these bytes between its colours and its picture."""
    data = encode("GIF")
    end = 13 + (3 << (data[10] & 7) + 1)
    return data[:end] + extensions + data[end:]


@pytest.mark.parametrize(
    "extensions",
    [
        b"\x21\xfe" + b"\x01a" * 300_000 + b"\0",
        b"\x21\xfe\x01a\0" * 150_000,
        b"\x21\xff\0" + b"\x01," * 10 + b"\0" + b"\x21\xfe\x01a\0" * 150_000,  # Pillow reads on after an empty block.
        b"\x21\xf9\4\0\0\0\0\0" * 100_000,
        b"\0" * 500_000,
    ],
    ids=["blocks", "comments", "disguised", "controls", "padding"],
)
def test_gif_of_very_many_blocks_before_its_picture_is_refused_without_its_cost(extensions: bytes) -> None:
    data = gif_with(extensions)
    tracemalloc.start()
    try:
        with pytest.raises(UnsupportedImageError, match="at most 10000 blocks"):
            images.decode(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * 2**20


def test_gif_of_many_blocks_is_accepted() -> None:
    plain, comment = encode("GIF"), b"\x21\xfe" + b"\x01a" * 9_900 + b"\0"
    np.testing.assert_array_equal(images.decode(gif_with(comment)), images.decode(plain))
    # What follows the first picture is not read.
    np.testing.assert_array_equal(images.decode(plain[:-1] + comment * 3 + plain[-1:]), images.decode(plain))


@pytest.mark.parametrize(
    ("kind", "content"),
    [(b"tRNS", bytes(6)), (b"eXIf", b"junk"), (b"PLTE", bytes(6))],
)
@pytest.mark.parametrize("is_before", [True, False])
def test_repeated_png_chunks_are_read_without_a_word_on_stderr(
    kind: bytes, content: bytes, is_before: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    repeated, rows = [(kind, content)] * 5_000, (b"IDAT", zlib.compress((b"\0" + bytes([9] * 24)) * 8))
    chunks = [*repeated, rows] if is_before else [rows, *repeated]
    decoded = images.decode(png(png_header(8, 8), *chunks, (b"IEND", b"")))
    np.testing.assert_array_equal(decoded, np.full((8, 8, 3), 9))
    assert capfd.readouterr() == ("", "")


def test_the_first_orientation_of_a_png_counts() -> None:
    turns = [(b"eXIf", struct.pack("<4sIHHHIII", b"II*\0", 8, 1, 0x0112, 3, 1, turn, 0)) for turn in (6, 1)]
    rows = (b"IDAT", zlib.compress((b"\0" + bytes(24)) * 4))
    assert images.decode(png(png_header(8, 4), *turns, rows, (b"IEND", b""))).shape == (8, 4, 3)


def test_messages_keep_opencvs_text_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise cv2.error("OpenCV(4.11.0) /io/opencv/modules/imgcodecs/src/loadsave.cpp:798: error")

    monkeypatch.setattr(cv2, "imdecode", refuse)
    data = encode("BMP")
    with pytest.raises(TruncatedImageError) as raised:
        images.decode(data)
    assert str(raised.value) == (
        f"Expected a complete BMP. Received: {len(data)} bytes that its decoder refuses. Send the file again."
    )
    assert isinstance(raised.value.__cause__, cv2.error)


@pytest.mark.parametrize("image_format", images.SUPPORTED_FORMATS)
def test_decoding_reads_the_header_once(image_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(image_format)
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **options: opened.append(1) or original(*args, **options))
    found = images.read_image(data)
    # Of a JPEG with nothing in its header but what its pixels need, Pillow knows nothing more.
    assert (found.format, len(opened)) == (image_format, int(image_format != "JPEG"))
    assert (found.height_px, found.width_px, found.bit_depth, found.damage) == (60, 80, 8, None)
    np.testing.assert_array_equal(found.pixels, images.decode(data))


def read_or_error(data: bytes, **options: Any) -> tuple[Any, ...]:
    """What `read_image` says, by fields, or the type of its error."""
    try:
        found = images.read_image(data, **options)
    except ImageError as err:
        return (type(err).__name__,)
    fields = (found.format, found.height_px, found.width_px, found.bit_depth, found.channels, found.orientation)
    return (*fields, found.damage, found.pixels.shape, found.pixels.tobytes())


PLAIN = {
    "baseline": {},
    "all the colours": {"subsampling": 0},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "a comment": {"comment": b"by hand"},
    "grey": {},
    "with EXIF": {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"},
    "CMYK": {},
}
OTHERS = {"with EXIF", "CMYK"}


def jpeg_of_kind(kind: str, height: int = 20, width: int = 32) -> bytes:
    picture = Image.fromarray(scene(height, width)).convert({"grey": "L", "CMYK": "CMYK"}.get(kind, "RGB"))
    return encode("JPEG", picture, quality=90, **PLAIN[kind])


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_jpeg_is_read_without_pillow_and_as_with_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = jpeg_of_kind(kind)
    assert (image_files.plain_jpeg_header(data) is None) == (kind in OTHERS)
    found = read_or_error(data)
    monkeypatch.setattr(images, "plain_jpeg_header", lambda data: None)
    assert found == read_or_error(data)


@given(
    kind=st.sampled_from(sorted(PLAIN)),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3),
    kept=st.one_of(st.just(1.0), st.floats(0.02, 1.0)),
    max_pixels=st.sampled_from([600, 10_000]),
)
def test_a_damaged_jpeg_is_judged_without_pillow_as_with_it(
    kind: str, damage: list[tuple[float, int]], kept: float, max_pixels: int
) -> None:
    data = bytearray(jpeg_of_kind(kind))
    for place, value in damage:
        data[int(place * (len(data) - 1))] = value
    data = bytes(data[: int(len(data) * kept)])
    found = read_or_error(data, max_pixels=max_pixels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "plain_jpeg_header", lambda data: None)
        assert found == read_or_error(data, max_pixels=max_pixels)


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize(("sides", "reduction"), [((399, 400), 2), ((97, 128), 1), ((401, 770), 4)])
def test_an_overview_of_a_jpeg_is_smaller_and_says_the_same(kind: str, sides: tuple[int, int], reduction: int) -> None:
    data = jpeg_of_kind(kind, *sides)
    whole, overview = images.read_image(data), images.read_image(data, overview_px=100)
    assert replace(overview, pixels=whole.pixels) == whole
    assert overview.pixels.shape == (*(-(-side // reduction) for side in whole.pixels.shape[:2]), 3)
    expected, found = (
        cv2.resize(
            np.asarray(cv2.cvtColor(image.pixels, cv2.COLOR_RGB2GRAY)), (16, 16), interpolation=cv2.INTER_AREA
        ).astype(int)
        for image in (whole, overview)
    )
    assert np.abs(found - expected).max() <= 4, "the scene has a step of 16 levels from cell to cell"


@given(
    kind=st.sampled_from(sorted(PLAIN)),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3),
    kept=st.one_of(st.just(1.0), st.floats(0.02, 1.0)),
)
def test_an_overview_finds_the_damage_that_all_of_it_has(
    kind: str, damage: list[tuple[float, int]], kept: float
) -> None:
    data = bytearray(jpeg_of_kind(kind))
    for place, value in damage:
        data[int(place * (len(data) - 1))] = value
    data = bytes(data[: int(len(data) * kept)])
    for least_px in (4, 64):
        assert read_or_error(data, overview_px=least_px)[:7] == read_or_error(data)[:7]


def test_what_a_decoder_did_not_reach_is_black_and_not_what_the_memory_held() -> None:
    data = jpeg_of_kind("progressive")
    scan = data.index(b"\xff\xda")
    damaged = data[: scan + 16] + b"\xff" + data[scan + 17 :]  # A marker that no decoder knows, in the first scan.
    held = [np.full((20, 32, 3), 93, np.uint8) for _ in range(50)]
    del held
    found = images.read_image(damaged)
    assert found.damage is not None
    assert not found.pixels.any()


def test_errors_carry_their_http_status() -> None:
    errors = (EmptyImageError, TruncatedImageError, UnsupportedImageError, ImageTooLargeError)
    assert [error.status_code for error in errors] == [400, 400, 415, 413]


@given(
    image_format=st.sampled_from(images.SUPPORTED_FORMATS),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8),
    kept=st.floats(0.02, 1.0),
)
def test_damaged_bytes_decode_or_raise_an_image_error(
    image_format: str, damage: list[tuple[float, int]], kept: float
) -> None:
    data = bytearray(encode(image_format, scene(12, 16)))
    for place, value in damage:
        data[int(place * (len(data) - 1))] = value
    try:
        decoded = images.decode(bytes(data[: int(len(data) * kept)]), max_pixels=10_000)
    except ImageError:
        return
    assert decoded.dtype == np.uint8
    assert decoded.shape[2] == 3


def test_shrinking_averages_the_area() -> None:
    image = (np.arange(4 * 4 * 3, dtype=np.uint8) * np.uint8(5)).reshape(4, 4, 3)
    blocks = image.reshape(2, 2, 2, 2, 3).mean(axis=(1, 3))
    assert largest_difference(images.resize(image, (2, 2)), np.round(blocks)) <= 1


def test_growing_interpolates_between_pixel_centres() -> None:
    image = np.zeros((1, 2, 3), dtype=np.uint8)
    image[0, 1] = 100
    # Centres of four output pixels lie at -0.25, 0.25, 0.75 and 1.25 input pixels.
    assert images.resize(image, (1, 4))[0, :, 0].tolist() == [0, 25, 75, 100]


def test_resize_takes_height_before_width_and_keeps_a_fitting_image() -> None:
    image = scene(30, 20)
    assert images.resize(image, (10, 40)).shape == (10, 40, 3)
    assert images.resize(image, (30, 20)) is image


def test_crop_keeps_the_middle_and_pad_keeps_all_of_it_between_grey() -> None:
    image = np.zeros((2, 8, 3), dtype=np.uint8)
    image[:, 3:5] = 200
    image[:, :3] = 100
    crop, pad = (images.resize(image, (2, 2), framing=framing) for framing in ("crop", "pad"))
    assert crop[:, :, 0].tolist() == [[200, 200], [200, 200]]
    assert pad.shape == (2, 2, 3)
    pad = images.resize(image, (8, 8), framing="pad")
    assert (pad[:3] == images.PADDING_GREY).all()
    assert (pad[5:] == images.PADDING_GREY).all()
    np.testing.assert_array_equal(pad[3:5], image)


@pytest.mark.parametrize("framing", images.FRAMINGS)
def test_every_framing_bears_the_oddest_proportions(framing: images.Framing) -> None:
    for shape in ((1, 65_535), (65_535, 1), (1, 1), (37, 41)):
        framed = images.resize(np.full((*shape, 3), 9, dtype=np.uint8), (24, 16), framing=framing)
        assert framed.shape == (24, 16, 3)
        assert (framed == 9).any()


def test_preprocess_is_decode_then_resize() -> None:
    data = encode("PNG")
    np.testing.assert_array_equal(images.preprocess(data, (16, 24)), images.resize(scene(), (16, 24)))


def test_hash_follows_size_and_policy() -> None:
    first = images.preprocessing_hash((16, 24))
    assert first == images.preprocessing_hash((16, 24))
    assert first != images.preprocessing_hash((24, 16))
    assert first != images.preprocessing_hash((16, 24), FORMER)
    assert len({images.preprocessing_hash((16, 24), images.Preprocessing(framing=one)) for one in images.FRAMINGS}) == 3


def test_hashes_are_those_of_earlier_releases_unless_bits_are_declared() -> None:
    # As 7107123 computed them.
    assert images.preprocessing_hash((16, 24)) == "02c1caf646f671ed"
    assert images.preprocessing_hash((16, 24), images.Preprocessing(framing="crop")) == "61566e16986fea0f"
    hashes = {images.preprocessing_hash((16, 24), in_bits(bits)): bits for bits in images.SAMPLE_BITS}
    assert len(hashes) == 7
    assert "02c1caf646f671ed" not in hashes
    for known, bits in hashes.items():
        assert images.find_preprocessing(known, (16, 24)) == in_bits(bits)


def test_the_version_of_a_hash_is_found_again() -> None:
    # As the release that trained with version 2 computed it.
    assert images.find_preprocessing("ff8a83c1884f0a0c", (16, 24)) == images.Preprocessing(version=2)
    cropped = images.preprocessing_hash((16, 24), images.Preprocessing(framing="crop"))
    assert images.find_preprocessing(cropped, (16, 24)) == images.Preprocessing(version=3, framing="crop")
    assert images.find_preprocessing("0" * 16, (16, 24)) is None
    with pytest.raises(ValueError, match="one of the versions"):
        images.decode(encode("PNG"), preprocessing=images.Preprocessing(version=1))


def test_decoding_in_threads_leaves_the_filters_of_warnings_alone() -> None:
    data = encode("PNG", np.zeros((9, 9, 3), np.uint8))
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(images.decode, [data] * 400))
    assert warnings.filters == before
