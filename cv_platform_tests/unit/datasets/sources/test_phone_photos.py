from __future__ import annotations

import base64
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cv_platform.datasets.importing import ImportRules, import_dataset
from cv_platform.datasets.repository import read_version
from cv_platform.datasets.sources import staging, tree
from cv_platform.datasets.sources.phone_photos import decodes, is_phone_photo, to_jpeg
from cv_platform.errors import InvalidDatasetError
from cv_platform_tests.support.pictures import write_pictures

# 48×32, red on the left and blue on the right; libde265 decodes, and nothing here encodes HEVC.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAX1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAA"
    "ACJpbG9jAAAAAERAAAEAAQAAAAABoQABAAAAAAAAAC4AAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRt"
    "AAAAAAABAAAA/WlwcnAAAADdaXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMA"
    "AAMAHroCQGEAAQAqQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5j"
    "bHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xhcAAAADAAAAABAAAAIAAAAAH////wAAAAAv///+AAAAACAAAAEHBp"
    "eGkAAAAAAwgICAAAABhpcG1hAAAAAAAAAAEAAQWBAgMFhAAAADZtZGF0AAAAKigBrxmA94RJf+cg/nkX8FBr7X7t2tsq/HCPXJMe"
    "WyO/GvQwAAu43G23gA=="
)


def write_avif(path: Path, image: np.ndarray, **options: object) -> Path:
    Image.fromarray(image).save(path, "AVIF", quality=90, **options)
    return path


def test_a_heic_becomes_the_jpeg_that_it_shows(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(HEIC)
    assert is_phone_photo(tmp_path / "a.heic")
    assert to_jpeg(tmp_path / "a.heic", tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as picture:
        assert (picture.format, picture.size) == ("JPEG", (48, 32))
        pixels = np.asarray(picture).astype(int)
    assert np.abs(pixels[:, :20] - (255, 0, 0)).max() <= 10
    assert np.abs(pixels[:, 28:] - (0, 0, 255)).max() <= 10


def test_an_avif_becomes_an_upright_jpeg_on_white(tmp_path: Path) -> None:
    image = np.zeros((32, 64, 4), dtype=np.uint8)
    image[:, :32] = (0, 128, 0, 255)  # The right half is transparent.
    exif = Image.Exif()
    exif[0x0112] = 6  # To be turned clockwise: what was left is above.
    source = write_avif(tmp_path / "a.avif", image, exif=exif.tobytes())
    assert to_jpeg(source, tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as picture:
        pixels = np.asarray(picture).astype(int)
    assert pixels.shape == (64, 32, 3)
    assert np.abs(pixels[:28] - (0, 128, 0)).max() <= 16
    assert np.abs(pixels[36:] - 255).max() <= 16


@pytest.mark.parametrize("content", [HEIC[:40], HEIC[:-20], b"\0\0\0\x18ftypavif" + bytes(100)])
def test_damaged_ones_are_no_images(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.heic").write_bytes(content)
    assert is_phone_photo(tmp_path / "a.heic")
    assert not decodes(tmp_path / "a.heic")
    assert not to_jpeg(tmp_path / "a.heic", tmp_path / "a.jpg")
    assert not (tmp_path / "a.jpg").exists()


@pytest.mark.parametrize("tar_above", [None, 0])
def test_telephones_photographs_are_imported_whatever_they_are_called(tmp_path: Path, tar_above: int | None) -> None:
    rules = ImportRules(tar_above=tar_above)
    source = write_pictures(tmp_path / "pets", [f"{name}/{i}.jpg" for name in ("cat", "dog") for i in range(2)])
    (source / "cat/1.HEIC").write_bytes(HEIC)  # Beside the 1.jpg that the telephone made of it.
    write_avif(source / "dog/2", np.full((16, 16, 3), 90, np.uint8))
    (source / "dog/3.jpg").write_bytes(HEIC)
    imported = import_dataset(source, ds_name="pets", tag="v1", ds_root=tmp_path / "ds", rules=rules)
    assert imported.counts == {"no split": 7}
    assert imported.left_out == {}
    said = "made JPEG of HEIC and AVIF, which the service does not take: 3, such as cat/1.HEIC"
    assert said in imported.notes
    again = import_dataset(source, ds_name="pets", tag="v1", ds_root=tmp_path / "ds", rules=rules)
    assert again.dvc_md5 == imported.dvc_md5 == read_version(imported.directory, "v1").dvc_md5
    assert sorted(path.name for path in (source / "cat").iterdir()) == ["0.jpg", "1.HEIC", "1.jpg"]


def test_processes_look_at_photographs_and_convert_them_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    write_pictures(source, [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(3)])
    for number in range(7):
        image = np.random.default_rng(number).integers(0, 256, (32, 48, 3), dtype=np.uint8)
        write_avif(source / "cat" / f"{number}.avif", image)
    (source / "dog" / "4.heic").write_bytes(HEIC)
    (source / "dog" / "5.heic").write_bytes(HEIC[:-20])

    def imported(name: str) -> tuple[str, dict[str, int]]:
        root = tmp_path / name
        made = import_dataset(source, ds_root=root, ds_name="pets", tag="v1.0.0", rules=ImportRules())
        return made.dvc_md5, made.left_out

    alone = imported("alone")
    for module, name, most in ((tree, "_SHARD_FILES", 3), (staging, "_SHARD_PHOTOS", 3)):
        monkeypatch.setattr(module, name, most)
    assert imported("together") == alone
    assert sum(alone[1].values()) == 1


def test_a_photograph_that_ends_its_process_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{name}.avif" for name in "abc"]
    for name in names:
        write_avif(tmp_path / name, np.full((16, 16, 3), 90, np.uint8))
    monkeypatch.setattr(tree, "are_images", dies_of_b)
    assert tree.images_among(tmp_path, names) == ({"a.avif", "c.avif"}, {})


def dies_of_b(files: tree.FileShard) -> list[bool | str]:
    if "b.avif" in files.paths:
        os.kill(os.getpid(), signal.SIGKILL)
    return tree.are_images(files)


def test_a_photograph_whose_conversion_ends_its_process_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_pictures(tmp_path / "pets", ["cat/0.jpg", "dog/0.jpg"])
    for name in "abc":
        write_avif(source / f"cat/{name}.avif", np.full((16, 16, 3), 90, np.uint8))
    monkeypatch.setattr(staging, "convert", dies_converting_b)
    with pytest.raises(InvalidDatasetError, match=r"Expected cat/b\.avif to become a JPEG.* by SIGKILL\. Remove it"):
        import_dataset(source, ds_name="pets", tag="v1", ds_root=tmp_path / "ds")


def dies_converting_b(photos: staging.PhotoShard) -> None:
    if any(path == "cat/b.avif" for path, _ in photos.pairs):
        os.kill(os.getpid(), signal.SIGKILL)
    staging.convert(photos)
