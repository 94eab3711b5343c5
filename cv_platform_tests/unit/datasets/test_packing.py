from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from cv_platform import images
from cv_platform.datasets.contact_sheet import contact_sheet, keep_contact_sheet
from cv_platform.datasets.manifest import build_manifest, read_manifest
from cv_platform.datasets.packing import open_split, pack_images
from cv_platform.errors import DatasetError, DiskSpaceError, InvalidDatasetError
from cv_platform.records import DatasetVersion, PackedImages, Provenance
from cv_platform_tests.support.pictures import class_folders, picture, write_pictures

from .conftest import dataset, model


def version_of(directory: Path, annotations: bytes | None = None, **fields: Any) -> DatasetVersion:
    config = model(**fields)
    manifest = build_manifest(directory, data_path="images", annotations=annotations, model=config, dataset=dataset())
    return DatasetVersion(
        provenance=Provenance(ds_name="pets", dvc_tag="v1.0.0", dvc_md5="0" * 32),
        git_commit="1" * 40,
        directory=directory,
        manifest=manifest.name,
        class_names=config.classes,
        sample_bits=config.sample_bits,
    )


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> DatasetVersion:
    """20 readable images of two classes, one unreadable, without splits."""
    directory = tmp_path_factory.mktemp("version")
    class_folders(directory / "images", 10)
    (directory / "images/dog/zz.png").write_bytes(picture(5)[:30])
    return version_of(directory)


@pytest.fixture(scope="module")
def module_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def packed(version: DatasetVersion, module_home: Path) -> PackedImages:
    return pack_images(version, model(size=12), quarantined=(), home=module_home)


def test_every_readable_image_is_preprocessed_into_its_row(version: DatasetVersion, packed: PackedImages) -> None:
    manifest = read_manifest(version.manifest_path)
    readable = manifest[manifest["is_readable"]]
    assert sum(packed.counts.values()) == len(readable) == 20
    for split, count in packed.counts.items():
        opened = open_split(packed, split)
        expected = readable[readable["split"] == split]
        assert opened.paths == expected["path"].tolist()
        assert opened.sha256 == expected["sha256"].tolist()
        assert opened.images.shape == (count, 12, 12, 3)
        assert opened.images.dtype == np.uint8
        assert opened.targets.tolist() == [("cat", "dog").index(names[0]) for names in expected["labels"]]
        assert opened.targets.dtype == np.int64
        for row, path in enumerate(opened.paths):
            data = (version.directory / path).read_bytes()
            np.testing.assert_array_equal(opened.images[row], images.preprocess(data, (12, 12)))


def test_record_says_what_the_pack_is(packed: PackedImages, module_home: Path) -> None:
    assert packed.directory.parent == module_home / "packed"
    assert packed.directory.name.startswith("0" * 32 + "-")
    assert packed.task.preprocessing_hash == images.preprocessing_hash((12, 12))
    notes = {"packed.json", "verified.json"}
    assert packed.bytes == sum(p.stat().st_size for p in packed.directory.iterdir() if p.name not in notes)
    assert packed.images_per_second > 0


def test_rows_in_order_are_views_that_cannot_be_written(packed: PackedImages) -> None:
    opened = open_split(packed, "train")
    rows = opened.images[2:5]
    assert np.shares_memory(rows, opened.images[2:5])
    with pytest.raises(ValueError, match="read-only"):
        rows[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        opened.targets[0] = 0


def test_batches_walk_the_rows_in_order(packed: PackedImages) -> None:
    opened = open_split(packed, "train")
    batches = list(opened.batches(4))
    assert [len(targets) for _, targets in batches] == [4] * (packed.counts["train"] // 4) + (
        [packed.counts["train"] % 4] if packed.counts["train"] % 4 else []
    )
    np.testing.assert_array_equal(np.concatenate([batch for batch, _ in batches]), np.asarray(opened.images))
    np.testing.assert_array_equal(np.concatenate([targets for _, targets in batches]), opened.targets)
    with pytest.raises(ValueError, match="at least 1"):
        next(opened.batches(0))


def test_multi_label_targets_are_zeros_and_ones(tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", [f"{i}.png" for i in range(4)])
    csv = b"path,split,label\n0.png,train,cat|dog\n1.png,train,\n2.png,test,dog\n3.png,valid,cat\n"
    version = version_of(tmp_path, csv, classifier_type="multi-label")
    packed = pack_images(version, model(classifier_type="multi-label"), quarantined=(), home=tmp_path)
    rows = {}
    for split in packed.counts:
        opened = open_split(packed, split)
        assert opened.targets.dtype == np.float32
        rows |= dict(zip(opened.paths, opened.targets.tolist(), strict=True))
    assert rows == {"images/0.png": [1, 1], "images/1.png": [0, 0], "images/2.png": [0, 1], "images/3.png": [1, 0]}


def test_samples_of_declared_bits_are_packed_and_shown_by_them(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", 10)
    deep = np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8)
    (tmp_path / "images/cat/0.png").write_bytes(cv2.imencode(".png", deep)[1].tobytes())
    names, rows, sheets = set[str](), dict[int | None, np.ndarray](), set[bytes]()
    for bits in (None, 12, 14):
        version, config = version_of(tmp_path, sample_bits=bits), model(sample_bits=bits)
        packed = pack_images(version, config, quarantined=(), home=tmp_path)
        assert packed.task.preprocessing_hash == images.preprocessing_hash((8, 8), images.Preprocessing.of(config))
        names.add(packed.directory.name)
        sheets.add(keep_contact_sheet(version).read_bytes())
        opened = [open_split(packed, split) for split in packed.counts]
        (rows[bits],) = [
            one.images[at] for one in opened for at, path in enumerate(one.paths) if path.endswith("cat/0.png")
        ]
    assert len(names) == len(sheets) == 3
    assert rows[12][..., 0].ravel().tolist() == list(range(0, 256, 4))
    assert rows[None][..., 0].ravel().tolist() == [at // 4 for at in range(64)]
    assert rows[14].max() == 63


def test_empty_split_opens(tmp_path: Path) -> None:
    write_pictures(
        tmp_path / "images", [f"{split}/{name}/1.png" for split in ("train", "test") for name in ("cat", "dog")]
    )
    packed = pack_images(version_of(tmp_path), model(), quarantined=(), home=tmp_path)
    opened = open_split(packed, "reference")
    assert (opened.images.shape, opened.paths, list(opened.batches(4))) == ((0, 8, 8, 3), [], [])


def test_quarantined_images_are_left_out_and_have_their_own_pack(version: DatasetVersion, packed: PackedImages) -> None:
    gone = open_split(packed, "train").paths[0]
    other = pack_images(version, model(size=12), quarantined=[gone], home=packed.directory.parents[1])
    assert other.directory != packed.directory
    assert other.counts["train"] == packed.counts["train"] - 1
    assert gone not in open_split(other, "train").paths


def test_key_follows_size_classes_and_manifest(version: DatasetVersion, packed: PackedImages) -> None:
    home = packed.directory.parents[1]
    names = {
        packed.directory.name,
        pack_images(version, model(size=16), quarantined=(), home=home).directory.name,
        pack_images(version, model("dog", "cat", size=12), quarantined=(), home=home).directory.name,
    }
    assert len(names) == 3


def test_name_is_that_of_earlier_releases_as_models_keep_to_it(version: DatasetVersion, packed: PackedImages) -> None:
    said = [[1, images.preprocessing_hash((12, 12)), ["cat", "dog"], "multi-class"]]
    columns = ["path", "sha256", "split", "labels", "is_readable"]
    said += read_manifest(version.manifest_path)[columns].to_numpy().tolist()
    text = "".join(json.dumps(row) for row in [*said, []])
    assert packed.directory.name == f"{'0' * 32}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def test_only_training_images_are_packed_larger_and_everyone_else_sees_them_as_the_service_does(
    version: DatasetVersion, packed: PackedImages
) -> None:
    home, as_served = packed.directory.parents[1], open_split(packed, "train")
    scaled = pack_images(version, model(size=12), quarantined=(), home=home, pack_scale=1.5)

    assert scaled.directory != packed.directory
    assert (scaled.pack_scale, scaled.task) == (1.5, packed.task)
    for split in ("valid", "test", "reference"):
        judged = open_split(scaled, split)
        assert judged.larger is None
        for row, path in enumerate(judged.paths):
            served = images.preprocess((version.directory / path).read_bytes(), (12, 12))
            np.testing.assert_array_equal(judged.images[row], served)
    train = open_split(scaled, "train")
    for row, path in enumerate(train.paths):
        data = (version.directory / path).read_bytes()
        np.testing.assert_array_equal(train.stored[row], images.preprocess(data, (18, 18)))
    assert train.images.shape == as_served.images.shape
    seen = np.asarray(train.images)
    np.testing.assert_array_equal(train.images[[1, 3]], seen[[1, 3]])
    np.testing.assert_array_equal(train.images[2], seen[2])
    # A second interpolation, of noise: grey levels move, by much less than between two images.
    moved = np.abs(seen.astype(int) - np.asarray(as_served.images)).mean()
    assert moved < np.abs(seen.astype(int) - np.asarray(as_served.images)[::-1]).mean() / 2


def test_pack_is_used_again(version: DatasetVersion, packed: PackedImages) -> None:
    inode = packed.directory.stat().st_ino
    again = pack_images(version, model(size=12), quarantined=(), home=packed.directory.parents[1])
    assert again == packed
    assert again.directory.stat().st_ino == inode


@pytest.mark.parametrize("damage", ["changed byte", "truncated", "missing", "no marker", "broken marker"])
def test_damaged_pack_is_made_again(tmp_path: Path, version: DatasetVersion, damage: str) -> None:
    packed = pack_images(version, model(), quarantined=(), home=tmp_path)
    expected = np.array(open_split(packed, "train").images)
    array, marker = packed.directory / "train-00000.uint8", packed.directory / "packed.json"
    if damage == "changed byte":
        data = bytearray(array.read_bytes())
        data[-1] ^= 0xFF
        array.write_bytes(data)
    elif damage == "truncated":
        array.write_bytes(array.read_bytes()[:-1])
    elif damage == "missing":
        array.unlink()
    elif damage == "no marker":
        marker.unlink()
    else:
        marker.write_text(json.dumps({"packed": {}}))
    again = pack_images(version, model(), quarantined=(), home=tmp_path)
    np.testing.assert_array_equal(open_split(again, "train").images, expected)


def test_opening_a_damaged_pack_says_what_to_do(tmp_path: Path, version: DatasetVersion) -> None:
    packed = pack_images(version, model(), quarantined=(), home=tmp_path)
    array = packed.directory / "test-00000.uint8"
    array.write_bytes(array.read_bytes()[:50])
    with pytest.raises(DatasetError, match="Materialise packed_images again"):
        open_split(packed, "test")
    shutil.rmtree(packed.directory)
    with pytest.raises(DatasetError, match="Materialise packed_images again"):
        open_split(packed, "train")


def test_leftovers_of_a_killed_pack_are_cleared(tmp_path: Path, version: DatasetVersion) -> None:
    packed = pack_images(version, model(), quarantined=(), home=tmp_path)
    killed = packed.directory.with_name(f".{packed.directory.name}.partial-0badc0de")
    packed.directory.rename(killed)
    again = pack_images(version, model(), quarantined=(), home=tmp_path)
    assert not killed.exists()
    assert again.counts == packed.counts


def test_refuses_files_that_are_not_those_of_the_manifest(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", 4)
    version = version_of(tmp_path)
    (tmp_path / "images/cat/1.png").write_bytes(picture(123))
    with pytest.raises(InvalidDatasetError, match=r"images/cat/1\.png .* other bytes"):
        pack_images(version, model(), quarantined=(), home=tmp_path)
    assert not [p for p in (tmp_path / "packed").iterdir() if p.is_dir()]


def test_refuses_unknown_quarantine_and_nothing_to_train_on(tmp_path: Path, version: DatasetVersion) -> None:
    with pytest.raises(InvalidDatasetError, match=r"nowhere\.png"):
        pack_images(version, model(), quarantined=["nowhere.png"], home=tmp_path)
    everything = read_manifest(version.manifest_path)["path"].tolist()
    with pytest.raises(InvalidDatasetError, match="images to train on"):
        pack_images(version, model(), quarantined=everything, home=tmp_path)


def test_says_when_the_disk_is_too_small(
    tmp_path: Path, version: DatasetVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cv_platform import files

    monkeypatch.setattr(files, "SPARE_BYTES", shutil.disk_usage(tmp_path).total)
    with pytest.raises(DiskSpaceError, match="GB free"):
        pack_images(version, model(), quarantined=(), home=tmp_path)


def test_a_sheet_is_drawn_once_for_an_order_of_classes(version: DatasetVersion) -> None:
    sheet = keep_contact_sheet(version)
    assert sheet.read_bytes() == contact_sheet(version)
    drawn = sheet.stat().st_ino
    assert keep_contact_sheet(version).stat().st_ino == drawn
    turned = keep_contact_sheet(version.model_copy(update={"class_names": version.class_names[::-1]}))
    assert turned.read_bytes() != sheet.read_bytes()


def test_contact_sheet_shows_readable_images_in_a_row_per_class(version: DatasetVersion) -> None:
    png = contact_sheet(version, per_class=3)
    assert png.startswith(b"\x89PNG")
    sheet = images.decode(png)
    # 2 rows and 3 columns of 96 px with gaps of 4 px, beside 120 px for the labels.
    assert sheet.shape == (2 * 100 + 4, 120 + 3 * 100, 3)
    manifest = read_manifest(version.manifest_path)
    rows = [row for _, row in manifest.sort_values("sha256").iterrows()]
    cats = [row["path"] for row in rows if bool(row["is_readable"]) and row["labels"][0] == "cat"]
    first = images.decode((version.directory / cats[0]).read_bytes())
    np.testing.assert_array_equal(sheet[4:100, 120:216], first.repeat(12, axis=0).repeat(12, axis=1))


def test_unknown_labels_are_nan_and_have_a_pack_of_their_own(tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", [f"{i}.png" for i in range(3)])
    head, kind = b"path,split,label,unknown_labels\n", model(classifier_type="multi-label")
    names = set()
    for first in (b"0.png,train,cat,dog\n", b"0.png,train,cat,\n"):
        csv = head + first + b"1.png,train,dog,\n2.png,test,,cat\n"
        shutil.rmtree(tmp_path / "checkout", ignore_errors=True)
        shutil.copytree(tmp_path / "images", tmp_path / "checkout" / "images")
        packed = pack_images(
            version_of(tmp_path / "checkout", csv, classifier_type="multi-label"), kind, quarantined=(), home=tmp_path
        )
        names.add(packed.directory.name)
        train, test = (open_split(packed, split).targets for split in ("train", "test"))
        dog = np.nan if b"cat,dog" in first else 0.0
        assert np.array_equal(train, np.array([[1, dog], [0, 1]], np.float32), equal_nan=True)
        assert np.array_equal(test, np.array([[np.nan, 0]], np.float32), equal_nan=True)
    assert len(names) == 2
