"""A backup's container: complete or refused."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cv_platform.errors import BackupError
from cv_platform.maintenance.archive import extract_archive, verify_archive, write_archive

CONTENT = {"home/a.txt": b"first", "home/deep/er/b.bin": bytes(range(256)) * 1000, "home/leer": b""}


def write(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    target = tmp_path / "x.tar.gz"
    with write_archive(target, kind="test", product_version="1.2.3") as writer:
        writer.add_folder("home/empty")
        for number, (name, content) in enumerate(CONTENT.items()):
            path = source / str(number)
            path.write_bytes(content)
            writer.add_file(path, name)
        writer.details = {"home": "/somewhere"}
    return target


def crafted(
    tmp_path: Path, members: list[tarfile.TarInfo], *, format_version: int = 1, listed: list[dict] | None = None
) -> Path:
    """An archive with an honest manifest around dishonest members (their content is "evil" where they have one)."""
    path = tmp_path / "crafted.tar.gz"
    manifest = {
        "format_version": format_version,
        "kind": "test",
        "product_version": "9",
        "created_utc": datetime.now(UTC).isoformat(),
        "details": {},
        "members": listed or [],
    }
    with tarfile.open(path, "w:gz") as tar:
        for info in members:
            info.size = 4 if info.isreg() else 0
            tar.addfile(info, io.BytesIO(b"evil"))
        content = json.dumps(manifest).encode()
        last = tarfile.TarInfo("manifest.json")
        last.size = len(content)
        tar.addfile(last, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_an_archive_comes_back_as_it_was(tmp_path: Path) -> None:
    path = write(tmp_path)
    manifest = verify_archive(path)
    assert (manifest.kind, manifest.product_version, manifest.details) == ("test", "1.2.3", {"home": "/somewhere"})
    assert {m.name: m.bytes for m in manifest.members} == {name: len(content) for name, content in CONTENT.items()}
    assert manifest.total_bytes == 5 + 256_000
    # sha256 of the empty input is well known.
    assert manifest.members[2].sha256 == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    into = tmp_path / "into"
    into.mkdir()
    extract_archive(path, manifest, into)
    assert {name: (into / name).read_bytes() for name in CONTENT} == CONTENT
    assert (into / "home" / "empty").is_dir()
    assert not (into / "manifest.json").exists()
    assert path.stat().st_mode & 0o077 == 0


def test_what_fails_leaves_no_archive(tmp_path: Path) -> None:
    def fail() -> None:
        with write_archive(tmp_path / "x.tar.gz", kind="test", product_version="1") as writer:
            writer.add_folder("home")
            raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_archive_is_not_overwritten(tmp_path: Path) -> None:
    path = write(tmp_path)
    before = path.read_bytes()
    with (
        pytest.raises(BackupError, match="which exists"),
        write_archive(path, kind="test", product_version="1"),
    ):
        pass
    assert path.read_bytes() == before


def test_links_are_not_followed_into_an_archive(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    with (
        pytest.raises(BackupError, match="Cannot write"),
        write_archive(tmp_path / "x.tar.gz", kind="test", product_version="1") as writer,
    ):
        writer.add_file(tmp_path / "link", "home/link")


def test_a_changed_byte_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    path = write(tmp_path)
    content = path.read_bytes()
    data = gzip.decompress(content)
    refused = 0
    for place in range(0, len(content), 50):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        try:
            verify_archive(path)
        except BackupError:
            refused += 1
        else:
            # A back reference to another place with the same bytes: nothing has changed.
            assert gzip.decompress(path.read_bytes()) == data
    assert refused > 20


def test_a_truncated_archive_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = write(tmp_path)
    content = path.read_bytes()
    for length in [0, 1, 20, *range(100, len(content), len(content) // 20), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(BackupError):
            verify_archive(path)


@pytest.mark.parametrize(
    "cut", [lambda data: data[: -2 * 512], lambda data: data[:1024], lambda _: b"", lambda _: b"no tar at all" * 100]
)
def test_a_well_compressed_stump_is_refused(tmp_path: Path, cut: Callable[[bytes], bytes]) -> None:
    path = write(tmp_path)
    data = gzip.decompress(path.read_bytes())
    end = data.rindex(b"manifest.json")  # The last header.
    path.write_bytes(gzip.compress(cut(data[:end])))
    with pytest.raises(BackupError):
        verify_archive(path)


@pytest.mark.parametrize(
    "name", ["../evil", "home/../../evil", "/etc/evil", "home//evil", "./evil", "home/.", "home\\..\\evil", ".."]
)
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BackupError, match="names below one folder"):
        verify_archive(crafted(tmp_path, [member(name)]))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with pytest.raises(BackupError, match="a link or device"):
        verify_archive(crafted(tmp_path, [member("home/link", kind, "/etc/passwd")]))


def test_a_name_may_come_once_only(tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="each once"):
        verify_archive(crafted(tmp_path, [member("home/a"), member("home/a")]))


def test_members_beside_the_manifest_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="Missing, added or changed: home/extra"):
        verify_archive(crafted(tmp_path, [member("home/extra")]))
    listed = [{"name": "home/gone", "bytes": 4, "sha256": "0" * 64}]
    with pytest.raises(BackupError, match="Missing, added or changed: home/gone"):
        verify_archive(crafted(tmp_path, [], listed=listed))


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackupError, match=r"format 1 or older\. Received: 2"):
        verify_archive(crafted(tmp_path, [], format_version=2))


def test_an_archive_that_was_exchanged_after_its_verification_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    manifest = verify_archive(path)
    (tmp_path / "other").mkdir()
    (tmp_path / "into").mkdir()
    content = CONTENT["home/a.txt"]
    CONTENT["home/a.txt"] = b"other"
    try:
        other = write(tmp_path / "other")
    finally:
        CONTENT["home/a.txt"] = content
    other.replace(path)
    with pytest.raises(BackupError, match=r"another home/a\.txt"):
        extract_archive(path, manifest, tmp_path / "into")
