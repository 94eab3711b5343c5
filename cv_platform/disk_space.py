"""Refuses to start what would fill the disk, where databases beside the data would stop working, too."""

from __future__ import annotations

import shutil
from pathlib import Path

from cv_platform.errors import DiskSpaceError

SPARE_BYTES = 256 * 2**20
"""Left free unless `CV_SPARE_DISK_BYTES` says otherwise."""


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
