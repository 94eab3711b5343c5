from __future__ import annotations

from pathlib import Path

import pytest

from cv_platform.datasets.layouts import ImageEntry, read_layout, write_annotations
from cv_platform.errors import InvalidDatasetError

from .conftest import write_pictures


def test_reads_class_folders_and_leaves_out_what_is_no_image(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["dog/b.PNG", "cat/a.jpeg"])
    for name in ("cat/notes.txt", "cat/.hidden.png", "readme.md", ".DS_Store"):
        (tmp_path / name).write_text("x")
    layout = read_layout(tmp_path, None)
    assert layout.entries == (ImageEntry("cat/a.jpeg", None, ("cat",)), ImageEntry("dog/b.PNG", None, ("dog",)))
    assert layout.class_names == ("cat", "dog")
    assert layout.ignored == ("cat/notes.txt", "readme.md")


@pytest.mark.parametrize("valid", ["valid", "val", "validation"])
def test_reads_split_folders_by_any_of_their_names(tmp_path: Path, valid: str) -> None:
    write_pictures(tmp_path, ["train/cat/1.png", f"{valid}/cat/2.png", "test/dog/3.png", "reference/dog/4.png"])
    assert {entry.split for entry in read_layout(tmp_path, None).entries} == {"train", "valid", "test", "reference"}


def test_train_may_be_a_class(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["train/1.png", "car/2.png"])
    layout = read_layout(tmp_path, None)
    assert layout.class_names == ("car", "train")
    assert {entry.split for entry in layout.entries} == {None}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/cat/1.png", "cat/2.png"], "Received also: cat"),
        (["val/cat/1.png", "valid/cat/2.png"], "one folder for the split valid"),
        (["1.png", "cat/2.png"], "1 directly in it, such as 1.png"),
        (["cat/more/1.png", "cat/2.png"], "the folder cat/more"),
        (["a|b/1.png", "c/2.png"], r"without '\|'"),
    ],
)
def test_refuses_ambiguous_folders(tmp_path: Path, names: list[str], message: str) -> None:
    write_pictures(tmp_path, names)
    with pytest.raises(InvalidDatasetError, match=message):
        read_layout(tmp_path, None)


def test_refuses_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(InvalidDatasetError, match=r"Received: none\. Arrange them"):
        read_layout(tmp_path, None)


def test_reads_labels_joined_by_a_bar(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "x/2.png", "3.png"])
    csv = "\ufefffilename,label,split\n1.png,cat|dog,train\nx/2.png, dog ,val\n3.png,,test\n"
    layout = read_layout(tmp_path, csv.encode())
    assert layout.entries == (
        ImageEntry("1.png", "train", ("cat", "dog")),
        ImageEntry("3.png", "test", ()),
        ImageEntry("x/2.png", "valid", ("dog",)),
    )
    assert layout.class_names == ("cat", "dog")


def test_reads_one_column_per_class_in_their_order(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "2.png", "unlisted.png"])
    layout = read_layout(tmp_path, b"image,zebra,ant\n1.png,1,0\n2.png,1.0,True\n")
    assert layout.class_names == ("zebra", "ant")
    assert [entry.labels for entry in layout.entries] == [("zebra",), ("ant", "zebra")]
    assert layout.ignored == ("unlisted.png",)


def test_csv_may_name_the_folder_it_lies_beside(tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", ["cat/1.png"])
    layout = read_layout(tmp_path / "images", b"path,label\nimages/cat/1.png,cat\n")
    assert layout.entries[0].path == "cat/1.png"


def test_lists_all_mistakes_of_a_csv(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png"])
    rows = ["1.png,train,cat", "1.png,train,cat", "2.png,train,cat", "../1.png,train,cat", "1.png,holdout,cat", "x,y"]
    csv = "\n".join(["path,split,label", *rows])
    with pytest.raises(InvalidDatasetError) as caught:
        read_layout(tmp_path, csv.encode())
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
        (b"label\ncat\n", "a column path or image or filename"),
        (b"path,path,label\n", "each name once"),
        (b"path,split\n1.png,train\n", "a column label"),
        (b"path,cat,dog\n1.png,1,maybe\n", "'maybe' in the class column dog"),
        (b"path,label\n\xff\xfe,cat\n", "CSV in UTF-8"),
    ],
)
def test_refuses_a_csv_of_another_form(tmp_path: Path, csv: bytes, message: str) -> None:
    write_pictures(tmp_path, ["1.png"])
    with pytest.raises(InvalidDatasetError, match=message):
        read_layout(tmp_path, csv)


def test_written_annotations_read_the_same(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a, b.png", "c.png"])
    entries = (ImageEntry("a, b.png", "train", ("cat", "dog")), ImageEntry("c.png", "test", ()))
    assert write_annotations(entries) == b'path,split,label\n"a, b.png",train,cat|dog\nc.png,test,\n'
    assert read_layout(tmp_path, write_annotations(entries)).entries == entries
