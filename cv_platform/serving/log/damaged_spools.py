"""Spool files that SQLite found damaged and that were put aside, as `<name>.damaged` with `-wal` and `-shm`.

They are kept for a person to recover entries from (https://www.sqlite.org/recovery.html), but no longer than what they
hold may be kept. Nothing can be deleted *in* a damaged file and be known to be gone: its index may point elsewhere, and
pages that nothing points to keep their bytes. So a file that names a deleted prediction anywhere goes as a whole. Where
the damage has overwritten that name, an upload may be left in it, until the shorter of the two retentions ends.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

from cv_platform.serving.log.spool_file import EXTENSIONS

logger = logging.getLogger(__name__)

_DAMAGED = ".damaged"
_PART_BYTES = 2**20


def put_aside(path: Path, err: sqlite3.DatabaseError) -> None:
    """Renames a damaged spool, so that it is there for a person and in nobody's way."""
    logger.error("%s is damaged and is put aside: %s", path, err)
    for extension in EXTENSIONS:
        damaged = path.with_name(path.name + extension)
        if damaged.exists():
            damaged.rename(path.with_name(f"{path.stem}{_DAMAGED}{extension}"))


def delete_from_damaged(directory: Path, prediction_id: UUID) -> bool:
    """Removes each damaged spool that names a prediction; returns whether there was one."""
    name = str(prediction_id).encode()
    named = [path for path in _damaged(directory) if any(_holds(part, name) for part in _parts(path))]
    for path in named:
        _remove(path, f"it names prediction {prediction_id}, which was deleted")
    return bool(named)


def remove_expired(directory: Path, keep_days: int | None) -> None:
    """Removes damaged spools that were last written to longer ago than `keep_days`; None: none."""
    if keep_days is None:
        return
    for path in _damaged(directory):
        with contextlib.suppress(FileNotFoundError):  # Another worker was faster.
            newest = max(part.stat().st_mtime for part in (path, *_parts(path)))
            if time.time() - newest > keep_days * 86_400:
                _remove(path, f"it is older than {keep_days} days")


def _damaged(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"*{_DAMAGED}"))


def _parts(path: Path) -> Iterator[Path]:
    return (part for part in (path.with_name(path.name + extension) for extension in EXTENSIONS) if part.exists())


def _holds(path: Path, text: bytes) -> bool:
    # Not by `mmap`: its `find` holds up all other threads (4 s for 1 GiB), and a sector that cannot be read, as after
    # such damage, would end the process.
    end = b""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        while part := file.read(_PART_BYTES):
            if text in (joined := end + part):
                return True
            end = joined[-len(text) :]
    return False


def _remove(path: Path, reason: str) -> None:
    logger.error("The damaged spool %s is removed with all that it holds, as %s.", path, reason)
    for part in sorted(_parts(path), reverse=True):  # The file that is listed goes last.
        part.unlink(missing_ok=True)
