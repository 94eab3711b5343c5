from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from cv_platform.datasets.differences import changes_since, compare_versions
from cv_platform.datasets.importing import import_dataset
from cv_platform.datasets.repository import summarise_versions
from cv_platform.datasets.versions import checkout_version, repository_of
from cv_platform.errors import DatasetNotFoundError, UnknownDatasetVersionError
from cv_platform_tests.support.pictures import picture, write_pictures

from .conftest import dataset, model


def pets(root: Path) -> Path:
    return write_pictures(
        root, [f"{split}/{name}/{i}.png" for split in ("train", "test") for name in ("cat", "dog") for i in range(4)]
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CV_HOME with `pets` v1.0.0, and v2.0.0 in which each kind of change was made by hand."""
    folder = tmp_path_factory.mktemp("differences")
    source = pets(folder / "source")
    root = folder / "home" / "datasets"
    import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=root)
    (source / "train/cat/0.png").rename(source / "train/dog/was-a-cat.png")
    (source / "train/cat/1.png").rename(source / "test/cat/from-train.png")
    (source / "train/cat/2.png").rename(source / "train/cat/other-name.png")
    (source / "train/dog/0.png").write_bytes(picture(1000))
    (source / "test/dog/3.png").unlink()
    write_pictures(source, ["train/dog/new.png", "test/dog/new.png"], first_seed=2000)
    import_dataset(source, ds_name="pets", tag="v2.0.0", ds_root=root)
    return folder / "home"


def test_tells_what_was_added_removed_changed_relabelled_and_moved(home: Path) -> None:
    found = compare_versions(home / "datasets/pets", "v1.0.0", "v2.0.0", home=home)
    paths = [(c.kind, c.before.path if c.before else None, c.after.path if c.after else None) for c in found.changes]
    assert paths == [
        ("added", None, "test/dog/new.png"),
        ("added", None, "train/dog/new.png"),
        ("removed", "test/dog/3.png", None),
        ("changed", "train/dog/0.png", "train/dog/0.png"),
        ("relabelled", "train/cat/0.png", "train/dog/was-a-cat.png"),
        ("moved", "train/cat/1.png", "test/cat/from-train.png"),
    ]
    assert [change.title for change in found.changes[-2:]] == ["cat → dog", "train → test"]
    assert found.summary() == (
        "v1.0.0 → v2.0.0: 2 added, 1 removed, 1 changed, 1 relabelled, 1 moved; "
        "12 images are the same (1 of them under another name)."
    )
    assert found.by_class() == [
        {"class": "cat", "added": 0, "removed": 0, "changed": 0, "gained": 0, "lost": 1, "moved": 1},
        {"class": "dog", "added": 2, "removed": 1, "changed": 1, "gained": 1, "lost": 0, "moved": 0},
    ]
    rows = list(csv.DictReader(io.StringIO(found.write_csv().decode())))
    assert [row["kind"] for row in rows] == [change.kind for change in found.changes]
    assert (rows[4]["before_label"], rows[4]["after_label"]) == ("cat", "dog")
    assert rows[4]["before_sha256"] == rows[4]["after_sha256"]


def test_the_way_back_swaps_what_was_added_and_removed(home: Path) -> None:
    forth = compare_versions(home / "datasets/pets", "v1.0.0", "v2.0.0", home=home)
    back = compare_versions(home / "datasets/pets", "v2.0.0", "v1.0.0", home=home)
    assert (back.count("added"), back.count("removed")) == (forth.count("removed"), forth.count("added"))
    assert back.unchanged == forth.unchanged
    same = compare_versions(home / "datasets/pets", "v1.0.0", "v1.0.0", home=home)
    assert (same.changes, same.unchanged) == ((), 16)


def test_the_sheet_shows_what_changed_with_before_and_after(home: Path) -> None:
    found = compare_versions(home / "datasets/pets", "v1.0.0", "v2.0.0", home=home)
    sheet = cv2.imdecode(np.frombuffer(found.draw(), np.uint8), cv2.IMREAD_COLOR)
    rows = (sheet.shape[0] - 4) // 100
    assert rows == 5  # Added dog, removed dog, changed dog, cat → dog, train → test.
    cells = [
        [sheet[4 + 100 * row : 100 + 100 * row, 248 + 100 * at : 344 + 100 * at] for at in range(8)]
        for row in range(rows)
    ]
    assert [sum(bool((cell < 250).any()) for cell in row) for row in cells] == [2, 1, 2, 1, 1]
    before = cv2.imdecode(np.frombuffer(picture(4), np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_allclose(cells[2][0][::12, ::12].astype(int), before.astype(int), atol=2)


def test_labels_in_a_file_are_compared_too(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "source", [f"{i}.png" for i in range(6)])
    for tag, label in (("v1", "cat"), ("v2", "dog")):
        rows = [f"{i}.png,{'cat|dog' if i == 5 else label if i == 0 else 'cat' if i < 3 else 'dog'}" for i in range(6)]
        (source / "annotations.csv").write_text("\n".join(["path,label", *rows]))
        import_dataset(source, ds_name="pets", tag=tag, ds_root=tmp_path / "home/datasets")
    found = compare_versions(tmp_path / "home/datasets/pets", "v1", "v2", home=tmp_path / "home")
    assert [(c.kind, c.title, c.after.path) for c in found.changes if c.after] == [("relabelled", "cat → dog", "0.png")]
    assert found.unchanged == 5


def test_versions_are_listed_with_their_size_and_message(home: Path) -> None:
    one, two = summarise_versions(home / "datasets/pets")
    assert (one.tag, one.files, one.message) == ("v1.0.0", 16, "Import v1.0.0")
    assert (two.tag, two.files) == ("v2.0.0", 17)
    compare_versions(home / "datasets/pets", "v1.0.0", "v2.0.0", home=home)  # It checks both out.
    assert one.bytes == sum(path.stat().st_size for path in (home / "worktrees/pets" / one.dvc_md5).rglob("*.png"))


def test_unknown_versions_and_datasets_are_named_with_those_that_there_are(home: Path) -> None:
    with pytest.raises(UnknownDatasetVersionError, match=r"'v9'. Tags: v1\.0\.0, v2\.0\.0"):
        compare_versions(home / "datasets/pets", "v1.0.0", "v9", home=home)
    with pytest.raises(DatasetNotFoundError, match="Datasets there: pets"):
        repository_of("pest", root=home / "datasets")


def test_a_version_is_compared_with_the_one_that_was_used_before(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "home", symlinks=True)
    home, repository = tmp_path / "home", tmp_path / "home/datasets/pets"
    one, two = (checkout_version(dataset(tag=tag), model(), home=home) for tag in ("v1.0.0", "v2.0.0"))
    found = changes_since(one, two, repository, home)
    assert found
    assert (found.before, found.after, len(found.changes)) == ("v1.0.0", "v2.0.0", 6)
    assert changes_since(None, two, repository, home) is None
    assert changes_since(two, two, repository, home) is None
    gone = one.provenance.model_copy(update={"dvc_tag": "v0"})
    assert changes_since(one.model_copy(update={"provenance": gone}), two, repository, home) is None
