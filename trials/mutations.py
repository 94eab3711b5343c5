"""Damaged uploads without end, each a function of a seed and a number: what failed once can be sent again.

`hostile_upload(seed, number)` takes a real image of `hostile_files` (or, now and then, a bomb or a polyglot), and
damages it once to four times: bits, runs, lengths, sides, order. A third of the damaged PNGs get checksums that fit
again, so that their content meets the decoder and not only the walk over the chunks.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trials.hostile_files import bombs, jpeg_with_size, png_with_size, polyglots, real_images

_ODD_NUMBERS = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFF0, 65_536, 40_000_001)
_ODD_SIDES = (0, 1, 3, 47, 65, 1_000, 6_000, 16_384, 65_500, 65_535)
_ODD_BYTES = (0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF)
_MOST_DAMAGE = 4
_PREPARED_EVERY = 20
"""One upload of so many is a bomb or a polyglot, in turn, every second of them undamaged."""


@dataclass(frozen=True)
class HostileUpload:
    """One file to send."""

    name: str
    """Says what it was made of, and how to make it again."""
    content: bytes


def hostile_upload(seed: int, number: int) -> HostileUpload:
    """Returns upload `number` of the sequence `seed`; the same for the same two, on any machine."""
    random = np.random.default_rng((seed, number))
    if number % _PREPARED_EVERY == 0:
        prepared = {f"bomb-{name}": data for name, data in bombs().items()}
        prepared |= {f"polyglot-{name}": data for name, data in polyglots().items()}
        turn, index = divmod(number // _PREPARED_EVERY, len(prepared))
        name, content = sorted(prepared.items())[index]
        if turn == 0:
            return HostileUpload(f"{seed}-{number}-{name}", content)
    else:
        images = sorted(real_images().items())
        name, content = images[int(random.integers(len(images)))]
    done: list[str] = []
    for _ in range(int(random.integers(1, _MOST_DAMAGE + 1))):
        damage = _DAMAGES[int(random.integers(len(_DAMAGES)))]
        content = damage(content, random)
        done.append(damage.__name__.strip("_"))
    if content.startswith(b"\x89PNG") and random.random() < 1 / 3:
        content = with_right_checksums(content)
        done.append("checksums")
    return HostileUpload(f"{seed}-{number}-{name}-{'-'.join(done)}", content)


def prepare() -> None:
    """Makes what all uploads are made of, which takes seconds; else the first of them do it."""
    for make in (real_images, bombs, polyglots):
        make()


def with_right_checksums(png: bytes) -> bytes:
    """Returns a PNG with the checksum of each chunk computed anew, as far as the chunks can be walked."""
    data, at = bytearray(png), 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            break
        data[end - 4 : end] = struct.pack(">I", zlib.crc32(data[at + 4 : end - 4]))
        at = end
    return bytes(data)


def _place(data: bytes, random: np.random.Generator) -> int:
    """Chooses a place, every second time among the first 64 bytes: headers decide what happens."""
    limit = min(len(data), 64) if random.random() < 0.5 else len(data)
    return int(random.integers(max(limit, 1)))


def _flip_bits(data: bytes, random: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(int(random.integers(1, 33)) if changed else 0):
        changed[_place(data, random)] ^= 1 << int(random.integers(8))
    return bytes(changed)


def _set_bytes(data: bytes, random: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(int(random.integers(1, 9)) if changed else 0):
        changed[_place(data, random)] = _ODD_BYTES[int(random.integers(len(_ODD_BYTES)))]
    return bytes(changed)


def _cut_off(data: bytes, random: np.random.Generator) -> bytes:
    return data[: int(random.integers(len(data) + 1))]


def _drop_run(data: bytes, random: np.random.Generator) -> bytes:
    at = _place(data, random)
    return data[:at] + data[at + int(random.integers(1, 65)) :]


def _repeat_run(data: bytes, random: np.random.Generator) -> bytes:
    at, length = _place(data, random), int(random.integers(1, 257))
    return data[:at] + data[at : at + length] * int(random.integers(2, 40)) + data[at + length :]


def _insert_noise(data: bytes, random: np.random.Generator) -> bytes:
    at = _place(data, random)
    return data[:at] + random.bytes(int(random.integers(1, 257))) + data[at:]


def _splice(data: bytes, random: np.random.Generator) -> bytes:
    images = sorted(real_images().items())
    other = images[int(random.integers(len(images)))][1]
    return data[: int(random.integers(len(data) + 1))] + other[int(random.integers(len(other))) :]


def _odd_number(data: bytes, random: np.random.Generator) -> bytes:
    """Writes a number that lengths and offsets are not made for, in either byte order, in two or four bytes."""
    value = _ODD_NUMBERS[int(random.integers(len(_ODD_NUMBERS)))]
    width = int(random.choice((2, 4)))
    order = "big" if random.random() < 0.5 else "little"
    at = _place(data, random)
    return data[:at] + (value % 256**width).to_bytes(width, order) + data[at + width :]  # type: ignore[arg-type]


def _odd_sides(data: bytes, random: np.random.Generator) -> bytes:
    width, height = (_ODD_SIDES[int(i)] for i in random.integers(len(_ODD_SIDES), size=2))
    if data.startswith(b"\x89PNG") and len(data) > 33:
        return png_with_size(data, width, height)
    if data.startswith(b"\xff\xd8"):
        return jpeg_with_size(data, width, height)
    if data.startswith(b"GIF8"):
        return data[:6] + struct.pack("<HH", width, height) + data[10:]
    if data.startswith(b"BM"):
        return data[:18] + struct.pack("<ii", width, int(random.choice((-1, 1))) * height) + data[26:]
    return _odd_number(data, random)


def _swap_chunks(data: bytes, random: np.random.Generator) -> bytes:
    """Exchanges two runs, as if parts of the file had arrived in another order."""
    if len(data) < 32:
        return data[::-1]
    first, second, third = sorted(int(i) for i in random.integers(len(data), size=3))
    return data[:first] + data[second:third] + data[first:second] + data[third:]


def _append_noise(data: bytes, random: np.random.Generator) -> bytes:
    return data + random.bytes(int(random.integers(1, 4097)))


_DAMAGES: tuple[Callable[[bytes, np.random.Generator], bytes], ...] = (
    _flip_bits,
    _set_bytes,
    _cut_off,
    _drop_run,
    _repeat_run,
    _insert_noise,
    _splice,
    _odd_number,
    _odd_sides,
    _swap_chunks,
    _append_noise,
)
