"""Packed images that installations share in central storage: a folder, and a real S3 API (moto's server) over HTTP."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.core import url_to_fs

from cv_platform.datasets.packing import open_split, pack_images
from cv_platform.datasets.shards import reading, writing
from cv_platform.errors import DatasetError, StorageError
from cv_platform.records import DatasetVersion, PackedImages
from cv_platform_tests.support.pictures import class_folders
from cv_platform_tests.unit.datasets.conftest import model
from cv_platform_tests.unit.datasets.test_packing import version_of

SIZE = 8


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "central") if request.param == "folder" else request.getfixturevalue("s3_url")


@pytest.fixture
def version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetVersion:
    """60 images of two classes, packed in shards of 4."""
    monkeypatch.setattr(writing, "SHARD_BYTES", 4 * SIZE * SIZE * 3)
    class_folders(tmp_path / "version" / "images", 30)
    return version_of(tmp_path / "version")


def pack(version: DatasetVersion, home: Path, storage: str | None, **options: Any) -> PackedImages:
    return pack_images(version, model(size=SIZE), quarantined=(), home=home, shared_in=storage, **options)


def pixels(packed: PackedImages, split: str) -> np.ndarray:
    return np.array(open_split(packed, split).images)


def shards(packed: PackedImages, split: str = "") -> list[str]:
    """The shards that lie in a pack's folder, or are linked there."""
    return sorted(path.name for path in packed.directory.glob(f"{split}*-*") if path.suffix in {".uint8", ".jpeg"})


def damage(storage: str, packed: PackedImages, name: str) -> None:
    """Changes a byte of a shard in central storage."""
    files, root = url_to_fs(storage)
    (path,) = files.glob(f"{root}/shards/{packed.directory.name}/*/{name}")
    content = bytearray(files.cat_file(path))
    content[-1] ^= 0xFF
    files.pipe_file(path, bytes(content))


@pytest.mark.parametrize("budget", [0, 10**9], ids=["jpeg", "uint8"])
def test_another_machine_takes_the_pack_and_each_shard_when_it_is_first_used(
    version: DatasetVersion, storage: str, tmp_path: Path, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pack(version, tmp_path / "here", storage, uint8_budget_bytes=budget)
    shutil.rmtree(version.directory / "images")  # So that nobody could pack them again.
    taken = pack(version, tmp_path / "there", storage, uint8_budget_bytes=budget)
    assert taken.model_copy(update={"directory": made.directory}) == made
    assert shards(taken) == []
    hashed = list[str]()
    original = reading.file_sha256
    monkeypatch.setattr(reading, "file_sha256", lambda path: hashed.append(path.name) or original(path))
    np.testing.assert_array_equal(pixels(taken, "train"), pixels(made, "train"))
    assert shards(taken) == shards(made, "train")
    assert set(shards(made, "train")) <= set(hashed)
    lies_elsewhere = [(taken.directory / name).is_symlink() for name in shards(taken)]
    assert set(lies_elsewhere) == {not storage.startswith("s3:")}
    hashed.clear()
    pixels(taken, "train")
    assert not hashed
    assert pack(version, tmp_path / "there", storage, uint8_budget_bytes=budget) == taken
    np.testing.assert_array_equal(pixels(taken, "test"), pixels(made, "test"))


def test_a_shard_of_other_bytes_is_refused_and_packed_anew_when_it_is_taken_away(
    version: DatasetVersion, storage: str, tmp_path: Path
) -> None:
    made = pack(version, tmp_path / "here", storage)
    taken = pack(version, tmp_path / "there", storage)
    damage(storage, made, shards(made, "train")[-1])
    with pytest.raises(
        DatasetError, match=rf"Expected {shards(made, 'train')[-1]} of .*/shards/.* Received: other bytes"
    ):
        open_split(taken, "train")
    files, root = url_to_fs(storage)
    files.rm(f"{root}/shards/{made.directory.name}", recursive=True)
    with pytest.raises(DatasetError, match="materialise packed_images again"):
        open_split(taken, "train")
    again = pack(version, tmp_path / "there", storage)
    np.testing.assert_array_equal(pixels(again, "train"), pixels(made, "train"))
    assert shards(pack(version, tmp_path / "elsewhere", storage)) == []


def test_two_that_publish_at_once_leave_one_copy(version: DatasetVersion, storage: str, tmp_path: Path) -> None:
    homes = [tmp_path / name for name in ("here", "there")]
    packs = [pack(version, home, None) for home in homes]
    with ThreadPoolExecutor(len(homes)) as threads:
        list(threads.map(lambda home: pack(version, home, storage), homes))
    files, root = url_to_fs(storage)
    folders = {Path(path).parent.name for path in files.glob(f"{root}/shards/{packs[0].directory.name}/*/packed.json")}
    marker = json.loads(files.cat_file(f"{root}/shards/{packs[0].directory.name}/shared.json"))
    assert folders == {marker["folder"]}


def test_a_pack_stays_usable_while_central_storage_is_away(version: DatasetVersion, tmp_path: Path) -> None:
    central = tmp_path / "central"
    pack(version, tmp_path / "here", str(central))
    taken = pack(version, tmp_path / "there", str(central))
    central.rename(tmp_path / "away")
    with pytest.raises(DatasetError, match="Check CV_STORAGE"):
        open_split(taken, "train")
    (tmp_path / "away").rename(central)
    assert len(pixels(taken, "train")) == taken.counts["train"]


def test_an_unreadable_marker_is_named(version: DatasetVersion, tmp_path: Path) -> None:
    made = pack(version, tmp_path / "here", str(tmp_path / "central"))
    (tmp_path / "central" / "shards" / made.directory.name / "shared.json").write_text("{}")
    with pytest.raises(StorageError, match=r"Expected shared\.json of the packed images"):
        pack(version, tmp_path / "there", str(tmp_path / "central"))


def test_a_taken_pack_is_published_whole_where_central_storage_has_moved(
    version: DatasetVersion, storage: str, tmp_path: Path
) -> None:
    made = pack(version, tmp_path / "here", storage)
    pack(version, tmp_path / "there", storage)
    moved = str(tmp_path / "moved")
    pack(version, tmp_path / "there", moved)
    shutil.rmtree(version.directory / "images")  # So that nobody could pack them again.
    taken = pack(version, tmp_path / "elsewhere", moved)
    np.testing.assert_array_equal(pixels(taken, "train"), pixels(made, "train"))
