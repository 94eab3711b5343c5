"""A version made from another one: it keeps, moves, leaves out and adds images, and changes no pixel."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cv_platform.datasets.importing import store_version
from cv_platform.datasets.repository import DATA_FOLDER, StoredVersion
from cv_platform.datasets.sources.entries import ImageEntry, Layout
from cv_platform.datasets.sources.layouts import write_annotations
from cv_platform.datasets.stand_ins.links import write_links
from cv_platform.datasets.stand_ins.tars import tars_above, write_tars
from cv_platform.errors import InvalidDatasetError
from cv_platform.files import exclusive, scratch_directory


@dataclass(frozen=True)
class SuccessorImage:
    """An image of the new version: the file of a checkout that it comes from, and where and as what it is stored.

    One that the version before has left in place stays there: see `stand_ins.links`.
    """

    file: Path
    entry: ImageEntry


def store_successor(
    repository: Path,
    tag: str,
    images: Iterable[SuccessorImage],
    message: str,
    *,
    before: Layout,
    beside: Mapping[str, bytes],
) -> StoredVersion:
    """Adds a version of these images to a repository, with labels where the version before had them.

    Args:
        repository: of the dataset.
        tag: of the new version; the same content under the same tag changes nothing.
        images: all of it.
        message: of the commit.
        before: the version that it is made from.
        beside: more files of the commit, by path.

    Raises:
        InvalidDatasetError: a class would have no images any more, or the tag has other content.
        DatasetError: git or DVC fails.
    """
    images = tuple(images)
    left = {name for image in images for name in image.entry.labels}
    if emptied := sorted({name for entry in before.entries for name in entry.labels} - left):
        raise InvalidDatasetError(
            f"Expected images of every class in the new version. Received: none left of {', '.join(emptied)}. "
            "Keep some, or import the dataset without that class."
        )
    with (
        exclusive(repository.parent / f".{repository.name}.lock"),
        scratch_directory(repository.parent, repository.name) as scratch,
    ):
        own = {image.entry.path: image.file for image in images if not image.file.is_symlink()}
        if len(own) > tars_above(repository):
            write_tars(scratch / DATA_FOLDER, own)
        else:
            for path, file in own.items():
                _link(file, scratch / DATA_FOLDER / path)
        left_in_place = {image.entry.path: image.file.readlink() for image in images if image.file.is_symlink()}
        beside = {**beside, **write_links(scratch / DATA_FOLDER, left_in_place)}
        annotations = None
        if before.labels_from != "folders":
            annotations = write_annotations(image.entry for image in images)
        return store_version(repository, tag, scratch, annotations, message, beside)


def _link(origin: Path, target: Path) -> None:
    """Gives a read-only file another place; copied where the file system has no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(origin, target)
    except OSError:
        shutil.copyfile(origin, target)
