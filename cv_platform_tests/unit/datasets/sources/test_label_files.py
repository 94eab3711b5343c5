from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from cv_platform.datasets.sources.entries import Layout
from cv_platform.datasets.sources.label_files import LabelRules, read_labels
from cv_platform.datasets.sources.layouts import read_layout
from cv_platform.datasets.sources.tree import walk
from cv_platform.errors import InvalidDatasetError
from cv_platform_tests.support.pictures import write_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pets", ["1.png", "2.png", "sub/3.png"])


def read(
    folder: Path,
    text: str | bytes,
    *,
    classes: str = "",
    is_stored: bool = False,
    unknown: Literal["negative", "ignore"] | None = None,
) -> Layout:
    content = text.encode() if isinstance(text, str) else text
    rules = LabelRules(tuple(classes.split(",")) if classes else None, is_stored, unknown=unknown)
    return read_labels(walk(folder), content, rules, name="labels.csv")


def labels(layout: Layout) -> dict[str, tuple[str, ...]]:
    return {entry.path: entry.labels for entry in layout.entries}


CAT_AND_DOG = {"1.png": ("cat",), "2.png": ("dog",)}


@pytest.mark.parametrize(
    "text",
    [
        "path,label\n1.png,cat\n2.png,dog\n",
        "file_name;class\r\n1.png;cat\r\n2.png;dog\r\n",
        "Image Name\tCategory\n1.png\tcat\n2.png\tdog\n",
        "\ufeffimage_id,class_name\n1,cat\n2,dog\n",
        "path,label\n1.png,cat\n2.png,dog\n".encode("utf-16"),
        "id,breed\n1,cat\n2,dog\n",
        "sep=;\r\npath;label\r\n1.png;cat\r\n2.png;dog\r\n",
        "abs_path,image_name,target\n/home/user/old/pets/1.png,x,cat\n/home/user/old/pets/2.png,y,dog\n",
        "path,label\nC:\\data\\pets\\1.png,cat\nC:\\data\\pets\\2.png,dog\n",
        ",path,label\n0,pets/1.png,cat\n1,./2.png,dog\n",
        '{"file_name": "1.png", "label": "cat"}\n\n{"file_name": "2.png", "label": "dog", "objects": {"bbox": [1]}}\n',
        "path,cat,dog\n1.png,1,0\n2.png,0,1\n",
        "file_name;cat;dog\n1;True;False\n2;0.0;1.0\n",
        '{"file_name": "1.png", "cat": true, "dog": false}\n{"file_name": "2.png", "dog": 1}\n',
    ],
)
def test_dialects_and_names_of_columns_mean_the_same(folder: Path, text: str | bytes) -> None:
    assert labels(read(folder, text)) == CAT_AND_DOG


def test_absolute_paths_are_found_by_their_longest_end(folder: Path) -> None:
    write_pictures(folder, ["sub/1.png"])
    layout = read(folder, "path,label\n/old/place/sub/1.png,cat\n/old/place/1.png,dog\n")
    assert labels(layout) == {"1.png": ("dog",), "sub/1.png": ("cat",)}


def test_a_name_alone_is_enough_where_only_one_file_has_it(folder: Path) -> None:
    assert labels(read(folder, "image,label\n3,cat\n")) == {"sub/3.png": ("cat",)}
    write_pictures(folder, ["other/3.png"])
    with pytest.raises(InvalidDatasetError, match=r"3 is the name of several files \(other/3\.png, sub/3\.png\)"):
        read(folder, "image,label\n3,cat\n")
    write_pictures(folder, ["1.bmp"])
    with pytest.raises(InvalidDatasetError, match=r"1 is the name of several files \(1\.bmp, 1\.png\)"):
        read(folder, "image,label\n1,cat\n")


def test_says_which_columns_are_classes_and_why(folder: Path) -> None:
    layout = read(folder, "path,split,cat,dog\n1.png,TRAIN,1,0\n2.png,testing,0,1\n")
    assert layout.notes == (
        "the image is the column path",
        "the split is the column split",
        "classes are the columns cat, dog: every value is 0 or 1",
    )
    assert [entry.split for entry in layout.entries] == ["train", "test"]
    layout = read(folder, "path,cat,dog,is_verified,fold\n1.png,1,0,1,3\n2.png,0,1,0,4\n", classes="dog,cat")
    assert layout.class_names == ("dog", "cat")
    assert layout.notes[1:] == (
        "classes are the columns dog, cat: named by --classes",
        "not used are the columns is_verified, fold",
    )


@pytest.mark.parametrize(
    ("header", "row", "received"),
    [
        ("cat,dog,is_verified,fold", "1,0,1,3", "is_verified (0 and 1); fold ('3')"),
        ("cat,dog,is_verified", "1,0,1", "is_verified (0 and 1)"),
        ("cat,dog,width", "1,0,640", "width ('640')"),
        ("cat,dog,remark", "1,0,", "remark (empty)"),
    ],
)
def test_asks_where_a_column_may_be_no_class(folder: Path, header: str, row: str, received: str) -> None:
    with pytest.raises(InvalidDatasetError) as caught:
        read(folder, f"path,{header}\n1.png,{row}\n")
    assert f"Received: cat (0 and 1); dog (0 and 1); {received}." in str(caught.value)
    assert str(caught.value).endswith("--classes cat,dog.")


def test_the_only_other_column_holds_the_labels_also_where_these_are_0_and_1(folder: Path) -> None:
    layout = read(folder, "path,defect\n1.png,1\n2.png,0\n")
    assert labels(layout) == {"1.png": ("1",), "2.png": ("0",)}
    assert layout.notes[1] == "the labels are the column defect"
    with pytest.raises(InvalidDatasetError, match=r"Received: is_verified \(0 and 1\)"):
        read(folder, "path,is_verified\n1.png,1\n2.png,0\n")


def test_classes_that_are_no_columns_are_named(folder: Path) -> None:
    with pytest.raises(InvalidDatasetError, match="no emu in path, cat, dog"):
        read(folder, "path,cat,dog\n1.png,1,0\n", classes="cat,emu")


def test_classes_may_be_chosen_from_the_labels(folder: Path) -> None:
    layout = read(folder, "path,label\n1.png,cat|emu\n2.png,emu\nsub/3.png,dog\n", classes="dog,cat")
    assert labels(layout) == {"1.png": ("cat",), "sub/3.png": ("dog",)}
    assert layout.left_out.counts() == {"of no class that --classes names, such as 2.png": 1}


@pytest.mark.parametrize("mark", [",", ";", "|"])
def test_joined_labels_are_several_and_a_stored_version_joins_by_a_bar_only(folder: Path, mark: str) -> None:
    text = f'path,label\n1.png,"cat{mark} dog"\n2.png,dog\n'
    layout = read(folder, text)
    assert labels(layout) == {"1.png": ("cat", "dog"), "2.png": ("dog",)}
    assert f"labels joined by {mark!r} are several labels" in layout.notes
    stored = ("cat", "dog") if mark == "|" else (f"cat{mark} dog",)
    assert labels(read(folder, text, is_stored=True))["1.png"] == stored


def test_blank_and_minus_one_are_negative_counted_and_said(folder: Path) -> None:
    layout = read(folder, "path,cat,dog\n1.png,1,-1\n2.png,,1.0\nsub/3.png,-1.0,nan\n")
    assert labels(layout) == {**CAT_AND_DOG, "sub/3.png": ()}
    assert layout.notes[2:] == (
        "labels.csv: 2 blank and 2 −1 in the columns of classes count as negative (--unknown negative)",
        "labels.csv: 1 images without a label (multi-label: of no class; multi-class refuses them)",
    )


def test_labels_that_mean_none_are_left_out(folder: Path) -> None:
    layout = read(folder, "path,label\n1.png,cat\n2.png,no_label\nsub/3.png,dog\n")
    assert layout.class_names == ("cat", "dog")
    assert layout.left_out.counts() == {"labelled no_label, which means no label, such as 2.png": 1}
    assert "no_label" in read(folder, "path,label\n1.png,cat\n2.png,no_label\n", is_stored=True).class_names


def test_folders_of_splits_count_where_no_column_does(tmp_path: Path) -> None:
    """As Hugging Face's single metadata.csv above the splits."""
    write_pictures(tmp_path, ["train/1.png", "test/2.png"])
    text = "file_name,label\ntrain/1.png,cat\ntest/2.png,dog\n"
    assert [entry.split for entry in read(tmp_path, text).entries] == ["test", "train"]
    assert [entry.split for entry in read(tmp_path, text, is_stored=True).entries] == [None, None]


def test_accents_are_compared_in_one_form(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["cafe\u0301.png", "2.png"])
    layout = read(tmp_path, "path,label\ncaf\u00e9.png,cafe\u0301\n2,caf\u00e9\n")
    assert layout.class_names == ("caf\u00e9",)
    assert len(layout.entries) == 2


@pytest.mark.parametrize(
    "text",
    [
        "{not json\n",
        '{"path": "1.png"}\n[1]\n',
        'path,label\n"1.png,cat\n',
        "{" * 100_000,
        "\ud83d".encode("utf-16-le", "surrogatepass"),
    ],
)
def test_garbage_is_refused_by_name(folder: Path, text: str | bytes) -> None:
    with pytest.raises(InvalidDatasetError, match=r"labels\.csv"):
        read(folder, text)


def test_a_label_that_no_config_can_name_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidDatasetError, match=r"slashes.* Received: 'n/a'"):
        read_layout(walk(folder), b"path,label\n1.png,cat\n2.png,n/a\n", LabelRules())


def test_a_file_of_something_else_may_be_moved_away(folder: Path) -> None:
    with pytest.raises(InvalidDatasetError, match=r"Received: name, count.*move the file away"):
        read(folder, "name,count\ncat,3\n")


def test_blank_and_minus_one_are_unknown_where_they_are_to_be_ignored(folder: Path) -> None:
    text = "path,cat,dog\n1.png,1,-1\n2.png,,1.0\nsub/3.png,-1.0,nan\n"
    layout = read(folder, text, unknown="ignore")
    assert {entry.path: (entry.labels, entry.unknown_labels) for entry in layout.entries} == {
        "1.png": (("cat",), ("dog",)),
        "2.png": (("dog",), ("cat",)),
        "sub/3.png": ((), ("cat", "dog")),
    }
    assert layout.notes[2:] == (
        "labels.csv: 2 blank and 2 −1 in the columns of classes are unknown (--unknown ignore)",
    )


def test_a_column_of_unknown_labels_beside_the_labels_is_kept_unless_they_are_to_be_negative(folder: Path) -> None:
    text = "path,label,unknown_labels\n1.png,cat,dog\n2.png,dog,\nsub/3.png,,cat\n"
    for layout in (read(folder, text, is_stored=True), read(folder, text), read(folder, text, unknown="ignore")):
        assert {e.path: (e.labels, e.unknown_labels) for e in layout.entries} == {
            "1.png": (("cat",), ("dog",)),
            "2.png": (("dog",), ()),
            "sub/3.png": ((), ("cat",)),
        }
    assert not any(entry.unknown_labels for entry in read(folder, text, unknown="negative").entries)
    chosen = read(folder, text, classes="dog,emu")
    assert {e.path: (e.labels, e.unknown_labels) for e in chosen.entries} == {
        "2.png": (("dog",), ()),
        "sub/3.png": ((), ()),
    }


def test_what_is_wrong_with_unknown_labels_is_named(folder: Path) -> None:
    with pytest.raises(InvalidDatasetError, match="row 2: cat is a label, and in unknown_labels, too"):
        read(folder, "path,label,unknown_labels\n1.png,cat,cat|dog\n2.png,dog,\n")
    with pytest.raises(
        InvalidDatasetError, match="Received: emu, which no image has as a label; the classes are cat, dog"
    ):
        read_layout(walk(folder), b"path,label,unknown_labels\n1.png,cat,emu\n2.png,dog,\n", LabelRules())
