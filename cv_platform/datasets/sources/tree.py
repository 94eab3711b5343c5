"""A source's folders and files as they lie there, walked once: without litter, and with the images told by content.

What folders and names mean is `layouts`' business; whether an image is whole is found out when it is decoded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from pathlib import Path

from cv_platform import images
from cv_platform.compute import map_shards
from cv_platform.compute.engine import DECODING_BYTES, TASK_BYTES, Salvage, span
from cv_platform.compute.local import LocalEngine
from cv_platform.datasets.sources.phone_photos import decodes, is_phone_photo
from cv_platform.errors import ImageError, InvalidDatasetError
from cv_platform.images.files import format_by_signature, is_litter, seems_image

MAX_DEPTH = 64
_SHARD_FILES = 32


@dataclass(frozen=True, eq=False)
class Folder:
    """One folder: its visible files and folders by name; and what in it is litter, a broken link or a device."""

    path: Path
    files: tuple[str, ...]
    folders: tuple[Folder, ...]
    litter: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.name

    @cached_property
    def images(self) -> tuple[str, ...]:
        """Names of the images directly in it."""
        try:
            return tuple(
                name for name in self.files if seems_image(f"{self.path}/{name}") or is_phone_photo(self.path / name)
            )
        except OSError as err:
            raise InvalidDatasetError(
                f"Expected files that can be read. Received: {err.filename} ({err.strerror}). Correct its rights, or "
                "remove it."
            ) from err

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


def walk(path: Path, _above: tuple[tuple[int, int], ...] = ()) -> Folder:
    """Reads the tree below `path`; links are followed.

    Raises:
        InvalidDatasetError: a folder cannot be read, is nested too deep, or leads back to one above it.
    """
    files: list[str] = []
    folders: list[Path] = []
    litter: list[str] = []
    try:
        status = path.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in _above or len(_above) > MAX_DEPTH:
            what = "a link back to a folder above it" if identity in _above else f"more than {MAX_DEPTH} levels"
            raise InvalidDatasetError(f"Expected a tree of folders. Received: {what} at {path}. Remove it.")
        with os.scandir(path) as found:
            for item in found:
                if is_litter(item.name) or not (item.is_dir() or item.is_file()):
                    litter.append(item.name)
                elif item.is_dir():
                    folders.append(Path(item.path))
                else:
                    files.append(item.name)
    except OSError as err:
        raise InvalidDatasetError(
            f"Expected a folder that can be read. Received: {path} ({err.strerror}). Correct its rights, or remove it."
        ) from err
    below = tuple(walk(folder, (*_above, identity)) for folder in sorted(folders))
    return Folder(path, tuple(sorted(files)), below, tuple(litter))


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


def images_among(root: Path, paths: Sequence[str]) -> set[str]:
    """Returns those files below `root` that are images, see `is_image`, by processes of this machine.

    A HEIC or AVIF whose decoding ends its process is none.

    Raises:
        OSError: one cannot be read.
    """
    salvage: Salvage[FileShard, list[bool]] = Salvage(
        divide=lambda shard: (FileShard(root, (path,)) for path in shard.paths),
        join=lambda parts: [one for part in parts for one in part],
        lost=lambda shard, why: [False],
    )
    photos = [path for path in paths if is_phone_photo(root / path)]
    others = sorted(set(paths).difference(photos))
    found: set[str] = set()
    # A photograph that ends the process which decodes it must never be decoded by this one.
    ways = (others, LocalEngine(), DECODING_BYTES), (photos, LocalEngine(worth_seconds=0), TASK_BYTES)
    for chosen, engine, task_bytes in ways:
        starts = range(0, len(chosen), _SHARD_FILES)
        shards = (FileShard(root, tuple(chosen[start : start + _SHARD_FILES])) for start in starts)
        for shard, is_one in map_shards(
            are_images,
            shards,
            engine=engine,
            title="Images looked at",
            total=len(chosen),
            salvage=salvage,
            task_bytes=task_bytes,
        ):
            found.update(compress(shard.paths, is_one))
    return found


def are_images(files: FileShard) -> list[bool]:
    """Returns `is_image` of each file."""
    return [is_image(files.root / path) for path in files.paths]


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
