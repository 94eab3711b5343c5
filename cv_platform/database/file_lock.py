"""Locks on files that the kernel drops with the process that holds them, shared or exclusive.

`flock` rather than the `filelock` package: that has no shared lock, and a lock must survive `exec` (see
`embedded.run_in_foreground`). https://man7.org/linux/man-pages/man2/flock.2.html
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cv_platform.errors import ServiceError

_POLL_SECONDS = 0.05


def open_lock(path: Path) -> int:
    """Opens (and makes) a lock file and returns its descriptor; each call is a holder of its own."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if os.geteuid() == 0 and (owner := path.parent.stat()).st_uid != 0:
        os.fchown(handle, owner.st_uid, owner.st_gid)  # Else one start as root would shut the home's owner out.
    return handle


def try_lock(handle: int, *, shared: bool = False) -> bool:
    """Takes the lock, or changes its kind, if nobody is in the way; never waits."""
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def exclusive(path: Path, *, timeout_seconds: float) -> Iterator[None]:
    """Holds a file's lock alone, waiting for it at most `timeout_seconds`.

    Raises:
        ServiceError: somebody else held it all that time.
    """
    handle = open_lock(path)
    try:
        deadline = time.monotonic() + timeout_seconds
        while not try_lock(handle):
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"Expected to get the lock {path} within {timeout_seconds:.0f} s. Received: another process holds "
                    "it. End that process, and try again."
                )
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(handle)
