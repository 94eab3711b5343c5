"""A backup's file: one `.tar.gz` with a checksum of each file in it, which counts only once it has been read again.

What is in the stream, and what is refused, is `archive_stream.py`'s part; what belongs into an archive is the caller's.
Standard library only, as the stack in containers is backed up by the machine's Python (3.9 on).
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tarfile import TarInfo

from cv_platform.errors import BackupError
from cv_platform.files import whole_file
from cv_platform.maintenance.archive_stream import (
    CHUNK_BYTES,
    ArchiveReader,
    ArchiveWriter,
    HashingReader,
    Manifest,
    Member,
    Readable,
    packing,
    reading,
)

_COMPRESSION = 1  # Most of the bytes are images and weights, which no level makes smaller.


@contextmanager
def write_archive(target: Path, *, kind: str, product_version: str) -> Iterator[ArchiveWriter]:
    """Yields a writer; when the block ends without an error, `target` appears, complete, synced and read again.

    The file is readable by its owner only.

    Raises:
        BackupError: `target` exists, the archive cannot be written, or it does not read as it was written.
    """
    if target.exists():
        raise BackupError(f"Expected a new name for the archive. Received: {target}, which exists.")
    try:
        with whole_file(target, is_private=True) as partial:
            with (
                partial.open("wb") as raw,
                gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=_COMPRESSION, mtime=0) as packed,
                packing(packed, kind=kind, product_version=product_version) as writer,
            ):
                yield writer
            verify_archive(partial)
    except OSError as err:
        raise BackupError(f"Cannot write {target}: {err}. Check the folder, its rights and the free space.") from err


def verify_archive(path: Path) -> Manifest:
    """Reads an archive to its end and returns its manifest, once every checksum and name holds.

    Raises:
        BackupError: it is no archive of ours, of a newer format, truncated, damaged, or holds what an archive never
            does: links, devices, names that lead out of it.
    """
    with reading(str(path)), gzip.open(path, "rb") as packed:
        return ArchiveReader(str(path), packed).read_to_end()


def verified_members(path: Path, manifest: Manifest) -> Iterator[tuple[TarInfo, HashingReader | None]]:
    """Yields the members of an archive that `verify_archive` has read, and compares each with its manifest.

    Raises:
        BackupError: it is another archive by now.
    """
    expected = {member.name: member for member in manifest.members}
    with reading(str(path)), gzip.open(path, "rb") as packed:
        for info, content in ArchiveReader(str(path), packed):
            yield info, content
            if content is not None:
                while content.read(CHUNK_BYTES):
                    pass
                if Member(info.name, content.size, content.sha256) != expected.pop(info.name, None):
                    raise BackupError(f"{path}: expected the archive that was verified. Received: another {info.name}.")
    if expected:
        raise BackupError(f"{path}: expected the archive that was verified. Received: one without {min(expected)}.")


def extract_archive(path: Path, manifest: Manifest, into: Path) -> None:
    """Unpacks a verified archive below the empty folder `into`, comparing every checksum again, and syncs it.

    Raises:
        BackupError: the archive is not the one that was verified, or the files cannot be written.
    """
    with reading(str(path)):
        for info, content in verified_members(path, manifest):
            write_member(content, into / info.name)
    os.sync()  # Once for thousands of files, instead of an fsync for each.


def write_member(content: Readable | None, target: Path) -> None:
    """Writes a member to `target`, where nothing is yet, with the folders above it."""
    if content is None:
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        while chunk := content.read(CHUNK_BYTES):
            file.write(chunk)
