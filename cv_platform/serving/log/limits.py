"""What the request log of one worker may take of its disk, and for how long it keeps what no database takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cv_platform.settings import Settings

LEAST_RESERVE_BYTES = 32 * 1024 * 1024
"""Of the disk that entries leave free at least: deleting what the database has needs room in the write-ahead log, too,
and so a disk that the spool itself has filled to its end would never get any back."""


def _one_may_come() -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class LogLimits:
    """Bounds of one worker's request log.

    Attributes:
        max_bytes: of entries that wait in its spool, from which it takes no more.
        reserve_bytes: of the disk that it leaves free.
        archive: folder that the oldest entries go to where there is no database to take them; None: they are dropped.
        keep_days: how long what the database refused, and damaged files, are kept; None: for ever.
        may_have_database: asked when there is no database now; says whether one may still come, so that nothing may be
            dropped.
    """

    max_bytes: int = 10_000_000_000
    reserve_bytes: int = LEAST_RESERVE_BYTES
    archive: Path | None = None
    keep_days: int | None = None
    may_have_database: Callable[[], bool] = _one_may_come

    @classmethod
    def of(cls, settings: Settings) -> LogLimits:
        """Returns the bounds of an installation's workers."""
        embedded = settings.home / "postgres"  # There once the installation has had a database of its own.
        return cls(
            max_bytes=settings.spool_max_bytes,
            reserve_bytes=max(settings.spare_disk_bytes, LEAST_RESERVE_BYTES),
            archive=settings.spool_archive,
            # Both hold uploads.
            keep_days=min(
                (days for days in (settings.log_retention_days, settings.image_retention_days) if days), default=None
            ),
            may_have_database=lambda: settings.database_url is not None or embedded.exists(),
        )
