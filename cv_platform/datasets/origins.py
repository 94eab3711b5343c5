"""The files of a check-out for who works on them: by path where it is seen, else by URL from central storage.

Imports little, as each process that works on shards does it anew. How files come there is `publishing`'s part.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cv_platform.compute.sight import Proof
from cv_platform.errors import InvalidDatasetError, StorageError

if TYPE_CHECKING:
    from cv_platform.object_store import ObjectStore

_AT_ONCE = 32
"""Objects, or parts of tars, that are asked for together."""
_MOST_BYTES = 16 * 2**20
"""Of what is read together, but for one file that is larger."""
_GAP_BYTES = 4096
"""Between two images of a tar that are read in one go: its headers take 1,024, of long names some more."""


class Place(NamedTuple):
    """Where central storage has a file: an object, or from `start` to `end` of one.

    Attributes:
        object: its path below `Stored.url`.
        digest: md5 of an object, sha256 of a part of one; empty: nobody has noted it.
        start: of the part, in bytes; None: the file is the whole object.
        end: behind the part.
        size: of a whole object, in bytes; 0: nobody has noted it.
    """

    object: str
    digest: bytes
    start: int | None = None
    end: int | None = None
    size: int = 0


@dataclass(frozen=True)
class Stored:
    """Where central storage has some files of a check-out, for who does not see that.

    Attributes:
        url: of the folder of the objects.
        proof: tells who sees the check-out.
        places: of the files.
    """

    url: str
    proof: Proof
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Files:
    """Some files of a check-out, whose bytes it gives in order; pickle takes it.

    Attributes:
        directory: of the check-out, where who gives out the work has it.
        paths: POSIX, relative to it.
        stored: where else they are; None: whoever works on them sees the check-out.

    Raises:
        InvalidDatasetError: (while they are read) one is not there, or central storage has another one in its place.
        StorageError: (while they are read) the check-out is away, or central storage cannot be reached.
    """

    directory: Path
    paths: tuple[str, ...]
    stored: Stored | None = None

    def __iter__(self) -> Iterator[bytes]:
        if self.stored is not None and not self.stored.proof.holds():
            yield from self._by_url(self.stored)
            return
        try:
            for path in self.paths:
                # Not by a `Path`, whose making takes longer than the reading of a small file.
                with open(f"{self.directory}/{path}", "rb", buffering=0) as file:  # noqa: PTH123
                    data = file.readall()
                yield data
        except (FileNotFoundError, NotADirectoryError, PermissionError) as err:
            if os.path.isdir(self.directory):  # noqa: PTH112 -- A `Path` raises where its parents may not be seen.
                raise InvalidDatasetError(
                    "Expected the images of the dataset as they were listed. "
                    f"Received: {err}. Materialise the dataset again."
                ) from err
            raise StorageError(
                f"Expected the dataset's images in {self.directory}. Received: no such folder. Mount it, if it is "
                "away; else materialise the dataset again."
            ) from err
        except OSError as err:
            raise StorageError(f"Cannot read images of the dataset: {err}. Look at the disk, or the share.") from err

    def only(self, at: int) -> Files:
        """Returns one of them."""
        stored = self.stored and replace(self.stored, places=self.stored.places[at : at + 1])
        return Files(self.directory, self.paths[at : at + 1], stored)

    def described(self, sha256: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Yields path and bytes of each file, which has to be the one that the manifest describes.

        Raises:
            InvalidDatasetError: it has another sha256; see also the class.
        """
        for path, expected, data in zip(self.paths, sha256, self, strict=True):
            if hashlib.sha256(data).hexdigest() != expected:
                raise InvalidDatasetError(
                    f"Expected {path} in {self.directory} as the manifest describes it. Received: other bytes. "
                    "Materialise the dataset again."
                )
            yield path, data

    def _by_url(self, stored: Stored) -> Iterator[bytes]:
        store, paths = _store(stored.url), iter(self.paths)
        for runs in read_together(stored.places):
            wanted = [(store.path(*run[0].object.split("/")), run[0].start, run[-1].end) for run in runs]
            with store.errors("read images of the dataset"):
                contents = store.read_parts(wanted)
            for run, content in zip(runs, contents, strict=True):
                for place in run:
                    first = run[0].start or 0
                    data = content if place.start is None else content[place.start - first : (place.end or 0) - first]
                    path, digest = next(paths), hashlib.md5 if place.start is None else hashlib.sha256
                    if place.digest and digest(data).digest() != place.digest:
                        raise InvalidDatasetError(
                            f"Expected {path} in {store.url}/{place.object} as it was sent there. Received: other "
                            "bytes. Remove that file there, and materialise again: it is sent anew."
                        )
                    yield data


@dataclass(frozen=True)
class Origin:
    """A check-out, for who gives its files to others.

    Attributes:
        directory: of the check-out.
        find: returns where else files are, by their paths; None: whoever works on them sees the check-out.
    """

    directory: Path
    find: Callable[[Sequence[str]], Stored] | None = None

    def files(self, paths: Sequence[str]) -> Files:
        """Returns files by their paths, POSIX and relative to the check-out."""
        return Files(self.directory, tuple(paths), self.find and self.find(paths))


def read_together(places: Sequence[Place]) -> Iterator[list[list[Place]]]:
    """Yields the runs that are read at a time, each of files that lie one behind the other in a tar, or of one file."""
    runs, size, last = list[list[Place]](), 0, Place("", b"")
    for place in places:
        length = place.size if place.start is None or place.end is None else place.end - place.start
        if runs and (len(runs) == _AT_ONCE or size + length > _MOST_BYTES):
            yield runs
            runs, size, last = [], 0, Place("", b"")
        if place.start is not None and place.object == last.object and 0 <= place.start - (last.end or 0) < _GAP_BYTES:
            runs[-1].append(place)
        else:
            runs.append([place])
        size, last = size + length, place
    if runs:
        yield runs


@functools.lru_cache(maxsize=2)
def _store(url: str) -> ObjectStore:
    from cv_platform.object_store import ObjectStore  # Who sees the check-out has no need of fsspec.

    return ObjectStore(url)
