"""Log entries that the database has refused: shows them, and puts them back into the queue once the reason is mended.

    cv-platform log rejected [--requeue [ENTRY_ID …]]
    python -m cv_platform.serving.log.rejected_entries [--requeue [ENTRY_ID …]]       where there is only the service

The spools' owners may be at work: what was put back is drained by them within seconds.
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypeVar

from cv_platform.errors import CvPlatformError, ServiceError
from cv_platform.serving.log.spool_file import SQLITE, open_existing, requeue_rejected
from cv_platform.settings import Settings

_T = TypeVar("_T")


class Rejection(NamedTuple):
    """One refused entry, the reason, and the spool that it lies in."""

    entry_id: str
    kind: str
    rejected_on: datetime
    reason: str
    spool: str


def find_rejected(directory: Path) -> list[Rejection]:
    """Returns the refused entries in all spools of a folder, the oldest of each first.

    Raises:
        ServiceError: a spool cannot be read.
    """

    def look(path: Path, connection: sqlite3.Connection) -> list[Rejection]:
        query = "SELECT entry_id, kind, rejected_on, reason FROM rejected ORDER BY rowid"
        return [
            Rejection(entry_id, kind, datetime.fromtimestamp(seconds, UTC), reason, path.name)
            for entry_id, kind, seconds, reason in connection.execute(query)
        ]

    return [entry for found in _in_each(directory, look) for entry in found]


def requeue(directory: Path, entry_ids: Collection[str] | None = None) -> int:
    """Puts refused entries (None: all) back into their spools' queues; returns how many.

    Raises:
        ServiceError: a spool cannot be written.
    """

    def put_back(_: Path, connection: sqlite3.Connection) -> int:
        connection.execute("BEGIN IMMEDIATE")
        count = requeue_rejected(connection, entry_ids)
        connection.execute("COMMIT")
        return count

    return sum(_in_each(directory, put_back))


def show_rejected(settings: Settings, *, requeue_ids: Sequence[str] | None, say: Callable[[str], None]) -> None:
    """Shows the refused entries, a line each.

    Args:
        settings: of the installation.
        requeue_ids: those that are put back into the queue first; empty: all; None: none.
        say: takes each line.

    Raises:
        ServiceError: a spool cannot be read or written.
    """
    directory = settings.home / "spool"
    if requeue_ids is not None:
        count = requeue(directory, set(requeue_ids) or None)
        say(f"{count} log entries wait for the database again.")
    left = find_rejected(directory)
    for entry in left:
        reason = " ".join(entry.reason.split())
        say(f"{entry.entry_id}  {entry.kind}  refused {entry.rejected_on:%Y-%m-%d %H:%M:%S} UTC  {reason}")
    if not left and requeue_ids is None:
        say(f"The database has refused none of the log entries in {directory}.")
    elif requeue_ids is None:
        say("When the reason is mended: --requeue puts them back into the queue.")
    elif left:
        say(f"{len(left)} refused entries stay: not asked for, or their record cannot be read.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command understands."""
    parser.add_argument(
        "--requeue", nargs="*", metavar="ENTRY_ID", help="put these (none named: all) back into the queue"
    )


def _in_each(directory: Path, work: Callable[[Path, sqlite3.Connection], _T]) -> list[_T]:
    results: list[_T] = []
    for path in sorted(directory.glob(f"*{SQLITE}")):
        try:
            with closing(open_existing(path)) as connection:
                results.append(work(path, connection))
        except sqlite3.Error as err:
            # Otherwise drained and deleted since it was listed, or not yet made.
            if path.exists() and "no such table" not in str(err):
                raise ServiceError(
                    f"Expected to read and write the spool {path}. Received: {err}. Run this as the service's user."
                ) from err
    return results


def main() -> int:
    """Runs the command where there is only the service."""
    parser = argparse.ArgumentParser(prog="python -m cv_platform.serving.log.rejected_entries", description=__doc__)
    add_arguments(parser)
    try:
        show_rejected(
            Settings.from_environment(),
            requeue_ids=parser.parse_args().requeue,
            say=lambda line: print(line, flush=True),  # noqa: T201
        )
    except CvPlatformError as err:
        print(f"error: {err}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
