"""A source's folders and files as they lie there, walked once: without litter, and with the images told by content.

What folders and names mean is `layouts`' business; whether an image is whole is found out when it is decoded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cv_platform import images
from cv_platform.compute import map_shards
from cv_platform.compute.engine import DECODING_BYTES, TASK_BYTES, Salvage, span
from cv_platform.compute.local import LocalEngine
from cv_platform.datasets.sources.entries import UNREADABLE
from cv_platform.datasets.sources.phone_photos import begins_as_phone_photo, decodes, is_phone_photo
from cv_platform.errors import ImageError, InvalidDatasetError
from cv_platform.files import is_of_the_file
from cv_platform.images.files import format_by_signature, is_litter, named_as_image, read_head

MAX_DEPTH = 64
_SHARD_FILES = 32


@dataclass(frozen=True, eq=False)
class Folder:
    """One folder as it lies there.

    Attributes:
        path: of the folder.
        files: names of its visible files.
        folders: its visible folders, by name.
        litter: names of what is litter, hidden or a device.
        broken: names of links that cannot be followed.
    """

    path: Path
    files: tuple[str, ...]
    folders: tuple[Folder, ...]
    litter: tuple[str, ...]
    broken: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.name

    @cached_property
    def images(self) -> tuple[str, ...]:
        """Names of the images directly in it: those whose suffix says so, or says nothing and their first bytes do."""
        return self._told[0]

    @property
    def unreadable(self) -> dict[str, str]:
        """Why files that only their first bytes would tell cannot be read, by name."""
        return self._told[1]

    @cached_property
    def _told(self) -> tuple[tuple[str, ...], dict[str, str]]:
        images: list[str] = []
        unreadable: dict[str, str] = {}
        for name in self.files:
            is_one = named_as_image(name)
            try:
                if is_one or (is_one is None and begins_as_image(read_head(f"{self.path}/{name}"))):
                    images.append(name)
            except OSError as err:
                unreadable[name] = _why_unreadable(err, self.path / name)
        return tuple(images), unreadable

    def below(self) -> Iterator[Folder]:
        """Yields the folder and all folders below it."""
        yield self
        for folder in self.folders:
            yield from folder.below()

    @cached_property
    def has_images(self) -> bool:
        """Tells whether there is an image at any depth."""
        return any(folder.images for folder in self.below())

    def inside(self, root: Folder) -> str:
        """Returns what the POSIX path, relative to `root`, of a file directly in it has before the file's name."""
        inside = self.path.relative_to(root.path).as_posix()
        return "" if inside == "." else f"{inside}/"

    def paths(self, root: Folder) -> Iterator[str]:
        """Yields the POSIX paths, relative to `root`, of all files in it, at any depth."""
        return (inside + name for f in self.below() for inside in (f.inside(root),) for name in f.files)

    def image_paths(self, root: Folder) -> Iterator[str]:
        """Yields those of the images."""
        return (inside + name for f in self.below() for inside in (f.inside(root),) for name in f.images)


def begins_as_image(head: bytes) -> bool:
    """Tells whether these are the first `HEAD_BYTES` of what is taken for an image, HEIC and AVIF included."""
    return format_by_signature(head) is not None or begins_as_phone_photo(head)


def walk(
    path: Path, *, unread: list[InvalidDatasetError] | None = None, _above: tuple[tuple[int, int], ...] = ()
) -> Folder:
    """Reads the tree below `path`; links are followed.

    Args:
        path: a folder.
        unread: takes what would be raised of folders below it, which are left out; None: it is raised.

    Raises:
        InvalidDatasetError: a folder cannot be read, is nested too deep, or leads back to one above it.
    """
    found: dict[str, list[str]] = {"files": [], "folders": [], "litter": [], "broken": []}
    try:
        status = path.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in _above or len(_above) > MAX_DEPTH:
            what = "a link back to a folder above it" if identity in _above else f"more than {MAX_DEPTH} levels"
            raise InvalidDatasetError(f"Expected a tree of folders. Received: {what} at {path}. Remove it.")
        with os.scandir(path) as items:
            for item in items:
                found["litter" if is_litter(item.name) else _kind(item)].append(item.name)
    except OSError as err:
        raise InvalidDatasetError(
            f"Expected a folder that can be read. Received: {path} ({err.strerror}). Correct its rights, or remove it."
        ) from err
    below: list[Folder] = []
    for name in sorted(found["folders"]):
        try:
            below.append(walk(path / name, unread=unread, _above=(*_above, identity)))
        except InvalidDatasetError as err:
            if unread is None:
                raise
            unread.append(err)
    return Folder(path, tuple(sorted(found["files"])), tuple(below), tuple(found["litter"]), tuple(found["broken"]))


def _kind(item: os.DirEntry[str]) -> str:
    try:
        if item.is_dir() or item.is_file():
            return "folders" if item.is_dir() else "files"
    except OSError:  # A link in a circle, or into a folder without rights.
        return "broken"
    return "litter" if os.path.exists(item.path) else "broken"  # noqa: PTH110 -- A device, or a link to nowhere.


def _why_unreadable(err: OSError, path: Path) -> str:
    """Returns the reason to leave a file out.

    Raises:
        InvalidDatasetError: the error says nothing about the file.
    """
    if not is_of_the_file(err):
        raise InvalidDatasetError(
            f"Expected files that can be read. Received: {path} ({err.strerror}). Look at the disk, or the share."
        ) from err
    return f"{UNREADABLE} ({err.strerror})"


@dataclass(frozen=True)
class FileShard:
    """Some files below a folder: a shard of those that are looked at."""

    root: Path
    paths: tuple[str, ...]

    @property
    def name(self) -> str:
        """Returns its first and its last path, for the log."""
        return span(self.paths[0], self.paths[-1])

    @property
    def images(self) -> int:
        """Returns how many files it has."""
        return len(self.paths)


def images_among(root: Path, paths: Sequence[str]) -> tuple[set[str], dict[str, str]]:
    """Returns those files below `root` that are images, see `is_image`, by processes of this machine.

    A HEIC or AVIF whose decoding ends its process is none. Besides, why files cannot be read, by path.

    Raises:
        InvalidDatasetError: none can be, for now.
    """
    salvage: Salvage[FileShard, list[bool | str]] = Salvage(
        divide=lambda shard: (FileShard(root, (path,)) for path in shard.paths),
        join=lambda parts: [one for part in parts for one in part],
        lost=lambda shard, why: [False],
    )
    photos = [path for path in paths if _is_readable_photo(root / path)]
    others = sorted(set(paths).difference(photos))
    found: set[str] = set()
    unreadable: dict[str, str] = {}
    # A photograph that ends the process which decodes it must never be decoded by this one.
    ways = (others, LocalEngine(), DECODING_BYTES), (photos, LocalEngine(worth_seconds=0), TASK_BYTES)
    for chosen, engine, task_bytes in ways:
        starts = range(0, len(chosen), _SHARD_FILES)
        shards = (FileShard(root, tuple(chosen[start : start + _SHARD_FILES])) for start in starts)
        for shard, told in map_shards(
            are_images,
            shards,
            engine=engine,
            title="Images looked at",
            total=len(chosen),
            salvage=salvage,
            task_bytes=task_bytes,
        ):
            found.update(path for path, is_one in zip(shard.paths, told, strict=True) if is_one is True)
            unreadable.update((path, why) for path, why in zip(shard.paths, told, strict=True) if isinstance(why, str))
    return found, unreadable


def are_images(files: FileShard) -> list[bool | str]:
    """Returns `is_image` of each file, or why it cannot be read.

    Raises:
        InvalidDatasetError: none can be, for now.
    """
    told: list[bool | str] = []
    for path in files.paths:
        try:
            told.append(is_image(files.root / path))
        except OSError as err:
            told.append(_why_unreadable(err, files.root / path))
    return told


def _is_readable_photo(path: Path) -> bool:
    try:
        return is_phone_photo(path)
    except OSError:
        return False


def is_image(path: Path) -> bool:
    """Tells by the whole file's content whether it is, or was, an image of a supported format, or becomes one."""
    if is_phone_photo(path):
        return decodes(path)
    try:
        data = path.read_bytes()
        if format_by_signature(data) is None:
            images.read_size(data)
    except ImageError:
        return False
    return True
