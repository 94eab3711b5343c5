"""Files of a check-out by path, and by URL where it is not seen."""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from cv_platform.compute import engine as compute
from cv_platform.compute.sight import Proof, blind_machines
from cv_platform.datasets import origins
from cv_platform.datasets.origins import Files, Place, Stored
from cv_platform.errors import InvalidDatasetError, StorageError
from cv_platform_tests.support.elsewhere import Apart, Elsewhere
from cv_platform_tests.support.waiting import wait_until


def test_a_file_of_the_same_size_and_another_end_is_no_proof(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "marker").write_bytes(bytes(9000) + b"here")
    proof = Proof.of(folder / "marker")
    assert proof.holds()
    assert blind_machines(None, proof) == blind_machines(Elsewhere(), proof) == []
    assert blind_machines(Apart(folder), proof) == ["apart"]
    (folder / "marker").write_bytes(bytes(9000) + b"else")
    assert not proof.holds()
    (folder / "marker").unlink()
    assert not proof.holds()


def stored(tmp_path: Path, *places: Place) -> Files:
    """Returns files of a check-out that is not there, and whose proof is not."""
    proof = Proof(str(tmp_path / "gone" / "marker"), 1, b"x")
    paths = tuple(f"images/{at}.png" for at in range(len(places)))
    return Files(tmp_path / "gone", paths, Stored(str(tmp_path / "central"), proof, places))


def put(tmp_path: Path, name: str, content: bytes) -> None:
    file = tmp_path / "central" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def part(name: str, content: bytes, start: int, end: int) -> Place:
    return Place(name, hashlib.sha256(content[start:end]).digest(), start, end)


def test_images_that_lie_one_behind_the_other_are_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar, whole = os.urandom(20_000), b"an image"
    put(tmp_path, "a.tar", tar)
    put(tmp_path, "files/md5/ab/c", whole)
    ranges = [(0, 100), (612, 800), (1024, 2000), (9000, 9500), (8000, 8100)]
    places = [part("a.tar", tar, *place) for place in ranges]
    files = stored(tmp_path, *places, Place("files/md5/ab/c", hashlib.md5(whole).digest()), places[0])
    asked = list[list[tuple[str, int | None, int | None]]]()
    store = origins._store(str(tmp_path / "central"))
    read = store.read_parts
    monkeypatch.setattr(store, "read_parts", lambda parts: asked.append(list(parts)) or read(parts))
    assert list(files) == [*(tar[start:end] for start, end in ranges), whole, tar[:100]]
    assert list(files.only(3)) == [tar[9000:9500]]
    spans = [[(Path(path).name, start, end) for path, start, end in parts] for parts in asked]
    # 7,000 bytes further is another read, and so is what lies before.
    first = [("a.tar", 0, 2000), ("a.tar", 9000, 9500), ("a.tar", 8000, 8100), ("c", None, None), ("a.tar", 0, 100)]
    assert spans == [first, [("a.tar", 9000, 9500)]]


def test_few_megabytes_and_few_files_are_asked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origins, "_AT_ONCE", 3)
    monkeypatch.setattr(origins, "_MOST_BYTES", 1000)
    tarred = [Place("a.tar", b"", at * 500, at * 500 + 400) for at in range(5)]
    whole = [Place(str(at), b"") for at in range(4)]
    large = [Place(str(at), b"", size=size) for at, size in enumerate((600, 400, 100, 5000, 5000, 1), 4)]
    together = [[len(run) for run in runs] for runs in origins.read_together([*tarred, *whole, *large])]
    assert together == [[2], [2], [1, 1, 1], [1, 1, 1], [1, 1], [1], [1], [1]]


@pytest.mark.parametrize("is_tar", [False, True])
def test_other_bytes_in_central_storage_are_refused(tmp_path: Path, is_tar: bool) -> None:
    content = b"as they were sent"
    put(tmp_path, "one", content[::-1])
    place = part("one", content, 0, 17) if is_tar else Place("one", hashlib.md5(content).digest())
    with pytest.raises(InvalidDatasetError, match=r"Expected images/0\.png in .*/central/one as it was sent there"):
        list(stored(tmp_path, place))


def test_what_central_storage_does_not_have_is_its_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"Cannot read images of the dataset at .*/central: .*Check CV_STORAGE"):
        list(stored(tmp_path, Place("nowhere", b"")))


def test_a_check_out_that_is_away_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compute, "_WAITS_SECONDS", (0.1,) * 600)
    checkout, away = tmp_path / "checkout", tmp_path / "away"
    checkout.mkdir()
    (checkout / "a.png").write_bytes(b"a")
    part = Part(Files(checkout, ("a.png",)))
    checkout.rename(away)

    def come_back() -> None:
        wait_until(lambda: f"images in {checkout}. Received: no such folder. Mount it" in caplog.text)
        away.rename(checkout)

    returning = threading.Thread(target=come_back)
    returning.start()
    assert compute.call(lambda shard: list(shard.files), part) == [b"a"]
    returning.join()


@dataclass(frozen=True)
class Part:
    files: Files
    name: str = "a.png"
    images: int = 1
