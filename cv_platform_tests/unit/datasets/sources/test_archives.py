from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from pathlib import Path
from typing import Any, cast

import pytest

from cv_platform.datasets.sources.archives import is_archive, unpack
from cv_platform.errors import InvalidDatasetError


def tar_with(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, cast(Any, mode)) as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.fixture
def into(tmp_path: Path) -> Path:
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".zip"])
def test_unpacks_files_and_folders(tmp_path: Path, into: Path, suffix: str) -> None:
    archive = tmp_path / f"a{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as zipped:
            zipped.mkdir("cat")
            zipped.writestr("cat/1.png", b"one")
    else:
        mode = {".tar": "w", ".tar.gz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}[suffix]
        tar_with(archive, (member("cat", tarfile.DIRTYPE), b""), (member("./cat/1.png"), b"one"), mode=mode)
    assert is_archive(archive)
    unpack(archive, into)
    assert (into / "cat" / "1.png").read_bytes() == b"one"


@pytest.mark.parametrize(
    "name", ["../evil.png", "/tmp/evil.png", "cat/../../evil.png", "..\\..\\evil.png", "\\evil.png"]
)
def test_refuses_paths_that_lead_out(tmp_path: Path, into: Path, name: str) -> None:
    if "\\" not in name:  # Which means nothing in a tar.
        with pytest.raises(InvalidDatasetError, match="leads out of it"):
            unpack(tar_with(tmp_path / "a.tar.gz", (member(name), b"x")), into)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        zipped.writestr(name, b"x")
    with pytest.raises(InvalidDatasetError, match="leads out of it"):
        unpack(tmp_path / "a.zip", into)
    assert not list(tmp_path.rglob("evil.png"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_refuses_links_and_devices_in_tar(tmp_path: Path, into: Path, kind: bytes) -> None:
    archive = tar_with(tmp_path / "a.tar.gz", (member("cat/1.png", kind, link="/etc/passwd"), b""))
    with pytest.raises(InvalidDatasetError, match="only files and folders"):
        unpack(archive, into)
    assert not list(into.rglob("*.png"))


def test_refuses_links_in_zip(tmp_path: Path, into: Path) -> None:
    link = zipfile.ZipInfo("cat/1.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        zipped.writestr(link, "/etc/passwd")
    with pytest.raises(InvalidDatasetError, match="only files and folders"):
        unpack(tmp_path / "a.zip", into)


def test_stops_before_content_exceeds_the_limit(tmp_path: Path, into: Path) -> None:
    archive = tar_with(tmp_path / "a.tar.gz", (member("1.png"), bytes(600)), (member("2.png"), bytes(600)))
    with pytest.raises(InvalidDatasetError, match="allowed"):
        unpack(archive, into, max_bytes=1000)
    assert [path.name for path in into.iterdir()] == ["1.png"]


def test_refuses_the_same_file_twice(tmp_path: Path, into: Path) -> None:
    archive = tar_with(tmp_path / "a.tar.gz", (member("1.png"), b"a"), (member("1.png"), b"b"))
    with pytest.raises(InvalidDatasetError, match="each file once"):
        unpack(archive, into)


@pytest.mark.parametrize("cut", [40, 200])
def test_names_a_truncated_archive(tmp_path: Path, into: Path, cut: int) -> None:
    noise = bytes(i * 37 % 251 for i in range(5000))
    archive = tar_with(tmp_path / "a.tar.gz", (member("1.png"), noise))
    archive.write_bytes(archive.read_bytes()[:-cut])
    with pytest.raises(InvalidDatasetError, match=r"complete archive.*a\.tar\.gz"):
        unpack(archive, into)


def test_other_files_are_no_archives(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"hello")
    assert not is_archive(tmp_path / "a.tar")
    assert not is_archive(tmp_path)


def zip_with(path: Path, *names: bytes, flags: int = 0) -> Path:
    """Returns a zip whose names are exactly these bytes, with the flag bits of each."""
    stand_ins = [f"{at:02d}".ljust(len(name), "x") for at, name in enumerate(names)]
    with zipfile.ZipFile(path, "w") as zipped:
        for stand_in in stand_ins:
            zipped.writestr(stand_in, stand_in)
    data = path.read_bytes()
    for stand_in, name in zip(stand_ins, names, strict=True):
        # Of each name its two headers: the local one, and that of the directory, with their flags 24 and 38 before it.
        local = data.index(stand_in.encode())
        data = (
            data[: local - 24]
            + flags.to_bytes(2, "little")
            + data[local - 22 : local]
            + name
            + data[local + len(name) :]
        )
        listed = data.rindex(stand_in.encode())
        data = (
            data[: listed - 38]
            + flags.to_bytes(2, "little")
            + data[listed - 36 : listed]
            + name
            + data[listed + len(name) :]
        )
    path.write_bytes(data)
    return path


def unpacked(into: Path) -> list[str]:
    return sorted(path.relative_to(into).as_posix() for path in into.rglob("*") if path.is_file())


def test_backslashes_part_folders_in_a_zip(tmp_path: Path, into: Path) -> None:
    """As PowerShell 5 packs, folders included."""
    unpack(zip_with(tmp_path / "a.zip", b"pets\\", b"pets\\cat\\1.png", b"pets\\dog\\2.png"), into)
    assert unpacked(into) == ["pets/cat/1.png", "pets/dog/2.png"]


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("utf-8", "猫/1.png"),
        ("gbk", "狗/1.png"),
        ("cp932", "ソース/1.png"),  # Whose first character ends with the byte of a backslash.
        ("cp437", "Käfer/1.png"),
    ],
)
def test_names_that_do_not_say_their_encoding(tmp_path: Path, into: Path, encoding: str, name: str) -> None:
    archive = zip_with(tmp_path / "a.zip", name.encode(encoding), b"dog/2.png")
    if encoding != "utf-8":
        with pytest.raises(InvalidDatasetError, match=rf"\n  {encoding}: {name}") as caught:
            unpack(archive, into)
        assert "--zip-encoding gbk" in str(caught.value)
        assert unpacked(into) == []
        unpack(archive, into, encoding=encoding)
    else:
        unpack(archive, into)
    assert unpacked(into) == sorted([name, "dog/2.png"])


@pytest.mark.parametrize("encoding", ["ascii", "no-such", "hex"])
def test_says_when_names_are_not_in_the_encoding_given(tmp_path: Path, into: Path, encoding: str) -> None:
    archive = zip_with(tmp_path / "a.zip", "狗/1.png".encode("gbk"))
    with pytest.raises(InvalidDatasetError, match=f"as {encoding}.*Choose another --zip-encoding"):
        unpack(archive, into, encoding=encoding)


def test_refuses_names_that_are_not_the_utf_8_they_say(tmp_path: Path, into: Path) -> None:
    with pytest.raises(InvalidDatasetError, match="Pack it again"):
        unpack(zip_with(tmp_path / "a.zip", "狗/1.png".encode("gbk"), flags=0x800), into)


def test_refuses_folders_without_end(tmp_path: Path, into: Path) -> None:
    with pytest.raises(InvalidDatasetError, match="at most 64 folders"):
        unpack(zip_with(tmp_path / "a.zip", b"a/" * 2000 + b"1.png"), into)


def test_names_an_archive_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:  # The rights of a file mean nothing to root, who runs the tests in containers.
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.tar").touch()
    monkeypatch.setattr(tarfile, "is_tarfile", refuse)
    with pytest.raises(InvalidDatasetError, match=r"a\.tar \(Permission denied\)\. Correct its rights"):
        is_archive(tmp_path / "a.tar")
