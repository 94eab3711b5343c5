from __future__ import annotations

import zlib

import pytest

from cv_platform.images import SUPPORTED_FORMATS, decode, read_size
from trials.hostile_files import bombs, polyglots, real_images
from trials.mutations import hostile_upload, with_right_checksums


def test_real_images_are_what_the_service_takes() -> None:
    formats = set()
    for name, content in real_images().items():
        image_format, height, width = read_size(content)
        formats.add(image_format)
        turned = name in {"jpeg-exif", "webp-exif"}
        assert (height, width) == (48, 64)
        assert decode(content).shape == ((64, 48, 3) if turned else (48, 64, 3)), name
    assert formats == set(SUPPORTED_FORMATS)


def test_an_interlaced_png_written_by_hand_shows_the_same_picture() -> None:
    images = real_images()
    assert (decode(images["png-interlaced"]) == decode(images["png"])).all()


def test_prepared_files_fit_into_an_upload_and_are_all_different() -> None:
    files = [*bombs().values(), *polyglots().values()]
    assert len(set(files)) == len(files) > 40
    assert max(map(len, files)) < 10_000_000


def test_the_prepared_files_are_each_sent_once_undamaged() -> None:
    prepared = len(bombs()) + len(polyglots())
    sent = {hostile_upload(3, 20 * number).content for number in range(prepared)}
    assert sent == {*bombs().values(), *polyglots().values()}


def test_uploads_depend_on_seed_and_number_alone() -> None:
    backwards = [hostile_upload(5, number) for number in reversed(range(40))]
    assert backwards[::-1] == [hostile_upload(5, number) for number in range(40)]
    names = [hostile_upload(seed, number).name for seed in (5, 6) for number in range(40)]
    assert len(set(names)) == 80
    assert all(name.startswith(f"{5 + index // 40}-{index % 40}-") for index, name in enumerate(names))


def test_repaired_checksums_fit_the_damaged_chunks() -> None:
    png = bytearray(real_images()["png"])
    png[20] ^= 1  # A bit of the width.
    repaired = with_right_checksums(bytes(png))
    assert int.from_bytes(repaired[29:33], "big") == zlib.crc32(repaired[12:29])
    assert repaired[:29] == bytes(png[:29])


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n" + b"\xff" * 30])
def test_what_has_no_chunks_stays_as_it_is(content: bytes) -> None:
    assert with_right_checksums(content) == content
