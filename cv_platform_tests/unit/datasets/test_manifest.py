from __future__ import annotations

import hashlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cv_platform.datasets.manifest import (
    MANIFEST_SCHEMA,
    build_manifest,
    count_manifest,
    is_manifest,
    manifest_name,
    read_manifest,
    read_thumbnails,
)
from cv_platform.datasets.near_copies import thumbnail
from cv_platform.datasets.origins import Files
from cv_platform.datasets.quarantine import kind_of
from cv_platform.errors import DatasetError, InvalidDatasetError
from cv_platform.images import Preprocessing, decode, preprocess
from cv_platform.properties import PROPERTY_NAMES, image_properties
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
    assert manifest.columns.tolist() == MANIFEST_SCHEMA.names[:-1]
    assert manifest["path"].tolist() == [f"images/{name}/{i}.png" for name in ("cat", "dog") for i in range(3)]
    row = manifest.iloc[0]
    assert (row["sha256"], row["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert (row["width_px"], row["height_px"], row["labels"]) == (9, 5, ["cat"])
    assert (row["format"], row["channels"], row["bit_depth"], row["orientation"]) == ("PNG", 3, 8, 1)
    assert (row["is_readable"], row["status"], row["group"]) == (True, "used", None)
    assert row["problem"] is None
    seen = image_properties(preprocess(data, (32, 32)))
    np.testing.assert_allclose(row[list(PROPERTY_NAMES)].astype(float), seen, rtol=1e-5)


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
    assert (row["width_px"], row["height_px"], row["orientation"]) == (10, 20, 6)


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
    red = np.full((400, 500, 3), (40, 40, 200), np.uint8)
    as_light = red.copy()
    as_light[:, 250:] = (88, 88, 88)  # BGR, of the same grey level.
    files = {
        "cat/0.png": deep_png(noise),
        "cat/1.png": deep_png(noise * 16),
        "cat/2.png": jpeg[:-2],
        "cat/3.png": jpeg[:400] + bytes(9) + jpeg[409:],
        "cat/4.png": jpeg,
        "dog/0.png": deep_png(np.full((9, 9), 700)),
        "dog/1.png": cv2.imencode(".jpg", red)[1].tobytes(),
        "dog/2.png": cv2.imencode(".jpg", as_light)[1].tobytes(),
    }
    for name, content in files.items():
        (tmp_path / "images" / name).write_bytes(content)
    manifest = build(tmp_path).set_index("path")
    assert all(manifest["is_readable"])
    odd = {column: manifest[column].dropna().to_dict() for column in ("damage", "constant", "narrow_range")}
    assert odd["constant"] == {
        "images/dog/0.png": "all of it is RGB (2, 2, 2)",
        "images/dog/1.png": "all of it is RGB (200, 40, 40)",
    }
    assert odd["narrow_range"] == {
        "images/cat/0.png": "16-bit samples from 0 to 4095: 16 of 256 levels are seen",
        "images/dog/0.png": "16-bit samples from 700 to 700: 1 of 256 levels are seen",
    }
    assert list(odd["damage"]) == ["images/cat/2.png", "images/cat/3.png"]
    assert "every row decodes" in odd["damage"]["images/cat/2.png"]
    assert "Corrupt JPEG data" in odd["damage"]["images/cat/3.png"]


def test_declared_bits_decide_what_is_seen_and_what_is_clipped(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", 4)
    noise = np.random.default_rng(0).integers(0, 4096, (9, 9))
    fourteen = np.where(noise == noise.max(), 2**14 - 1, noise // 4)
    for name, samples in (("0", noise), ("1", noise // 8), ("2", np.where(noise > 4000, 5000, noise)), ("3", fourteen)):
        (tmp_path / f"images/cat/{name}.png").write_bytes(deep_png(samples))
    plain, declared = (build(tmp_path, sample_bits=bits).set_index("path") for bits in (None, 12))
    largest = {
        f"images/cat/{name}.png": value
        for name, value in (("0", noise.max()), ("1", noise.max() // 8), ("2", 5000), ("3", 2**14 - 1))
    }
    for manifest in (plain, declared):
        assert manifest["largest_sample"].dropna().to_dict() == largest
    assert plain["clipped"].dropna().to_dict() == {}
    # 14 bits come to 64 levels at most.
    assert sorted(plain["narrow_range"].dropna().index) == sorted(largest)
    assert declared["narrow_range"].dropna().to_dict() == {}
    assert declared["clipped"].dropna().to_dict() == {
        "images/cat/2.png": "samples up to 5000, where model.sample_bits: 12 ends at 4095",
        "images/cat/3.png": "samples up to 16383, where model.sample_bits: 12 ends at 4095",
    }
    # The statistics, too, are of what a model sees.
    content, made = deep_png(noise), Preprocessing(sample_bits=12)
    seen = image_properties(preprocess(content, (32, 32), preprocessing=made))
    found = declared.loc["images/cat/0.png", list(PROPERTY_NAMES)].astype(float)
    np.testing.assert_allclose(found, seen, rtol=1e-5)
    assert found["luma_mean"] > 10 * plain.loc["images/cat/0.png", "luma_mean"]
    for rows in (plain, declared):
        same = [name for name in rows.index if name not in largest]
        np.testing.assert_array_equal(rows.loc[same, list(PROPERTY_NAMES)], plain.loc[same, list(PROPERTY_NAMES)])


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
    counts = count_manifest(next(tmp_path.glob("manifest-*.parquet")))
    assert counts.splits == {"train": 12, "valid": 4, "test": 20, "reference": 4}
    assert counts.origins == dict.fromkeys(("valid", "reference"), "taken from train") | {
        "train": "given",
        "test": "given",
    }
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
        manifest_name(model(sample_bits=12), dataset()),
    ]
    assert len({name, *changed}) == 6
    assert manifest_name(model(sample_bits=16), dataset()) == name


def test_missing_manifest_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="Materialise the dataset again"):
        read_manifest(tmp_path / "manifest.parquet")


def gif(pictures: int) -> bytes:
    frames = [Image.fromarray(np.random.default_rng(at).integers(0, 255, (9, 9), np.uint8)) for at in range(pictures)]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    return stream.getvalue()


def bad_files() -> dict[str, bytes]:
    """A file of each kind that quarantine knows, by kind, but for unknown classes and duplicates."""
    whole = jpeg_bytes(90)
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0), b"IDAT", b"IEND")
    huge = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return {
        "zero_size": b"",
        "absurd_size": b"\x89PNG\r\n\x1a\n" + b"".join(huge),
        "unreadable": picture(1, (30, 20))[:-40],
        "damaged": jpeg_bytes(91)[:-2],
        "animated": gif(3),
        "constant": cv2.imencode(".png", np.full((9, 9, 3), 7, np.uint8))[1].tobytes(),
        "bit_depth": deep_png(np.random.default_rng(0).integers(0, 4096, (20, 30))),
        "wrong_suffix": whole,
    }


def jpeg_bytes(seed: int) -> bytes:
    return cv2.imencode(".jpg", scene(seed), [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def test_each_bad_kind_is_kept_out_of_every_split_for_its_reason(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", 20)
    files = bad_files()
    names = {kind: f"images/cat/bad-{kind}{'.gif' if kind == 'animated' else '.png'}" for kind in files}
    names["damaged"] = "images/cat/bad-damaged.jpg"
    for kind, content in files.items():
        (tmp_path / names[kind]).write_bytes(content)
    class_folders(tmp_path / "images", 2, ("emu",))
    (tmp_path / "images/dog/same.png").write_bytes((tmp_path / "images/dog/1.png").read_bytes())
    (tmp_path / "images/dog/other.png").write_bytes((tmp_path / "images/cat/2.png").read_bytes())
    policy = dict.fromkeys([*names, "unknown_class", "duplicate"], "quarantine") | {"constant": "fail"}
    (tmp_path / "images/cat/0.png").write_bytes(picture(99, (1, 40)))
    path = build_manifest(
        tmp_path, data_path="images", annotations=None, model=model(), dataset=dataset(quarantine=policy)
    )
    manifest = read_manifest(path).set_index("path")
    out = manifest.loc[manifest["status"] != "used"]
    reasons = out["reason"].to_dict()
    assert {kind_of(reasons[names[kind]]) for kind in names} == set(names)
    assert all(kind_of(reasons[names[kind]]) == kind for kind in names)
    assert reasons["images/cat/0.png"] == "absurd_size: 40×1 pixels"
    assert reasons["images/emu/0.png"] == "unknown_class: labelled emu"
    kept = (reasons.get("images/dog/1.png"), reasons.get("images/dog/same.png"))
    assert sorted(map(str, kept)) == [
        "None",
        f"duplicate: the same bytes as images/dog/{'1' if kept[0] is None else 'same'}.png",
    ]
    both = "duplicate: the same bytes with other labels: images/cat/2.png, images/dog/other.png"
    assert reasons["images/cat/2.png"] == reasons["images/dog/other.png"] == both
    assert len(out) == len(files) + 1 + 2 + 1 + 2
    assert out["split"].isna().all()
    assert out["split_origin"].isna().all()
    assert out.index[out["status"] == "refused"].tolist() == [names["constant"]]
    assert set(manifest.loc[manifest["status"] == "used", "split"]) == {"train", "valid", "test", "reference"}

    counts = count_manifest(path)
    assert (counts.images, counts.unreadable) == (len(manifest), int((~manifest["is_readable"]).sum()))
    assert counts.splits == manifest["split"].value_counts().to_dict()
    assert counts.kinds == out["reason"].map(kind_of).value_counts().to_dict()
    assert counts.examples["constant"] == names["constant"]
    of_cats = manifest.loc[[labels == ["cat"] for labels in manifest["labels"]], "split"]
    assert counts.classes["cat"] == of_cats.value_counts().to_dict()
    assert "emu" not in counts.classes


def test_very_many_copies_of_an_image_leave_one_or_where_labels_differ_none(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", 20)
    for at in range(300):
        (tmp_path / f"images/cat/same-{at:03}.png").write_bytes(picture(77))
        (tmp_path / f"images/{('cat', 'dog')[at % 2]}/torn-{at:03}.png").write_bytes(picture(78))
    policy = {"duplicate": "quarantine"}
    path = build_manifest(
        tmp_path, data_path="images", annotations=None, model=model(), dataset=dataset(quarantine=policy)
    )
    manifest = read_manifest(path)
    out = manifest.loc[manifest["status"] == "quarantined"]
    assert out["reason"].value_counts().to_dict() == {
        "duplicate: the same bytes with other labels: images/cat/torn-000.png, images/dog/torn-001.png, 298 more": 300,
        "duplicate: the same bytes as images/cat/same-000.png": 299,
    }
    assert out[["split", "split_origin"]].isna().all(axis=None)
    kept = manifest.loc[manifest["status"] == "used"]
    assert len(kept) == 41
    assert "images/cat/same-000.png" in kept["path"].tolist()
    assert kept[["split", "split_origin"]].notna().all(axis=None)


def test_by_default_only_what_cannot_be_used_is_kept_out(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", 5)
    for kind, content in bad_files().items():
        (tmp_path / f"images/cat/{kind}.png").write_bytes(content)
    manifest = build(tmp_path)
    out = manifest.loc[manifest["status"] != "used", "reason"].map(kind_of)
    assert sorted(out) == ["absurd_size", "unreadable", "zero_size"]


def test_splits_that_are_made_never_divide_a_group(tmp_path: Path) -> None:
    names = [f"{at:03d}.png" for at in range(240)]
    write_pictures(tmp_path / "images", names)
    # Thirty patients with 1 to 15 images, each of both classes.
    patients = [str(at) for at, size in enumerate([1, 15] * 15) for _ in range(size)]
    rows = [
        f"{name},{patient},{('cat', 'dog')[at % 2]}"
        for at, (name, patient) in enumerate(zip(names, patients, strict=True))
    ]
    manifest = build(tmp_path, "\n".join(["path,group,label", *rows]).encode())
    assert manifest["group"].tolist() == patients
    assert manifest.groupby("group")["split"].nunique().max() == 1
    shares = manifest["split"].value_counts(normalize=True)
    expected = {"train": 0.5, "valid": 0.15, "test": 0.15, "reference": 0.2}
    # A group is a sixteenth of the images: no split is further off than one.
    assert all(abs(shares[split] - share) < 15 / 240 for split, share in expected.items())


def test_a_file_that_goes_while_it_is_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidDatasetError, match=r"as they were listed.*gone\.png"):
        list(Files(tmp_path, ("gone.png",)))


@pytest.mark.parametrize(
    ("first", "second", "reasons"),
    [
        (b"cat,dog", b"cat,", ["duplicate: the same bytes as images/1.png", None]),  # Of the other one more is known.
        (b"cat,dog", b"dog,", ["duplicate: the same bytes with other labels: images/0.png, images/1.png"] * 2),
        (b"cat,dog", b"cat|dog,", ["duplicate: the same bytes as images/1.png", None]),
    ],
)
def test_copies_contradict_each_other_in_what_is_known_of_both(
    tmp_path: Path, first: bytes, second: bytes, reasons: list[str | None]
) -> None:
    write_pictures(tmp_path / "images", ["0.png", "2.png", "3.png"])
    (tmp_path / "images/1.png").write_bytes((tmp_path / "images/0.png").read_bytes())
    csv = b"path,split,label,unknown_labels\n0.png,train,%b\n1.png,train,%b\n2.png,train,cat,\n3.png,train,dog,\n"
    policy = {"duplicate": "quarantine"}
    config = dataset(quarantine=policy, valid_fraction=0.01, test_fraction=0.01, reference_fraction=0.01)
    kind = model(classifier_type="multi-label")
    path = build_manifest(tmp_path, data_path="images", annotations=csv % (first, second), model=kind, dataset=config)
    rows = read_manifest(path)
    assert [None if pd.isna(reason) else reason for reason in rows["reason"]][:2] == reasons


def test_a_manifest_of_before_there_were_unknown_labels_is_made_again_under_its_name(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", 3)
    path = build_manifest(tmp_path, data_path="images", annotations=None, model=model(), dataset=dataset())
    before = pq.read_table(path).drop_columns(["unknown_labels"])
    pq.write_table(before, path)
    assert not is_manifest(path)
    again = build_manifest(tmp_path, data_path="images", annotations=None, model=model(), dataset=dataset())
    assert (again, is_manifest(again)) == (path, True)
    assert read_manifest(path)["unknown_labels"].tolist() == [[]] * 6
