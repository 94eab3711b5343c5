"""How much a spool may hold: a bound on its entries, and a reserve of its disk that stays free."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import NamedTuple

from cv_platform.errors import SpoolFullError
from cv_platform.serving.log.group_commit import MAX_QUEUED_BYTES
from cv_platform.serving.log.limits import LEAST_RESERVE_BYTES, LogLimits
from cv_platform.serving.log.spool_file import LONG_LOG_PAGES, SHORT_LOG_PAGES

_MARGIN = 10
"""What part of its bound a spool without a database leaves free."""


class Usage(NamedTuple):
    """Bytes that entries take in a spool's file, and that others still could take on its disk."""

    used: int
    free: int


class Room:
    """The room of one spool file; `require` is asked by the thread that writes, before each entry."""

    def __init__(self, path: Path, limits: LogLimits) -> None:
        self.limits = limits
        self._names = str(path), f"{path}-wal", str(path.parent)
        self._log_pages = SHORT_LOG_PAGES

    def require(self, connection: sqlite3.Connection) -> None:
        """Returns if there is room for one more entry.

        Raises:
            SpoolFullError: there is none.
        """
        if self.is_ample():
            self._copy_log_from(LONG_LOG_PAGES, connection)
            return
        self._copy_log_from(SHORT_LOG_PAGES, connection)
        usage, limits, file_name = self.usage(connection), self.limits, self._names[0]
        if usage.free < limits.reserve_bytes:
            raise SpoolFullError(
                f"Expected {limits.reserve_bytes} bytes free on the disk of {file_name} (CV_SPARE_DISK_BYTES). "
                f"Received: {usage.free}. Free space on it, or bring the database back."
            )
        if usage.used > limits.max_bytes:
            raise SpoolFullError(
                f"Expected less than {limits.max_bytes} bytes of entries that the database does not have yet "
                f"(CV_SPOOL_MAX_BYTES). Received: {usage.used} in {file_name}. Bring the database back."
            )

    def is_ample(self) -> bool:
        """Says whether there is so much room that it need not be counted, as the files' sizes tell.

        They lack what the present transaction adds. This spares three statements an entry.
        """
        file_name, log_name, folder = self._names
        margin, disk = 2 * MAX_QUEUED_BYTES, os.statvfs(folder)
        size = _size_bytes(log_name) + _size_bytes(file_name)
        is_disk_ample = disk.f_bavail * disk.f_frsize >= self.limits.reserve_bytes + margin
        return is_disk_ample and size + margin <= self.limits.max_bytes

    def usage(self, connection: sqlite3.Connection) -> Usage:
        """Returns how much is taken, and how much there is."""
        _, log_name, folder = self._names
        disk = os.statvfs(folder)
        pages, unused, page_bytes = (
            int(connection.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_count", "freelist_count", "page_size")
        )
        # What the files hold and do not use counts as free: they seldom give it back to the disk.
        idle = unused * page_bytes + min(_size_bytes(log_name), LEAST_RESERVE_BYTES // 2)
        return Usage((pages - unused) * page_bytes, disk.f_bavail * disk.f_frsize + idle)

    def is_crowded(self, connection: sqlite3.Connection, others_bytes: int) -> bool:
        """Says whether there is little room left, together with `others_bytes` of other spools."""
        usage, limits = self.usage(connection), self.limits
        margin = min(limits.max_bytes // _MARGIN, MAX_QUEUED_BYTES)
        return min(limits.max_bytes - usage.used - others_bytes, usage.free - limits.reserve_bytes) < margin

    def _copy_log_from(self, pages: int, connection: sqlite3.Connection) -> None:
        if pages != self._log_pages:
            connection.execute(f"PRAGMA wal_autocheckpoint = {pages}")
            self._log_pages = pages


def _size_bytes(name: str) -> int:
    """Asks the system, without a `Path`, which takes longer than the system: this is done for each entry."""
    return os.stat(name).st_size  # noqa: PTH116
