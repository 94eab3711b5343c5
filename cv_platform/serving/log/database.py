"""One connection to the request log's database, by which a drainer writes.

It needs the driver and SQLAlchemy, whose imports take longer than loading a small model: `drainer.py` imports it in
its thread, so that nobody waits for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from typing import cast

import psycopg2
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import PoolProxiedConnection

from cv_platform.database.connection import make_engine, normalise_url, typed_error
from cv_platform.errors import DatabaseError
from cv_platform.serving.log.spool import ChangedMeanwhileError, PoisonError, Spool, SpoolRow
from cv_platform.serving.log.tables import DAMAGED_RECORD, Cursor, RequestRows, check_revision, write_entries

_STATEMENT_SECONDS = 120.0
_POISON_CLASSES = frozenset({"21", "22", "23", "54", "P0"})
"""Cardinality, data, constraint, limit of the program, a trigger's own error: the row is at fault, and will stay so."""


class LogDatabase:
    """Writes batches of spooled entries; for one thread. Nothing connects before `connect`.

    Args:
        url: PostgreSQL's.

    Raises:
        ConfigError: the URL is no PostgreSQL URL.
        SchemaMismatchError: (all methods) the database has another revision.
        DatabaseUnavailableError, psycopg2.Error: (all methods) it refuses or is gone; see `explained`.
    """

    def __init__(self, url: str) -> None:
        self._url = normalise_url(url)
        self._engine = make_engine(url, pool_size=1, statement_timeout_seconds=_STATEMENT_SECONDS)
        self._connection: PoolProxiedConnection | None = None

    def connect(self) -> bool:
        """Makes the connection, unless there is one; returns whether it did."""
        if self._connection is not None:
            return False
        connection = self._engine.raw_connection()
        try:
            with _cursor(connection) as cursor:
                check_revision(cursor)
            connection.rollback()
        except BaseException:
            connection.invalidate()
            raise
        self._connection = connection
        return True

    def write(self, spool: Spool, rows: Sequence[SpoolRow], made: RequestRows | None = None) -> None:
        """Returns once the database has committed the rows.

        Args:
            spool: where they are.
            rows: as they were read.
            made: what `tables.make_requests` has returned for them.

        Raises:
            PoisonError: at least one of them can never be written; none was.
            ChangedMeanwhileError: a deletion has changed one since it was read; none was written.
        """
        connection = self._connected()
        try:
            with _cursor(connection) as cursor:
                write_entries(cursor, rows, spool.read_image, made)
            _require_unchanged(connection, spool, rows)  # What was deleted meanwhile must not arrive.
            connection.commit()
        except psycopg2.Error as err:
            if (err.pgcode or "")[:2] in _POISON_CLASSES:
                connection.rollback()
                _require_unchanged(connection, spool, rows)
                raise PoisonError(str(err).strip()) from err
            raise
        except DAMAGED_RECORD as err:
            connection.rollback()
            _require_unchanged(connection, spool, rows)
            raise PoisonError(f"{type(err).__name__}: {err}") from err

    def check(self) -> None:
        """Returns if the database is there and has the tables of this version."""
        connection = self._connected()
        with _cursor(connection) as cursor:
            check_revision(cursor)
        connection.rollback()

    def explained(self, err: Exception) -> Exception | None:
        """Returns an error that came from the database, the platform's own where it has one; None for any other."""
        if isinstance(err, psycopg2.Error):
            return typed_error(err, self._url) or err
        return err if isinstance(err, DatabaseError | SQLAlchemyError) else None

    def disconnect(self) -> None:
        """Lets go of the connection, which may be broken; `connect` makes another one."""
        if self._connection is not None:
            self._connection.invalidate()
            self._connection = None

    def close(self) -> None:
        """Ends it for good."""
        self.disconnect()
        self._engine.dispose()

    def _connected(self) -> PoolProxiedConnection:
        if self._connection is None:
            raise RuntimeError("Expected a connection. Received: none. Call connect first.")
        return self._connection


def _cursor(connection: PoolProxiedConnection) -> AbstractContextManager[Cursor]:
    return closing(cast(Cursor, connection.cursor()))  # SQLAlchemy's type is that of any driver.


def _require_unchanged(connection: PoolProxiedConnection, spool: Spool, rows: Sequence[SpoolRow]) -> None:
    if not spool.still_holds(rows):
        connection.rollback()
        raise ChangedMeanwhileError
