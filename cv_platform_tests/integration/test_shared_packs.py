"""Packed images that installations share in central storage: a folder, and a real S3 API (moto's server) over HTTP."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.core import url_to_fs

from cv_platform.compute import engine, rows
from cv_platform.compute.carried import CarriedFile
from cv_platform.compute.rows import row_shards
from cv_platform.datasets import packing
from cv_platform.datasets.packing import open_split, pack_images
from cv_platform.datasets.publishing import Sharing
from cv_platform.datasets.shards import reading, sharing, writing
from cv_platform.errors import DatasetError, StorageError
from cv_platform.evaluation.classifier import Classifier, answer_rows
from cv_platform.records import DatasetVersion, PackedImages
from cv_platform.serving.model.runtime import PublishedModel
from cv_platform.storage import CentralStorage
from cv_platform_tests.support.away import away_for_a_moment, away_from
from cv_platform_tests.support.hand_made import hand_made_export
from cv_platform_tests.support.pictures import class_folders
from cv_platform_tests.support.tiny_models import build_classifier, publish_tiny
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
    return pack_images(
        version, model(size=SIZE), quarantined=(), home=home, sharing=Sharing(storage) if storage else None, **options
    )


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


def test_where_a_published_pack_is_is_noted_once_and_not_in_a_folder_that_cannot_be_written(
    version: DatasetVersion, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pack(version, tmp_path / "here", storage)
    note = made.directory / "published.json"
    inode = note.stat().st_ino
    assert pack(version, tmp_path / "here", storage) == made
    assert note.stat().st_ino == inode

    def refuse(path: Path, _: str) -> None:
        raise PermissionError(f"{path} is another user's")

    note.unlink()
    monkeypatch.setattr(sharing, "write_file", refuse)
    assert pack(version, tmp_path / "here", storage) == made
    assert not note.exists()


_WORKER = """
import pickle, sys
function, shards = pickle.load(sys.stdin.buffer)
pickle.dump([function(shard) for shard in shards], sys.stdout.buffer)
"""


def test_a_process_of_another_home_answers_for_images_that_it_takes_from_central_storage(
    version: DatasetVersion, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_SHARD_ROWS", 12)
    home, own = tmp_path / "here", tmp_path / "own"
    packed = pack_images(version, model(size=16), quarantined=(), home=home, sharing=Sharing(storage))
    build_classifier(seed=1).save(home / "classifier.keras")
    classifier = Classifier(CarriedFile.of(home / "classifier.keras"), 3, rows.Device(is_gpu=False))
    function, shards_ = partial(answer_rows, classifier), list(row_shards(open_split(packed, "train").images))
    assert len(shards_) > 2
    expected, work = [function(shard) for shard in shards_], pickle.dumps((function, shards_))
    home.rename(tmp_path / "away")
    process = subprocess.run(
        [sys.executable, "-c", _WORKER],
        input=work,
        stdout=subprocess.PIPE,
        env={**os.environ, "CV_HOME": str(own)},
        check=True,
        timeout=300,
    )
    for answered, alone in zip(pickle.loads(process.stdout), expected, strict=True):
        assert [array.tobytes() for array in answered] == [array.tobytes() for array in alone]
    assert not home.exists()
    assert list((own / "packed" / packed.directory.name).glob("train-*.uint8"))


def test_a_process_of_another_home_loads_a_bundle_into_its_own(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = publish_tiny(CentralStorage(storage), hand_made_export(tmp_path / "export"))
    monkeypatch.setenv("CV_HOME", str(tmp_path / "own"))
    published = PublishedModel(storage, metadata.model_name, metadata.version, tmp_path / "here")
    assert pickle.loads(pickle.dumps(published)).load().metadata == metadata
    assert not (tmp_path / "here").exists()
    cached = list((tmp_path / "own").glob("cache/bundles/*/*/.complete"))
    assert len(cached) == storage.startswith("s3:")


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


def test_a_pack_stays_usable_while_central_storage_is_away(
    version: DatasetVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    central = tmp_path / "central"
    pack(version, tmp_path / "here", str(central))
    taken = pack(version, tmp_path / "there", str(central))
    with monkeypatch.context() as hasty:
        hasty.setattr(engine, "_WAITS_SECONDS", ())
        central.rename(tmp_path / "away")
        with pytest.raises(DatasetError, match="Check CV_STORAGE"):
            open_split(taken, "train")
        (tmp_path / "away").rename(central)
    with away_for_a_moment(central, monkeypatch, caplog):
        assert len(pixels(taken, "train")) == taken.counts["train"]


@pytest.mark.parametrize("step", ["take_pack", "publish_pack"])
def test_central_storage_that_is_away_for_a_moment_costs_no_pack(
    step: str,
    version: DatasetVersion,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    central = tmp_path / "central"
    with away_from(step, packing, central, monkeypatch, caplog):
        made = pack(version, tmp_path / "here", str(central))
    shutil.rmtree(version.directory / "images")  # So that nobody could pack them again.
    taken = pack(version, tmp_path / "there", str(central))
    np.testing.assert_array_equal(pixels(taken, "train"), pixels(made, "train"))
    assert len(list(central.glob("shards/*/*/packed.json"))) == 1


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
