from __future__ import annotations

from pathlib import Path

import pytest

from cv_platform.datasets.sources.entries import ImageEntry, Layout
from cv_platform.datasets.sources.label_files import LabelRules
from cv_platform.datasets.sources.layouts import read_layout, write_annotations
from cv_platform.datasets.sources.tree import walk
from cv_platform.errors import InvalidDatasetError
from cv_platform_tests.support.pictures import write_pictures


def read(folder: Path, annotations: bytes | None = None, *, is_stored: bool = False, classes: str = "") -> Layout:
    rules = LabelRules(classes=tuple(classes.split(",")) if classes else None, is_stored=is_stored)
    return read_layout(walk(folder), annotations, rules)


def test_reads_class_folders_and_leaves_out_what_is_no_image(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["dog/b.PNG", "cat/a.jpeg"])
    for name in ("cat/notes.txt", "cat/.hidden.png", "readme.md", ".DS_Store"):
        (tmp_path / name).write_text("x")
    layout = read(tmp_path)
    assert layout.entries == (ImageEntry("cat/a.jpeg", None, ("cat",)), ImageEntry("dog/b.PNG", None, ("dog",)))
    assert layout.class_names == ("cat", "dog")
    assert layout.left_out.counts() == {
        "litter, hidden or a broken link, such as .DS_Store": 2,
        "no image, beside the images (.md), such as readme.md": 1,
        "no image, beside the images (.txt), such as cat/notes.txt": 1,
    }


@pytest.mark.parametrize(
    ("train", "valid", "test"),
    [
        ("train", "valid", "test"),
        ("Training", "val", "Testing"),
        ("TRAIN", "DEV", "EVAL"),
        ("training_set", "validation", "test1"),
        ("seg_train", "validation_images", "evaluation"),
    ],
)
def test_reads_split_folders_by_any_of_their_names(tmp_path: Path, train: str, valid: str, test: str) -> None:
    names = [f"{train}/cat/1.png", f"{valid}/cat/2.png", f"{test}/dog/3.png", "reference/dog/4.png"]
    layout = read(write_pictures(tmp_path, names))
    assert {entry.path: entry.split for entry in layout.entries} == dict(
        zip(names, ("train", "valid", "test", "reference"), strict=True)
    )
    assert layout.class_names == ("cat", "dog")


def test_train_may_be_a_class(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["train/1.png", "car/2.png"])
    layout = read(tmp_path)
    assert layout.class_names == ("car", "train")
    assert {entry.split for entry in layout.entries} == {None}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/cat/1.png", "cat/2.png"], "Received also: cat"),
        (["val/cat/1.png", "valid/cat/2.png"], "one folder for the split valid"),
        (["1.png", "cat/2.png"], "1 directly in it, such as 1.png"),
        (["cat/more/1.png", "cat/2.png"], "the folder cat/more"),
        (["a|b/1.png", "c/2.png"], r"without '\|'.* Received: 'a\|b'"),
        (["a" * 101 + "/1.png", "c/2.png"], "up to 100 characters"),
    ],
)
def test_refuses_ambiguous_folders(tmp_path: Path, names: list[str], message: str) -> None:
    write_pictures(tmp_path, names)
    with pytest.raises(InvalidDatasetError, match=message):
        read(tmp_path)


def test_refuses_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(InvalidDatasetError, match=r"Received: none\. Arrange them"):
        read(tmp_path)


def test_reads_labels_joined_by_a_bar(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "x/2.png", "3.png"])
    csv = "\ufefffilename,label,split\n1.png,cat|dog,train\nx/2.png, dog ,val\n3.png,,test\n"
    layout = read(tmp_path, csv.encode())
    assert layout.entries == (
        ImageEntry("1.png", "train", ("cat", "dog")),
        ImageEntry("3.png", "test", ()),
        ImageEntry("x/2.png", "valid", ("dog",)),
    )
    assert layout.class_names == ("cat", "dog")


def test_reads_one_column_per_class_in_their_order(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "2.png", "unlisted.png"])
    layout = read(tmp_path, b"image,zebra,ant\n1.png,1,0\n2.png,1.0,True\n")
    assert layout.class_names == ("zebra", "ant")
    assert [entry.labels for entry in layout.entries] == [("zebra",), ("ant", "zebra")]
    assert layout.left_out.counts() == {"not named by the label file, such as unlisted.png": 1}


def test_csv_may_name_the_folder_it_lies_beside(tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", ["cat/1.png"])
    layout = read(tmp_path / "images", b"path,label\nimages/cat/1.png,cat\n")
    assert layout.entries[0].path == "cat/1.png"


def test_lists_all_mistakes_of_a_csv(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png"])
    rows = ["1.png,train,cat", "1.png,train,cat", "2.png,train,cat", "../1.png,train,cat", "1.png,holdout,cat", "x,y"]
    csv = "\n".join(["path,split,label", *rows])
    with pytest.raises(InvalidDatasetError) as caught:
        read(tmp_path, csv.encode())
    text = str(caught.value)
    assert "row 3: 1.png for the second time" in text
    assert "row 4: 2.png is not in" in text
    assert "row 5: '../1.png' instead of a path relative" in text
    assert "row 6: split 'holdout'" in text
    assert "row 7: 2 cells instead of 3" in text


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        (b"", "no header"),
        (b"label\ncat\n", "a column of the images"),
        (b"path,path,label\n", "each name once"),
        (b"path,split\n1.png,train\n", "a column label"),
        (b"path,cat,dog\n1.png,1,maybe\n", r"cat \(0 and 1\); dog \('maybe'\).* --classes cat"),
        (b"path,label\n\xff\xfe,cat\n", "in UTF-8"),
    ],
)
def test_refuses_a_csv_of_another_form(tmp_path: Path, csv: bytes, message: str) -> None:
    write_pictures(tmp_path, ["1.png"])
    with pytest.raises(InvalidDatasetError, match=message):
        read(tmp_path, csv)


def test_written_annotations_read_the_same(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a, b.png", "c.png"])
    entries = (ImageEntry("a, b.png", "train", ("cat", "dog")), ImageEntry("c.png", "test", ()))
    assert write_annotations(entries) == b'path,split,label\n"a, b.png",train,cat|dog\nc.png,test,\n'
    assert read(tmp_path, write_annotations(entries)).entries == entries


def test_splits_with_images_directly_in_them_are_no_classes(tmp_path: Path) -> None:
    """As Kaggle's dogs and cats: the class is in the file's name."""
    write_pictures(tmp_path, ["train/cat.0.png", "train/dog.0.png", "test1/1.png"])
    (tmp_path / "sample_submission.csv").write_text("id,label\n1,0\n")
    with pytest.raises(InvalidDatasetError) as caught:
        read(tmp_path)
    assert "the splits test1, train with images directly in them (test1/1.png) and no labels" in str(caught.value)
    assert "Labels may be in sample_submission.csv: name it by --annotations." in str(caught.value)


@pytest.mark.parametrize(
    "names", [["images/1.png", "masks/1.png"], ["train/images/1.png", "train/labels/1.png", "test/images/1.png"]]
)
def test_folders_of_other_tasks_are_no_classes(tmp_path: Path, names: list[str]) -> None:
    write_pictures(tmp_path, names)
    with pytest.raises(InvalidDatasetError, match="folders that name no classes: images, "):
        read(tmp_path)


@pytest.mark.parametrize(
    ("folder", "labels"),
    [
        ("metadata.csv", "file_name,label\n{}.png,{}\n"),
        ("metadata.jsonl", '{{"file_name": "{}.png", "label": "{}"}}\n'),
        ("_classes.csv", "filename, cat, dog\n{0}.png, 0, 1\n{1}.png, 1, 0\n"),
    ],
)
def test_reads_a_label_file_in_each_split(tmp_path: Path, folder: str, labels: str) -> None:
    write_pictures(tmp_path, ["train/1.png", "train/cat.png", "valid/2.png", "valid/cat.png", "test/3.png"])
    (tmp_path / "README.dataset.txt").touch()
    for split, number in (("train", "1"), ("valid", "2")):
        (tmp_path / split / folder).write_text(labels.format(number, "cat"))
    layout = read(tmp_path)
    found = {(entry.path, entry.split, entry.labels) for entry in layout.entries}
    expected = {("train/1.png", "train", ("cat",)), ("valid/2.png", "valid", ("cat",))}
    if folder == "_classes.csv":
        expected = {(path, split, ("dog",)) for path, split, _ in expected}
        expected |= {(f"{split}/cat.png", split, ("cat",)) for split in ("train", "valid")}
    assert found == expected
    counts = layout.left_out.counts()
    assert counts["in test/, which has no label file, such as test/3.png"] == 1
    assert counts["no image, beside the images (.txt), such as README.dataset.txt"] == 1


def test_train_needs_a_label_file_where_another_split_has_one(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["train/cat/1.png", "train/dog/2.png", "test/3.png"])
    (tmp_path / "test/labels.csv").write_text("path,label\n3.png,cat\n")
    with pytest.raises(
        InvalidDatasetError, match=r"a label file in train/ of .*Received: test/labels\.csv\. Add one, or"
    ):
        read(tmp_path)


def test_label_files_of_splits_must_have_the_same_class_columns(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["train/1.png", "test/2.png"])
    (tmp_path / "train/_classes.csv").write_text("filename,cat,dog\n1.png,1,0\n")
    (tmp_path / "test/_classes.csv").write_text("filename,cat,emu\n2.png,1,0\n")
    with pytest.raises(InvalidDatasetError, match=r"test/_classes\.csv: cat, emu; train/_classes\.csv: cat, dog"):
        read(tmp_path)


@pytest.mark.parametrize("unlabelled", ["test/7.png", "test/images/7.png", "test/unknown/7.png", "test/test/7.png"])
def test_an_unlabelled_split_is_left_out_and_counted(tmp_path: Path, unlabelled: str) -> None:
    write_pictures(tmp_path, ["train/cat/1.png", "train/dog/2.png", unlabelled])
    layout = read(tmp_path)
    assert {entry.split for entry in layout.entries} == {"train"}
    assert layout.class_names == ("cat", "dog")
    assert layout.left_out.counts() == {f"in test/, which has no labels, such as {unlabelled}": 1}


def test_images_beside_the_class_folders_of_a_split_are_counted(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["train/cat/1.png", "train/dog/2.png", "train/3.png"])
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/notes.txt").touch()
    layout = read(tmp_path)
    assert layout.left_out.counts() == {
        "directly in a split's folder, in no class folder, such as train/3.png": 1,
        "no image, beside the images (.txt), such as docs/notes.txt": 1,
    }


def test_steps_through_a_folder_that_repeats_its_split(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["training_set/training_set/cat/1.png", "test_set/test_set/dog/2.png"])
    assert [(entry.split, entry.labels) for entry in read(tmp_path).entries] == [
        ("test", ("dog",)),
        ("train", ("cat",)),
    ]


def test_no_label_is_no_class_unless_it_is_said_to_be(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["train/cat/1.png", "train/dog/2.png", "train/no_label/3.png"])
    layout = read(tmp_path)
    assert layout.class_names == ("cat", "dog")
    assert layout.left_out.counts() == {"in folders no_label, which means no label, such as train/no_label/3.png": 1}
    assert read(tmp_path, classes="cat,dog,no_label").class_names == ("cat", "dog", "no_label")
    # A version that was stored with such a class keeps it.
    assert read(tmp_path, is_stored=True).class_names == ("cat", "dog", "no_label")


def test_classes_may_be_chosen_from_the_folders(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["cat/1.png", "dog/2.png", "emu/3.png"])
    layout = read(tmp_path, classes="dog,cat")
    assert layout.class_names == ("dog", "cat")
    assert layout.left_out.counts() == {"of no class that --classes names, such as emu/3.png": 1}


def test_the_two_forms_of_an_accent_are_one_class(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["train/cafe\u0301/1.png", "test/caf\u00e9/2.png", "train/dog/3.png"])
    assert read(tmp_path).class_names == ("caf\u00e9", "dog")


def test_an_absent_checkout_is_named(tmp_path: Path) -> None:
    (tmp_path / "images.dvc").touch()
    with pytest.raises(InvalidDatasetError, match=r"images\.dvc stands for images that `dvc pull` would fetch"):
        read(tmp_path)
