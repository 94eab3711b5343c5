"""Files that are no good images, by what is wrong with them: a suffix, and a function of a generator to the bytes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image


def _pixels(generator: np.random.Generator, height: int = 48, width: int = 64) -> np.ndarray:
    coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def _encoded(suffix: str, pixels: np.ndarray) -> bytes:
    return cv2.imencode(suffix, pixels)[1].tobytes()


def _cut(suffix: str, part: float) -> Callable[[np.random.Generator], bytes]:
    def make(generator: np.random.Generator) -> bytes:
        whole = _encoded(suffix, _pixels(generator))
        return whole[: int(len(whole) * part)]

    return make


def _flipped(generator: np.random.Generator) -> bytes:
    content = bytearray(_encoded(".png", _pixels(generator)))
    content[len(content) // 2] ^= 0xFF
    return bytes(content)


def _huge_header(generator: np.random.Generator) -> bytes:
    content = _encoded(".png", _pixels(generator))
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def _animated(generator: np.random.Generator) -> bytes:
    first, second = (Image.fromarray(_pixels(generator)) for _ in range(2))
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=[second], duration=100)
    return file.getvalue()


def _constant(generator: np.random.Generator) -> bytes:
    return _encoded(".png", np.full((48, 64, 3), generator.integers(0, 256), np.uint8))


def _narrow(generator: np.random.Generator) -> bytes:
    return _encoded(".png", _pixels(generator)[..., 0].astype(np.uint16) * 16)


BAD_FILES: dict[str, tuple[str, Callable[[np.random.Generator], bytes]]] = {
    "empty": (".png", lambda _: b""),
    "text": (".jpg", lambda generator: b"<html>not found</html>" + generator.bytes(4).hex().encode()),
    "cut PNG": (".png", _cut(".png", 0.5)),
    "cut JPEG": (".jpg", _cut(".jpg", 0.6)),
    "flipped byte": (".png", _flipped),
    "one pixel": (".png", lambda generator: _encoded(".png", _pixels(generator)[:1, :1])),
    "a line": (".png", lambda generator: _encoded(".png", _pixels(generator, 3, 600))),
    "header of 3.6 gigapixels": (".png", _huge_header),
    "animated": (".gif", _animated),
    "one colour": (".png", _constant),
    "12 of 16 bits": (".png", _narrow),
    "PNG called JPEG": (".jpg", lambda generator: _encoded(".png", _pixels(generator))),
}
