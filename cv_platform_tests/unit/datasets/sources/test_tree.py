from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from cv_platform.datasets.sources.tree import images_among, is_image, walk
from cv_platform.errors import InvalidDatasetError
from cv_platform_tests.support.pictures import picture, write_pictures


def test_leaves_out_what_nas_desktops_and_archivers_leave_behind(tmp_path: Path) -> None:
    litter = ["@eaDir/1.png", "lost+found/2", "__MACOSX/._1.png", ".ipynb_checkpoints/1.png", "$RECYCLE.BIN/3.png"]
    write_pictures(tmp_path, ["cat/1.png", *litter, "cat/@eaDir/1.png@SynoEAStream"])
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "cat/Thumbs.db"):
        (tmp_path / name).touch()
    (tmp_path / "gone").symlink_to("nowhere")
    root = walk(tmp_path)
    assert list(root.paths(root)) == ["cat/1.png"]
    assert root.broken == ("gone",)
    assert sorted(root.litter) == sorted(
        [*(name.partition("/")[0] for name in litter), ".DS_Store", "Thumbs.db", "desktop.ini"]
    )


def test_images_are_known_by_their_content_where_the_suffix_says_nothing(tmp_path: Path) -> None:
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    for name in ("a.jfif", "b.jpe", "c", "d.JPG"):
        (tmp_path / name).write_bytes(jpeg.getvalue())
    (tmp_path / "e.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(20))
    (tmp_path / "f.dng").write_bytes(b"II*\0" + bytes(40))
    (tmp_path / "g.txt").write_bytes(jpeg.getvalue())
    (tmp_path / "h.svg").write_text("<svg/>")
    assert walk(tmp_path).images == ("a.jfif", "b.jpe", "c", "d.JPG")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (picture(0), True),
        (picture(0, (30, 30))[:-40], True),  # Damaged: a finding of validation, which names it.
        (b"", False),
        (b"<html>not found</html>", False),
        (b"\0\0\0\x18ftypheic" + bytes(100), False),
    ],
)
def test_content_decides_whatever_the_suffix_says(tmp_path: Path, data: bytes, expected: bool) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    assert is_image(tmp_path / "a.jpg") is expected


def test_follows_links_to_folders_but_not_in_circles(tmp_path: Path) -> None:
    write_pictures(tmp_path / "elsewhere", ["1.png"])
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets/cat").symlink_to(tmp_path / "elsewhere")
    root = walk(tmp_path / "pets")
    assert list(root.image_paths(root)) == ["cat/1.png"]
    (tmp_path / "elsewhere/again").symlink_to(tmp_path / "pets")
    with pytest.raises(InvalidDatasetError, match=r"a link back to a folder above it at .*cat/again"):
        walk(tmp_path / "pets")


def test_refuses_folders_without_end(tmp_path: Path) -> None:
    tmp_path.joinpath(*["a"] * 70).mkdir(parents=True)
    with pytest.raises(InvalidDatasetError, match="more than 64 levels"):
        walk(tmp_path)


def test_names_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "private").mkdir()
    scandir = os.scandir

    def refuse(path: Path) -> object:  # The rights of a folder mean nothing to root, who runs the tests in containers.
        if Path(path).name == "private":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InvalidDatasetError, match=r"private \(Permission denied\)\. Correct its rights"):
        walk(tmp_path)


def test_opens_only_what_its_suffix_does_not_tell(tmp_path: Path) -> None:
    for name in ("a.png", "b.txt", "c.dng", "d", "e.mp4"):
        (tmp_path / name).symlink_to("/proc/self/mem")  # Its reading is an input/output error, for root as well.
    root = walk(tmp_path)
    assert root.images == ("a.png",)
    assert root.unreadable == dict.fromkeys(("d", "e.mp4"), "that cannot be read (Input/output error)")
    reasons = dict.fromkeys(("a.png", "d"), "that cannot be read (Input/output error)")
    assert images_among(tmp_path, ["a.png", "d"]) == (set(), reasons)


def test_goes_on_without_folders_that_lead_back_or_too_deep_where_asked(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["cat/1.png", "dog/1.png"])
    (tmp_path / "cat/again").symlink_to(tmp_path)
    tmp_path.joinpath("dog", *["a"] * 70).mkdir(parents=True)
    unread: list[InvalidDatasetError] = []
    root = walk(tmp_path, unread=unread)
    assert list(root.image_paths(root)) == ["cat/1.png", "dog/1.png"]
    assert [str(one).partition("Received: ")[2].partition(" at ")[0] for one in unread] == [
        "a link back to a folder above it",
        "more than 64 levels",
    ]
