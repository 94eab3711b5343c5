"""What an import is about to store, gathered in one folder: copied, moved, converted, in tars, or left where it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cv_platform.compute import map_shards
from cv_platform.compute.engine import Salvage, span
from cv_platform.compute.local import LocalEngine
from cv_platform.compute.progress import watched
from cv_platform.datasets.sources.entries import ImageEntry
from cv_platform.datasets.sources.phone_photos import GROWTH, to_jpeg
from cv_platform.datasets.stand_ins.links import write_links
from cv_platform.datasets.stand_ins.tars import write_tars
from cv_platform.errors import InvalidDatasetError
from cv_platform.files import require_free_space

_SHARD_PHOTOS = 16
Traits = dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Staging:
    """Brings the images found in `root` below `images`; those that an interrupted import has brought are there already.

    Attributes:
        root: the source.
        images: what is to be stored.
        converted: paths in `root` of those that become JPEG.
        is_ours: whether `root` is what was unpacked here, so that no copy is needed.
        stays: whether the images are to be left in `root`.
        is_tarred: whether they are so many that they become tars.
    """

    root: Path
    images: Path
    converted: frozenset[str]
    is_ours: bool
    stays: bool = False
    is_tarred: bool = False

    def fill(self, found: tuple[ImageEntry, ...], named: tuple[ImageEntry, ...]) -> dict[str, bytes]:
        """Brings each to its name, and returns what the version's commit needs beside the labels.

        Raises:
            InvalidDatasetError: one cannot be read, or ends each process that converts it.
            DiskSpaceError: there is no room for a copy.
        """
        pairs = list(zip((origin.path for origin in found), (entry.path for entry in named), strict=True))
        try:
            if self.stays:
                return write_links(self.images, {name: self.root / path for path, name in pairs})
            folder = self.images.with_name("converted") if self.is_tarred else self.images
            own = {name: folder / name for path, name in pairs if not self.is_tarred or path in self.converted}
            self._bring_all([(path, own[name]) for path, name in pairs if name in own])
            if self.is_tarred:
                write_tars(self.images, {name: own.get(name, self.root / path) for path, name in pairs})
        except OSError as err:
            raise InvalidDatasetError(
                f"Cannot read the images of {self.root}: {err}. Check their rights and the disk."
            ) from err
        return {}

    def _bring_all(self, pairs: list[tuple[str, Path]]) -> None:
        todo = [(path, target) for path, target in pairs if not self._is_there(path, target)]
        copied = [path for path, _ in todo if not self.is_ours or path in self.converted]
        growth = {path: GROWTH if path in self.converted else 1 for path in copied}
        needed = sum((self.root / path).stat().st_size * times for path, times in growth.items())
        require_free_space(self.images.parent, needed, purpose=f"a copy of {self.root}")
        for path, target in watched([pair for pair in todo if pair[0] not in self.converted], "Images copied"):
            self._bring(path, target)
        self._convert([pair for pair in todo if pair[0] in self.converted])

    def _is_there(self, path: str, target: Path) -> bool:
        """Tells whether an interrupted import of the same, unchanged files has brought one: it has its name last."""
        if not target.exists():
            return False
        return path in self.converted or target.stat().st_size == (self.root / path).stat().st_size

    def _bring(self, path: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = self.images.with_name("partial")
        partial.unlink(missing_ok=True)
        if self.is_ours:
            try:
                os.link(self.root / path, partial)
            except OSError:  # The file system has no hard links.
                shutil.copyfile(self.root / path, partial)
        else:
            # Never a hard link: what happens to a stored file must not reach the source.
            shutil.copyfile(self.root / path, partial)
        partial.replace(target)

    def _convert(self, pairs: list[tuple[str, Path]]) -> None:
        """Converts photographs by processes of this machine: one that ends its process does not end the import's."""
        starts, total = range(0, len(pairs), _SHARD_PHOTOS), len(pairs)
        photos = PhotoShard(self.root, self.images, tuple(pairs))
        shards = (replace(photos, pairs=photos.pairs[start : start + _SHARD_PHOTOS]) for start in starts)
        salvage: Salvage[PhotoShard, None] = Salvage(
            divide=lambda shard: (replace(shard, pairs=(pair,)) for pair in shard.pairs),
            join=lambda _: None,
            lost=_refuse,
        )
        for _ in map_shards(
            convert,
            shards,
            engine=LocalEngine(worth_seconds=0),
            title="Images converted",
            total=total,
            salvage=salvage,
        ):
            pass


@dataclass(frozen=True)
class PhotoShard:
    """Some photographs in HEIC or AVIF, and the JPEGs that they are to be: a shard.

    Attributes:
        root: of their paths.
        beside: the folder beside which unfinished files lie, as all below it are stored.
        pairs: the path of each, and its JPEG.
    """

    root: Path
    beside: Path
    pairs: tuple[tuple[str, Path], ...]

    @property
    def name(self) -> str:
        """Returns its first and its last photograph, for the log."""
        return span(self.pairs[0][0], self.pairs[-1][0])

    @property
    def images(self) -> int:
        """Returns how many photographs it has."""
        return len(self.pairs)


def convert(photos: PhotoShard) -> None:
    """Makes the JPEGs; each gets its name when it is whole.

    Raises:
        InvalidDatasetError: one does not decode any more.
        OSError: one cannot be written.
    """
    partial = photos.beside.with_name(f"partial-{os.getpid()}")
    for path, target in photos.pairs:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not to_jpeg(photos.root / path, partial):
            raise InvalidDatasetError(f"Expected {path} as it was a moment ago. Received: damaged. Import again.")
        partial.replace(target)


def _refuse(photo: PhotoShard, why: str) -> None:
    raise InvalidDatasetError(
        f"Expected {photo.name} to become a JPEG. Received: it {why}. Remove it, or give the machine more memory; then "
        "import again."
    )


def filled_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Returns `folder` with what `fill` wrote into it, now or in an import that was interrupted later."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}-partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        fill(partial)
        partial.rename(folder)
    return folder
