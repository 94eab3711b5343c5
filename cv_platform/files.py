"""Files and folders that appear whole or not at all, locks between processes, and room on the disk.

A process may be killed at any line, and the power may fail: what has its final name is complete and on the disk. Locks
are `flock`'s, which the kernel drops with the process that holds them
(https://man7.org/linux/man-pages/man2/flock.2.html). The `filelock` package has no shared lock, and none that survives
`exec`, which `database.embedded` needs.

Standard library only, and for Python 3.9 but for `file_sha256`: the machine's own Python backs up the stack in
containers.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from cv_platform.errors import DiskSpaceError, LockHeldError

LONGEST_WORK_SECONDS = 3600.0
"""The longest honest work under a lock: checking out or packing a large dataset."""
MANY_FILES = 100
"""From here on, a folder reaches the disk by one sync of everything."""
SPARE_BYTES = 256 * 2**20
"""Left free unless `CV_SPARE_DISK_BYTES` says otherwise."""
_POLL_SECONDS = 0.05
_PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN}
"""Errors of reading that say nothing about the file: too many are open, or who serves them is away."""


@contextmanager
def whole_file(target: Path, *, suffix: str = "", is_private: bool = False) -> Generator[Path]:
    """Yields a path beside `target`; what the block writes there becomes `target`, synced, in one step.

    Args:
        target: the file; its folder is made if it is missing.
        suffix: that the path must have for its writer. None by default: who looks for such files finds no half one.
        is_private: its owner alone may read it; one that root makes belongs to the folder's owner.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}{suffix}")
    try:
        if is_private:
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            _give_to_owner(handle, target.parent)
            os.close(handle)
        yield partial
        sync_file(partial)
        partial.replace(target)
        sync_folder(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_file(target: Path, content: str | bytes, *, is_private: bool = False) -> None:
    """Makes `content` (text in UTF-8) the file `target`; see `whole_file`."""
    with whole_file(target, is_private=is_private) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_directory(
    target: Path, *, resumes: bool = False, outlives: tuple[type[Exception], ...] = ()
) -> Generator[Path]:
    """Yields a folder that becomes `target` (replacing one that exists) when the block ends without an error.

    Call it under `exclusive`: it also clears what killed processes left beside `target`.

    Args:
        target: the folder.
        resumes: yields the folder of a process that was killed or interrupted as it left it; else it is empty.
        outlives: errors that say nothing against what is there, either, and leave the folder to the next one as it is.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial-{'resumes' if resumes else secrets.token_hex(4)}"
    for pattern in (f".{target.name}.partial-*", f".{target.name}.stale-*"):
        for leftover in target.parent.glob(pattern):
            if leftover != partial:
                shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(exist_ok=resumes)
    try:
        yield partial
        sync_tree(partial)
        stale = target.parent / f".{target.name}.stale-{secrets.token_hex(4)}"
        if target.exists():
            target.rename(stale)
        partial.rename(target)
        sync_folder(target.parent)
        shutil.rmtree(stale, ignore_errors=True)
    except BaseException as err:
        # An interruption says nothing against what is there.
        if not resumes or (isinstance(err, Exception) and not isinstance(err, outlives)):
            shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def scratch_directory(parent: Path, name: str, *, work: str = "") -> Generator[Path]:
    """Yields a hidden folder below `parent` and removes it afterwards; call it under `exclusive`.

    Args:
        parent: of the folder.
        name: whose folder it is; what killed processes left of that name is removed.
        work: identifies what is done there. A process that was killed or interrupted at the same work has left its
            folder to the next one, as it was; empty: the folder is always a new one.
    """
    parent.mkdir(parents=True, exist_ok=True)
    scratch = parent / f".{name}.scratch-{work or secrets.token_hex(4)}"
    for leftover in parent.glob(f".{name}.scratch-*"):
        if leftover != scratch:
            shutil.rmtree(leftover, ignore_errors=True)
    scratch.mkdir(exist_ok=bool(work))
    try:
        yield scratch
    except BaseException as err:
        if not work or isinstance(err, Exception):  # An interruption says nothing against what is there.
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(scratch, ignore_errors=True)


def sync_tree(directory: Path) -> None:
    """Makes everything below `directory` survive a power cut."""
    paths = list(directory.rglob("*"))
    if len(paths) > MANY_FILES:
        os.sync()  # Once, instead of an fsync for each.
        return
    for path in paths:
        if path.is_file() and not path.is_symlink():
            sync_file(path)
    for folder in (directory, *(path for path in paths if path.is_dir() and not path.is_symlink())):
        sync_folder(folder)


def sync_file(path: Path) -> None:
    """Makes what a file holds survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in `folder` survive a power cut, where the file system can."""
    # Some network file systems refuse to sync a folder, and one above the storage may not be ours to open; what the
    # files hold is synced by their writers.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_of_the_file(err: OSError) -> bool:
    """Tells whether an error in reading a file is that file's, and stays; others are the process's or the share's."""
    return not isinstance(err, TimeoutError | ConnectionError) and err.errno not in _PASSING


def file_sha256(path: Path) -> str:
    """Returns a file's sha256 as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def exclusive(path: Path, *, timeout_seconds: float = LONGEST_WORK_SECONDS, mode: int = 0o600) -> Generator[None]:
    """Holds a file's lock alone, so that no other process or thread does the same work while the block runs.

    The file stays: removing it could let two processes believe that they hold it.

    Args:
        path: the lock file, made if it is missing, as is its folder.
        timeout_seconds: how long to wait for it.
        mode: of a new lock file.

    Raises:
        LockHeldError: somebody else held it all that time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = open_lock(path, mode=mode)
    try:
        deadline = time.monotonic() + timeout_seconds
        while not try_lock(handle):
            if time.monotonic() > deadline:
                raise LockHeldError(
                    f"Expected to get the lock {path} within {timeout_seconds:.0f} s. Received: another process holds "
                    "it. Wait for that process, or end it, and try again."
                )
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)  # A forked child may have a copy of the handle, which would keep the lock.
        os.close(handle)


def open_lock(path: Path, *, mode: int = 0o600) -> int:
    """Opens (and makes) a lock file and returns its descriptor; each call is a holder of its own."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
    except PermissionError:  # Made by another user; to lock it, reading is enough.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    _give_to_owner(handle, path.parent)  # Else one start as root would shut the home's owner out.
    return handle


def try_lock(handle: int, *, shared: bool = False) -> bool:
    """Takes the lock, or changes its kind, if nobody is in the way; never waits."""
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(path: Path) -> bool:
    """Returns whether somebody holds the lock of a file, alone or shared; False where there is no such file."""
    if not path.exists():
        return False
    handle = open_lock(path)
    try:
        return not try_lock(handle)
    finally:
        os.close(handle)


def _give_to_owner(handle: int, folder: Path) -> None:
    if os.geteuid() == 0 and (owner := folder.stat()).st_uid != 0:
        os.fchown(handle, owner.st_uid, owner.st_gid)


def free_bytes(directory: Path) -> int:
    """Returns what a user of this process may still write where `directory` is, or will be made."""
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def require_free_space(directory: Path, needed_bytes: int, *, purpose: str, spare_bytes: int | None = None) -> None:
    """Returns if `needed_bytes` fit where `directory` is, or will be made, and a reserve stays free.

    Args:
        directory: where the bytes go.
        needed_bytes: how many.
        purpose: of the bytes, for the message.
        spare_bytes: the reserve; None: `SPARE_BYTES`.

    Raises:
        DiskSpaceError: they do not fit.
    """
    spare = SPARE_BYTES if spare_bytes is None else spare_bytes
    free = free_bytes(directory)
    if needed_bytes + spare > free:
        raise DiskSpaceError(
            f"Expected {(needed_bytes + spare) / 1e9:.2f} GB free at {directory} for {purpose} "
            f"({spare / 1e9:.2f} GB of it as a reserve, CV_SPARE_DISK_BYTES). Received: {free / 1e9:.2f} GB. "
            "Free some space (`cv-platform gc` lists what is not needed), or move CV_HOME to a larger disk."
        )
