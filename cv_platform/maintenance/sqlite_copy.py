"""Copies SQLite databases while others write to them, by SQLite's backup API: https://www.sqlite.org/backup.html."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from cv_platform.errors import BackupError

_BUSY_SECONDS = 60.0


def copy_sqlite(source: Path, target: Path) -> bool:
    """Writes one consistent state of a database to the new file `target`; False when `source` has gone meanwhile.

    The file itself is never opened but by SQLite: closing another descriptor of it would drop the locks of a
    connection in this process.

    Raises:
        BackupError: it is damaged, or was locked for a minute.
    """
    try:
        with (
            closing(
                sqlite3.connect(f"file:{quote(str(source.absolute()))}?mode=ro", uri=True, timeout=_BUSY_SECONDS)
            ) as reading,
            closing(sqlite3.connect(target)) as writing,
        ):
            reading.backup(writing)
            verdict = writing.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.DatabaseError as err:
        if not source.exists():
            target.unlink(missing_ok=True)
            return False
        raise BackupError(
            f"{source}: expected a readable SQLite database. Received: {err}. Repair or remove it."
        ) from err
    if verdict != "ok":
        raise BackupError(f"{source}: expected an intact SQLite database. Received: {verdict}. Repair or remove it.")
    return True
