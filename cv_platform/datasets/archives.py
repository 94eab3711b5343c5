"""Unpacks archives from strangers: nothing outside the folder, no links or devices, no more than the disk takes."""

from __future__ import annotations

import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from cv_platform import disk_space
from cv_platform.errors import InvalidDatasetError

MAX_UNPACKED_BYTES = 500 * 10**9
MAX_MEMBERS = 20_000_000


def is_archive(path: Path) -> bool:
    """Tells from the content whether `path` is a tar (also compressed) or zip file."""
    return path.is_file() and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))


def unpack(archive: Path, into: Path, *, max_bytes: int = MAX_UNPACKED_BYTES) -> None:
    """Unpacks the files of a tar or zip below the empty folder `into`.

    Raises:
        InvalidDatasetError: a member would leave the folder, is a link or device, or comes twice; the archive is
            damaged or encrypted; or its content is larger than `max_bytes` or the free disk space.
    """
    free = disk_space.free_bytes(into) - disk_space.SPARE_BYTES
    limit, why = (max_bytes, "allowed") if max_bytes < free else (free, "free on the disk")
    unpacked_bytes = 0
    members = _zip_members if zipfile.is_zipfile(archive) else _tar_members
    try:
        with members(archive) as found:
            for count, (name, size, content) in enumerate(found):
                unpacked_bytes += size
                if unpacked_bytes > limit or count >= MAX_MEMBERS:
                    raise InvalidDatasetError(
                        f"Expected an archive with at most {limit / 1e9:.1f} GB ({why}) and {MAX_MEMBERS} files. "
                        f"Received: {archive} with more. Unpack it yourself on a larger disk, and import the folder."
                    )
                target = _target(archive, into, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                with content, target.open("xb") as file:
                    shutil.copyfileobj(content, file, 2**20)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError) as err:
        raise InvalidDatasetError(f"Expected a complete archive. Received: {archive}: {err}. Copy it again.") from err
    except (FileExistsError, NotADirectoryError) as err:
        raise InvalidDatasetError(f"Expected each file once in {archive}. Received: {err.filename} twice.") from err
    except OSError as err:
        raise InvalidDatasetError(f"Cannot unpack {archive}: {err}. Check the archive and the disk.") from err


def _target(archive: Path, into: Path, name: str) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
        raise InvalidDatasetError(
            f"Expected only paths inside the archive. Received: {name!r} in {archive}, which leads out of it. "
            "Do not trust this archive."
        )
    return into / path


def _refuse(archive: Path, name: str, kind: str) -> InvalidDatasetError:
    return InvalidDatasetError(
        f"Expected only files and folders in {archive}. Received: {name!r}, {kind}. Pack the archive again without it."
    )


@contextmanager
def _tar_members(archive: Path) -> Iterator[Iterator[tuple[str, int, IO[bytes]]]]:
    def members(tar: tarfile.TarFile) -> Iterator[tuple[str, int, IO[bytes]]]:
        for member in tar:
            if member.isdir():
                continue
            content = tar.extractfile(member) if member.isfile() else None
            if content is None:
                raise _refuse(archive, member.name, "a link" if member.issym() or member.islnk() else "a device")
            yield member.name, member.size, content

    with tarfile.open(archive) as tar:
        yield members(tar)


@contextmanager
def _zip_members(archive: Path) -> Iterator[Iterator[tuple[str, int, IO[bytes]]]]:
    def members(zipped: zipfile.ZipFile) -> Iterator[tuple[str, int, IO[bytes]]]:
        for member in zipped.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if member.is_dir() or stat.S_ISDIR(kind):
                continue
            if kind and not stat.S_ISREG(kind):
                raise _refuse(archive, member.filename, "a link or device")
            if member.flag_bits & 0x1:
                raise _refuse(archive, member.filename, "which is encrypted")
            yield member.filename, member.file_size, zipped.open(member)

    with zipfile.ZipFile(archive) as zipped:
        yield members(zipped)
