"""Files below a folder or an fsspec URL such as `s3://bucket/prefix`, each replaced in one step.

What central storage keeps, and where, is `storage.py`'s part. In a folder all that was written survives a power cut,
where the file system can sync; object stores replace whole objects, and see to their durability themselves.
https://filesystem-spec.readthedocs.io
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import fsspec

from cv_platform.errors import CorruptBundleError, LockHeldError, StorageError
from cv_platform.files import exclusive, sync_file, sync_folder, write_file

_ATTEMPTS = 20
"""Of a compare-and-set on S3: each but the last lost to a write between its reading and its writing."""
_CONFLICTS = {"PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"}
"""Error codes of S3 for a condition that does not hold, or for an object that another request is changing."""
_DRIVERS = (("botocore.exceptions", "BotoCoreError"), ("aiohttp", "ClientError"))
"""Roots of what S3's driver raises of its own where a storage refuses connections, or breaks off in an answer."""
_LOCK_SECONDS = 60.0
"""A pointer is moved in milliseconds; a host that was frozen meanwhile keeps its lock."""


def driver_errors() -> tuple[type[Exception], ...]:
    """Returns what drivers of fsspec raise where a storage is away: OSError, and S3's own errors, once it is loaded."""
    loaded = ((sys.modules.get(module), name) for module, name in _DRIVERS)
    return (OSError, *(getattr(module, name) for module, name in loaded if module is not None))


def has_anything(file_system: Any, root: str) -> bool:
    """Tells whether anything is at a place now: a folder that is not mounted is empty, or none."""
    try:
        if "file" in file_system.protocol:
            with os.scandir(root) as entries:
                return any(entries)
        file_system.invalidate_cache()
        return bool(file_system.exists(root))
    except driver_errors():
        return False


class ObjectStore:
    """Reads and writes files at one URL; paths are what `path` returns.

    Raises:
        StorageError: (all methods, within `errors`) the storage cannot be reached or written.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as err:
            raise StorageError(
                f"CV_STORAGE: expected a folder or a URL whose driver is installed. Received: {self.url} ({err}). "
                "For s3:// install the extra: pip install 'cv-platform[s3]'."
            ) from err
        protocol = self._fs.protocol
        protocols = (protocol,) if isinstance(protocol, str) else protocol
        self.is_local, self.is_s3 = "file" in protocols, "s3" in protocols

    @contextmanager
    def errors(self, action: str) -> Iterator[None]:
        """Says what could not be done, and where."""
        try:
            yield
        except (*driver_errors(), LockHeldError) as err:
            raise StorageError(
                f"Cannot {action} at {self.url}: {err}. Check CV_STORAGE, its rights and the free space."
            ) from err

    def path(self, *names: str) -> str:
        """Returns the path of these folders and a file; refuses a name that would leave its folder."""
        for name in names:  # Callers validate before, this is the last lock.
            if not name or name in {".", ".."} or any(c in name for c in "/\\\0"):
                raise StorageError(f"Expected a name. Received: {name!r}, which is a path.")
        return "/".join([self._root, *names])

    def url_of(self, path: str) -> str:
        """Returns a path's URL."""
        return str(self._fs.unstrip_protocol(path))

    def has_anything(self) -> bool:
        """Returns whether there is anything at all, now; see the function."""
        return has_anything(self._fs, self._root)

    def exists(self, path: str) -> bool:
        """Returns whether there is such a file or folder, now."""
        self._fs.invalidate_cache()
        return bool(self._fs.exists(path))

    def size_bytes(self, path: str) -> int:
        """Returns the bytes of a file, or of all files below a folder."""
        return int(self._fs.du(path))

    def sizes(self, folder: str) -> dict[str, int]:
        """Returns the bytes of each file below a folder, now, by its path relative to it."""
        self._fs.invalidate_cache()
        found = self._fs.find(folder, detail=True)
        return {path[len(folder) + 1 :]: int(entry["size"]) for path, entry in found.items()}

    def names(self, folder: str, kind: str) -> list[str]:
        """Lists what is in a folder, of the kind `file` or `directory`; nothing where there is no folder."""
        if not self.exists(folder):
            return []
        entries = self._fs.ls(folder, detail=True)
        return sorted(str(e["name"]).rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == kind)

    def read(self, path: str) -> str | None:
        """Returns a file's text; None where there is none."""
        with self.errors(f"read {path}"):
            self._fs.invalidate_cache()
            try:
                return self._fs.cat_file(path).decode()
            except FileNotFoundError:
                return None
            except UnicodeDecodeError as err:
                raise CorruptBundleError(f"{path}: expected text. Received: {err}") from err

    def read_parts(self, parts: Sequence[tuple[str, int | None, int | None]]) -> list[bytes]:
        """Returns the bytes of parts of files, all asked for at once: path, start and end; None: from end to end."""
        self._fs.invalidate_cache()  # As of `sizes`, since when others may have sent some.
        paths, starts, ends = (list(values) for values in zip(*parts, strict=True))
        return self._fs.cat_ranges(paths, starts, ends, on_error="raise")

    def download(self, path: str, target: Path) -> None:
        """Copies a file to `target`."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self._fs.get_file(path, str(target))

    def upload(self, directory: Path, relatives: Iterable[str], target: str) -> None:
        """Copies files of `directory` to the same places below `target`; none is half there when it returns."""
        copies = [f"{target}/{relative}" for relative in relatives]
        for relative, copy in zip(relatives, copies, strict=True):
            self._fs.makedirs(copy.rsplit("/", 1)[0], exist_ok=True)
            self._fs.put_file(str(directory / relative), copy)
        if self.is_local:
            for copy in copies:
                sync_file(Path(copy))
            for folder in dict.fromkeys(folder for copy in copies for folder in self._folders(Path(copy))):
                sync_folder(folder)

    def replace(self, path: str, content: str | bytes) -> None:
        """Writes a file in one step: a reader sees the old one or the new one, after a power cut too."""
        data = content.encode() if isinstance(content, str) else content
        if not self.is_local:
            self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            self._fs.pipe_file(path, data)
            return
        self._make_folder(Path(path).parent)
        write_file(Path(path), data)

    def remove(self, path: str) -> None:
        """Deletes a file, or a folder with all that is in it, if it is there."""
        if self.exists(path):
            self._fs.rm(path, recursive=True)
            if self.is_local:
                sync_folder(Path(path).parent)

    def remove_files(self, paths: Sequence[str]) -> None:
        """Deletes files that are there, many at a time where the storage can."""
        if paths:
            self._fs.rm(list(paths))

    def update(self, path: str, change: Callable[[str | None], str | None]) -> bool:
        """Writes what `change` makes of a file's text, unless another host writes it meanwhile; returns whether it did.

        In a folder it is the lock `.lock` beside the file that keeps others out, on S3 conditional requests
        (https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-requests.html). Other object stores have no
        such request in fsspec: there it is compared, then written.

        Args:
            path: of the file.
            change: is given the text and returns the new one, None meaning no file; it may be asked several times.
        """
        with self._alone(Path(path).parent) if self.is_local else nullcontext():
            for _ in range(_ATTEMPTS):
                tag = self._tag(path)  # Before the reading: if the object changes between them, the write is refused.
                before = self.read(path)
                after = change(before)
                if after == before or self._write_if(path, after, tag):
                    return True
        return False

    @contextmanager
    def _alone(self, folder: Path) -> Iterator[None]:
        self._make_folder(folder)
        # Readable by other users, who may be among the hosts that move the pointer: to lock it, reading is enough.
        with exclusive(folder / ".lock", timeout_seconds=_LOCK_SECONDS, mode=0o644):
            yield

    def _tag(self, path: str) -> str | None:
        """Returns what S3 calls an object's present content; None: there is no such object, or this is not S3."""
        self._fs.invalidate_cache()
        try:
            return self._fs.info(path)["ETag"] if self.is_s3 else None
        except FileNotFoundError:
            return None

    def _write_if(self, path: str, text: str | None, tag: str | None) -> bool:
        """Writes a file, or deletes it; on S3 if it has this tag still (None: if it is still not there), else False."""
        if not self.is_s3:
            self.remove(path) if text is None else self.replace(path, text)
            return True
        try:
            if text is not None:
                condition: dict[str, Any] = {"IfMatch": tag} if tag else {"IfNoneMatch": "*"}
                self._fs.pipe_file(path, text.encode(), **condition)
            elif tag is None:
                return False
            else:
                bucket, key, _ = self._fs.split_path(path)
                self._fs.call_s3("delete_object", Bucket=bucket, Key=key, IfMatch=tag)
        except OSError as err:
            answer = getattr(err.__cause__, "response", None) or {}
            if answer.get("Error", {}).get("Code") in _CONFLICTS:
                return False
            raise
        return True

    def _make_folder(self, folder: Path) -> None:
        """Makes a local folder, with its name and those of the folders above it on the disk."""
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            for above in self._folders(folder):
                sync_folder(above)

    def _folders(self, file: Path) -> list[Path]:
        """Lists the folders from the one that holds `file` up to the one that holds the storage."""
        root = Path(self._root)
        return [*(folder for folder in file.parents if folder.is_relative_to(root)), root.parent]
