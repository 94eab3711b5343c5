"""What the request log says of itself: the metrics and the health page show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DatabaseState = Literal["ok", "unreachable", "schema mismatch", "not configured"]


@dataclass(frozen=True)
class LogStatus:
    """What the request log is doing.

    Attributes:
        dropped_rows: oldest entries that had to leave a full spool, as there is no database.
        archived_rows: those of them that went to the archive instead.
    """

    depth: int
    oldest_age_seconds: float | None
    database: DatabaseState
    last_error: str | None
    drained_rows: int
    rejected: int
    spool_bytes: int = 0
    dropped_rows: int = 0
    archived_rows: int = 0
