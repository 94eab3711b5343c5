"""A backup's container: one `.tar.gz` with a checksum of each file, which counts only once it has been read again.

The last member, `manifest.json`, says what was meant to be in it. Reading trusts nothing: only plain files and folders
with harmless names are accepted, each once, and exactly those of the manifest. What belongs into an archive is the
caller's business. https://docs.python.org/3/library/tarfile.html#extraction-filters
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import secrets
import stat
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cv_platform.errors import BackupError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_CHUNK_BYTES = 2**20
_COMPRESSION = 1  # Most of the bytes are images and weights, which no level makes smaller.
_UNREADABLE = (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile, UnicodeDecodeError)


class Member(BaseModel):
    """One file of an archive."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What an archive holds.

    Attributes:
        format_version: of the archive.
        kind: of what was backed up; each is restored by its own code.
        product_version: that wrote it.
        created_utc: when writing began: later changes may be missing.
        details: what the caller wants to know at the restoration.
        members: all files, in their order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    kind: str
    product_version: str
    created_utc: datetime
    details: dict[str, Any] = Field(default_factory=dict)
    members: tuple[Member, ...]

    @property
    def total_bytes(self) -> int:
        """Size of all files, unpacked."""
        return sum(member.bytes for member in self.members)


class ArchiveWriter:
    """An archive that is being written; made by `write_archive`.

    Attributes:
        details: become `Manifest.details`.
        members: what was added so far.
    """

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self.details: dict[str, Any] = {}
        self.members: list[Member] = []

    def add_file(self, path: Path, name: str) -> Member:
        """Adds a file as it is when it is opened: what is appended later is left out.

        Raises:
            FileNotFoundError: it has gone.
            BackupError: it is no plain file, or became shorter meanwhile.
        """
        # Without following links: a name may have become one since it was listed.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BackupError(f"Expected a plain file at {path}. Received: something else. Remove it.")
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = status.st_size, status.st_mtime, status.st_mode & 0o755
            reader = _HashingReader(file, status.st_size)
            try:
                self._tar.addfile(info, reader)
            except tarfile.TarError as err:
                raise BackupError(f"{path}: expected a file that keeps its size. Received: {err}. Try again.") from err
        member = Member(name=name, bytes=status.st_size, sha256=reader.sha256)
        self.members.append(member)
        return member

    def add_folder(self, name: str) -> None:
        """Adds an empty folder: some programs want theirs to exist."""
        info = tarfile.TarInfo(name)
        info.type, info.mode = tarfile.DIRTYPE, 0o755
        self._tar.addfile(info)

    def _add_manifest(self, kind: str, product_version: str, created_utc: datetime) -> None:
        manifest = Manifest(
            kind=kind,
            product_version=product_version,
            created_utc=created_utc,
            details=self.details,
            members=tuple(self.members),
        )
        content = manifest.model_dump_json(indent=1).encode()
        info = tarfile.TarInfo(MANIFEST)
        info.size, info.mode = len(content), 0o644
        self._tar.addfile(info, io.BytesIO(content))


@contextmanager
def write_archive(target: Path, *, kind: str, product_version: str) -> Iterator[ArchiveWriter]:
    """Yields a writer; when the block ends without an error, `target` appears, complete, synced and read again.

    The file is readable by its owner only.

    Raises:
        BackupError: `target` exists, the archive cannot be written, or it does not read as it was written.
    """
    if target.exists():
        raise BackupError(f"Expected a new name for the archive. Received: {target}, which exists.")
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    created_utc = datetime.now(UTC)
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as raw:
            with (
                gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=_COMPRESSION, mtime=0) as packed,
                tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
            ):
                writer = ArchiveWriter(tar)
                yield writer
                writer._add_manifest(kind, product_version, created_utc)
            raw.flush()
            os.fsync(raw.fileno())
        verify_archive(partial)
        partial.rename(target)
        sync_folder(target.parent)
    except OSError as err:
        raise BackupError(f"Cannot write {target}: {err}. Check the folder, its rights and the free space.") from err
    finally:
        partial.unlink(missing_ok=True)


def verify_archive(path: Path) -> Manifest:
    """Reads an archive to its end and returns its manifest, once every checksum and name holds.

    Raises:
        BackupError: it is no archive of ours, of a newer format, truncated, damaged, or holds what an archive never
            does: links, devices, names that lead out of it.
    """
    found: list[Member] = []
    manifest: Manifest | None = None
    with _errors(path), gzip.open(path, "rb") as packed:
        for name, content in _members(path, packed):
            if manifest is not None:
                raise BackupError(f"{path}: expected {MANIFEST} as the last member. Received: {name!r} after it.")
            if name == MANIFEST and content is not None:
                manifest = _parse_manifest(path, content.read())
            elif content is not None:
                digest = hashlib.sha256()
                size = 0
                while chunk := content.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
                found.append(Member(name=name, bytes=size, sha256=digest.hexdigest()))
        while packed.read(_CHUNK_BYTES):  # To its checksum.
            pass
    if manifest is None:
        raise BackupError(
            f"{path}: expected an archive that ends with {MANIFEST}. Received: one without. Copy it again."
        )
    if tuple(found) != manifest.members:
        expected = {member.name: member for member in manifest.members}
        actual = {member.name: member for member in found}
        wrong = sorted(name for name in expected | actual if expected.get(name) != actual.get(name))
        raise BackupError(
            f"{path}: expected the {len(expected)} files of its manifest. Missing, added or changed: "
            f"{', '.join(wrong[:5]) or 'their order'}. Use another backup."
        )
    return manifest


def extract_archive(path: Path, manifest: Manifest, into: Path) -> None:
    """Unpacks a verified archive below the empty folder `into`, comparing every checksum again, and syncs it.

    Raises:
        BackupError: the archive is not the one that was verified, or the files cannot be written.
    """
    expected = {member.name: member.sha256 for member in manifest.members}
    with _errors(path), gzip.open(path, "rb") as packed:
        for name, content in _members(path, packed, into=into):
            target = into / name
            if content is None:
                target.mkdir(parents=True, exist_ok=True)
            elif name != MANIFEST:
                target.parent.mkdir(parents=True, exist_ok=True)
                digest = hashlib.sha256()
                with target.open("xb") as file:
                    while chunk := content.read(_CHUNK_BYTES):
                        digest.update(chunk)
                        file.write(chunk)
                if expected.pop(name, None) != digest.hexdigest():
                    raise BackupError(f"{path}: expected the archive that was verified. Received: another {name}.")
    if expected:
        raise BackupError(f"{path}: expected the archive that was verified. Received: one without {min(expected)}.")
    os.sync()  # Once for thousands of files, instead of an fsync for each.


def sync_folder(folder: Path) -> None:
    """Makes new names in `folder` survive a power cut, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        return  # Some network file systems refuse to sync a folder; its files are synced.
    finally:
        os.close(handle)


class _HashingReader(io.RawIOBase):
    """Reads at most `size` bytes of a file and knows their sha256."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._left = size
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        self._digest.update(data)
        return data


def _members(path: Path, packed: gzip.GzipFile, *, into: Path | None = None) -> Iterator[tuple[str, IO[bytes] | None]]:
    """Yields name and content of each member; None is a folder.

    Raises:
        BackupError: a member is something else, has a harmful name, or comes twice.
    """
    seen: set[str] = set()
    with tarfile.open(fileobj=packed, mode="r|") as tar:
        for info in tar:
            name = info.name
            if not (info.isreg() or info.isdir()):
                raise BackupError(f"{path}: expected plain files. Received: {name!r}, a link or device. Do not use it.")
            if not _is_harmless(name) or name in seen:
                raise BackupError(
                    f"{path}: expected names below one folder, each once. Received: {name!r}. Do not use it."
                )
            if into is not None:
                tarfile.data_filter(info, str(into))
            seen.add(name)
            yield name, tar.extractfile(info) if info.isreg() else None


def _is_harmless(name: str) -> bool:
    """Whether a name stays below the folder that it is unpacked into, on every system."""
    return "\\" not in name and "\0" not in name and all(part not in {"", ".", ".."} for part in name.split("/"))


def _parse_manifest(path: Path, content: bytes) -> Manifest:
    try:
        version = json.loads(content)["format_version"]
        if version > FORMAT_VERSION:
            raise BackupError(
                f"{path}: expected an archive of format {FORMAT_VERSION} or older. Received: {version}. "
                "Restore it with the release that made it, or a newer one."
            )
        return Manifest.model_validate_json(content)
    except (ValueError, KeyError, TypeError, ValidationError) as err:
        raise BackupError(f"{path}: expected a manifest. Received: {err}. Use another backup.") from err


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as err:
        raise BackupError(
            f"{path}: expected a complete archive. Received: {err}. Copy it again, or use another."
        ) from err
    except OSError as err:
        raise BackupError(f"Cannot read {path}: {err}. Check the file, its rights and the free space.") from err
