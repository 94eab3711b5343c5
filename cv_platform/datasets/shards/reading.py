"""Reads shards as one array of images, and knows which of a pack's files were verified already."""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from cv_platform.files import file_sha256, write_file
from cv_platform.images import resize

VERIFIED = "verified.json"


class ShardedImages:
    """The images of a split, `(N, H, W, 3)` uint8 RGB, read from its shards as they are asked for.

    It can be indexed as an array by a number, a slice or an array of rows; what comes back is one, and read-only where
    it is a view.

    Args:
        files: the shards, in order.
        counts: images of each.
        shape: (H, W, 3) of one image.
        sizes: bytes of each image in JPEG shards; None: the shards are uint8.
        seen_as: (height, width) that larger images are resized to as they are read; None: they are read as they are.
        reopened: what another process opens them by, a function of a module and its argument; None: by the same files.

    Raises:
        OSError, ValueError: a shard is missing or of another size.
    """

    ndim = 4
    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        files: Sequence[Path],
        counts: Sequence[int],
        shape: tuple[int, int, int],
        sizes: NDArray[np.int64] | None = None,
        *,
        seen_as: tuple[int, int] | None = None,
        reopened: tuple[Callable[[Any], Images], Any] | None = None,
    ) -> None:
        self._by_files = partial(ShardedImages, files, counts, shape, sizes, seen_as=seen_as)
        self._reopened = reopened
        self.shape = (sum(counts), *(seen_as or shape[:2]), shape[2])
        self._stored_shape = shape
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._shards = [
            _RawShard(file, (count, *shape))
            if sizes is None
            else _JpegShard(file, shape, sizes[self._starts[at] : self._starts[at + 1]])
            for at, (file, count) in enumerate(zip(files, counts, strict=True))
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns what another process opens the images by."""
        if self._reopened is None:
            return self._by_files, ()
        function, argument = self._reopened
        return function, (argument,)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> NDArray[np.uint8]:
        if isinstance(key, int | np.integer):
            if not -len(self) <= key < len(self):
                raise IndexError(f"Expected a row of {len(self)}. Received: {key}.")
            return self._rows(np.array([key % len(self)]))[0]
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            at = int(np.searchsorted(self._starts, start, side="right")) - 1
            if step == 1 and start < stop <= self._starts[at + 1]:
                return self._seen(self._shards[at].slice(start - self._starts[at], stop - self._starts[at]))
        return self._rows(np.arange(len(self))[key])

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        return (self[row] for row in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def views(self, rows: NDArray[np.integer]) -> list[NDArray[np.uint8]]:
        """Returns images as `views` does."""
        if self.shape[1:] != self._stored_shape or isinstance(self._shards[0], _JpegShard):
            return list(self._rows(rows))
        of_row = np.searchsorted(self._starts, rows, side="right") - 1
        within = rows - self._starts[of_row]
        return [
            self._shards[at].slice(row, row + 1)[0] for at, row in zip(of_row.tolist(), within.tolist(), strict=True)
        ]

    def _rows(self, rows: NDArray[np.integer]) -> NDArray[np.uint8]:
        of_row = np.searchsorted(self._starts, rows, side="right") - 1
        shards = np.unique(of_row)
        if len(shards) == 1:
            return self._seen(self._shards[shards[0]].rows(rows - self._starts[shards[0]]))
        images = np.empty((len(rows), *self._stored_shape), np.uint8)
        for at in shards:
            chosen = of_row == at
            images[chosen] = self._shards[at].rows(rows[chosen] - self._starts[at])
        return self._seen(images)

    def _seen(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        size = self.shape[1], self.shape[2]
        return images if size == self._stored_shape[:2] else np.stack([resize(image, size) for image in images])


Images: TypeAlias = np.ndarray | ShardedImages
"""`(N, H, W, 3)` uint8 RGB, in memory or in shards."""


def views(images: Images, rows: NDArray[np.integer]) -> list[NDArray[np.uint8]]:
    """Returns images one by one, `(H, W, 3)`, without a copy of their pixels where they are stored as they are."""
    if isinstance(images, ShardedImages):
        return images.views(rows)
    stored = np.asarray(images)  # Views of a memory map cost more each.
    return [stored[row] for row in rows.tolist()]


class _RawShard:
    def __init__(self, file: Path, shape: tuple[int, ...]) -> None:
        if (size := file.stat().st_size) != np.prod(shape):
            raise ValueError(f"{file.name} has {size} bytes, {np.prod(shape)} were written")
        self._images = np.asarray(np.memmap(file, np.uint8, mode="r", shape=shape))

    def slice(self, start: int, stop: int) -> NDArray[np.uint8]:
        return self._images[start:stop]

    def rows(self, rows: NDArray[np.integer]) -> NDArray[np.uint8]:
        return self._images[rows]


class _JpegShard:
    def __init__(self, file: Path, shape: tuple[int, int, int], sizes: NDArray[np.int64]) -> None:
        self._shape, self._ends = shape, np.cumsum(sizes)
        with file.open("rb") as opened:
            self._data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self._data) != self._ends[-1]:
            raise ValueError(f"{file.name} has {len(self._data)} bytes, {self._ends[-1]} were written")

    def slice(self, start: int, stop: int) -> NDArray[np.uint8]:
        return self.rows(np.arange(start, stop))

    def rows(self, rows: NDArray[np.integer]) -> NDArray[np.uint8]:
        images = np.empty((len(rows), *self._shape), np.uint8)
        for image, row in zip(images, rows, strict=True):
            start = self._ends[row - 1] if row else 0
            simplejpeg.decode_jpeg(self._data[start : self._ends[row]], "RGB", buffer=image)
        return images


def find_damage(directory: Path, files: Mapping[str, Sequence[Any]]) -> str | None:
    """Returns the name of a file that is not the one that was written, or None.

    A file is hashed when it is first used, and again after it changed: its size, time or inode.

    Args:
        directory: of the pack.
        files: size and sha256 of each, by name.

    Raises:
        OSError: a file is missing or cannot be read.
    """
    verified: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        verified = dict(json.loads((directory / VERIFIED).read_bytes()))
    found = {name: _traits(directory / name) for name in files}
    unknown = [name for name in files if verified.get(name) != found[name]]
    for name in unknown:
        size, sha256 = files[name]
        if found[name][0] != size or file_sha256(directory / name) != sha256:
            return name
    if unknown:
        _note(directory, verified | found)
    return None


def note_verified(directory: Path, files: Iterable[str]) -> None:
    """Notes that the files of a pack are those that were written, as they are now."""
    _note(directory, {name: _traits(directory / name) for name in files})


def _note(directory: Path, traits: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # Of another user, say: then they are hashed again next time.
        write_file(directory / VERIFIED, json.dumps(traits))


def _traits(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]
