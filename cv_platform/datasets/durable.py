"""Folders and files that appear whole or not at all, also when a process is killed or two of them start at once."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cv_platform.errors import DatasetError

LOCK_TIMEOUT_SECONDS = 3600.0
"""The longest honest work under a lock: checking out or packing a large dataset."""
MANY_FILES = 100
"""From here on, a folder reaches the disk by one sync of everything."""


@contextmanager
def exclusive(lock_path: Path) -> Iterator[None]:
    """Keeps other processes and threads out of the same work while the block runs.

    Raises:
        DatasetError: another process has held the lock for an hour.
    """
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_path, timeout=LOCK_TIMEOUT_SECONDS)
    try:
        lock.acquire()
    except Timeout as err:
        raise DatasetError(
            f"Expected the lock {lock_path} to become free. Received: {LOCK_TIMEOUT_SECONDS:.0f} seconds of waiting. "
            "End the process that holds it, then try again."
        ) from err
    try:
        yield
    finally:
        lock.release()


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Yields a fresh folder that becomes `target` (replacing one that exists) when the block ends without an error.

    Call it under `exclusive`: it also clears what killed processes left beside `target`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for pattern in (f".{target.name}.partial-*", f".{target.name}.stale-*"):
        for leftover in target.parent.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        yield partial
        sync_tree(partial)
        stale = target.parent / f".{target.name}.stale-{secrets.token_hex(4)}"
        if target.exists():
            target.rename(stale)
        partial.rename(target)
        sync_directory(target.parent)
        shutil.rmtree(stale, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def scratch_directory(parent: Path, name: str) -> Iterator[Path]:
    """Yields an empty hidden folder below `parent` and removes it afterwards; call it under `exclusive`."""
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(f".{name}.scratch-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch = parent / f".{name}.scratch-{secrets.token_hex(4)}"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def whole_file(target: Path, *, suffix: str = "") -> Iterator[Path]:
    """Yields a path beside `target`; what the block writes there becomes `target`, synced, in one step.

    Args:
        target: the file; its folder exists.
        suffix: that the path must have for its writer. None by default: who looks for such files finds no half one.
    """
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}{suffix}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
        sync_directory(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync_tree(directory: Path) -> None:
    """Makes everything below `directory` survive a power cut."""
    paths = list(directory.rglob("*"))
    if len(paths) > MANY_FILES:
        os.sync()  # Once, instead of an fsync for each.
        return
    for path in paths:
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for folder in (directory, *(path for path in paths if path.is_dir() and not path.is_symlink())):
        sync_directory(folder)


def sync_directory(directory: Path) -> None:
    """Makes renames and new names in `directory` survive a power cut, where the file system can."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        # Some network file systems refuse to sync a folder; its files are synced by their writers.
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)
