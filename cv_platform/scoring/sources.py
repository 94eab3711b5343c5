"""Where images to be scored come from, and how a process on any machine reads them: a folder, an archive, a URL.

Listing a source opens no file. What its suffix calls an image has a row, whatever it holds; what its suffix calls text
or RAW has none; of all else the first bytes decide, as for the import, when it is read. By URL these 32 bytes are asked
for alone, so that no other large object is fetched.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cv_platform.datasets.origins import Place, read_together
from cv_platform.datasets.sources.archives import is_archive, unpack
from cv_platform.datasets.sources.tree import begins_as_image, walk
from cv_platform.errors import DatasetError, InvalidDatasetError, StorageError
from cv_platform.files import is_of_the_file, whole_directory
from cv_platform.images.files import HEAD_BYTES, is_litter, named_as_image
from cv_platform.object_store import driver_errors, has_anything

logger = logging.getLogger(__name__)
T = TypeVar("T")

_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz", ".tar.zst", ".7z", ".rar")
_AT_ONCE = 32
"""First bytes that are asked for together."""


@dataclass(frozen=True)
class PassedOver:
    """What of a source has no row; litter and hidden files are not counted.

    Attributes:
        files: that are no images.
        archives: of them, those that are called archives.
        folders: that cannot be read; the log names them.
    """

    files: int
    archives: int
    folders: int = 0

    @staticmethod
    def of(paths: Sequence[str], folders: int = 0) -> PassedOver:
        """Counts files, and the archives among them."""
        return PassedOver(len(paths), sum(path.lower().endswith(_ARCHIVES) for path in paths), folders)

    def __add__(self, other: PassedOver) -> PassedOver:
        return PassedOver(self.files + other.files, self.archives + other.archives, self.folders + other.folders)

    def line(self) -> str:
        """Says it; nothing where there is nothing."""
        inner = f" ({_counted(self.archives, 'archive')}: unpack to score what is inside)" if self.archives else ""
        said = [f"{_counted(self.files, 'file')} passed over{inner}"] if self.files else []
        said += [f"{_counted(self.folders, 'folder')} not read (see the log)"] if self.folders else []
        return ", ".join(said)


@dataclass(frozen=True)
class Found:
    """What may be images at one place, ordered by path.

    Attributes:
        source: whose they are.
        root: a folder or URL that every process which works on them sees.
        paths: of the files below it.
        stamps: one for each, which changes when the file does.
        sizes: in bytes, of objects at a URL; 0: not known.
        passed_over: what is none.
    """

    source: str
    root: str
    paths: Sequence[str]
    stamps: Sequence[str]
    sizes: Sequence[int]
    passed_over: PassedOver

    def no_images(self, passed_over: PassedOver | None = None) -> DatasetError:
        """Returns what is raised where none is an image; `passed_over` is what has turned out since."""
        known = self.passed_over + (passed_over or PassedOver.of([]))
        received = "; ".join(filter(None, ["none", known.line()]))
        return DatasetError(
            f"Expected images in {self.source}. Received: {received}. Name another folder, archive or URL."
        )


def find_images(source: str, scratch: Path) -> Found:
    """Lists what may be images in a source, see the module.

    Args:
        source: a folder, a tar or zip, or a URL that fsspec knows, such as s3://bucket/prefix.
        scratch: an archive is unpacked below it, once.

    Raises:
        DatasetError: there is nothing there, or no image; or the URL is that of a file.
        InvalidDatasetError: the folder or archive itself cannot be read.
        StorageError: the URL cannot be reached.
    """
    root = open_source(source, scratch)
    found = _of_url(source, root) if "://" in root else _of_path(source, Path(root))
    if not found.paths:
        raise found.no_images()
    return found


def open_source(source: str, scratch: Path) -> str:
    """Returns the root of a source's images without listing them, see `Found`.

    Raises:
        DatasetError, InvalidDatasetError: as `find_images`.
    """
    path = _local(source)
    return source if path is None else str(_unpacked(path, scratch))


def read_images(root: str, paths: Sequence[str], sizes: Sequence[int] = ()) -> Iterator[tuple[str, bytes | OSError]]:
    """Yields the images among some files, in order: path, and bytes or why that file cannot be read.

    From a URL up to 32 are read at a time, of 16 MiB together but for one that is larger, while those before are used.

    Args:
        root: see `Found`.
        paths: of files below it.
        sizes: in bytes, of objects at a URL; 0: not known.

    Raises:
        StorageError: their place cannot be reached, or has nothing at all, which may pass.
    """
    if "://" not in root:
        files = ((path, _read_local(root, path)) for path in paths)
        yield from ((path, content) for path, content in files if content is not None)
        return
    for some in _ahead(_read_objects(root, paths, sizes or [0] * len(paths))):
        yield from some


def _read_objects(root: str, paths: Sequence[str], sizes: Sequence[int]) -> Iterator[list[tuple[str, bytes | OSError]]]:
    """Yields what `read_images` yields, as much as is read at a time."""
    broken, chosen = _choose(root, paths, sizes)
    places = [Place(path, b"", size=0 if path in broken else size) for path, size in chosen]
    for runs in read_together(places):
        together = [run[0] for run in runs]
        whole = [place for place in together if place.object not in broken]
        # From 0: else the driver would ask for each one's size first. Of an empty object there is no such part.
        contents = _cat(root, [(place.object, 0 if place.size else None, None) for place in whole])
        read = {**broken, **dict(zip((place.object for place in whole), contents, strict=True))}
        yield [(place.object, read[place.object]) for place in together]


def _ahead(made: Iterator[T]) -> Iterator[T]:
    """Yields what an iterator yields, of which the next is made by a thread meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, made, None)
        while (one := coming.result()) is not None:
            coming = thread.submit(next, made, None)
            yield one


def read_file(root: str, path: str) -> bytes:
    """Returns the bytes of a file.

    Raises:
        OSError: it is gone, or cannot be read.
        StorageError: its place cannot be reached, or has nothing at all, which may pass.
    """
    (content,) = _cat(root, [(path, None, None)])
    if isinstance(content, OSError):
        raise content
    return content


def _read_local(root: str, path: str) -> bytes | OSError | None:
    """Returns a file's bytes, or why it cannot be read; None: it is no image."""
    try:
        with open(f"{root}/{path}", "rb") as file:  # noqa: PTH123 -- Path takes as long as the reading.
            if named_as_image(path):
                return file.read()
            head = file.read(HEAD_BYTES)
            return head + file.read() if begins_as_image(head) else None
    except OSError as err:
        return _of_the_file(root, path, err, functools.partial(has_anything, _file_system(root), root))


def _choose(
    root: str, paths: Sequence[str], sizes: Sequence[int]
) -> tuple[dict[str, bytes | OSError], list[tuple[str, int]]]:
    """Returns why files cannot be read, by path, and path and size of all that are not known to be no images."""
    untold = [path for path in paths if not named_as_image(path)]
    heads: dict[str, bytes | OSError] = {}
    for start in range(0, len(untold), _AT_ONCE):
        some = untold[start : start + _AT_ONCE]
        heads |= zip(some, _cat(root, [(path, 0, HEAD_BYTES) for path in some]), strict=True)
    broken: dict[str, bytes | OSError] = {path: head for path, head in heads.items() if isinstance(head, OSError)}
    no_images = {path for path, head in heads.items() if isinstance(head, bytes) and not begins_as_image(head)}
    return broken, [one for one in zip(paths, sizes, strict=True) if one[0] not in no_images]


def _cat(root: str, parts: Sequence[tuple[str, int | None, int | None]]) -> list[bytes | OSError]:
    """Returns parts of files, all asked for at once: path, start and end; in place of one why it cannot be read."""
    file_system, place = _file_system(root), _root(root)
    starts, ends = ([part[at] for part in parts] for at in (1, 2))
    paths = [f"{place}/{path}" for path, *_ in parts]
    contents: list[bytes | Exception] = file_system.cat_ranges(paths, starts, ends, on_error="return") if parts else []
    is_there = functools.cache(functools.partial(has_anything, file_system, place))
    return [
        _of_the_file(root, path, content, is_there) if isinstance(content, Exception) else content
        for (path, *_), content in zip(parts, contents, strict=True)
    ]


def _of_the_file(root: str, path: str, err: Exception, is_there: Callable[[], bool]) -> OSError:
    """Returns an error that is a file's own, and stays; asks whether anything is at its place.

    Raises:
        StorageError: it is its place's, and may pass.
        Exception: it is none of reading.
    """
    if not isinstance(err, driver_errors()):
        raise err
    if isinstance(err, OSError) and _stays(root, err) and is_there():
        return err
    if isinstance(err, FileNotFoundError):
        raise StorageError(
            f"Expected images at {root}. Received: nothing, as {socket.gethostname()} sees it. Mount it, if it is "
            "away. Each machine that scores has to see it: name a folder that all of them share, or a URL such as "
            "s3://bucket/prefix."
        ) from err
    raise StorageError(f"Cannot read {path} at {root}: {err}. Check that it is reached from here.") from err


def _stays(root: str, err: OSError) -> bool:
    """Tells whether an error is one of a file: of an object those that say so (EINVAL is a request that it refuses)."""
    if "://" not in root:
        return is_of_the_file(err)
    return isinstance(err, FileNotFoundError | PermissionError) or err.errno == errno.EINVAL


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
    except (OSError, DatasetError) as err:
        raise StorageError(f"Expected {path} of {source}. Received: {err}.") from err
    if hashlib.sha256(content).hexdigest() != sha256:
        raise StorageError(f"Expected {path} as it was scored. Received: another file. Materialise batch_scores.")
    return content


def reader_of(source: str) -> Callable[[str, str], bytes] | None:
    """Returns `read_scored` of a folder or URL; None of an archive, which would be unpacked for a few images."""
    path = _local(source)
    if path is not None and path.is_file():
        return None
    return functools.partial(read_scored, source, Path())


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _local(source: str) -> Path | None:
    """Returns the path of a source on this machine; None: it is a URL of another."""
    if "://" not in source:
        return Path(source).expanduser().absolute()
    return Path(_root(source)) if "file" in _file_system(source).protocol else None


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


def _of_path(source: str, path: Path) -> Found:
    unread: list[InvalidDatasetError] = []
    tree = walk(path, unread=unread)
    for why in unread:
        logger.warning("Passed over: %s", why)
    below = [(folder.inside(tree), folder) for folder in tree.below()]
    names = sorted(inside + name for inside, folder in below for name in (*folder.files, *folder.broken))
    told = {name: named_as_image(name) for name in names}
    paths = [name for name in names if told[name] is not False]
    no_images = [name for name in names if told[name] is False]
    stamps = [_stamp(path / name) for name in paths]
    return Found(source, str(path), paths, stamps, (), PassedOver.of(no_images, len(unread)))


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError as err:  # Its row says so, until it can be read.
        return str(err.errno)
    return f"{status.st_size}-{status.st_mtime_ns}"


def _of_url(source: str, url: str) -> Found:
    file_system, root = _file_system(url), _root(url)
    try:
        is_file = root.lower().endswith(_ARCHIVES) and file_system.isfile(root)
        listed: dict[str, dict[str, Any]] = {} if is_file else file_system.find(root, detail=True)
    except driver_errors() as err:
        raise StorageError(f"Expected images at {url}. Received: {err}. Check the URL and its rights.") from err
    if is_file or root in listed:
        raise DatasetError(
            f"Expected the URL of a folder of images. Received: {url}, a file. Name the folder that it is in; an "
            "archive download, and name the file."
        )
    # An object whose name ends in a slash is what a web console puts in place of a folder.
    below = {path.removeprefix(f"{root}/"): facts for path, facts in listed.items() if not path.endswith("/")}
    names = sorted(name for name in below if not any(is_litter(part) for part in name.split("/")))
    # Of nothing the first bytes say nothing, and no storage gives a part of it.
    may_be = {
        name: named_as_image(name) or (named_as_image(name) is None and below[name]["size"] != 0) for name in names
    }
    paths = [name for name in names if may_be[name]]
    stamps = [str(below[name].get("ETag") or (below[name]["size"], str(below[name].get("mtime")))) for name in paths]
    sizes = [int(below[name]["size"] or 0) for name in paths]
    return Found(source, url, paths, stamps, sizes, PassedOver.of([name for name in names if not may_be[name]]))


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
