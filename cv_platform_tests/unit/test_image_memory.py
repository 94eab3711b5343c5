"""How much memory an image takes on its way through its decoder: what the limit of pixels is worth."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

SIDE_PX = 2_000
MOST_BYTES = 13
"""For each pixel, as docs/reference/service.md says. Nothing needs more than a progressive JPEG of four channels (two
bytes for each of its coefficients, and four), or an animated WebP with alpha (two canvases of four, and four)."""
SLACK_BYTES = 4 * 2**20
"""Tables, buffers of a few rows, code that was not needed before."""
PROGRAM = """
import os, sys
from pathlib import Path
from trials.soak.workers import forget_peak_memory, peak_memory_bytes
from cv_platform import images

def decode(data):
    return images.decode(data, preprocessing=images.Preprocessing(sample_bits=12))

images.MAX_PIXELS = int(sys.argv.pop())
small, large = (Path(name).read_bytes() for name in sys.argv[1:])
decode(small)
forget_peak_memory(os.getpid())
before = peak_memory_bytes(os.getpid())
decode(large)
print(peak_memory_bytes(os.getpid()) - before)
"""


def picture(side_px: int, mode: str) -> Image.Image:
    y, x = np.mgrid[0:side_px, 0:side_px]
    return Image.fromarray(np.dstack([x & 255, y & 255, (x + y) & 255]).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize(
    ("image_format", "mode", "options"),
    [
        ("JPEG", "CMYK", {"progressive": True}),
        ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
        ("PNG", "RGBA", {}),
        ("PNG", "RGB", {"save_all": True}),
        ("WEBP", "RGBA", {"quality": 20, "method": 0}),
        ("WEBP", "RGB", {"quality": 20, "method": 0, "save_all": True}),
        ("WEBP", "RGBA", {"quality": 20, "method": 0, "save_all": True}),
        ("BMP", "RGB", {}),
        ("GIF", "P", {}),
        ("TIFF", "RGBA", {"compression": "tiff_lzw"}),
        ("TIFF", "1", {"compression": "tiff_lzw"}),
    ],
)
def test_decoding_takes_at_most_thirteen_bytes_a_pixel(
    tmp_path: Path, image_format: str, mode: str, options: dict[str, Any]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # Turned by 90°, which takes a second image where the format has such a thing.
    files: list[Path] = []
    for side_px in (20, SIDE_PX):
        image, stream = picture(side_px, mode), io.BytesIO()
        frames = {"append_images": [image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]} if "save_all" in options else {}
        image.save(stream, image_format, exif=exif, **options, **frames)
        files.append(tmp_path / f"{side_px}")
        files[-1].write_bytes(stream.getvalue())
    assert taken_bytes(files, large_from=SIDE_PX**2) <= MOST_BYTES * SIDE_PX**2 + SLACK_BYTES


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_samples_of_declared_bits_take_no_more(tmp_path: Path, suffix: str) -> None:
    files = [tmp_path / "20", tmp_path / f"{SIDE_PX}"]
    for file in files:
        side_px = int(file.name)
        deep = np.asarray(picture(side_px, "RGBA")).astype(np.uint16) * 16
        data = cv2.imencode(suffix, deep[..., : 4 if suffix == ".png" else 3])[1].tobytes()
        if suffix == ".png":
            exif = b"eXIf" + struct.pack("<4sIHHHIII", b"II*\0", 8, 1, 0x0112, 3, 1, 6, 0)
            chunk = struct.pack(">I", len(exif) - 4) + exif + struct.pack(">I", zlib.crc32(exif))
            data = data[:33] + chunk + data[33:]
        file.write_bytes(data)
    assert taken_bytes(files, large_from=SIDE_PX**2) <= MOST_BYTES * SIDE_PX**2 + SLACK_BYTES


def taken_bytes(files: list[Path], *, large_from: int) -> int:
    command = [sys.executable, "-c", PROGRAM, *map(str, files), str(large_from)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)


@pytest.mark.parametrize(("image_format", "most_bytes"), [("JPEG", 1), ("PNG", 5)])
def test_a_large_image_takes_no_room_for_all_of_its_pixels(tmp_path: Path, image_format: str, most_bytes: int) -> None:
    files = [tmp_path / "20", tmp_path / "2000"]
    for file in files:
        picture(int(file.name), "RGB").save(file, image_format)
    # JPEG is reduced while it is decoded, PNG afterwards, from four bytes a pixel.
    assert taken_bytes(files, large_from=SIDE_PX**2 // 16) <= most_bytes * SIDE_PX**2 + SLACK_BYTES
