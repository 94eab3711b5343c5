"""Images of a version in central storage, for machines that work on them and do not see the check-out.

    images/<ds_name>/versions/<dvc_md5>.json    written first: which listing is the version's, and when it was last used
    images/<ds_name>/files/md5/ab/cdef…         what DVC tracks of it, as in any of its remotes

It is DVC that sends them, and what versions have in common it sends once. Nobody reads them but those machines, while
they work; `cv-platform gc` removes what no version needs.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path

import pyarrow as pa

from cv_platform.compute.engine import Engine, patiently
from cv_platform.compute.sight import Proof, blind_machines
from cv_platform.datasets.dvc_store import is_exact, listed_files, listing_name, object_name, push_images
from cv_platform.datasets.origins import Origin, Place, Stored
from cv_platform.datasets.repository import StoredVersion, read_version
from cv_platform.datasets.stand_ins.links import LINKED_FILES
from cv_platform.datasets.stand_ins.tars import TarIndexes
from cv_platform.errors import ComputeError, CorruptBundleError, CvPlatformError, DatasetError, InvalidDatasetError
from cv_platform.object_store import ObjectStore
from cv_platform.records import Provenance

logger = logging.getLogger(__name__)

FOLDER = "images"
VERSIONS = "versions"
_SHOWN = 3
_SENDING = timedelta(days=1)
"""What a version's listing is waited for, from when it was to be sent: a machine that died has sent none."""


@dataclass(frozen=True)
class Sharing:
    """What installations and machines share data by.

    Attributes:
        url: of central storage.
        repository: of the dataset, whose DVC sends images there; None: they are not sent.
    """

    url: str
    repository: Path | None = None


def find_origin(
    directory: Path, provenance: Provenance, *, seen_by: Path, engine: Engine | None, sharing: Sharing | None
) -> Origin:
    """Returns where an engine's machines read the images of a check-out, which are sent there if one does not see it.

    Args:
        directory: of the check-out.
        provenance: of it.
        seen_by: a file in it that is only there: by it a machine tells that it sees the check-out.
        engine: who works on the images; None: processes of this machine.
        sharing: central storage; None: nothing may be sent there.

    Raises:
        ComputeError: a machine sees neither the check-out nor central storage, or nothing may be sent there, or the
            images were left where they are.
        DatasetError: DVC cannot send them.
        StorageError: central storage cannot be reached or written.
    """
    if engine is None or not (blind := blind_machines(engine, Proof.of(seen_by))):
        return Origin(directory)
    expected = f"Expected {directory} on each machine that works on its images. Received: none on {_named(blind)}."
    if sharing is None or sharing.repository is None:
        raise ComputeError(
            f"{expected} Put CV_HOME at the same path of all of them, on a shared file system; or set "
            "CV_SHARE_PACKS=1, and CV_STORAGE to what they all reach, such as s3://bucket/prefix: images are then sent "
            "there, and read from there."
        )
    version = read_version(sharing.repository, provenance.dvc_tag)
    if version.dvc_md5 != provenance.dvc_md5:
        raise DatasetError(
            f"Expected {provenance} in {sharing.repository}. Received: {version.dvc_md5}; somebody has moved the tag. "
            "Materialise the dataset again."
        )
    listed = _Listed(version, directory, sharing.repository, expected)
    url, store = f"{sharing.url.rstrip('/')}/{FOLDER}/{provenance.ds_name}", ObjectStore(sharing.url)
    note = patiently(f"The note on {provenance}", _note_use, version, store, provenance.ds_name)
    require_readable(engine, blind, sharing.url, note, expected)
    patiently(f"The upload of {provenance}", _send, version, sharing.repository, listed, store, note)
    return Origin(directory, functools.partial(_stored, url, Proof.of(seen_by), listed))


def _send(version: StoredVersion, repository: Path, listed: _Listed, store: ObjectStore, note: str) -> None:
    """Sends what central storage does not have of a version's images.

    Raises:
        StorageError: central storage cannot be reached or written.
        DatasetError: DVC cannot send them, and it is not that.
    """
    # A chain such as simplecache::s3://bucket names its storage last.
    folder = store.path(FOLDER, repository.name)
    remote = folder if store.is_local else store.url_of(folder).rpartition("::")[2]
    with store.errors("look at the images that are there"):
        if listed.is_broken_in(store.sizes(folder)):
            logger.warning("%s has lost images of %s %s: they are sent again", store.url, repository.name, version.tag)
            store.remove(f"{folder}/{listing_name(version)}")
    try:
        push_images([version], repository=repository, url=remote)
    except DatasetError:
        store.read(note)  # Where storage is away, this says so.
        raise


def require_readable(engine: Engine, blind: Collection[str], url: str, note: str, expected: str) -> None:
    """Refuses machines that do not read central storage instead of what they do not see.

    Args:
        engine: whose machines they are.
        blind: their names.
        url: of central storage.
        note: the path of a file that is there.
        expected: how the error begins: what they do not see.

    Raises:
        ComputeError: one does not read that file.
    """
    answers = engine.ask(functools.partial(_unread, url, note))
    if unread := [f"{name}: {why}" for name in blind if (why := answers.get(name)) is not None]:
        raise ComputeError(
            f"{expected} Nor do all of them read central storage instead: {_named(unread)}. Set CV_STORAGE to what "
            "they all reach, such as s3://bucket/prefix, and give each node what that needs."
        )


def _named(machines: list[str]) -> str:
    more = f" and {len(machines) - _SHOWN} more" if len(machines) > _SHOWN else ""
    return "; ".join(machines[:_SHOWN]) + more


def _note_use(version: StoredVersion, store: ObjectStore, ds_name: str) -> str:
    """Notes in central storage that a version is in use from now on, and returns the path of the note."""
    note = store.path(FOLDER, ds_name, VERSIONS, f"{version.dvc_md5}.json")
    used = {"listing": listing_name(version), "used_utc": datetime.now(UTC).isoformat()}
    with store.errors(f"note that {ds_name} {version.tag} is in use"):
        store.replace(note, json.dumps(used))
    return note


def _unread(url: str, note: str) -> str | None:
    """Returns why this process cannot read a file of central storage; None: it can."""
    try:
        return None if ObjectStore(url).read(note) else f"{note} is not there"
    except CvPlatformError as err:
        return str(err)


def _stored(url: str, proof: Proof, listed: _Listed, paths: Sequence[str]) -> Stored:
    return Stored(url, proof, tuple(listed.places(paths)))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116  # As in `origins`.
    except OSError:  # It is read from central storage all the same.
        return 0


def _as_bytes(value: pa.Scalar) -> bytes:
    return value.as_py()


class _Listed:
    """Where DVC's remote has the files of a check-out: 16 bytes and its path in memory of each that it tracks."""

    def __init__(self, version: StoredVersion, directory: Path, repository: Path, expected: str) -> None:
        listing = listed_files(version, repository=repository)
        if LINKED_FILES in listing:
            raise ComputeError(
                f"{expected} {version.tag} was imported with --link, so that DVC has no copy to send them. Put "
                f"{directory} and the folder of its images at the same paths of all of them, or import it without."
            )
        self._version, self._directory, self._exact = version, directory, is_exact(version)
        self._tars = TarIndexes(directory, version=version.tag)
        self._of_tars = {name: md5 for name, md5 in listing.items() if name.endswith(".tar")}
        of_files = sorted((name.encode(errors="surrogateescape"), bytes.fromhex(md5)) for name, md5 in listing.items())
        self._paths = pa.array([path for path, _ in of_files], pa.large_binary())
        self._md5 = pa.array([md5 for _, md5 in of_files], pa.binary(16))

    def is_broken_in(self, there: Collection[str]) -> bool:
        """Tells whether the remote has the version's listing, and not all that it lists."""
        return listing_name(self._version) in there and any(
            object_name(md5.as_py().hex(), exact=self._exact) not in there for md5 in self._md5
        )

    def places(self, paths: Sequence[str]) -> list[Place]:
        """Returns where files are, by their paths in the check-out.

        Raises:
            InvalidDatasetError: DVC does not track one.
        """
        inside = [path.removeprefix(f"{self._version.data_path}/") for path in paths]
        places = {path: place for path in inside if (place := self._in_tar(path))}
        if alone := [path for path in inside if path not in places]:
            places |= self._whole(alone)
        return [places[path] for path in inside]

    def _in_tar(self, path: str) -> Place | None:
        if (found := self._tars.find(path)) is None:
            return None
        name, row = found
        place = object_name(self._of_tars[name], exact=self._exact)
        return Place(place, bytes.fromhex(row.sha256), row.offset, row.offset + row.bytes)

    def _whole(self, paths: Sequence[str]) -> dict[str, Place]:
        wanted = {path.encode(errors="surrogateescape"): path for path in paths}
        # Of those between the first and the last: consecutive images, or those of a split.
        start = bisect_left(self._paths, min(wanted), key=_as_bytes)
        end = bisect_right(self._paths, max(wanted), key=_as_bytes)
        between = zip(self._paths[start:end].to_pylist(), self._md5[start:end].to_pylist(), strict=True)
        found = {wanted[path]: md5 for path, md5 in between if path in wanted}
        if missing := [path for path in paths if path not in found]:
            raise InvalidDatasetError(
                f"{self._version.tag}: expected DVC to track {missing[0]}. Received: its listing is without it. "
                "Materialise the dataset again."
            )
        folder = f"{self._directory}/{self._version.data_path}"
        return {
            path: Place(
                object_name(md5.hex(), exact=self._exact),
                md5 if self._exact else b"",
                size=_size(f"{folder}/{path}"),
            )
            for path, md5 in found.items()
        }


@dataclass(frozen=True)
class Unneeded:
    """What central storage has of a dataset's images and no version needs.

    Attributes:
        ds_name: of the dataset.
        bytes: of the files.
        files: their paths, relative to the dataset's folder.
        is_all: there is nothing else.
    """

    ds_name: str
    bytes: int
    files: tuple[str, ...]
    is_all: bool

    def remove(self, url: str) -> None:
        """Deletes them. Who needs one by now waits for it in vain, and sends it again in the next stage, or run.

        Raises:
            StorageError: central storage cannot be reached or written.
        """
        store = ObjectStore(url)
        folder = store.path(FOLDER, self.ds_name)
        with store.errors(f"remove images of {self.ds_name}"):
            # A listing that outlived what it lists would keep DVC from sending that again.
            for _, names in groupby(sorted(self.files, key=_turn), key=_turn):
                store.remove_files([f"{folder}/{name}" for name in names])
            if self.is_all and not store.sizes(folder):  # Nobody has sent anything meanwhile.
                store.remove(folder)


def _turn(name: str) -> int:
    """Returns when a file is deleted: listings, objects, and notes, so that a killed deletion is seen again."""
    return 2 if name.startswith(f"{VERSIONS}/") else int(not name.endswith(".dir"))


def find_unneeded(url: str, is_needed: Callable[[str, datetime], bool]) -> tuple[list[Unneeded], list[str]]:
    """Lists what central storage has of images that no version needs: nothing of a dataset that is being sent.

    Args:
        url: of central storage.
        is_needed: tells of a version, by its md5 and when its images were last used, whether they stay.

    Returns:
        What is not needed; and of which datasets nobody can tell, as what is said of a version is unreadable.

    Raises:
        StorageError: central storage cannot be reached.
    """
    store, found, unreadable = ObjectStore(url), list[Unneeded](), list[str]()
    with store.errors("list the images"):
        for ds_name in store.names(store.path(FOLDER), "directory"):
            sizes = store.sizes(store.path(FOLDER, ds_name))
            try:
                needed = _needed(store, ds_name, sizes, is_needed)
            except InvalidDatasetError as err:
                unreadable.append(f"images of {ds_name} in central storage: {err}")
                continue
            if files := tuple(name for name in sizes if name not in needed):
                size = sum(sizes[name] for name in files)
                found.append(Unneeded(ds_name, size, files, is_all=len(files) == len(sizes)))
    return found, unreadable


def _needed(
    store: ObjectStore, ds_name: str, there: Collection[str], is_needed: Callable[[str, datetime], bool]
) -> set[str]:
    folder, needed = store.path(FOLDER, ds_name), set[str]()
    for note in [name for name in there if name.startswith(f"{VERSIONS}/")]:
        listing, used_utc = _read_note(store, f"{folder}/{note}")
        if is_needed(Path(note).stem, used_utc):
            needed |= {note, listing}
            if listing in there:  # Which DVC sends last.
                needed |= _objects(store, f"{folder}/{listing}")
            elif datetime.now(UTC) - used_utc < _SENDING:
                needed |= set(there)
    return needed


def _read_note(store: ObjectStore, path: str) -> tuple[str, datetime]:
    """Returns the listing of a version, and when its images were last used."""
    try:
        note = json.loads(store.read(path) or "")
        return str(note["listing"]), datetime.fromisoformat(note["used_utc"]).astimezone(UTC)
    except (CorruptBundleError, ValueError, KeyError, TypeError, OverflowError) as err:
        raise InvalidDatasetError(
            f"{path} in {store.url}: expected what the images of a version are. Received: {err!r}. Remove it: whoever "
            "needs them sends them again."
        ) from err


def _objects(store: ObjectStore, listing: str) -> set[str]:
    """Returns the names of what a listing has, relative to the dataset's folder, as `dvc_store.object_name` says."""
    exact = listing.rsplit("/", 2)[0].endswith("/files/md5")
    try:
        found = [str(entry["md5"]) for entry in json.loads(store.read(listing) or "")]
    except (CorruptBundleError, ValueError, KeyError, TypeError) as err:
        raise InvalidDatasetError(
            f"{listing} in {store.url}: expected DVC's listing of a version. Received: {err!r}. Remove it: whoever "
            "needs it sends it again."
        ) from err
    return {object_name(md5, exact=exact) for md5 in found}
