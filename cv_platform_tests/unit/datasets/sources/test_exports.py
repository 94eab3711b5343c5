"""What labelling tools and Hugging Face export, as each of them writes it, and what hostile files of theirs come to."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cv_platform.datasets.importing import import_dataset
from cv_platform.datasets.sources import exports
from cv_platform.datasets.sources.entries import Layout
from cv_platform.datasets.sources.label_files import LabelRules
from cv_platform.datasets.sources.layouts import descend, read_layout
from cv_platform.datasets.sources.parquet import unpack_parquet
from cv_platform.datasets.sources.tree import walk
from cv_platform.errors import InvalidDatasetError
from cv_platform_tests.support.pictures import picture, write_pictures

COCO = {
    "images": [{"id": 7, "file_name": "1.png"}, {"id": 8, "file_name": "2.png"}, {"id": 9, "file_name": "3.png"}],
    "categories": [{"id": 1, "name": "cat"}, {"id": 5, "name": "dog, small"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 1},
        {"id": 2, "image_id": 7, "category_id": 1},
        {"id": 3, "image_id": 8, "category_id": 5},
    ],
}
DATUMARO = {
    "info": {},
    "categories": {"label": {"labels": [{"name": "cat"}, {"name": "dog"}]}},
    "items": [
        {"id": "a", "annotations": [{"type": "label", "label_id": 0}], "image": {"path": "a.png", "size": [8, 8]}},
        {"id": "b", "annotations": [{"type": "label", "label_id": 1}, {"type": "bbox", "label_id": 0}]},
        {"id": "c", "annotations": []},
    ],
}
CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version>
  <image id="0" name="a.png" subset="train" width="8" height="8"><tag label="cat" source="manual"></tag></image>
  <image id="1" name="b.png" subset="val" width="8" height="8"><tag label="dog"/><box label="cat"/></image>
  <image id="2" name="c.png" width="8" height="8"></image>
</annotations>"""


def task(image: str, *choices: str, others: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    result = [{"type": "choices", "from_name": "animal", "value": {"choices": list(choices)}}]
    return {"id": 1, "data": {"image": image}, "annotations": [{"result": result}, *(others or [])]}


def read(root: Path, *, classes: tuple[str, ...] | None = None) -> Layout:
    return read_layout(descend(walk(root)), None, LabelRules(classes))


def found(layout: Layout) -> dict[str, tuple[str | None, tuple[str, ...]]]:
    return {entry.path: (entry.split, entry.labels) for entry in layout.entries}


def test_a_coco_export_beside_its_images(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data", ["1.png", "2.png", "3.png", "4.png"])
    (tmp_path / "labels.json").write_text(json.dumps(COCO))
    layout = read(tmp_path)
    assert found(layout) == {"data/1.png": (None, ("cat",)), "data/2.png": (None, ("dog, small",))}
    assert layout.class_names == ("cat", "dog, small")  # A comma in a category's name parts no labels.
    assert layout.left_out.paths[exports.NO_ANNOTATION] == ["3.png"]
    assert layout.left_out.paths["not named by the label file"] == ["data/4.png"]


def test_coco_files_of_splits_in_a_folder_of_annotations(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["train2017/1.png", "train2017/2.png", "val2017/1.png", "val2017/2.png"])
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"annotations/instances_{split}2017.json").write_text(json.dumps(COCO))
        (tmp_path / f"annotations/captions_{split}2017.json").write_text(json.dumps({"images": [], "annotations": []}))
    assert found(read(tmp_path)) == {
        "train2017/1.png": ("train", ("cat",)),
        "train2017/2.png": ("train", ("dog, small",)),
        "val2017/1.png": ("valid", ("cat",)),
        "val2017/2.png": ("valid", ("dog, small",)),
    }


def test_a_datumaro_export_with_the_same_names_in_each_subset(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["images/train/a.png", "images/train/b.png", "images/test/a.png", "images/test/b.png"])
    (tmp_path / "annotations").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"annotations/{split}.json").write_text(json.dumps(DATUMARO))
    assert found(read(tmp_path)) == {
        f"images/{split}/{name}.png": (split, (label,))
        for split in ("train", "test")
        for name, label in (("a", "cat"), ("b", "dog"))
    }


def test_a_cvat_export_is_read_by_its_tags(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["images/train/a.png", "images/val/b.png", "images/c.png"])
    (tmp_path / "annotations.xml").write_text(CVAT)
    layout = read(tmp_path)
    assert found(layout) == {"images/train/a.png": ("train", ("cat",)), "images/val/b.png": ("valid", ("dog",))}
    assert any("1 box are not used" in note for note in layout.notes)


def test_a_label_studio_export_finds_its_files_by_each_kind_of_address(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "sub/2.png", "0badc0de-3.png", "4.png", "5.png"])
    tasks = [
        task("/data/upload/12/0badc0de-1.png", "cat"),  # The file as it was before it was uploaded.
        task("/data/local-files/?d=sub%2F2.png", "dog"),
        task("https://host.example/data/upload/12/0badc0de-3.png", "cat"),
        task("s3://bucket/place/4.png", "cat", others=[{"was_cancelled": True, "result": []}]),
        task("5.png", "cat", others=task("5.png", "dog")["annotations"]),
    ]
    (tmp_path / "project-12-at-2026-01-31.json").write_text(json.dumps(tasks))
    layout = read(tmp_path)
    assert {path: labels for path, (_, labels) in found(layout).items()} == {
        "1.png": ("cat",),
        "sub/2.png": ("dog",),
        "0badc0de-3.png": ("cat",),
        "4.png": ("cat",),
    }
    assert layout.left_out.paths[exports.DISAGREEMENT] == ["5.png"]


def test_two_questions_of_label_studio_are_asked_back_about(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "2.png"])
    quality = {"type": "choices", "from_name": "quality", "value": {"choices": ["good"]}}
    tasks = [task("1.png", "cat"), task("2.png", "dog")]
    tasks[0]["annotations"][0]["result"].append(quality)
    (tmp_path / "result.json").write_text(json.dumps(tasks))
    with pytest.raises(InvalidDatasetError, match=r"one question .* animal, quality\. .*--classes"):
        read(tmp_path)
    assert {labels for _, labels in found(read(tmp_path, classes=("cat", "dog"))).values()} == {("cat",), ("dog",)}


def test_label_studios_short_json_is_read_too(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "2.png"])
    short = [
        {"image": "/data/upload/1/1.png", "id": 1, "choice": "cat", "annotator": 1, "annotation_id": 4},
        {"image": "/data/upload/1/2.png", "id": 2, "choice": {"choices": ["dog"]}, "annotator": 1, "annotation_id": 5},
    ]
    (tmp_path / "export.json").write_text(json.dumps(short))
    assert {path: labels for path, (_, labels) in found(read(tmp_path)).items()} == {
        "1.png": ("cat",),
        "2.png": ("dog",),
    }


BOMB = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa">]><annotations><image name="&a;"/></annotations>'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.json", json.dumps(COCO)[:-40], "breaks off or has other fields"),
        ("labels.json", json.dumps({**COCO, "images": [{"id": 1}]}), "Received: 3 of others"),
        ("labels.json", json.dumps({**COCO, "annotations": [5]}), "breaks off or has other fields"),
        ("labels.json", json.dumps(COCO).replace('"1.png"', "7"), "7 as an image's name"),
        ("x.json", json.dumps([{**task("", "cat"), "data": {}}]), "'' instead of a path relative"),
        ("labels.json", '{"images": [], "categories": ' + "[" * 100_000, "breaks off or has other fields"),
        ("labels.json", json.dumps(COCO).replace("1.png", "../../etc/passwd"), "instead of a path relative"),
        ("labels.json", json.dumps(COCO).replace("2.png", "/etc/hostname"), "hostname is not in"),
        ("labels.json", json.dumps(COCO).replace('"cat"', '"cat|dog"'), "labels without '|'"),
        ("x.json", json.dumps([task("/data/local-files/?d=../../etc/passwd", "cat")]), "passwd is not in"),
        ("annotations.xml", BOMB, "without definitions of entities"),
        ("annotations.xml", "<annotations><image", "breaks off or has other fields"),
        ("annotations.xml", '<annotations><image name="1.png"><box label="cat"/></image></annotations>', "1 box"),
    ],
)
def test_broken_and_hostile_exports_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    write_pictures(tmp_path / "images", ["1.png", "2.png", "3.png"])
    (tmp_path / "images" / name).write_text(content)
    with pytest.raises(InvalidDatasetError, match=message):
        read(tmp_path / "images")


def test_a_huge_export_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, ["1.png"])
    (tmp_path / "labels.json").write_text(json.dumps(COCO))
    monkeypatch.setattr(exports, "MAX_EXPORT_BYTES", 100)
    with pytest.raises(InvalidDatasetError, match="Export fewer images at a time"):
        read(tmp_path)


def test_other_json_beside_class_folders_is_no_export(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["cat/1.png", "dog/2.png"])
    (tmp_path / "dataset_info.json").write_text('{"splits": []}')
    assert found(read(tmp_path)) == {"cat/1.png": (None, ("cat",)), "dog/2.png": (None, ("dog",))}


def parquet(path: Path, rows: list[dict[str, Any]], *, is_numbered: bool = True) -> Path:
    """Writes a file as `datasets` does."""
    feature = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    metadata = {"huggingface": json.dumps({"info": {"features": feature if is_numbered else {}}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    label = pa.int64() if is_numbered else pa.string()
    schema = pa.schema([("image", image), ("label", label)], metadata=metadata)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def row(seed: int, label: object) -> dict[str, Any]:
    return {"image": {"bytes": picture(seed), "path": "../../out.png"}, "label": label}


@pytest.mark.parametrize("labels", [["cat", "dog", None], [0.0, 1.0, math.nan]], ids=["text", "floats"])
def test_labels_that_pandas_wrote_anew_keep_their_names(tmp_path: Path, labels: list[Any]) -> None:
    names = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = pa.table({"image": [picture(seed) for seed in range(3)], "label": labels})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": names}})})
    pq.write_table(table, tmp_path / "pets.parquet")
    (tmp_path / "into").mkdir()
    unpack_parquet([tmp_path / "pets.parquet"], tmp_path / "into", root=tmp_path)
    written = list(csv.reader((tmp_path / "into/annotations.csv").read_text().splitlines()))
    assert [label for _, label in written[1:]] == ["cat", "dog", "no_label"]


def test_parquet_of_hugging_face_imports_with_splits_and_names(tmp_path: Path) -> None:
    source = tmp_path / "source"
    parquet(source / "data/train-00000-of-00002.parquet", [row(1, 0), row(2, 1)])
    parquet(source / "data/train-00001-of-00002.parquet", [row(3, 0), row(4, 1), row(5, -1)])
    parquet(source / "data/test-00000-of-00001.parquet", [row(6, 0), row(7, 1)])
    imported = import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "datasets")
    assert imported.counts == {"train": 4, "test": 2}
    assert imported.class_counts == {"cat": 3, "dog": 3}
    assert imported.notes[0] == "images taken out of 3 Parquet files"
    assert any("means no label" in reason for reason in imported.left_out)
    assert not (tmp_path / "out.png").exists()
    assert {path.name for path in source.rglob("*") if path.is_file()} == {
        *("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet")
    }
    again = import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "datasets")
    assert again.dvc_md5 == imported.dvc_md5


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": {"bytes": None, "path": "/etc/hostname"}, "label": 0}], "with its files embedded"),
        ([row(1, 0), row(2, 7)], r"the labels cat, dog \(2 names\), or their numbers"),
    ],
)
def test_parquet_that_cannot_be_taken_is_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    file = parquet(tmp_path / "train.parquet", rows)
    with pytest.raises(InvalidDatasetError, match=message):
        import_dataset(file, ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "datasets")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InvalidDatasetError, match="a whole Parquet file at"):
        import_dataset(file, ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "datasets")
