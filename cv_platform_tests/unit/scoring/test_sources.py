"""What of a source has a row, what is passed over, and what only its first bytes tell: from a folder and from a URL."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cv_platform.cli import main
from cv_platform.compute import engine as engines
from cv_platform.compute import open_engine
from cv_platform.datasets import origins
from cv_platform.errors import DatasetError, StorageError
from cv_platform.scoring.score import score_images
from cv_platform.scoring.sources import PassedOver, find_images, read_images, reader_of
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage
from cv_platform_tests.support.pictures import picture, write_pictures
from cv_platform_tests.support.tiny_models import TinyExport, publish_tiny
from cv_platform_tests.unit.datasets.sources.test_phone_photos import HEIC

VERSION = "20260101T000000Z-00000001"
UNREADABLE = "/proc/self/mem"
"""A file whose reading is an input/output error, for root as well."""
MEMORY = "memory://bucket/images"


@pytest.fixture
def settings(tmp_path: Path, hand_made: TinyExport, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    made = Settings.from_environment({"CV_HOME": str(tmp_path / "home")})
    publish_tiny(CentralStorage(made.storage_url), hand_made, VERSION)
    return made


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Four images, two of them with a name that does not say so, a HEIC, and six files that are none."""
    folder = write_pictures(tmp_path / "mixed", ["a/0.png", "1.png"])
    (folder / "a/plain").write_bytes(picture(2))
    (folder / "b.jfif").write_bytes(picture(3))
    (folder / "photo.heic").write_bytes(HEIC)
    (folder / "film.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(5000))
    (folder / "nothing").touch()
    (folder / "LICENSE").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(picture(1))
    shutil.make_archive(str(tmp_path / "inner"), "zip", folder / "a")
    for name in ("inner.zip", "a/Inner.TAR.GZ"):
        shutil.copy(tmp_path / "inner.zip", folder / name)
    return folder


ROWS = ["1.png", "a/0.png", "a/plain", "b.jfif", "photo.heic"]
PASSED_OVER = "; 6 files passed over (2 archives: unpack to score what is inside)"


@pytest.fixture
def memory(mixed: Path) -> Iterator[MemoryFileSystem]:
    """Holds the same files at `MEMORY`."""
    file_system = fsspec.filesystem("memory")
    file_system.put(f"{mixed}/", MEMORY, recursive=True)
    yield file_system
    file_system.rm("/bucket", recursive=True)


def problems_of(output: Path) -> dict[str, str | None]:
    rows = pq.read_table(output).to_pydict()
    return dict(zip(rows["path"], rows["problem"], strict=True))


def test_the_same_images_have_the_same_rows_by_path_and_by_url(
    settings: Settings, mixed: Path, memory: MemoryFileSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = [tmp_path / f"{name}.parquet" for name in ("folder", "file", "memory")]
    for source, output in zip((str(mixed), mixed.as_uri(), MEMORY), outputs, strict=True):
        assert main(["score", source, "--model", VERSION, "--output", str(output)]) == 0
        said = capsys.readouterr().out.strip()
        assert said.startswith("5 images: 1 without an answer, 0 unknown; 5 scored now")
        assert said.endswith(PASSED_OVER)
    found = problems_of(outputs[0])
    assert list(found) == ROWS
    assert [path for path, problem in found.items() if problem] == ["photo.heic"]
    assert outputs[0].read_bytes() == outputs[1].read_bytes() == outputs[2].read_bytes()


def test_what_cannot_be_read_has_a_row_with_its_reason(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engines, "_WAITS_SECONDS", ())
    folder = write_pictures(tmp_path / "images", ["0.png", "closed/0.png"])
    for name in ("broken.png", "broken", "notes.txt"):
        (folder / name).symlink_to(UNREADABLE)
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "circle.png").symlink_to("circle.png")
    os.mkfifo(folder / "pipe.png")
    scandir = os.scandir

    def refuse(path: Path | int) -> object:  # Root, who runs the tests in containers, may read each folder.
        if isinstance(path, Path) and path.name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    output = tmp_path / "scores.parquet"
    scored = score_images(str(folder), VERSION, output, settings=settings)
    assert problems_of(output) == {
        "0.png": None,
        "broken": "OSError: Input/output error",
        "broken.png": "OSError: Input/output error",
        "circle.png": "OSError: Too many levels of symbolic links",
        "gone.png": "FileNotFoundError: No such file or directory",
    }
    assert (scored.images, scored.problems, scored.computed) == (5, 4, 5)
    assert scored.line().endswith("; 1 file passed over, 1 folder not read (see the log)")
    assert f"Received: {folder}/closed (Permission denied). Correct its rights" in caplog.text


def test_a_name_that_is_not_utf_8_has_a_row_that_says_so(settings: Settings, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "images", ["0.png"])
    for name in (b"caf\xe9.png", b"\xe9", b"caf\xe9.txt"):
        (folder / os.fsdecode(name)).write_bytes(picture(1) if name.endswith(b".png") else b"no image")
    output = tmp_path / "scores.parquet"
    scored = score_images(str(folder), VERSION, output, settings=settings, engine=open_engine(settings))
    said = r"Expected a file name in UTF-8. Received: 'caf\udce9.png'. Rename the file."
    assert problems_of(output) == {"0.png": None, "caf\N{REPLACEMENT CHARACTER}.png": said}
    assert (scored.images, scored.passed_over) == (2, PassedOver(2, 0))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ESTALE, errno.ETIMEDOUT])
def test_an_error_that_is_not_the_files_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder = write_pictures(tmp_path / "images", ["0.png"])

    def refuse(path: str, mode: str) -> object:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(StorageError, match=rf"Cannot read 0\.png at .*{os.strerror(number)}"):
        list(read_images(str(folder), ["0.png"]))


def test_one_object_that_cannot_be_read_has_a_row_of_its_own(memory: MemoryFileSystem) -> None:
    paths = ["1.png", "a/gone.png", "gone", "film.mp4", "a/plain"]
    found = dict(read_images(MEMORY, paths, [0, 10, 10, 5000, 0]))
    assert list(found) == ["1.png", "a/gone.png", "gone", "a/plain"]
    assert [type(content) for content in found.values()] == [bytes, FileNotFoundError, FileNotFoundError, bytes]
    assert found["a/plain"] == picture(2)
    memory.rm("/bucket/images", recursive=True)
    with pytest.raises(StorageError, match=r"Expected images at memory://.* Received: nothing"):
        list(read_images(MEMORY, ["1.png"], [10]))


class Refused(MemoryFileSystem):
    """A storage that answers for one object with an error of its own."""

    error: Exception

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> bytes:
        if path.endswith("1.png"):
            raise self.error
        return super().cat_file(path, start=start, end=end, **kwargs)


@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (PermissionError("Access Denied"), True),
        (OSError(errno.EINVAL, "The object was stored using a form of Server Side Encryption."), True),
        (OSError(errno.EBUSY, "Please reduce your request rate."), False),
        (OSError(errno.EIO, "Internal"), False),
        (TimeoutError("Request timeout"), False),
    ],
)
def test_what_a_storage_says_of_one_object_is_told_from_its_own_trouble(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, error: Exception, stays: bool
) -> None:
    monkeypatch.setattr(MemoryFileSystem, "cat_file", Refused.cat_file)
    monkeypatch.setattr(MemoryFileSystem, "error", error, raising=False)
    if stays:
        assert dict(read_images(MEMORY, ["1.png"], [10])) == {"1.png": error}
    else:
        with pytest.raises(StorageError, match=r"Cannot read 1\.png at memory://"):
            list(read_images(MEMORY, ["1.png"], [10]))


def test_objects_are_read_many_at_a_time_and_few_megabytes(
    memory: MemoryFileSystem, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origins, "_AT_ONCE", 3)
    monkeypatch.setattr(origins, "_MOST_BYTES", 1000)
    asked: list[list[tuple[str, int, int | None]]] = []
    whole = MemoryFileSystem.cat_ranges

    def cat_ranges(self: MemoryFileSystem, paths: list[str], starts: list[int], ends: list[int], **kwargs: str) -> list:
        names = [path.rpartition("/images/")[2] for path in paths]
        asked.append(list(zip(names, starts, ends, strict=True)))
        return whole(self, paths, starts, ends, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", cat_ranges)
    paths = ["1.png", "a/0.png", "a/plain", "b.jfif", "film.mp4", "photo.heic"]
    found = dict(read_images(MEMORY, paths, [400, 400, 0, 100, 5000, 900]))
    assert found == {path: (mixed / path).read_bytes() for path in ROWS}
    assert asked == [
        [(path, 0, 32) for path in ("a/plain", "b.jfif", "film.mp4", "photo.heic")],
        [("1.png", 0, None), ("a/0.png", 0, None), ("a/plain", None, None)],
        [("b.jfif", 0, None), ("photo.heic", 0, None)],
    ]


def test_the_url_of_an_archive_is_refused_in_words_that_say_what_to_do(
    memory: MemoryFileSystem, tmp_path: Path
) -> None:
    for name in ("inner.zip", "1.png", "nothing"):
        with pytest.raises(
            DatasetError, match=rf"Received: {MEMORY}/{name}, a file\. .* an archive download, and name"
        ):
            find_images(f"{MEMORY}/{name}", tmp_path)
    archive = (tmp_path / "inner.zip").as_uri()
    assert find_images(archive, tmp_path).paths == ["0.png", "plain"]
    assert reader_of(archive) is None
    assert reader_of(MEMORY) is not None


def test_a_source_without_an_image_leaves_nothing_behind(settings: Settings, tmp_path: Path) -> None:
    folder, output = tmp_path / "archives", tmp_path / "scores.parquet"
    folder.mkdir()
    (folder / "a.zip").write_bytes(b"PK\x03\x04" + bytes(60))
    (folder / "notes.txt").touch()
    with pytest.raises(DatasetError, match=r"Received: none; 2 files passed over \(1 archive: unpack"):
        score_images(str(folder), VERSION, output, settings=settings)
    assert sorted(path.name for path in tmp_path.iterdir() if "scores" in path.name) == [".scores.parquet.parts.lock"]
