"""A backup as a stream: tar members, and as the last one `manifest.json` with a checksum of each.

Reading trusts nothing: only plain files and folders with harmless names are accepted, each once, and exactly those of
the manifest. The same stream is what a `.tar.gz` of `archive.py` holds, and what containers send and get; so this is
standard library only, for the Python of the machine (3.9 on).
https://docs.python.org/3/library/tarfile.html
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import os
import stat
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, Protocol

from cv_platform.errors import BackupError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CHUNK_BYTES = 2**20
_UNREADABLE = (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile, UnicodeDecodeError)


class Readable(Protocol):
    """What bytes are read from."""

    def read(self, size: int = -1, /) -> bytes:
        """Returns at most `size` bytes; none at the end."""
        ...


@dataclasses.dataclass(frozen=True)
class Member:
    """One file of an archive."""

    name: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What an archive holds.

    Attributes:
        kind: of what was backed up; each is restored by its own code.
        product_version: that wrote it.
        created_utc: when writing began: later changes may be missing.
        details: what the caller wants to know at the restoration.
        members: all files, in their order.
        format_version: of the archive.
    """

    kind: str
    product_version: str
    created_utc: datetime
    details: dict[str, Any]
    members: tuple[Member, ...]
    format_version: int = FORMAT_VERSION

    @property
    def total_bytes(self) -> int:
        """Size of all files, unpacked."""
        return sum(member.bytes for member in self.members)

    def as_json(self) -> bytes:
        """Returns what `parse_manifest` reads."""
        fields = {**dataclasses.asdict(self), "created_utc": self.created_utc.isoformat()}
        return json.dumps(fields, indent=1).encode()


class ArchiveWriter:
    """An archive that is being written; made by `packing`.

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
            try:
                return self.add_stream(file, name, size=status.st_size, mtime=status.st_mtime, mode=status.st_mode)
            except tarfile.TarError as err:
                raise BackupError(f"{path}: expected a file that keeps its size. Received: {err}. Try again.") from err

    def add_stream(self, content: Readable, name: str, *, size: int, mtime: float = 0, mode: int = 0o644) -> Member:
        """Adds a file of `size` bytes that are read from `content`.

        Raises:
            tarfile.TarError: it ends before.
        """
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode = size, mtime, mode & 0o755
        reader = HashingReader(content, size)
        self._tar.addfile(info, reader)
        member = Member(name=name, bytes=size, sha256=reader.sha256)
        self.members.append(member)
        return member

    def add_folder(self, name: str) -> None:
        """Adds an empty folder: some programs want theirs to exist."""
        info = tarfile.TarInfo(name)
        info.type, info.mode = tarfile.DIRTYPE, 0o755
        self._tar.addfile(info)

    def add_all(self, reader: ArchiveReader, *, below: str) -> Manifest:
        """Adds every member of another archive, with the folder `below` before its name; returns the other's manifest.

        Raises:
            BackupError: the other archive is not complete.
        """
        for info, content in reader:
            name = f"{below}/{info.name}"
            if content is None:
                self.add_folder(name)
            else:
                self.add_stream(content, name, size=info.size, mtime=info.mtime, mode=info.mode)
        return reader.manifest

    def _add_manifest(self, kind: str, product_version: str, created_utc: datetime) -> None:
        content = Manifest(kind, product_version, created_utc, self.details, tuple(self.members)).as_json()
        info = tarfile.TarInfo(MANIFEST)
        info.size, info.mode = len(content), 0o644
        self._tar.addfile(info, io.BytesIO(content))


@contextmanager
def packing(stream: IO[bytes] | gzip.GzipFile, *, kind: str, product_version: str) -> Iterator[ArchiveWriter]:
    """Yields a writer to `stream`; the manifest follows when the block ends without an error."""
    created_utc = datetime.now(timezone.utc)  # noqa: UP017 - datetime.UTC is of Python 3.11
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        writer = ArchiveWriter(tar)
        yield writer
        writer._add_manifest(kind, product_version, created_utc)


class ArchiveReader:
    """Yields `(header, content)` of each member of a stream, None for a folder's content, and checks all of them.

    What a consumer has read counts only once the iteration has ended without an error.

    Content that the consumer has left is read for it.
    """

    def __init__(self, name: str, stream: IO[bytes] | gzip.GzipFile) -> None:
        self._name = name
        self._stream = stream
        self._members: list[Member] = []
        self._manifest: Manifest | None = None

    @property
    def manifest(self) -> Manifest:
        """What the stream was meant to hold, once all of it was read.

        Raises:
            BackupError: it has not ended, or holds something else.
        """
        if self._manifest is None:
            raise BackupError(
                f"{self._name}: expected an archive that ends with {MANIFEST}. Received: one without. Copy it again."
            )
        if tuple(self._members) != self._manifest.members:
            expected = {member.name: member for member in self._manifest.members}
            actual = {member.name: member for member in self._members}
            wrong = sorted(n for n in set(expected) | set(actual) if expected.get(n) != actual.get(n))
            raise BackupError(
                f"{self._name}: expected the {len(expected)} files of its manifest. Missing, added or changed: "
                f"{', '.join(wrong[:5]) or 'their order'}. Use another backup."
            )
        return self._manifest

    def read_to_end(self) -> Manifest:
        """Reads everything and returns the manifest.

        Raises:
            BackupError: as the iteration.
        """
        for _ in self:
            pass
        return self.manifest

    def __iter__(self) -> Iterator[tuple[tarfile.TarInfo, HashingReader | None]]:
        """Reads to the end.

        Raises:
            BackupError: a member is no plain file or folder, has a harmful name, comes twice or is not as the manifest
                has it; or the stream ends early, is damaged or of a newer format.
        """
        seen: set[str] = set()
        with reading(self._name):
            with tarfile.open(fileobj=self._stream, mode="r|") as tar:
                for info in tar:
                    self._require_harmless(info, seen)
                    content = tar.extractfile(info) if info.isreg() else None
                    if content is None:
                        yield info, None
                    elif info.name == MANIFEST:
                        self._manifest = _parse_manifest(self._name, content.read())
                    else:
                        hashing = HashingReader(content, info.size)
                        yield info, hashing
                        while hashing.read(CHUNK_BYTES):
                            pass
                        self._members.append(Member(info.name, hashing.size, hashing.sha256))
            while self._stream.read(CHUNK_BYTES):  # To its own checksum, if it has one.
                pass
        _ = self.manifest

    def _require_harmless(self, info: tarfile.TarInfo, seen: set[str]) -> None:
        if self._manifest is not None:
            raise BackupError(
                f"{self._name}: expected {MANIFEST} as the last member. Received: {info.name!r} after it."
            )
        if not (info.isreg() or info.isdir()):
            raise BackupError(
                f"{self._name}: expected plain files. Received: {info.name!r}, a link or device. Do not use it."
            )
        if not is_harmless(info.name) or info.name in seen:
            raise BackupError(
                f"{self._name}: expected names below one folder, each once. Received: {info.name!r}. Do not use it."
            )
        seen.add(info.name)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Makes what goes wrong while the archive `name` is read a `BackupError`."""
    try:
        yield
    except _UNREADABLE as err:
        raise BackupError(
            f"{name}: expected a complete archive. Received: {err}. Copy it again, or use another."
        ) from err
    except OSError as err:
        raise BackupError(f"Cannot read {name}: {err}. Check the file, its rights and the free space.") from err


def is_harmless(name: str) -> bool:
    """Whether a name stays below the folder that it is unpacked into, on every system."""
    return "\\" not in name and "\0" not in name and all(part not in {"", ".", ".."} for part in name.split("/"))


class HashingReader(io.RawIOBase):
    """Reads at most `size` bytes of a file and knows their sha256.

    Attributes:
        size: bytes read so far.
    """

    def __init__(self, file: Readable, size: int) -> None:
        self._file = file
        self._left = size
        self._digest = hashlib.sha256()
        self.size = 0

    @property
    def sha256(self) -> str:
        """Of what was read so far."""
        return self._digest.hexdigest()

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes."""
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        self.size += len(data)
        self._digest.update(data)
        return data


def _parse_manifest(name: str, content: bytes) -> Manifest:
    try:
        fields = json.loads(content)
        version = fields["format_version"]
        if version > FORMAT_VERSION:
            raise BackupError(
                f"{name}: expected an archive of format {FORMAT_VERSION} or older. Received: {version}. "
                "Restore it with the release that made it, or a newer one."
            )
        members = tuple(Member(**member) for member in fields.pop("members"))
        created_utc = datetime.fromisoformat(fields.pop("created_utc").replace("Z", "+00:00"))
        manifest = Manifest(created_utc=created_utc, members=members, **fields)
        if not isinstance(manifest.details, dict):
            raise ValueError("details that are no object")
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise BackupError(f"{name}: expected a manifest. Received: {err}. Use another backup.") from err
