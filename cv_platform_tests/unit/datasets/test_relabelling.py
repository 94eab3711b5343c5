from __future__ import annotations

import csv
import io
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from cv_platform.datasets.differences import compare_versions
from cv_platform.datasets.importing import ImportRules, import_dataset
from cv_platform.datasets.relabelling import RelabelledVersion, read_review, relabel
from cv_platform.datasets.repository import list_tag_names
from cv_platform.errors import InvalidDatasetError
from cv_platform.files import file_sha256
from cv_platform_tests.support.pictures import write_pictures

CLASSES = ("cat", "dog")
ANNOTATED = "path,split,label\n" + "".join(f"{i}.png,train,{('cat', 'dog', 'cat|dog')[i % 3]}\n" for i in range(6))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CV_HOME with `pets`, whose labels are folders, and `tags`, whose labels are in a file; tests copy it."""
    home = tmp_path_factory.mktemp("relabelling")
    names = [f"{split}/{name}/{i}.png" for split in ("train", "test") for name in CLASSES for i in range(3)]
    import_dataset(write_pictures(home / "a", names), ds_name="pets", tag="v1", ds_root=home / "datasets")
    source = write_pictures(home / "b", [f"{i}.png" for i in range(6)])
    (source / "annotations.csv").write_text(ANNOTATED)
    import_dataset(source, ds_name="tags", tag="v1", ds_root=home / "datasets")
    return home


@pytest.fixture
def home(tmp_path: Path, root: Path) -> Path:
    shutil.copytree(root, tmp_path / "home")
    return tmp_path / "home"


def review(home: Path, *rows: Sequence[str], source: str = "a") -> bytes:
    """Returns the CSV of rows `(path, given, decision, label)`."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["path", "sha256", "given", "decision", "label"])
    for path, given, decision, label in rows:
        writer.writerow([f"images/{path}", file_sha256(home / source / path), given, decision, label])
    return text.getvalue().encode()


def relabelled(
    home: Path, content: bytes, name: str = "pets", kind: str = "multi-class", **options: str
) -> RelabelledVersion:
    decisions = read_review(content, CLASSES, kind)  # pyright: ignore[reportArgumentType]
    return relabel(home / "datasets" / name, "v1", content, decisions, home=home, **options)


def git(repository: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", repository, *arguments], capture_output=True, check=True, text=True).stdout


def test_a_review_becomes_a_version_that_differs_by_what_was_decided(home: Path) -> None:
    content = review(
        home,
        ("train/cat/0.png", "cat", "relabel", "dog"),  # train/dog/0.png is another image.
        ("train/cat/1.png", "cat", "keep", "cat"),
        ("test/dog/2.png", "dog", "leave out", ""),
    )
    made = relabelled(home, content)
    assert made.summary == ("3 reviewed: 1 relabelled, 1 left out, the others stay as they are.", "cat → dog: 1")
    assert made.version.tag.startswith("v1-reviewed-")
    found = compare_versions(home / "datasets/pets", "v1", made.version.tag, home=home)
    assert [(c.kind, c.title) for c in found.changes] == [("removed", "dog"), ("relabelled", "cat → dog")]
    assert (found.unchanged, found.changes[1].after and found.changes[1].after.split) == (10, "train")


def test_its_commit_says_what_it_was_made_from_and_keeps_the_review(home: Path) -> None:
    content = review(home, ("train/cat/0.png", "cat", "relabel", "dog"))
    made = relabelled(home, content, new_tag="v2")
    repository = home / "datasets/pets"
    message = git(repository, "log", "-1", "--format=%B", "v2")
    assert message.startswith("Relabel v1 as v2\n\n1 reviewed: 1 relabelled, 0 left out")
    assert f"base: v1, {made.base.dvc_md5}, commit {made.base.commit}" in message
    assert git(repository, "show", "v2:reviews/v2.csv").encode() == content.replace(b"\r\n", b"\n")
    assert git(repository, "rev-parse", "v2^").strip() == made.base.commit


def test_the_same_review_again_makes_nothing_new(home: Path) -> None:
    content = review(home, ("train/cat/0.png", "cat", "relabel", "dog"))
    first = relabelled(home, content)
    tags = list_tag_names(home / "datasets/pets")
    assert relabelled(home, content).version == first.version
    nothing = relabelled(home, review(home, ("train/cat/1.png", "cat", "keep", "cat")))
    assert nothing.version == nothing.base
    assert list_tag_names(home / "datasets/pets") == tags
    with pytest.raises(InvalidDatasetError, match="Versions do not change: choose a new tag"):
        relabelled(home, review(home, ("train/cat/2.png", "cat", "relabel", "dog")), new_tag=first.version.tag)


def test_labels_in_a_file_change_there_and_images_stay_where_they_are(home: Path) -> None:
    rows = (
        ("0.png", "cat", "relabel", "cat|dog"),
        ("1.png", "dog", "relabel", ""),
        ("2.png", "cat|dog", "leave out", ""),
    )
    made = relabelled(home, review(home, *rows, source="b"), "tags", "multi-label")
    assert made.version.annotations
    assert made.version.annotations.decode().splitlines() == [
        "path,split,label",
        *("0.png,train,cat|dog", "1.png,train,", "3.png,train,cat", "4.png,train,dog", "5.png,train,cat|dog"),
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("train/cat/0.png", "cat", "relabel", "bird")], "as bird, which model.classes does not name"),
        ([("train/cat/0.png", "cat", "relabel", "cat|dog")], "with 2 labels instead of one"),
        ([("train/cat/0.png", "cat", "burn", "")], "the decision 'burn' instead of keep, relabel, leave out"),
        ([("train/cat/0.png", "cat", "keep", "cat")] * 2, "images/train/cat/0.png for the second time"),
        (
            [("train/cat/0.png", "dog", "relabel", "dog"), ("train/cat/1.png", "dog", "leave out", "")],
            "reviewed as dog, but it is cat",
        ),
        (
            [(f"{s}/dog/{i}.png", "dog", "leave out", "") for s in ("train", "test") for i in range(3)],
            "none left of dog",
        ),
    ],
    ids=["class", "several", "decision", "twice", "given", "emptied"],
)
def test_a_review_that_does_not_fit_is_refused_and_changes_nothing(
    home: Path, rows: list[tuple[str, str, str, str]], said: str
) -> None:
    with pytest.raises(InvalidDatasetError, match=said):
        relabelled(home, review(home, *rows))
    assert list_tag_names(home / "datasets/pets") == ["v1"]


def test_unknown_and_other_images_are_named_together(home: Path) -> None:
    content = review(home, ("train/cat/0.png", "cat", "relabel", "dog"), ("train/cat/1.png", "cat", "relabel", "dog"))
    content = content.replace(b"cat/1.png", b"cat/2.png")
    content += f"images/train/cat/nine.png,{'0' * 64},cat,relabel,dog\n".encode()
    with pytest.raises(InvalidDatasetError) as caught:
        relabelled(home, content)
    assert "images/train/cat/nine.png: no such image in v1" in str(caught.value)
    assert "images/train/cat/2.png: another image in v1 than the one that was reviewed" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"), [(b"path,label\n", "none called sha256, given, decision"), (b"\xff\xfe", "in UTF-8")]
)
def test_what_is_no_review_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(InvalidDatasetError, match=said):
        read_review(content, CLASSES, "multi-class")


def test_what_a_reviewer_says_is_known_and_what_nobody_has_said_stays_unknown(home: Path) -> None:
    root, source = home / "datasets", write_pictures(home / "c", [f"{i}.png" for i in range(4)], first_seed=50)
    (source / "annotations.csv").write_text(
        "path,split,cat,dog,emu\n0.png,train,1,,-1\n1.png,train,0,1,\n2.png,train,1,1,0\n3.png,train,0,0,1\n"
    )
    rules = ImportRules(unknown="ignore")
    import_dataset(source, ds_name="open", tag="v1", ds_root=root, rules=rules)
    content = review(home, ("0.png", "cat", "relabel", "cat|dog"), ("1.png", "dog", "keep", "dog"), source="c")
    decisions = read_review(content, ("cat", "dog", "emu"), "multi-label")
    made = relabel(root / "open", "v1", content, decisions, home=home)
    assert (made.version.annotations or b"").splitlines() == [
        b"path,split,label,unknown_labels",
        b"0.png,train,cat|dog,emu",
        b"1.png,train,dog,emu",
        b"2.png,train,cat|dog,",
        b"3.png,train,emu,",
    ]
    difference = compare_versions(root / "open", "v1", made.version.tag, home=home)
    assert [change.title for change in difference.changes] == ["cat (unknown: dog|emu) → cat|dog (unknown: emu)"]
    (row,) = difference.by_class()
    assert row == {"class": "dog", "added": 0, "removed": 0, "changed": 0, "gained": 1, "lost": 0, "moved": 0} | {
        "now known": 1
    }
    (cells,) = csv.DictReader(io.StringIO(difference.write_csv().decode()))
    assert (cells["before_label"], cells["before_unknown_labels"]) == ("cat", "dog|emu")
    assert (cells["after_label"], cells["after_unknown_labels"]) == ("cat|dog", "emu")


def test_a_label_that_becomes_unknown_is_no_label_that_is_lost_to_another(home: Path) -> None:
    root, source = home / "datasets", write_pictures(home / "d", ["0.png", "1.png"], first_seed=60)
    for tag, cell in (("v1", "0"), ("v2", "-1")):
        (source / "annotations.csv").write_text(f"path,split,cat,dog\n0.png,train,1,{cell}\n1.png,train,0,1\n")
        import_dataset(source, ds_name="doubt", tag=tag, ds_root=root, rules=ImportRules(unknown="ignore"))
    difference = compare_versions(root / "doubt", "v1", "v2", home=home)
    assert [(change.kind, change.title) for change in difference.changes] == [
        ("relabelled", "cat → cat (unknown: dog)")
    ]
    (row,) = difference.by_class()
    assert (row["class"], row["gained"], row["lost"], row["now unknown"]) == ("dog", 0, 0, 1)
