from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from cv_platform.datasets.importing import import_dataset
from cv_platform.datasets.manifest import read_manifest
from cv_platform.datasets.repository import list_versions
from cv_platform.datasets.versions import checkout_version
from cv_platform.errors import DatasetError, InvalidDatasetError

from .conftest import class_folders, dataset, model, write_pictures


def git(repository: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", repository, *arguments], capture_output=True, check=True, text=True).stdout


def listing(folder: Path) -> list[tuple[str, int, int, int]]:
    return sorted(
        (str(p.relative_to(folder)), p.stat().st_mode, p.stat().st_nlink, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
    )


def test_imports_class_folders_and_leaves_the_source_alone(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "pets", per_class=3)
    before = listing(source)
    imported = import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "ds")
    assert listing(source) == before
    assert imported.class_names == ("cat", "dog")
    assert imported.counts == {"no split": 6}
    assert imported.class_counts == {"cat": 3, "dog": 3}
    config = dataset(ds_root=str(tmp_path / "ds"))
    version = checkout_version(config, model(), home=tmp_path / "home")
    assert version.dvc_md5 == imported.dvc_md5
    expected = sorted(p.relative_to(source).as_posix() for p in source.rglob("*.png"))
    assert sorted(read_manifest(version.manifest_path)["path"]) == [f"images/{name}" for name in expected]
    assert (version.directory / "images/cat/0.png").read_bytes() == (source / "cat/0.png").read_bytes()


def test_refuses_a_root_that_cannot_hold_repositories(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "pets", per_class=2)
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DatasetError, match=f"Received: {root} .*by --root, or none for"):
            import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=root)
    repository = import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "ds").directory
    with pytest.raises(DatasetError, match=f"a repository itself. Give the folder above it: --root {tmp_path / 'ds'}"):
        import_dataset(source, ds_name="pets", tag="v1.1.0", ds_root=repository)
    assert not (repository / "pets").exists()


def test_imports_an_archive_with_a_wrapping_folder_and_split_folders(tmp_path: Path) -> None:
    names = [f"{split}/{name}/{i}.png" for split in ("train", "val", "test") for name in ("cat", "dog") for i in (0, 1)]
    write_pictures(tmp_path / "pets-1.0", names)
    with tarfile.open(tmp_path / "pets.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "pets-1.0", "pets-1.0")
    imported = import_dataset(tmp_path / "pets.tar.gz", ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "ds")
    assert imported.counts == {"train": 4, "valid": 4, "test": 4}
    version = checkout_version(dataset(ds_root=str(tmp_path / "ds")), model(), home=tmp_path / "home")
    assert (version.directory / "images/valid/cat/0.png").is_file()
    assert sorted(p.name for p in (tmp_path / "ds").iterdir()) == [".pets.lock", "pets"]


def test_imports_multi_label_annotations(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "source", [f"{i}.png" for i in range(4)])
    (tmp_path / "labels.csv").write_text(
        "image,split,cat,dog\n0.png,train,1,0\n1.png,train,1,1\n2.png,test,0,1\n3.png,test,0,0\n"
    )
    imported = import_dataset(
        source, ds_name="pets", tag="v1", ds_root=tmp_path / "ds", annotations=tmp_path / "labels.csv"
    )
    assert imported.class_counts == {"cat": 2, "dog": 2}
    config = dataset(tag="v1", ds_root=str(tmp_path / "ds"), valid_fraction=0.01, reference_fraction=0.01)
    version = checkout_version(config, model(classifier_type="multi-label"), home=tmp_path / "home")
    assert read_manifest(version.manifest_path)["labels"].tolist() == [["cat"], ["cat", "dog"], ["dog"], []]


def test_other_annotations_of_the_same_images_are_another_version(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "source", ["0.png", "1.png"])
    md5s = []
    for tag, labels in (("v1", ("cat", "dog")), ("v2", ("dog", "cat"))):
        (source / "annotations.csv").write_text(f"path,label\n0.png,{labels[0]}\n1.png,{labels[1]}\n")
        md5s.append(import_dataset(source, ds_name="pets", tag=tag, ds_root=tmp_path / "ds").dvc_md5)
    assert md5s[0] != md5s[1]


def test_adds_a_version_without_touching_the_users_tree(tmp_path: Path) -> None:
    repository = tmp_path / "ds" / "pets"
    first = import_dataset(class_folders(tmp_path / "one", 2), ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "ds")
    (repository / "notes.txt").write_text("mine")
    (repository / ".gitignore").write_text("/images\n/mine\n")
    git(repository, "add", ".gitignore")
    state = git(repository, "status", "--porcelain"), git(repository, "rev-parse", "HEAD")
    second = import_dataset(class_folders(tmp_path / "two", 3), ds_name="pets", tag="v1.1.0", ds_root=tmp_path / "ds")
    assert (git(repository, "status", "--porcelain"), git(repository, "rev-parse", "HEAD")) == state
    assert {tag: v.dvc_md5 for tag, v in list_versions(repository).items()} == {
        "v1.0.0": first.dvc_md5,
        "v1.1.0": second.dvc_md5,
    }
    assert git(repository, "rev-parse", "v1.1.0~1") == git(repository, "rev-parse", "v1.0.0")


def test_same_tag_with_the_same_images_changes_nothing_and_with_others_is_refused(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "source", 2)
    first = import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "ds")
    commit = git(first.directory, "rev-parse", "v1.0.0")
    assert import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "ds") == first
    write_pictures(source, ["cat/new.png"], first_seed=99)
    with pytest.raises(InvalidDatasetError, match=r"v1\.0\.0 of .* has other content .* choose a new tag"):
        import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "ds")
    assert git(first.directory, "rev-parse", "v1.0.0") == commit


def test_ignores_the_environment_of_a_git_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    subprocess.run(["git", "init", "--quiet", other], check=True)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Someone")
    import_dataset(class_folders(tmp_path / "s", 2), ds_name="pets", tag="v1", ds_root=tmp_path / "ds")
    assert not (other / ".git" / "index").exists()
    monkeypatch.delenv("GIT_DIR")
    assert git(tmp_path / "ds" / "pets", "log", "--format=%an", "v1").strip() == "cv-platform"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat/1.png"], "at least two classes"),
        (["train/cat/1.png", "train/dog/2.png"], "the splits train and test"),
        (["valid/cat/1.png", "test/dog/2.png"], "the splits train and test"),
        (["notes.txt"], "Expected images"),
    ],
)
def test_refuses_unusable_sources_and_leaves_nothing_behind(tmp_path: Path, names: list[str], message: str) -> None:
    write_pictures(tmp_path / "source", names)
    with pytest.raises(InvalidDatasetError, match=message):
        import_dataset(tmp_path / "source", ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "ds")
    assert [p.name for p in (tmp_path / "ds").iterdir()] == [".pets.lock"]


def test_names_classes_without_images(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "source", 2)
    (source / "axolotl").mkdir()
    with pytest.raises(InvalidDatasetError, match="none of axolotl"):
        import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "ds")


@pytest.mark.parametrize(("name", "tag"), [("../pets", "v1"), ("pets", "v..1"), ("pets", "-v1"), ("pets", "v1.lock")])
def test_refuses_names_that_are_paths_or_no_tags(tmp_path: Path, name: str, tag: str) -> None:
    with pytest.raises(InvalidDatasetError):
        import_dataset(class_folders(tmp_path / "s", 1), ds_name=name, tag=tag, ds_root=tmp_path / "ds")
    assert not (tmp_path / "ds").exists()


def test_refuses_what_is_neither_folder_nor_archive(tmp_path: Path) -> None:
    (tmp_path / "a.rar").write_bytes(b"Rar!")
    for source, message in ((tmp_path / "a.rar", "which is neither"), (tmp_path / "none", "does not exist")):
        with pytest.raises(InvalidDatasetError, match=message):
            import_dataset(source, ds_name="pets", tag="v1", ds_root=tmp_path / "ds")


def test_says_when_the_disk_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cv_platform import disk_space
    from cv_platform.errors import DiskSpaceError

    monkeypatch.setattr(disk_space, "SPARE_BYTES", shutil.disk_usage(tmp_path).total)
    with pytest.raises(DiskSpaceError, match="Free some space"):
        import_dataset(class_folders(tmp_path / "s", 2), ds_name="pets", tag="v1", ds_root=tmp_path / "ds")
    assert [path.name for path in (tmp_path / "ds").iterdir()] == [".pets.lock"]
