"""Dumps a PostgreSQL database and loads it again, by PostgreSQL's own programs from the installation's wheel.

https://www.postgresql.org/docs/18/app-pgdump.html
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psycopg2
from psycopg2 import sql
from psycopg2.extensions import ISOLATION_LEVEL_REPEATABLE_READ, connection
from pydantic import BaseModel, ConfigDict
from sqlalchemy.engine import make_url

from cv_platform.database.pg_binaries import POSTGRES_MAJOR, ServerUser, find_binaries, server_environment
from cv_platform.errors import BackupError, DatabaseUnavailableError

_MINIMUM_MAJOR = 10


class DatabaseDump(BaseModel):
    """What a dump holds.

    Attributes:
        server_major: PostgreSQL's major version that the data came from.
        rows: by table.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    server_major: int
    rows: dict[str, int]

    def require_loadable(self) -> None:
        """Refuses a dump of a newer PostgreSQL than the one here.

        Raises:
            BackupError: it is one.
        """
        if self.server_major > POSTGRES_MAJOR:
            raise BackupError(
                f"Expected a dump of PostgreSQL {POSTGRES_MAJOR} or older. Received: of {self.server_major}. "
                "Restore it with the release that made it, or a newer one."
            )


def database_bytes(url: str) -> int:
    """Returns the size of a database on the server's disk."""
    database = _connect(url)
    try:
        return int(_values(database, sql.SQL("SELECT pg_database_size(current_database())"))[0])
    finally:
        database.close()


def dump_database(url: str, target: Path) -> DatabaseDump:
    """Writes one consistent state of a database to `target` while others use it; the rows counted are those dumped.

    Raises:
        DatabaseUnavailableError: it cannot be reached.
        BackupError: its server is newer than the programs here, or they refuse.
    """
    database = _connect(url)
    try:
        major = database.server_version // 10_000
        if not _MINIMUM_MAJOR <= major <= POSTGRES_MAJOR:
            raise BackupError(
                f"Expected PostgreSQL {POSTGRES_MAJOR} or older, as the pg_dump here is of that version. "
                f"Received: {major}. Back it up with its own pg_dump."
            )
        database.set_session(isolation_level=ISOLATION_LEVEL_REPEATABLE_READ, readonly=True)
        rows = _count_rows(database)
        # Both see the same rows, whatever is written meanwhile.
        (snapshot,) = _values(database, sql.SQL("SELECT pg_export_snapshot()"))
        _run(
            url,
            *("pg_dump", "--format=custom", "--compress=none", "--no-owner", "--no-privileges"),
            *(f"--snapshot={snapshot}", f"--file={target}"),
        )
    except psycopg2.Error as err:
        raise BackupError(f"Expected the database to be readable. Received: {str(err).strip()}") from err
    finally:
        database.close()
    return DatabaseDump(server_major=major, rows=rows)


def load_database(url: str, dump: Path, expected: DatabaseDump) -> None:
    """Loads a dump into an empty database, all or nothing, and compares the rows.

    Raises:
        DatabaseUnavailableError: it cannot be reached.
        BackupError: the dump is damaged, or the database not empty.
    """
    _run(url, "pg_restore", "--no-owner", "--no-privileges", "--exit-on-error", "--single-transaction", str(dump))
    database = _connect(url)
    try:
        rows = _count_rows(database)
    finally:
        database.close()
    if rows != expected.rows:
        raise BackupError(f"Expected rows by table: {expected.rows}. Received: {rows}. Use another backup.")


def _count_rows(database: connection) -> dict[str, int]:
    tables = _values(database, sql.SQL("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"))
    return {
        table: int(_values(database, sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier("public", table)))[0])
        for table in tables
    }


def _values(database: connection, statement: sql.Composable) -> list:
    with database.cursor() as cursor:
        cursor.execute(statement)
        return [row[0] for row in cursor.fetchall()]


def _connect(url: str) -> connection:
    try:
        return psycopg2.connect(
            make_url(url).set(drivername="postgresql").render_as_string(hide_password=False), connect_timeout=10
        )
    except psycopg2.OperationalError as err:
        raise DatabaseUnavailableError(
            f"Expected PostgreSQL at {make_url(url).host}. Received: {str(err).strip()}. Check that it runs."
        ) from err


def _run(url: str, program: str, *arguments: str) -> None:
    parsed = make_url(url)
    binaries = find_binaries(ServerUser(os.geteuid(), os.getegid()))
    command = [
        str(binaries / program),
        *("--no-password", f"--host={parsed.host}", f"--port={parsed.port or 5432}"),
        *(f"--username={parsed.username}", f"--dbname={parsed.database}"),
        *arguments,
    ]
    # Not on the command line, which every user of the machine may read.
    environment = {**server_environment(), "PGPASSWORD": str(parsed.password or "")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BackupError(f"Expected {program} to succeed. Received: {result.stderr.strip()[-2000:]}")
