"""Packs in central storage: made on one machine, trained with on others, each of which takes the shards that it reads.

    shards/<pack>/shared.json          written last: which of the folders beside it holds the pack
    shards/<pack>/<random>/…           its files, never changed

What takes a pack has its index, and `origin.json`: where the rest is. A shard is brought when it is first used: read
where it lies if central storage is a folder (a link), else downloaded; then it is verified like one that was made here.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from cv_platform.compute.engine import patiently
from cv_platform.errors import DatasetError, StorageError
from cv_platform.files import exclusive, require_free_space, whole_directory, whole_file, write_file
from cv_platform.object_store import ObjectStore

ORIGIN = "origin.json"
_FOLDER = "shards"
_SHARED = "shared.json"
_PUBLISHED = "published.json"
"""A file in a pack that central storage has, which says where that storage is."""
_SHARD_SUFFIXES = frozenset({".uint8", ".jpeg"})


def publish_pack(directory: Path, files: Sequence[str], storage_url: str) -> None:
    """Copies the files of a finished pack to central storage, unless it has them.

    Of two that do so at once, the first has done it, and the copy of the other is removed. What a pack that was taken
    from elsewhere lacks is brought first.

    Raises:
        DatasetError: it lacks shards, and they are not where it was taken from any more.
        StorageError: central storage cannot be reached or written.
    """
    folder = secrets.token_hex(4)
    patiently(f"The upload of {directory.name}", _publish, directory, sorted(files), ObjectStore(storage_url), folder)
    _note_published(directory, storage_url)


def _publish(directory: Path, files: list[str], store: ObjectStore, folder: str) -> None:
    pack = store.path(_FOLDER, directory.name)
    if _published(store, directory.name) is not None:
        return
    bring_shards(directory, files)
    with store.errors(f"publish the packed images {directory.name}"):
        store.upload(directory, files, f"{pack}/{folder}")
        shared = json.dumps({"folder": folder, "files": files})
        store.update(f"{pack}/{_SHARED}", lambda text: text or shared)
    if _published(store, directory.name) != (folder, files):
        with store.errors(f"remove a second copy of the packed images {directory.name}"):
            store.remove(f"{pack}/{folder}")


def _note_published(directory: Path, storage_url: str) -> None:
    note = json.dumps({"storage": storage_url})
    # In a folder of another user, say: then only who sees that folder works on its images.
    with contextlib.suppress(OSError):
        if not (directory / _PUBLISHED).exists() or (directory / _PUBLISHED).read_text(encoding="utf-8") != note:
            write_file(directory / _PUBLISHED, note)


def take_pack(directory: Path, storage_url: str) -> bool:
    """Makes `directory` the pack of its name that central storage has, without its shards; False: it has none.

    Call it under the lock of those who make packs.

    Raises:
        StorageError: central storage cannot be reached.
    """
    store = ObjectStore(storage_url)
    if (published := _published(store, directory.name)) is None:
        return False
    folder, files = published
    source = store.path(_FOLDER, directory.name, folder)
    with store.errors(f"fetch the packed images {directory.name}"), whole_directory(directory) as partial:
        for name in files:
            if Path(name).suffix not in _SHARD_SUFFIXES:
                store.download(f"{source}/{name}", partial / name)
        (partial / ORIGIN).write_text(json.dumps({"storage": storage_url, "folder": folder}), encoding="utf-8")
    return True


def shared_note(directory: Path, storage_url: str) -> str:
    """Returns the path of the file by which central storage has the pack of that name."""
    return ObjectStore(storage_url).path(_FOLDER, directory.name, _SHARED)


def published_in(directory: Path) -> str | None:
    """Returns the URL of the central storage that a pack was published to, or taken from; None: it is not shared."""
    for name in (_PUBLISHED, ORIGIN):
        if (directory / name).exists():
            return str(json.loads((directory / name).read_bytes())["storage"])
    return None


def is_still_shared(directory: Path) -> bool:
    """Tells whether what a pack was taken from is there still; True of a pack that was made here.

    Raises:
        StorageError: central storage cannot be reached.
    """
    if not (directory / ORIGIN).exists():
        return True
    store, folder = _origin(directory)
    return (_published(store, directory.name) or ("", []))[0] == folder


def absent_shards(directory: Path, names: Iterable[str]) -> list[str]:
    """Returns those shards of a pack that was taken which nobody has used here yet; of a pack made here, none."""
    if not (directory / ORIGIN).exists():
        return []
    return [name for name in names if Path(name).suffix in _SHARD_SUFFIXES and not (directory / name).exists()]


def bring_shards(directory: Path, names: Iterable[str]) -> None:
    """Brings the absent ones of these shards; who reads them verifies them.

    Raises:
        DatasetError: central storage does not have them any more, or cannot be reached.
        DiskSpaceError: there is no room for them.
    """
    if not (absent := absent_shards(directory, names)):
        return
    try:
        patiently(f"The download of {directory.name}", _bring, directory, absent)
    except StorageError as err:
        raise DatasetError(f"{err} Or materialise packed_images again: it packs what is not shared.") from err


def _bring(directory: Path, absent: list[str]) -> None:
    store, folder = _origin(directory)
    source = store.path(_FOLDER, directory.name, folder)
    if not is_still_shared(directory) and (store.has_anything() or not store.is_local):  # Else it is not mounted.
        raise DatasetError(
            f"Expected the packed images {directory.name} in {store.url}, where they were taken from. Received: none; "
            "materialise packed_images again: it packs what is not shared."
        )
    with store.errors(f"fetch shards of {directory.name}"), exclusive(directory / ".fetching.lock"):
        for name in absent_shards(directory, absent):
            if store.is_local:
                (directory / name).unlink(missing_ok=True)  # A link to what is gone.
                (directory / name).symlink_to(Path(f"{source}/{name}").resolve(strict=True))
                continue
            size = store.size_bytes(f"{source}/{name}")
            require_free_space(directory, size, purpose=f"the shard {name}")
            with whole_file(directory / name) as partial:
                store.download(f"{source}/{name}", partial)


def drop_shard(directory: Path, name: str) -> None:
    """Removes a shard that is not the one that was written, if the pack was taken: it is brought again.

    Raises:
        DatasetError: the pack was taken; says where the shard came from.
    """
    if not (directory / ORIGIN).exists():
        return
    store, folder = _origin(directory)
    (directory / name).unlink(missing_ok=True)
    where = store.url_of(store.path(_FOLDER, directory.name))
    raise DatasetError(
        f"Expected {name} of the packed images in {where}/{folder} as it was published. Received: other bytes. Try "
        f"again; if they are the same, remove {where} and materialise packed_images: it packs and publishes them anew."
    )


def _origin(directory: Path) -> tuple[ObjectStore, str]:
    origin = json.loads((directory / ORIGIN).read_bytes())
    return ObjectStore(origin["storage"]), str(origin["folder"])


def _published(store: ObjectStore, pack: str) -> tuple[str, list[str]] | None:
    text = store.read(store.path(_FOLDER, pack, _SHARED))
    if text is None:
        return None
    try:
        shared = json.loads(text)
        return str(shared["folder"]), [str(name) for name in shared["files"]]
    except (ValueError, KeyError, TypeError) as err:
        raise StorageError(
            f"Expected {_SHARED} of the packed images {pack} in {store.url}. Received: {err}. Remove it and "
            "materialise packed_images again."
        ) from err
