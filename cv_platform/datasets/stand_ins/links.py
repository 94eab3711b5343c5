"""Images that a version leaves where they are: what DVC should not copy is named by it, and linked to at a check-out.

DVC tracks `images/linked-files.csv` in their place, a row per image: `path` in the version, `origin` below the folder
where they lie, `bytes`, `sha256`. So the data version is what the images are, wherever they lie; the folder itself is
in `linked.json` of the tag's commit. A check-out reads every file once and refuses one that is gone or has changed;
afterwards a change is seen by its size and time, and the files are read again.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path

from cv_platform.compute.progress import Progress
from cv_platform.cores import available_cores
from cv_platform.datasets.stand_ins.listing import read_rows, require_inside, write_rows
from cv_platform.errors import InvalidDatasetError
from cv_platform.files import file_sha256

LINKED_FILES = "linked-files.csv"
PLACE = "linked.json"
_COLUMNS = ("path", "origin", "bytes", "sha256")
_SHOWN = 5


@dataclass(frozen=True)
class _Link:
    path: str
    origin: str
    bytes: int
    sha256: str

    def problem(self, root: Path) -> str | None:
        """Returns what is wrong with the file below `root`; None: it is the one that was imported."""
        file = root / self.origin
        try:
            if file.stat().st_size != self.bytes or file_sha256(file) != self.sha256:
                return f"{file} (changed)"
        except FileNotFoundError:
            return f"{file} (gone)"
        except OSError as err:
            return f"{file} ({err.strerror})"
        return None


def write_links(images: Path, origins: Mapping[str, Path]) -> dict[str, bytes]:
    """Writes the list of files that are left in place into what DVC is to track, and returns what the commit needs.

    Args:
        images: the folder that DVC is to track.
        origins: the absolute path of each file, by its path in the version.

    Raises:
        OSError: a file cannot be read.
    """
    if not origins:
        return {}
    root = Path(os.path.commonpath([file.parent for file in origins.values()]))

    def link(path: str) -> _Link:
        file = origins[path]
        return _Link(path, file.relative_to(root).as_posix(), file.stat().st_size, file_sha256(file))

    links: list[_Link] = []
    with ThreadPoolExecutor(available_cores()) as pool, closing(Progress("Images hashed", len(origins))) as progress:
        for made in pool.map(link, sorted(origins)):
            links.append(made)
            progress.add(1)
    images.mkdir(parents=True, exist_ok=True)
    (images / LINKED_FILES).write_bytes(write_rows(_COLUMNS, map(astuple, links)))
    return {PLACE: json.dumps({"root": str(root)}).encode(errors="surrogateescape")}


def place_links(images: Path, place: bytes | None, *, version: str) -> None:
    """Makes links of the list in a check-out, if it has one, to files that are all as they were imported.

    Args:
        images: the folder that DVC has checked out.
        place: `linked.json` of the tag.
        version: for messages.

    Raises:
        InvalidDatasetError: files are gone, changed or cannot be read, or the list is damaged.
    """
    listing = images / LINKED_FILES
    if not listing.exists():
        return
    links, root = _read(listing, place, version)
    listing.unlink()
    with ThreadPoolExecutor(available_cores()) as pool:
        problems = [problem for problem in pool.map(lambda link: link.problem(root), links) if problem]
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise InvalidDatasetError(
            f"{version}: expected the {len(links)} files that it left in {root} as they were imported. Received: "
            f"{len(problems)} others: {', '.join(problems[:_SHOWN])}{more}. Put them back, or import the folder "
            "again with --link under a new tag; one that has moved is imported again from its new place."
        )
    for link in links:
        target = images / link.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(root / link.origin)


def _read(listing: Path, place: bytes | None, version: str) -> tuple[list[_Link], Path]:
    try:
        root = Path(json.loads(place or b"")["root"])
        rows = read_rows(listing.read_bytes(), _COLUMNS)
        links = [_Link(path, origin, int(size), sha256) for path, origin, size, sha256 in rows]
    except (ValueError, KeyError, TypeError, csv.Error) as err:
        raise InvalidDatasetError(
            f"{version}: expected {PLACE} and {LINKED_FILES} as the import writes them. Received: others ({err!r}). "
            "Import the folder again with --link under a new tag."
        ) from err
    paths = (path for link in links for path in (link.path, link.origin))
    require_inside(paths, listing=LINKED_FILES, version=version)
    return links, root
