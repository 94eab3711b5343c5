"""Unpacks archives from strangers: nothing outside the folder, no links or devices, no more than the disk takes."""

from __future__ import annotations

import logging
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

from cv_platform import files
from cv_platform.datasets.sources.tree import MAX_DEPTH
from cv_platform.errors import InvalidDatasetError

logger = logging.getLogger(__name__)

MAX_UNPACKED_BYTES = 500 * 10**9
MAX_MEMBERS = 20_000_000
_UTF8_FLAG = 0x800
_ZIP_ENCODINGS = ("gbk", "cp932", "big5", "cp949", "cp1251", "cp437")
"""Of the systems that pack names without saying how: Chinese, Japanese, Korean, Cyrillic, Western."""


def is_archive(path: Path) -> bool:
    """Tells from the content whether `path` is a tar (also compressed) or zip file.

    Raises:
        InvalidDatasetError: it cannot be read.
    """
    try:
        return path.is_file() and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))
    except OSError as err:
        raise InvalidDatasetError(
            f"Expected an archive that can be read. Received: {path} ({err.strerror}). Correct its rights."
        ) from err


def unpack(archive: Path, into: Path, *, encoding: str | None = None, max_bytes: int = MAX_UNPACKED_BYTES) -> None:
    """Unpacks the files of a tar or zip below the empty folder `into`.

    Args:
        archive: the tar or zip.
        into: an empty folder.
        encoding: of the names in a zip that does not say theirs; None: UTF-8, or a refusal that shows what they may be.
        max_bytes: of the content.

    Raises:
        InvalidDatasetError: a member would leave the folder, is a link or device, or comes twice; the archive is
            damaged or encrypted; its names are in an unknown encoding; or its content is larger than `max_bytes` or the
            free disk space.
    """
    logger.info("Unpacking %s, %.1f GB", archive, archive.stat().st_size / 1e9)
    free = files.free_bytes(into) - files.SPARE_BYTES
    limit, why = (max_bytes, "allowed") if max_bytes < free else (free, "free on the disk")
    unpacked_bytes = 0
    is_zip = zipfile.is_zipfile(archive)
    try:
        with _zip_members(archive, encoding) if is_zip else _tar_members(archive) as found:
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
    if len(path.parts) > MAX_DEPTH:
        raise InvalidDatasetError(
            f"Expected at most {MAX_DEPTH} folders in each other in {archive}. Received: {name[:100]!r}… with "
            f"{len(path.parts)}. Unpack it yourself, and import the folder of the images."
        )
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
def _zip_members(archive: Path, encoding: str | None) -> Iterator[Iterator[tuple[str, int, IO[bytes]]]]:
    def members(zipped: zipfile.ZipFile) -> Iterator[tuple[str, int, IO[bytes]]]:
        found = zipped.infolist()
        for member, name in zip(found, _zip_names(archive, found, encoding), strict=True):
            kind = stat.S_IFMT(member.external_attr >> 16)
            if name.endswith("/") or stat.S_ISDIR(kind):
                continue
            if kind and not stat.S_ISREG(kind):
                raise _refuse(archive, name, "a link or device")
            if member.flag_bits & 0x1:
                raise _refuse(archive, name, "which is encrypted")
            yield name, member.file_size, zipped.open(member)

    try:
        zipped = zipfile.ZipFile(archive)
    except UnicodeDecodeError as err:
        raise InvalidDatasetError(
            f"Expected names in UTF-8, as {archive} says of its own. Received: {err}. Pack it again."
        ) from err
    with zipped:
        yield members(zipped)


def _zip_names(archive: Path, members: list[zipfile.ZipInfo], encoding: str | None) -> list[str]:
    """Returns the members' names with `/` between folders, decoded from what they were packed in.

    Where a zip does not say that its names are UTF-8, Python takes them for CP437, whatever the packing machine used.
    https://docs.python.org/3/library/zipfile.html#zipfile.ZipFile
    """
    undeclared = {
        at: member.orig_filename.encode("cp437")
        for at, member in enumerate(members)
        if not member.flag_bits & _UTF8_FLAG and member.filename == member.orig_filename
    }
    readings: dict[str, dict[int, str]] = {}
    for candidate in [encoding] if encoding else ["utf-8", *_ZIP_ENCODINGS]:
        try:
            readings[candidate] = {at: name.decode(candidate) for at, name in undeclared.items()}
        except (UnicodeDecodeError, LookupError) as err:
            if candidate == encoding:
                raise InvalidDatasetError(
                    f"Expected the names in {archive} as {encoding}. Received: {err}. Choose another --zip-encoding."
                ) from err
    chosen = encoding or "utf-8"
    if chosen not in readings:
        shown = "".join(
            f"\n  {name}: {', '.join([text for text in names.values() if not text.isascii()][:3])}"
            for name, names in readings.items()
        )
        raise InvalidDatasetError(
            f"Expected names in UTF-8 in {archive}. Received: names in another encoding, which may be:{shown}\n"
            "Choose the one that reads well, as in --zip-encoding gbk, or pack the archive again."
        )
    names = (readings[chosen].get(at, member.filename) for at, member in enumerate(members))
    return [name.replace("\\", "/") for name in names]  # PowerShell 5 writes Windows' separators.
