from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from cv_platform.datasets.importing import ImportRules, import_dataset
from cv_platform.datasets.manifest import count_manifest, read_manifest
from cv_platform.datasets.repository import list_versions, read_version
from cv_platform.datasets.sources import tree
from cv_platform.datasets.sources.entries import ImageEntry
from cv_platform.datasets.sources.staging import Staging
from cv_platform.datasets.versions import checkout_version
from cv_platform.errors import DatasetError, InvalidDatasetError
from cv_platform_tests.support.pictures import class_folders, picture, write_pictures

from .conftest import dataset, model


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
    assert version.provenance.dvc_md5 == imported.dvc_md5
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
    again = import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "ds")
    assert again == first.model_copy(update={"same_as": ("v1.0.0",)})
    write_pictures(source, ["cat/new.png"], first_seed=99)
    with pytest.raises(InvalidDatasetError, match=r"v1\.0\.0 of .* has other content .* choose a new tag"):
        import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "ds")
    assert git(first.directory, "rev-parse", "v1.0.0") == commit


def test_says_that_the_same_source_again_is_nothing_new(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "pets", per_class=3)
    first = import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "ds")
    assert first.same_as == ()
    again = import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "ds")
    assert again.summary()[-1] == "nothing new: v1.0.0 has had the same images and labels before"
    renamed = import_dataset(source, ds_name="pets", tag="v1.0.1", ds_root=tmp_path / "ds")
    assert renamed.summary()[-1] == "nothing new but the tag: the same images and labels as v1.0.0"
    assert renamed.dvc_md5 == first.dvc_md5


@pytest.mark.parametrize("change", ["added", "removed", "rewritten"])
def test_a_folder_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source = class_folders(tmp_path / "pets", per_class=3)
    fill = Staging.fill

    def fill_while_somebody_writes(staging: Staging, *entries: tuple[ImageEntry, ...]) -> dict[str, bytes]:
        beside = fill(staging, *entries)
        if change == "removed":
            (source / "cat/1.png").unlink()
        else:
            (source / ("cat/9.png" if change == "added" else "cat/1.png")).write_bytes(picture(77, (9, 9)))
        return beside

    monkeypatch.setattr(Staging, "fill", fill_while_somebody_writes)
    with pytest.raises(
        InvalidDatasetError, match=r"1 files that came, went or changed, such as .*cat/[19]\.png\. Wait"
    ):
        import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "ds")
    assert not (tmp_path / "ds/pets").exists()


_KILLED_AT_THE_FOURTH_COPY = """
import os, shutil, signal, sys
from pathlib import Path
from cv_platform.datasets.importing import import_dataset

copyfile, copied = shutil.copyfile, []

def copy_three(origin, target):
    if len(copied) == 3:
        target.write_bytes(b"half an image")
        os.kill(os.getpid(), signal.SIGKILL)
    copied.append(origin)
    return copyfile(origin, target)

shutil.copyfile = copy_three
import_dataset(Path(sys.argv[1]), ds_name="pets", tag="v1.0.0", ds_root=Path(sys.argv[2]))
"""


def test_a_killed_import_leaves_no_version_and_the_next_one_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = class_folders(tmp_path / "pets", per_class=3)
    killed = subprocess.run([sys.executable, "-c", _KILLED_AT_THE_FOURTH_COPY, source, tmp_path / "ds"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "ds/pets").exists()
    copied = copies_of(monkeypatch)
    imported = import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "ds")
    assert copied == ["dog/0.png", "dog/1.png", "dog/2.png"]
    assert sorted(p.name for p in (tmp_path / "ds").iterdir()) == [".pets.lock", "pets"]
    version = checkout_version(dataset(ds_root=str(tmp_path / "ds")), model(), home=tmp_path / "home")
    assert version.provenance.dvc_md5 == imported.dvc_md5
    assert {path: (version.directory / "images" / path).read_bytes() for path in copied} == {
        path: (source / path).read_bytes() for path in copied
    }


@pytest.mark.parametrize("changed", [False, True])
def test_an_interrupted_import_of_an_archive_unpacks_again_only_what_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, changed: bool
) -> None:
    def packed(per_class: int) -> Path:
        with tarfile.open(tmp_path / "pets.tar", "w") as tar:
            tar.add(class_folders(tmp_path / f"pets-{per_class}", per_class), "pets")
        return tmp_path / "pets.tar"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    source = packed(3)
    with monkeypatch.context() as patched:
        patched.setattr(Staging, "fill", interrupt)
        with pytest.raises(KeyboardInterrupt):
            import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "ds")
    (scratch,) = (tmp_path / "ds").glob(".pets.scratch-*")
    mark = scratch / "unpacked/pets/cat/mark.png"
    mark.write_bytes(picture(99, (9, 9)))  # Seen only by an import that goes on with what is unpacked.
    imported = import_dataset(packed(4) if changed else source, ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "ds")
    assert imported.class_counts == ({"cat": 4, "dog": 4} if changed else {"cat": 4, "dog": 3})


def copies_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list that gets the path, with its class, of each file that is copied from now on."""
    copied: list[str] = []
    copyfile = shutil.copyfile

    def copy(origin: Path | str, target: Path | str) -> Path | str:
        if isinstance(origin, Path):  # DVC copies, too, where it cannot link.
            copied.append(f"{origin.parent.name}/{origin.name}")
        return copyfile(origin, target)

    monkeypatch.setattr(shutil, "copyfile", copy)
    return copied


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
        (["valid/cat/1.png", "test/dog/2.png"], r"the split train .*Received: test, valid"),
        (["notes.txt"], "Expected images"),
    ],
)
def test_refuses_unusable_sources_and_leaves_nothing_behind(tmp_path: Path, names: list[str], message: str) -> None:
    write_pictures(tmp_path / "source", names)
    with pytest.raises(InvalidDatasetError, match=message):
        import_dataset(tmp_path / "source", ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "ds")
    assert [p.name for p in (tmp_path / "ds").iterdir()] == [".pets.lock"]


def test_a_class_that_is_named_twice_is_one(tmp_path: Path) -> None:
    rules = ImportRules(classes=("cat", "dog", "cat"))
    source = class_folders(tmp_path / "source", 2)
    imported = import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "ds", rules=rules)
    assert imported.class_names == ("cat", "dog")


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
    from cv_platform import files
    from cv_platform.errors import DiskSpaceError

    monkeypatch.setattr(files, "SPARE_BYTES", shutil.disk_usage(tmp_path).total)
    with pytest.raises(DiskSpaceError, match="Free some space"):
        import_dataset(class_folders(tmp_path / "s", 2), ds_name="pets", tag="v1", ds_root=tmp_path / "ds")
    assert [path.name for path in (tmp_path / "ds").iterdir()] == [".pets.lock"]


def test_the_original_stacks_dataset_imports_as_it_is(tmp_path: Path) -> None:
    """Folder and CSV of its animals10: absolute paths of its container, a column of 0 and 1 per class, splits."""
    names = [
        f"images/{split}/{name}_{i}.png" for split in ("train", "test") for name in ("cat", "dog") for i in range(2)
    ]
    source = write_pictures(tmp_path / "animals10-dvc", names)
    (source / "images.dvc").write_text("outs:\n- md5: 0123.dir\n  path: images\n")
    (source / ".dvc").mkdir()
    rows = ["image_name,abs_path,cat,dog,split"]
    for name in names:
        split, file = name.split("/")[1:]
        rows.append(
            f"{file},/home/jovyan/datasets/animals10-dvc/{name},{int('cat' in file)},{int('dog' in file)},{split}"
        )
    (source / "annotation_df.csv").write_text("\n".join(rows))
    imported = import_dataset(source, ds_name="animals10", tag="v1.0.0", ds_root=tmp_path / "ds")
    assert imported.class_names == ("cat", "dog")
    assert imported.counts == {"test": 4, "train": 4}
    assert "not used are the columns image_name" in imported.notes
    assert imported.left_out == {
        "litter, hidden or a broken link, such as .dvc": 1,
        "no image, beside the images (.dvc), such as images.dvc": 1,
    }
    config = dataset("animals10", ds_root=str(tmp_path / "ds"), valid_fraction=0.01, reference_fraction=0.01)
    version = checkout_version(config, model(), home=tmp_path / "home")
    manifest = read_manifest(version.manifest_path)
    assert dict(zip(manifest["path"], manifest["labels"], strict=True)) == {
        f"images/{name}": ["cat" if "cat" in name else "dog"] for name in names
    }


def test_a_missing_test_split_is_taken_from_train_or_is_valid(tmp_path: Path) -> None:
    names = [f"{split}/{name}/{i}.png" for split in ("train", "val") for name in ("cat", "dog") for i in range(10)]
    source = write_pictures(tmp_path / "source", names)
    taken = import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "ds")
    assert taken.counts == {"train": 20, "valid": 20}
    assert taken.notes[-1].startswith("test, reference: taken from train")
    version = checkout_version(dataset(ds_root=str(tmp_path / "ds")), model(), home=tmp_path / "home")
    manifest = read_manifest(version.manifest_path)
    # Per class 10 images: round(0.15 * 10) = 2 for test, round(0.2 * 10) = 2 for reference.
    assert Counter(zip(manifest["split"], manifest["split_origin"], strict=True)) == {
        ("train", "given"): 12,
        ("valid", "given"): 20,
        ("test", "taken from train"): 4,
        ("reference", "taken from train"): 4,
    }
    rules = ImportRules(use_valid_as_test=True)
    used = import_dataset(source, ds_name="pets", tag="v2.0.0", ds_root=tmp_path / "ds", rules=rules)
    assert used.counts == {"train": 20, "test": 20}
    assert "valid is used as test" in git(used.directory, "log", "-1", "--format=%B", "v2.0.0")
    write_pictures(source, ["test/cat/0.png"], first_seed=99)
    with pytest.raises(InvalidDatasetError, match="none called test for --use-valid-as-test"):
        import_dataset(source, ds_name="pets", tag="v3.0.0", ds_root=tmp_path / "ds", rules=rules)


def test_how_a_source_was_understood_is_recorded_with_the_version(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "source", ["TRAIN/cat/0.png", "TRAIN/dog/1.png", "dev/cat/2.png", "test1/3.png"])
    imported = import_dataset(source, ds_name="pets", tag="v1", ds_root=tmp_path / "ds")
    assert git(imported.directory, "log", "-1", "--format=%B", "v1").strip().splitlines() == [
        "Import v1",
        "",
        "understood as split and class folders (TRAIN, dev)",
        "test, reference: taken from train when the dataset is used, seeded, by its fractions",
        "images: train 2, valid 1",
        "classes: cat 2, dog 1",
        "left out: 1 in test1/, which has no labels, such as test1/3.png",
    ]


def test_what_is_no_image_is_counted_by_suffix_and_refused_where_it_is_much(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "source", per_class=10)
    (source / "cat/0.png").rename(source / "cat/0.jfif")
    (source / "cat/1.png").rename(source / "cat/1")
    for name in ("cat/a.heic", "dog/b.HEIC"):
        (source / name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (source / "dog/c.jpg").write_text("<html>not found</html>")
    (source / "dog/labels.txt").touch()
    rules = ImportRules(max_left_out_fraction=0.14)  # 3 of 23.
    imported = import_dataset(source, ds_name="pets", tag="v1", ds_root=tmp_path / "ds", rules=rules)
    assert imported.counts == {"no split": 21}
    assert imported.left_out == {
        "no image that can be decoded (.heic), such as cat/a.heic": 2,
        "no image, beside the images (.txt), such as dog/labels.txt": 1,
    }
    assert any(note.startswith("called images, but none that decode: 1, such as dog/c.jpg") for note in imported.notes)
    version = checkout_version(dataset(tag="v1", ds_root=str(tmp_path / "ds")), model(), home=tmp_path / "home")
    manifest = read_manifest(version.manifest_path).set_index("path")
    assert manifest.loc[manifest["status"] != "used", "reason"].index.tolist() == ["images/dog/c.jpg"]
    with pytest.raises(InvalidDatasetError) as caught:
        import_dataset(source, ds_name="pets", tag="v2", ds_root=tmp_path / "ds")
    text = str(caught.value)
    assert "Expected images in at least 90% of the images' files" in text
    assert "Received: 20 images, and 2 no image that can be decoded (.heic), such as cat/a.heic; 1 no image" in text


def test_a_source_of_nothing_but_undecodable_images_says_so(tmp_path: Path) -> None:
    for name in ("cat/1.heic", "dog/2.heic"):
        (tmp_path / "source" / name).parent.mkdir(parents=True)
        (tmp_path / "source" / name).write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(InvalidDatasetError, match=r"2 no image that can be decoded \(\.heic\).*RAW to JPEG"):
        import_dataset(tmp_path / "source", ds_name="pets", tag="v1", ds_root=tmp_path / "ds")


def test_accents_of_macos_and_of_the_config_are_the_same_class(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "source", 10, ("cafe\u0301", "dog"))
    write_pictures(source, ["dog/e\u0301.png"], first_seed=99)
    imported = import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=tmp_path / "ds")
    assert imported.class_names == ("caf\u00e9", "dog")
    config = dataset(ds_root=str(tmp_path / "ds"))
    for name in ("caf\u00e9", "cafe\u0301"):
        version = checkout_version(config, model(name, "dog"), home=tmp_path / "home")
        assert version.class_names == ("caf\u00e9", "dog")
        assert (version.directory / "images/dog/\u00e9.png").is_file()
    write_pictures(source, ["dog/\u00e9.png"], first_seed=100)
    with pytest.raises(InvalidDatasetError, match="Received twice: dog/\u00e9\\.png"):
        import_dataset(source, ds_name="pets", tag="v2", ds_root=tmp_path / "ds")


def test_an_archive_with_a_label_file_in_its_wrapping_folder(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pets", ["0.png", "1.png"])
    (tmp_path / "pets/annotations.csv").write_text("path,label\n0.png,cat\n1.png,dog\n")
    with tarfile.open(tmp_path / "pets.tar", "w") as tar:
        tar.add(tmp_path / "pets", "pets")
    imported = import_dataset(tmp_path / "pets.tar", ds_name="pets", tag="v1", ds_root=tmp_path / "ds")
    assert imported.class_counts == {"cat": 1, "dog": 1}


@pytest.mark.parametrize(
    ("annotations", "is_multi_label"),
    [
        ("path,label\n0.png,cat\n1.png,dog\n2.png,\n", False),  # Nobody may have looked at the third.
        ("path,label\n0.png,cat\n1.png,dog\n2.png,cat|dog\n", True),
        ("path,cat,dog\n0.png,1,0\n1.png,0,1\n2.png,1,0\n", False),
        ("path,cat,dog\n0.png,1,0\n1.png,0,1\n2.png,0,0\n", True),
    ],
)
def test_tells_multi_label_by_the_labels(tmp_path: Path, annotations: str, is_multi_label: bool) -> None:
    source = write_pictures(tmp_path / "source", ["0.png", "1.png", "2.png"])
    (source / "annotations.csv").write_text(annotations)
    imported = import_dataset(source, ds_name="pets", tag="v1", ds_root=tmp_path / "ds")
    assert imported.is_multi_label is is_multi_label


CHEST = "path,split,cat,dog\n0.png,train,1,\n1.png,train,0,1\n2.png,test,-1,0\n3.png,test,,\n"


def test_unknown_labels_survive_a_version_its_export_and_another_import(tmp_path: Path) -> None:
    source, root = write_pictures(tmp_path / "source", [f"{i}.png" for i in range(4)]), tmp_path / "ds"
    (source / "annotations.csv").write_text(CHEST)
    ignore = ImportRules(unknown="ignore", max_left_out_fraction=1.0)
    imported = import_dataset(source, ds_name="pets", tag="v1", ds_root=root, rules=ignore)
    assert (imported.is_multi_label, imported.class_counts) == (True, {"cat": 1, "dog": 1})
    assert imported.unknown_counts == {"cat": 1, "dog": 1}
    assert "unknown labels: cat 1, dog 1" in imported.summary()
    assert imported.left_out == {"of which no label is known, such as 3.png": 1}
    exported = read_version(root / "pets", "v1").annotations
    assert exported == (b"path,split,label,unknown_labels\n0.png,train,cat,dog\n1.png,train,dog,\n2.png,test,,cat\n")
    config = dataset(tag="v1", ds_root=str(root), valid_fraction=0.01, reference_fraction=0.01)
    version = checkout_version(config, model(classifier_type="multi-label"), home=tmp_path / "home")
    rows = read_manifest(version.manifest_path)
    assert rows[["labels", "unknown_labels"]].to_numpy().tolist() == [[["cat"], ["dog"]], [["dog"], []], [[], ["cat"]]]
    counts = count_manifest(version.manifest_path)
    assert counts.unknown["dog"] == {"train": 1, "valid": 0, "test": 0, "reference": 0}
    (source / "annotations.csv").write_bytes(exported)
    again = import_dataset(source, ds_name="pets", tag="v2", ds_root=root)
    assert (again.dvc_md5, again.same_as) == (imported.dvc_md5, ("v1",))
    as_no = import_dataset(source, ds_name="pets", tag="v3", ds_root=root, rules=ImportRules(unknown="negative"))
    assert (as_no.unknown_counts, as_no.dvc_md5 == imported.dvc_md5) == ({}, False)


def test_a_version_without_unknown_labels_is_the_same_whatever_they_would_mean(tmp_path: Path) -> None:
    source, root = write_pictures(tmp_path / "source", ["0.png", "1.png"]), tmp_path / "ds"
    (source / "annotations.csv").write_text("path,cat,dog\n0.png,1,0\n1.png,0,1\n")
    first = import_dataset(source, ds_name="pets", tag="v1", ds_root=root)
    other = import_dataset(source, ds_name="pets", tag="v2", ds_root=root, rules=ImportRules(unknown="ignore"))
    assert (first.dvc_md5, other.same_as) == (other.dvc_md5, ("v1",))
    assert read_version(root / "pets", "v1").annotations == b"path,label\n0.png,cat\n1.png,dog\n"


def test_says_where_every_known_label_is_yes(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "source", ["0.png", "1.png"])
    (source / "annotations.csv").write_text("path,cat,dog\n0.png,1,0\n1.png,,1\n")
    imported = import_dataset(
        source, ds_name="pets", tag="v1", ds_root=tmp_path / "ds", rules=ImportRules(unknown="ignore")
    )
    assert "no image is known not to show cat: nothing teaches a model to say no. Write 0 there" in imported.notes


def test_refuses_to_ignore_what_no_cell_can_say_and_unknown_labels_of_one_class_an_image(tmp_path: Path) -> None:
    folders, root = class_folders(tmp_path / "folders", 2), tmp_path / "ds"
    ignore = ImportRules(unknown="ignore", max_left_out_fraction=1.0)
    with pytest.raises(InvalidDatasetError, match=r"for --unknown ignore\. Received: class folders of .* Omit it"):
        import_dataset(folders, ds_name="pets", tag="v1", ds_root=root, rules=ignore)
    source = write_pictures(tmp_path / "source", [f"{i}.png" for i in range(4)])
    (source / "annotations.csv").write_text(CHEST.replace("-1,0", "1,"))
    import_dataset(source, ds_name="pets", tag="v1", ds_root=root, rules=ignore)
    with pytest.raises(
        InvalidDatasetError, match=r"2 images with unknown labels, such as 0\.png, which only multi-label"
    ):
        checkout_version(dataset(tag="v1", ds_root=str(root)), model(), home=tmp_path / "home")


def test_what_cannot_be_read_is_left_out_with_its_reason_and_refused_where_it_is_much(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "pets", [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(10)])
    for name in ("notes.txt", "cat/broken.png", "cat/broken"):
        (source / name).symlink_to("/proc/self/mem")  # Its reading is an input/output error, for root as well.
    (source / "dog/circle.png").symlink_to("circle.png")
    imported = import_dataset(source, ds_name="pets", tag="v1", ds_root=tmp_path / "ds")
    assert imported.class_counts == {"cat": 10, "dog": 10}
    assert imported.left_out == {
        "litter, hidden or a broken link, such as dog/circle.png": 1,
        "no image, beside the images (.txt), such as notes.txt": 1,
        "that cannot be read (Input/output error), such as cat/broken": 2,
    }
    (source / "dog/broken.png").symlink_to("/proc/self/mem")
    refused = r"Received: 20 images, and 3 that cannot be read \(Input/output error\), such as cat/broken\. .* rights"
    with pytest.raises(InvalidDatasetError, match=refused):
        import_dataset(source, ds_name="pets", tag="v2", ds_root=tmp_path / "ds")


def test_an_error_that_is_not_the_files_ends_the_import_with_the_files_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_pictures(tmp_path / "pets", ["cat/0.png", "dog/plain"])

    def refuse(path: str) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(tree, "read_head", refuse)
    with pytest.raises(InvalidDatasetError, match=r"Received: .*/dog/plain \(Too many open files\)\. Look at the disk"):
        import_dataset(source, ds_name="pets", tag="v1", ds_root=tmp_path / "ds")
