from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cv_platform.datasets.manifest import build_manifest, manifest_name, read_manifest, read_thumbnails, split_counts
from cv_platform.datasets.near_copies import thumbnail
from cv_platform.errors import DatasetError, InvalidDatasetError
from cv_platform.images import decode
from cv_platform_tests.support.pictures import class_folders, picture, write_pictures

from .conftest import dataset, model
from .test_near_copies import jpeg, scene


def build(directory: Path, annotations: bytes | None = None, **model_fields: Any):
    config = model(**model_fields)
    path = build_manifest(directory, data_path="images", annotations=annotations, model=config, dataset=dataset())
    return read_manifest(path)


def test_has_a_row_per_image_with_what_its_bytes_say(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", 3)
    data = picture(77, size=(5, 9))
    (tmp_path / "images/cat/0.png").write_bytes(data)
    manifest = build(tmp_path)
    columns = "path sha256 split labels split_origin width_px height_px bytes is_readable problem"
    assert manifest.columns.tolist() == [*columns.split(), "damage", "constant", "narrow_range"]
    assert manifest["path"].tolist() == [f"images/{name}/{i}.png" for name in ("cat", "dog") for i in range(3)]
    row = manifest.iloc[0]
    assert (row["sha256"], row["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert (row["width_px"], row["height_px"], row["labels"]) == (9, 5, ["cat"])
    assert row["is_readable"]
    assert row["problem"] is None


def test_a_thumbnail_is_kept_of_each_readable_image(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", 3)
    (tmp_path / "images/cat/0.png").write_bytes(b"no image")
    (tmp_path / "images/cat/1.png").write_bytes(picture(77, size=(5, 9)))
    build(tmp_path)
    (path,) = tmp_path.glob("manifest-*.parquet")
    thumbnails = read_thumbnails(path)
    assert (thumbnails.shape, thumbnails.dtype) == ((6, 32, 32), np.uint8)
    assert not thumbnails[0].any()
    np.testing.assert_array_equal(thumbnails[1], thumbnail(decode(picture(77, size=(5, 9)))))


def test_splits_that_are_made_never_divide_near_copies(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "cat"
    folder.mkdir(parents=True)
    for seed in range(60):
        kinds = [scene(seed), jpeg(scene(seed)), np.ascontiguousarray(scene(seed)[2:, 2:][:, ::-1])]
        for number, image in enumerate(kinds):
            Image.fromarray(image).save(folder / f"{seed:02d}-{number}.png")
    class_folders(tmp_path / "images", 5, classes=("dog",))
    manifest = build(tmp_path)
    cats = manifest.loc[manifest["path"].str.startswith("images/cat/")]
    splits = cats["split"].groupby(cats["path"].str.slice(11, 13)).nunique()
    assert len(splits) == 60
    assert splits.max() == 1
    assert set(cats["split"]) == {"train", "valid", "test", "reference"}


def test_sizes_are_those_of_the_upright_image(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", 2)
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.new("RGB", (20, 10)).save(stream, "JPEG", exif=exif.tobytes())
    (tmp_path / "images/cat/0.jpg").write_bytes(stream.getvalue())
    row = build(tmp_path).set_index("path").loc["images/cat/0.jpg"]
    assert (row["width_px"], row["height_px"]) == (10, 20)


def test_unreadable_images_are_rows_with_their_problem(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", 5)
    (tmp_path / "images/cat/0.png").write_bytes(b"")
    (tmp_path / "images/cat/1.png").write_bytes(b"<html>not found</html>")
    (tmp_path / "images/cat/2.png").write_bytes(picture(1, (30, 20))[:-40])
    manifest = build(tmp_path).set_index("path")
    bad = manifest[~manifest["is_readable"]]
    assert [problem.partition(":")[0] for problem in bad["problem"]] == [
        *("EmptyImageError", "UnsupportedImageError", "TruncatedImageError")
    ]
    assert bad["width_px"].tolist() == [0, 0, 20]


def deep_png(levels: np.ndarray) -> bytes:
    """A grey PNG of 16 bits per sample."""
    stream = io.BytesIO()
    Image.fromarray(levels.astype(np.uint16)).save(stream, "PNG")
    return stream.getvalue()


def test_says_what_is_odd_about_images_that_decode(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", 5)
    noise = np.random.default_rng(0).integers(0, 4096, (20, 30))
    noise[0, 0], noise[0, 1] = 0, 4095
    stream = io.BytesIO()
    Image.fromarray((noise // 16).astype(np.uint8)).save(stream, "JPEG")
    jpeg = stream.getvalue()
    files = {
        "cat/0.png": deep_png(noise),
        "cat/1.png": deep_png(noise * 16),
        "cat/2.png": jpeg[:-2],
        "cat/3.png": jpeg[:400] + bytes(9) + jpeg[409:],
        "cat/4.png": jpeg,
        "dog/0.png": deep_png(np.full((9, 9), 700)),
    }
    for name, content in files.items():
        (tmp_path / "images" / name).write_bytes(content)
    manifest = build(tmp_path).set_index("path")
    assert all(manifest["is_readable"])
    odd = {column: manifest[column].dropna().to_dict() for column in ("damage", "constant", "narrow_range")}
    assert odd["constant"] == {"images/dog/0.png": "all of it is RGB (2, 2, 2)"}
    assert odd["narrow_range"] == {
        "images/cat/0.png": "16-bit samples from 0 to 4095: 16 of 256 levels are seen",
        "images/dog/0.png": "16-bit samples from 512 to 767: 1 of 256 levels are seen",
    }
    assert list(odd["damage"]) == ["images/cat/2.png", "images/cat/3.png"]
    assert "every row decodes" in odd["damage"]["images/cat/2.png"]
    assert "Corrupt JPEG data" in odd["damage"]["images/cat/3.png"]


def test_the_configs_limit_of_pixels_decides_what_is_readable(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", 5)
    (tmp_path / "images/cat/0.png").write_bytes(picture(1, (30, 20)))
    readable = {}
    for limit in (600, 599):
        config = dataset(max_image_pixels=limit)
        path = build_manifest(tmp_path, data_path="images", annotations=None, model=model(), dataset=config)
        rows = read_manifest(path).set_index("path")
        readable[limit] = rows.loc["images/cat/0.png", "is_readable"]
        assert rows.loc["images/cat/1.png", "is_readable"]
    assert readable == {600: True, 599: False}


def test_copies_of_an_image_share_a_split(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", 20)
    for i in range(20):
        (tmp_path / f"images/dog/{i}.png").write_bytes((tmp_path / f"images/dog/{i % 4}.png").read_bytes())
    manifest = build(tmp_path)
    assert (manifest.groupby("sha256")["split"].nunique() == 1).all()


def test_lists_unknown_classes_and_classes_without_images(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", 1, ("cat", "emu"))
    with pytest.raises(InvalidDatasetError) as caught:
        build(tmp_path)
    text = str(caught.value)
    assert "pets v1.0.0: expected images of exactly the classes cat, dog" in text
    assert "model.classes does not name: emu" in text
    assert "no images of: dog" in text
    assert "Found: cat, emu" in text


def test_multi_class_needs_exactly_one_label(tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", ["0.png", "1.png", "2.png"])
    csv = b"path,label\n0.png,cat|dog\n1.png,\n2.png,dog\n"
    with pytest.raises(InvalidDatasetError, match=r"2 images without exactly one label: 0\.png \(cat\|dog\), 1\.png"):
        build(tmp_path, csv)
    assert build(tmp_path, csv, classifier_type="multi-label")["labels"].tolist() == [["cat", "dog"], [], ["dog"]]


def test_given_splits_are_kept_and_missing_ones_recorded(tmp_path: Path) -> None:
    names = [f"{split}/{name}/{i}.png" for split in ("train", "test") for name in ("cat", "dog") for i in range(10)]
    manifest = build(write_pictures(tmp_path / "images", names).parent)
    # Per class 10 train images: round(0.15 * 10) = 2 valid, round(0.2 * 10) = 2 reference.
    assert split_counts(manifest) == {"train": 12, "valid": 4, "test": 20, "reference": 4}
    taken = manifest[manifest["split_origin"] == "taken from train"]
    assert set(taken["split"]) == {"valid", "reference"}
    assert all(path.startswith("images/train/") for path in taken["path"])


def test_name_follows_what_would_change_a_row() -> None:
    name = manifest_name(model(), dataset())
    assert manifest_name(model("dog", "cat"), dataset()) == name
    changed = [
        manifest_name(model("cat", "emu"), dataset()),
        manifest_name(model(classifier_type="multi-label"), dataset()),
        manifest_name(model(), dataset(split_seed=1)),
        manifest_name(model(), dataset(valid_fraction=0.1)),
    ]
    assert len({name, *changed}) == 5


def test_missing_manifest_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="Materialise the dataset again"):
        read_manifest(tmp_path / "manifest.parquet")
