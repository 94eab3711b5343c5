"""Puts a folder in another's place in one step, where the system can: https://man7.org/linux/man-pages/man2/rename.2.html."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_AT_FDCWD = -100
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS.


def replace_folder(new: Path, current: Path, *, aside: Path) -> None:
    """Makes `new` the folder `current`; what was there becomes `aside`, which must not exist.

    A process that is killed meanwhile leaves the old or the new folder at `current`. Only a file system that cannot
    exchange two names has a moment without either, between two renames.

    Raises:
        OSError: the folders cannot be renamed; `current` is as it was.
    """
    if not current.exists() or not any(current.iterdir()):
        new.rename(current)  # An empty folder gives way.
        return
    new.rename(aside)
    try:
        if _exchange(aside, current):
            return
    except OSError:
        aside.rename(new)
        raise
    aside.rename(new)
    current.rename(aside)
    try:
        new.rename(current)
    except OSError:
        aside.rename(current)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names; False where the system or the file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "darwin":
            failed = library.renamex_np(names[0], names[1], _EXCHANGE)
        else:
            failed = library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE)
    except AttributeError:  # A C library without it.
        return False
    if failed:
        number = ctypes.get_errno()
        if number in {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV}:
            return False
        raise OSError(number, os.strerror(number), str(other))
    return True
