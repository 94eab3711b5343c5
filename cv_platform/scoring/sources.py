"""Where images to be scored come from, and how a process on any machine reads them: a folder, an archive, a URL."""

from __future__ import annotations

import functools
import hashlib
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cv_platform.datasets.sources.archives import is_archive, unpack
from cv_platform.datasets.sources.tree import walk
from cv_platform.errors import DatasetError, StorageError
from cv_platform.files import whole_directory
from cv_platform.images.files import IMAGE_SUFFIXES, is_litter
from cv_platform.object_store import driver_errors, has_anything


@dataclass(frozen=True)
class Found:
    """Images at one place, ordered by path.

    Attributes:
        root: a folder or URL that every process which works on them sees.
        paths: of the images below it.
        stamps: one for each, which changes when the file does.
    """

    root: str
    paths: Sequence[str]
    stamps: Sequence[str]


def find_images(source: str, scratch: Path) -> Found:
    """Lists the images of a source; what is none, by suffix or first bytes, is passed over.

    Args:
        source: a folder, a tar or zip, or a URL that fsspec knows, such as s3://bucket/prefix.
        scratch: an archive is unpacked below it, once.

    Raises:
        DatasetError: there is nothing there, or no image.
        InvalidDatasetError: a folder or archive that cannot be read.
        StorageError: the URL cannot be reached.
    """
    root = open_source(source, scratch)
    found = _of_url(root) if "://" in source else _of_path(Path(root))
    if not found.paths:
        raise DatasetError(f"Expected images in {source}. Received: none. Name another folder, archive or URL.")
    return found


def open_source(source: str, scratch: Path) -> str:
    """Returns the root of a source's images without listing them, see `Found`.

    Raises:
        DatasetError, InvalidDatasetError: as `find_images`.
    """
    return source if "://" in source else str(_unpacked(Path(source).expanduser().absolute(), scratch))


def read_file(root: str, path: str) -> bytes:
    """Returns the bytes of an image.

    Raises:
        FileNotFoundError, PermissionError: it is gone, or may not be read.
        StorageError: its place cannot be reached, or has nothing at all, which may pass.
    """
    try:
        if "://" in root:
            return _file_system(root).cat_file(f"{_root(root)}/{path}")
        with open(f"{root}/{path}", "rb") as file:  # noqa: PTH123 -- Path takes as long as the reading.
            return file.read()
    except PermissionError:
        raise
    except FileNotFoundError as err:
        if has_anything(_file_system(root), _root(root)):
            raise
        raise StorageError(
            f"Expected images at {root}. Received: nothing, as {socket.gethostname()} sees it. Mount it, if it is "
            "away. Each machine that scores has to see it: name a folder that all of them share, or a URL such as "
            "s3://bucket/prefix."
        ) from err
    except driver_errors() as err:
        raise StorageError(f"Cannot read {path} at {root}: {err}. Check that it is reached from here.") from err


def read_scored(source: str, scratch: Path, path: str, sha256: str) -> bytes:
    """Returns an image of a source as it was scored.

    Args:
        source: see `find_images`.
        scratch: an archive is unpacked below it, once.
        path: of the image.
        sha256: that it had.

    Raises:
        StorageError: it is gone, another one is in its place, or its place cannot be reached.
    """
    try:
        content = read_file(open_source(source, scratch), path)
    except (FileNotFoundError, PermissionError, DatasetError) as err:
        raise StorageError(f"Expected {path} of {source}. Received: {err}.") from err
    if hashlib.sha256(content).hexdigest() != sha256:
        raise StorageError(f"Expected {path} as it was scored. Received: another file. Materialise batch_scores.")
    return content


def reader_of(source: str) -> Callable[[str, str], bytes] | None:
    """Returns `read_scored` of a folder or URL; None of an archive, which would be unpacked for a few images."""
    if "://" not in source and Path(source).expanduser().is_file():
        return None
    return functools.partial(read_scored, source, Path())


def _unpacked(path: Path, scratch: Path) -> Path:
    if not path.exists():
        raise DatasetError(f"Expected a folder, an archive or a URL. Received: {path}, where nothing is. Correct it.")
    if path.is_file():
        if not is_archive(path):
            raise DatasetError(f"Expected a tar or zip of images. Received: {path}, which is neither. Name a folder.")
        status = path.stat()
        folder = scratch / f"unpacked-{status.st_size}-{status.st_mtime_ns}"
        if not folder.is_dir():
            with whole_directory(folder) as partial:
                unpack(path, partial)
        path = folder
    return path


def _of_path(path: Path) -> Found:
    tree = walk(path)
    names = sorted(tree.image_paths(tree))
    status_of = ((path / name).stat() for name in names)
    return Found(str(path), names, [f"{status.st_size}-{status.st_mtime_ns}" for status in status_of])


def _of_url(url: str) -> Found:
    try:
        listed: dict[str, dict[str, Any]] = _file_system(url).find(_root(url), detail=True)
    except driver_errors() as err:
        raise StorageError(f"Expected images at {url}. Received: {err}. Check the URL and its rights.") from err
    below = {path.removeprefix(f"{_root(url)}/"): facts for path, facts in listed.items()}
    names = sorted(
        name
        for name in below
        if Path(name).suffix.lower() in IMAGE_SUFFIXES and not any(is_litter(part) for part in name.split("/"))
    )
    stamps = [str(below[name].get("ETag") or (below[name]["size"], str(below[name].get("mtime")))) for name in names]
    return Found(url, names, stamps)


@functools.cache
def _file_system(root: str) -> Any:
    import fsspec

    try:
        return fsspec.core.url_to_fs(root)[0] if "://" in root else fsspec.filesystem("file")
    except (ImportError, ValueError) as err:
        raise StorageError(
            f"Expected a URL whose driver is installed. Received: {root} ({err}). "
            "For s3:// install the extra: pip install 'cv-platform[s3]'."
        ) from err


def _root(root: str) -> str:
    return str(_file_system(root)._strip_protocol(root)).rstrip("/") if "://" in root else root
