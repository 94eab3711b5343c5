from __future__ import annotations

import hashlib
import logging
import shutil
import tarfile
from pathlib import Path

import pytest

from cv_platform.compute import progress
from cv_platform.datasets.importing import ImportedDataset, ImportRules, import_dataset
from cv_platform.datasets.manifest import read_manifest
from cv_platform.datasets.relabelling import Decision, relabel
from cv_platform.datasets.stand_ins.links import LINKED_FILES, PLACE, place_links, write_links
from cv_platform.datasets.versions import checkout_version
from cv_platform.errors import InvalidDatasetError
from cv_platform.records import DatasetVersion
from cv_platform_tests.support.pictures import class_folders, picture
from cv_platform_tests.unit.datasets.conftest import dataset, model
from cv_platform_tests.unit.datasets.test_importing import listing


def link(source: Path, root: Path, tag: str = "v1.0.0") -> ImportedDataset:
    return import_dataset(source, ds_name="pets", tag=tag, ds_root=root, rules=ImportRules(links=True))


def check_out(root: Path, tag: str = "v1.0.0") -> DatasetVersion:
    return checkout_version(dataset(tag=tag, ds_root=str(root)), model(), home=root.parent / "home")


def test_images_that_are_linked_stay_where_they_are_and_are_in_the_manifest(tmp_path: Path) -> None:
    source, root = class_folders(tmp_path / "pets", per_class=3), tmp_path / "ds"
    before = listing(source)
    imported = link(source, root)
    version = check_out(root)
    assert listing(source) == before  # Rights and numbers of links, too.
    manifest = read_manifest(version.manifest_path)
    assert dict(zip(manifest["path"], manifest["sha256"], strict=True)) == {
        f"images/{path.relative_to(source).as_posix()}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in source.rglob("*.png")
    }
    assert (version.directory / "images/cat/0.png").readlink() == source / "cat/0.png"
    stored = [path for path in (imported.directory / ".dvc/cache").rglob("*") if path.is_file()]
    assert len(stored) == 2  # The list of files, and DVC's own of the folder.
    assert link(source, root).summary()[-1] == "nothing new: v1.0.0 has had the same images and labels before"


def test_the_progress_of_a_link_is_that_of_the_hashing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "_EVERY_SECONDS", 0.0)
    source = class_folders(tmp_path / "pets", per_class=1)
    files = {path.name + path.parent.name: path for path in source.rglob("*.png")}
    with caplog.at_level(logging.INFO), pytest.raises(FileNotFoundError):
        write_links(tmp_path / "images", {**files, "the last": source / "gone.png"})
    lines = [line.partition(" images")[0] for line in caplog.messages]
    assert lines == ["Images hashed: 1 of 3", "Images hashed: 2 of 3"]


def test_a_linked_image_that_changed_or_is_gone_is_named_before_anything_uses_it(tmp_path: Path) -> None:
    source, root = class_folders(tmp_path / "pets", per_class=3), tmp_path / "ds"
    link(source, root)
    check_out(root)
    content = (source / "dog/1.png").read_bytes()
    (source / "cat/0.png").unlink()
    (source / "dog/1.png").write_bytes(picture(55, (9, 9)))
    with pytest.raises(InvalidDatasetError, match=r"2 others: .*/cat/0\.png \(gone\), .*/dog/1\.png \(changed\)\. Put"):
        check_out(root)
    (source / "dog/1.png").write_bytes(content)
    shutil.copyfile(source / "cat/1.png", source / "cat/0.png")  # As large as before, perhaps; not the same.
    with pytest.raises(InvalidDatasetError, match=r"1 others: .*/cat/0\.png \(changed\)"):
        check_out(root)


def test_linked_images_that_have_moved_are_the_same_data_under_a_new_tag(tmp_path: Path) -> None:
    source, root = class_folders(tmp_path / "pets", per_class=3), tmp_path / "ds"
    first = link(source, root)
    before = check_out(root)
    source.rename(tmp_path / "moved")
    with pytest.raises(InvalidDatasetError, match=r"6 others: .*\(gone\).* one that has moved is imported again"):
        check_out(root)
    moved = link(tmp_path / "moved", root, "v1.0.1")
    assert moved.dvc_md5 == first.dvc_md5
    after = check_out(root, "v1.0.1")
    assert (after.directory, after.manifest) == (before.directory, before.manifest)
    assert (after.directory / "images/cat/0.png").read_bytes() == (tmp_path / "moved/cat/0.png").read_bytes()


def test_a_relabelled_version_leaves_its_images_in_place_too(tmp_path: Path) -> None:
    source, root = class_folders(tmp_path / "pets", per_class=3), tmp_path / "ds"
    repository = link(source, root).directory
    sha256 = hashlib.sha256((source / "cat/0.png").read_bytes()).hexdigest()
    decision = Decision("images/cat/0.png", sha256, ("cat",), ("dog",))
    relabel(repository, "v1.0.0", b"a review", [decision], home=tmp_path / "home", new_tag="v2")
    version = check_out(root, "v2")
    assert (version.directory / f"images/dog/0-{sha256[:12]}.png").readlink() == source / "cat/0.png"
    assert read_manifest(version.manifest_path)["labels"].tolist().count(["dog"]) == 4


def test_refuses_to_link_into_an_archive(tmp_path: Path) -> None:
    class_folders(tmp_path / "pets", per_class=2)
    with tarfile.open(tmp_path / "pets.tar", "w") as tar:
        tar.add(tmp_path / "pets", "pets")
    with pytest.raises(InvalidDatasetError, match=r"Expected a folder of image files for --link\. .*Unpack it"):
        link(tmp_path / "pets.tar", tmp_path / "ds")


@pytest.mark.parametrize("row", ["../a.png,a.png,1,00", "a.png,/etc/passwd,1,00", "a.png,x/../../b.png,1,00"])
def test_refuses_a_list_that_leads_elsewhere(tmp_path: Path, row: str) -> None:
    (tmp_path / LINKED_FILES).write_text(f"path,origin,bytes,sha256\n{row}\n")
    with pytest.raises(InvalidDatasetError, match="expected paths below a folder"):
        place_links(tmp_path, b'{"root": "/data"}', version="pets v1")


def test_says_that_a_list_without_its_place_is_none(tmp_path: Path) -> None:
    (tmp_path / LINKED_FILES).write_text("path,origin,bytes,sha256\n")
    with pytest.raises(InvalidDatasetError, match=f"expected {PLACE} and {LINKED_FILES} as the import writes them"):
        place_links(tmp_path, None, version="pets v1")
