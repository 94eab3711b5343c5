"""Very many images as few files: tars of up to 10,000 of them, each with an index.

DVC, its remotes and their file systems take their time for every file, and list each of them in every version. Where a
dataset's version has more than `tars_above` images, DVC tracks `images/tarred-images/<name>.tar` in their place, an
ordinary tar of images by their paths in the version, and `<name>.csv`, its index: a row per image with `path`, where
its bytes are (`offset`, `bytes`), and their `sha256`.

A tar's bytes follow from its images' paths and bytes, and which images it has from all paths of the version. So the
same images are the same tars, whoever imports them, and a version shares with the next one nearly all tars between
whose first and last path nothing has changed.

A check-out takes the images out of the tars, each of which is compared with its sha256. Those of a tar that another
check-out of the dataset has are linked to it: versions share them on the disk.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import os
import tarfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path

from cv_platform.compute.progress import watched
from cv_platform.cores import available_cores
from cv_platform.datasets.repository import read_newest_file
from cv_platform.datasets.stand_ins.listing import read_rows, require_inside, write_rows
from cv_platform.errors import InvalidDatasetError
from cv_platform.files import file_sha256, require_free_space

TARS = "tarred-images"
RULE = "tars.json"
TAR_ABOVE = 50_000
"""Images of a version that is still stored as files, unless its dataset says otherwise."""
MOST_IMAGES = 10_000
"""Of a tar; it has at least half as many, unless it is the last one."""
_COLUMNS = ("path", "offset", "bytes", "sha256")


@dataclass(frozen=True)
class TarredImage:
    """A row of a tar's index: an image's path in the version, and where its bytes are."""

    path: str
    offset: int
    bytes: int
    sha256: str

    def link(self, origin: Path, target: Path) -> bool:
        """Makes `target` another name of `origin`, if that is the image, and tells whether it did."""
        try:
            if file_sha256(origin) == self.sha256:
                os.link(origin, target)
                return True
        except OSError:  # It is gone, or the file system has no hard links.
            pass
        return False


def tars_above(repository: Path) -> int:
    """Returns with how many images a version of a dataset is still stored as files; the repository may not be there.

    Raises:
        InvalidDatasetError: what the repository says of it is no number.
        DatasetError: git failed.
    """
    rule = read_newest_file(repository, RULE) if (repository / ".git").exists() else None
    if rule is None:
        return TAR_ABOVE
    try:
        return int(json.loads(rule)["above"])
    except (ValueError, KeyError, TypeError) as err:
        raise InvalidDatasetError(
            f'{repository}: expected {RULE} such as {{"above": 50000}}. Received: {rule[:100]!r}. Import a version '
            "with --tar-above."
        ) from err


def write_rule(above: int) -> dict[str, bytes]:
    """Returns the file that a version's commit needs for `tars_above` to know it from then on."""
    return {RULE: json.dumps({"above": above}).encode()}


def write_tars(images: Path, files: Mapping[str, Path]) -> None:
    """Writes images as tars into the folder that DVC is to track; those that a killed call has written are kept.

    Args:
        images: the folder.
        files: each image by its path in the version; the same ones in each call for one folder.

    Raises:
        OSError: one cannot be read, or written.
        DiskSpaceError: there is no room for them.
    """
    folder = images / TARS
    folder.mkdir(parents=True, exist_ok=True)
    missing = [run for run in _runs(sorted(files)) if not _is_written(_index(folder, run))]
    needed = sum(files[path].stat().st_size for run in missing for path in run)
    require_free_space(images.parent, needed, purpose=f"tars of {len(files):,} images")
    paths = watched([path for run in missing for path in run], "Images put into tars")
    partial = images.with_name("partial")  # DVC is not to see a half one.
    for run in missing:
        index = _index(folder, run)
        rows = _write_tar(partial, islice(paths, len(run)), files)
        partial.replace(index.with_suffix(".tar"))
        partial.write_bytes(write_rows(_COLUMNS, map(astuple, rows)))
        partial.replace(index)


def place_tars(images: Path, *, version: str) -> None:
    """Puts the images of tars in their place, if the check-out has any; the indexes stay beside the images.

    Args:
        images: the folder that DVC has checked out, all files with their md5; its check-out lies beside others of the
            dataset.
        version: for messages.

    Raises:
        InvalidDatasetError: an index or a tar does not fit the other.
        DiskSpaceError: there is no room for the images.
    """
    if not (images / TARS).is_dir():
        return
    indexes = (images / TARS).rename(images.parent / TARS)
    with ThreadPoolExecutor(available_cores()) as pool:
        list(pool.map(lambda index: _take_out(index, images, version), sorted(indexes.glob("*.csv"))))


class TarIndexes:
    """Which tar of a check-out has had an image, and where; the rows of few tars are in memory at a time.

    Args:
        directory: of the check-out.
        version: for messages.

    Raises:
        InvalidDatasetError: (when it is searched) an index is not as the import writes it.
    """

    def __init__(self, directory: Path, *, version: str) -> None:
        self._version = version
        self._indexes = sorted((_first_path(index), index) for index in (directory / TARS).glob("*.csv"))
        self._rows = functools.lru_cache(maxsize=2)(self._read)

    def find(self, path: str) -> tuple[str, TarredImage] | None:
        """Returns the tar's path in the version, and the image's row; None: it is in no tar."""
        if (at := bisect_right(self._indexes, path, key=itemgetter(0))) == 0:
            return None
        index = self._indexes[at - 1][1]
        row = self._rows(index).get(path)
        return row and (f"{TARS}/{index.with_suffix('.tar').name}", row)

    def _read(self, index: Path) -> dict[str, TarredImage]:
        return {row.path: row for row in _read(index.read_bytes(), f"{TARS}/{index.name}", self._version)}


def _first_path(index: Path) -> str:
    with index.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return next((row[0] for row in islice(csv.reader(file), 1, 2)), "")


def _runs(paths: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cuts sorted paths where the next one has the least hash of those that may be the first of the next tar.

    So the cut stays where it is when paths before or after it come and go, which a cut after each 10,000 does not.
    """
    start = 0
    while len(paths) - start > MOST_IMAGES:
        places = range(start + max(1, MOST_IMAGES // 2), start + MOST_IMAGES + 1)
        end = min(places, key=lambda place: _digest(paths[place]))
        yield paths[start:end]
        start = end
    if paths:
        yield paths[start:]


def _digest(path: str) -> str:
    return hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest()


def _index(folder: Path, run: Sequence[str]) -> Path:
    """Returns the place of a tar's index, which is called by its first image."""
    return folder / f"{_digest(run[0])[:16]}.csv"


def _is_written(index: Path) -> bool:
    return index.exists() and index.with_suffix(".tar").exists()


def _write_tar(target: Path, paths: Iterable[str], files: Mapping[str, Path]) -> list[TarredImage]:
    rows: list[TarredImage] = []
    # Of what a header may have beside path and size nothing is set: no time, no owner.
    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as tar:
        for path in paths:
            data = files[path].read_bytes()
            header = tarfile.TarInfo(path)
            header.size, header.mode = len(data), 0o444
            tar.addfile(header, io.BytesIO(data))
            padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            rows.append(TarredImage(path, tar.offset - padded, len(data), hashlib.sha256(data).hexdigest()))
    return rows


def _take_out(index: Path, images: Path, version: str) -> None:
    content, tar = index.read_bytes(), index.with_suffix(".tar")
    rows = _read(content, f"{TARS}/{index.name}", version)
    same = [other for other in images.parents[1].glob(f"[!.]*/{TARS}/{index.name}") if other.read_bytes() == content]
    if not same:
        require_free_space(images, sum(row.bytes for row in rows), purpose=f"the images of {tar.name}")
    try:
        with tar.open("rb") as file:
            for row in rows:
                target = images / row.path
                target.parent.mkdir(parents=True, exist_ok=True)
                if any(row.link(other.parents[1] / images.name / row.path, target) for other in same):
                    continue
                file.seek(row.offset)
                data = file.read(row.bytes)
                if hashlib.sha256(data).hexdigest() != row.sha256:
                    raise _misfit(tar, version, f"other bytes of {row.path}")
                with target.open("xb") as whole:  # What has the name already may be a file of another check-out.
                    whole.write(data)
    except (FileNotFoundError, FileExistsError) as err:
        raise _misfit(tar, version, f"{err.strerror}: {err.filename}") from err
    tar.unlink()


def _read(content: bytes, name: str, version: str) -> list[TarredImage]:
    try:
        rows = [TarredImage(path, int(at), int(size), sha) for path, at, size, sha in read_rows(content, _COLUMNS)]
    except (ValueError, csv.Error) as err:
        raise InvalidDatasetError(
            f"{version}: expected {name} as the import writes it. Received: {err}. Import the images again."
        ) from err
    require_inside((row.path for row in rows), listing=name, version=version)
    return rows


def _misfit(tar: Path, version: str, received: str) -> InvalidDatasetError:
    return InvalidDatasetError(
        f"{version}: expected {TARS}/{tar.name} to hold what its index says. Received: {received}. Import the images "
        "again, under a new tag."
    )
