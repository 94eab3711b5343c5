"""Shards of packed pixels: how they are read, resumed after a kill, and made by several processes or runs at once."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cv_platform.compute.local import LocalEngine
from cv_platform.datasets.packing import open_split, pack_images
from cv_platform.datasets.shards import reading, writing
from cv_platform.errors import DatasetError, DiskSpaceError
from cv_platform.files import file_sha256
from cv_platform.records import DatasetVersion, PackedImages
from cv_platform_tests.support.pictures import class_folders
from cv_platform_tests.support.waiting import wait_until

from .conftest import model
from .test_packing import version_of

SIZE = 8
BYTES = SIZE * SIZE * 3


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> DatasetVersion:
    """60 images of two classes; 30 or so are of the split train."""
    directory = tmp_path_factory.mktemp("version")
    class_folders(directory / "images", 30)
    return version_of(directory)


def pack(version: DatasetVersion, home: Path, **options: Any) -> PackedImages:
    return pack_images(version, model(size=SIZE), quarantined=(), home=home, **options)


@pytest.fixture(scope="module")
def plain(version: DatasetVersion, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The pixels of train, in one shard."""
    return np.array(open_split(pack(version, tmp_path_factory.mktemp("plain")), "train").images)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 4 images."""
    monkeypatch.setattr(writing, "SHARD_BYTES", 4 * BYTES)


@pytest.mark.usefixtures("small_shards")
def test_many_shards_read_as_one_array(version: DatasetVersion, plain: np.ndarray, tmp_path: Path) -> None:
    packed = pack(version, tmp_path)
    assert len(list(packed.directory.glob("train-*.uint8"))) == -(-len(plain) // 4)
    images = open_split(packed, "train").images
    assert (len(images), images.shape, images.dtype, images.ndim) == (len(plain), plain.shape, plain.dtype, plain.ndim)
    np.testing.assert_array_equal(np.asarray(images), plain)
    shuffled = np.random.default_rng(1).permutation(len(plain))
    slices = (slice(1, 3), slice(2, 9), slice(None, None, 3), slice(5, 5))
    for key in (0, -1, np.int32(5), *slices, shuffled, plain[:, 0, 0, 0] > 99):
        np.testing.assert_array_equal(images[key], plain[key], err_msg=str(key))
    with pytest.raises(IndexError, match="Expected a row"):
        images[len(plain)]
    one_by_one = reading.views(images, shuffled)
    np.testing.assert_array_equal(one_by_one, plain[shuffled])
    assert not any(image.flags.owndata for image in one_by_one)  # The mapped files' own bytes.


@pytest.mark.usefixtures("small_shards")
def test_train_above_the_budget_is_kept_as_jpeg_and_what_judges_is_not(
    version: DatasetVersion, plain: np.ndarray, tmp_path: Path
) -> None:
    exact, packed = pack(version, tmp_path), pack(version, tmp_path, uint8_budget_bytes=BYTES)
    assert packed.directory != exact.directory
    opened, near = open_split(packed, "train"), np.asarray(open_split(packed, "train").images).astype(int)
    assert np.abs(near - plain).mean() < 8  # Of the small pictures' sharp edges; a wrong row differs by 50 and more.
    np.testing.assert_array_equal(opened.images[np.array([9, 2])], near[[9, 2]])
    np.testing.assert_array_equal(reading.views(opened.images, np.array([9, 2])), near[[9, 2]])
    for split in ("valid", "test", "reference"):
        np.testing.assert_array_equal(
            np.asarray(open_split(packed, split).images), np.asarray(open_split(exact, split).images)
        )


@pytest.mark.usefixtures("small_shards")
def test_several_processes_make_the_same_pack(version: DatasetVersion, tmp_path: Path) -> None:
    alone = pack(version, tmp_path / "alone")
    together = pack(version, tmp_path / "together", engine=LocalEngine(2, worth_seconds=0))
    assert _sums(together.directory) == _sums(alone.directory)


KILLED = """
import os, signal, sys, psutil
from pathlib import Path
from cv_platform.compute.local import LocalEngine
from cv_platform.datasets import packing
from cv_platform.datasets.shards import writing
from cv_platform.records import DatasetVersion
from cv_platform_tests.support.elsewhere import Apart
from cv_platform_tests.unit.datasets.conftest import model

whole = writing.map_shards
def killed(*arguments, **options):
    for at, made in enumerate(whole(*arguments, **options)):
        yield made
        if at >= 2 and list(Path(sys.argv[3]).glob("packed/.*/train-00000.uint8.sealed.json")):
            print(*(child.pid for child in psutil.Process().children()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
writing.SHARD_BYTES = 4 * 192
writing.map_shards = killed
version = DatasetVersion.model_validate_json(sys.argv[1], context={"home": Path(sys.argv[2])})
engine = Apart(Path(sys.argv[3])) if sys.argv[4] == "apart" else LocalEngine(2, worth_seconds=0)
packing.pack_images(version, model(size=8), quarantined=(), home=Path(sys.argv[3]), engine=engine)
"""


@pytest.mark.parametrize("engine", ["local", "apart"])
@pytest.mark.usefixtures("small_shards")
def test_a_killed_packing_goes_on_with_the_shards_that_it_finished(
    version: DatasetVersion, plain: np.ndarray, tmp_path: Path, engine: str
) -> None:
    home = version.directory.parent
    arguments = [version.model_dump_json(context={"home": home}), str(home), str(tmp_path), engine]
    run = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, timeout=120)
    assert run.returncode == -9, run.stderr
    workers = [int(pid) for pid in run.stdout.split()]
    assert bool(workers) == (engine == "local")
    # They end with it, as nobody else would end them.
    wait_until(lambda: not any(_is_alive(pid) for pid in workers), seconds=30)
    (unfinished,) = (tmp_path / "packed").glob(".*.partial-resumes")
    sealed = {path.name.removesuffix(".sealed.json") for path in unfinished.glob("*.sealed.json")}
    assert "train-00000.uint8" in sealed
    before = {name: (unfinished / name).stat().st_ino for name in sealed}
    damaged = unfinished / max(sealed)
    damaged.write_bytes(bytes(damaged.stat().st_size))
    packed = pack(version, tmp_path)
    after = {name: (packed.directory / name).stat().st_ino for name in sealed if name != damaged.name}
    assert after == {name: inode for name, inode in before.items() if name != damaged.name}
    np.testing.assert_array_equal(np.asarray(open_split(packed, "train").images), plain)
    assert not unfinished.exists()
    assert not list(packed.directory.glob("*.sealed.json"))


def test_two_runs_that_pack_the_same_version_at_once_pack_it_once(
    version: DatasetVersion, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "cv_platform.datasets.packing")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: pack(version, tmp_path), range(2))
    assert first == second
    assert sum("Packed 60 images" in message for message in caplog.messages) == 1


def test_a_disk_that_fills_up_while_packing_is_said_and_nothing_is_left(
    version: DatasetVersion, tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * BYTES, limits[1]))  # No file may be longer: as if full from there.
    try:
        with pytest.raises(DiskSpaceError, match=r"What was written is removed\. Free some space"):
            pack(version, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "packed").iterdir() if path.is_dir()] == []
    pack(version, tmp_path)


def test_a_pack_of_the_former_format_is_made_again_and_never_misread(version: DatasetVersion, tmp_path: Path) -> None:
    packed = pack(version, tmp_path)
    expected = np.array(open_split(packed, "test").images)
    shutil.rmtree(packed.directory)
    packed.directory.mkdir()
    files = {}
    for split, count in packed.counts.items():  # As release 0.2 wrote it.
        path = packed.directory / f"{split}.images.npy"
        np.save(path, np.zeros((count, SIZE, SIZE, 3), np.uint8))
        files[path.name] = (path.stat().st_size, file_sha256(path))
    facts = {"counts": packed.counts, "bytes": 1, "images_per_second": 1.0}
    (packed.directory / "packed.json").write_text(json.dumps({"files": files, "packed": facts}))
    with pytest.raises(DatasetError, match=r"one of format 1, .*Materialise packed_images again"):
        open_split(packed, "test")
    again = pack(version, tmp_path)
    assert again.directory == packed.directory  # So that the models that were trained on it keep to it.
    np.testing.assert_array_equal(np.asarray(open_split(again, "test").images), expected)
    assert not list(again.directory.glob("*.images.npy"))


def test_files_are_hashed_when_first_used_and_after_a_change_only(
    version: DatasetVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack(version, tmp_path)
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr(reading, "file_sha256", counted)
    pack(version, tmp_path)
    open_split(packed, "train")
    assert hashed == []
    moved = tmp_path / "restored" / "packed" / packed.directory.name
    shutil.copytree(packed.directory, moved)
    open_split(packed.model_copy(update={"directory": moved}), "train")
    assert sorted(hashed) == ["train-00000.uint8", "train.rows.parquet", "train.targets.npy"]
    open_split(packed.model_copy(update={"directory": moved}), "train")
    assert len(hashed) == 3
    data = bytearray((moved / "train-00000.uint8").read_bytes())
    data[5] ^= 1
    (moved / "train-00000.uint8").write_bytes(data)
    with pytest.raises(DatasetError, match=r"train-00000\.uint8 is not the file that was written"):
        open_split(packed.model_copy(update={"directory": moved}), "train")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _sums(directory: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in directory.glob("*.uint8")}
