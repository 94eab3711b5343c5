"""Moves spooled entries to PostgreSQL in the background, for as long as it takes.

An entry is deleted from the spool only after the database has committed it; a crash in between sends it again, which
the database ignores. While the database is away, or has another schema, entries stay. An entry that the database
refuses for its values is found by halving the batch and put aside, so that it blocks nobody.
"""

from __future__ import annotations

import logging
import random
import sqlite3
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import psycopg2
from sqlalchemy import Engine
from sqlalchemy.pool import PoolProxiedConnection

from cv_platform.database.connection import make_engine, normalise_url, typed_error
from cv_platform.errors import SchemaMismatchError, SpoolFullError
from cv_platform.serving.log_tables import Cursor, check_revision, prepare_session, write_entries
from cv_platform.serving.spool import Spool, SpoolRow
from cv_platform.serving.spool_file import EXTENSIONS, LOCK, SQLITE

logger = logging.getLogger(__name__)

DatabaseState = Literal["ok", "unreachable", "schema mismatch", "not configured"]

_BATCH_ROWS = 1000
_LINGER_SECONDS = 0.5
"""After an append: gathers the next ones into the same transaction."""
_BATCH_IMAGE_BYTES = 32 * 1024 * 1024
_IDLE_SECONDS = 5.0
"""How often an idle drainer looks whether the database is still there, and for the spools of others that are gone."""
_STATEMENT_SECONDS = 120.0
_FIRST_WAIT_SECONDS = 0.2
_LONGEST_WAIT_SECONDS = 15.0
_POISON_CLASSES = frozenset({"21", "22", "23", "54", "P0"})
"""Cardinality, data, constraint, limit of the program, a trigger's own error: the row is at fault, and will stay so."""
_DAMAGED_RECORD = (ValueError, KeyError, TypeError, AttributeError, struct.error)


@dataclass(frozen=True)
class DrainStatus:
    """What the request log is doing; `dropped` is there to say that nothing ever is."""

    depth: int
    oldest_age_seconds: float | None
    database: DatabaseState
    last_error: str | None
    drained_rows: int
    rejected: int
    spool_bytes: int = 0
    dropped: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields by name, for JSON."""
        return asdict(self)


class _PoisonError(Exception):
    """The database refuses the values of at least one row of a batch, or a row's record is damaged."""


class _ChangedMeanwhileError(Exception):
    """A deletion has changed an entry between its reading and its commit."""


class Drainer:
    """A thread that drains one replica's spool, and the spools of replicas that are gone.

    Args:
        spool: this replica's.
        database_url: PostgreSQL's URL; None: nothing is drained, everything stays in the spool.
        adopt: whether to look for the spools of others that are gone.
    """

    def __init__(self, spool: Spool, database_url: str | None, *, adopt: bool = True) -> None:
        self._spool = spool
        self._url = None if database_url is None else normalise_url(database_url)
        self._engine = (
            None
            if database_url is None
            else make_engine(database_url, pool_size=1, statement_timeout_seconds=_STATEMENT_SECONDS)
        )
        self._connection: PoolProxiedConnection | None = None
        self._adopts = adopt
        self._adopted: Spool | None = None
        self._next_adoption = 0.0
        self._unusable: set[str] = set()
        self._state: DatabaseState = "not configured" if database_url is None else "unreachable"
        self._last_error: str | None = None if database_url is None else "not connected yet"
        self._drained_rows = 0
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._progress = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="request-log-drainer", daemon=True)

    def start(self) -> None:
        """Starts draining."""
        self._spool.on_append(self._wake.set)
        self._thread.start()

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Stops after the batch that is under way; what is left stays in the spool."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def status(self) -> DrainStatus:
        """Returns the state now; `depth` includes a spool that is being taken over."""
        spools = [spool for spool in (self._spool, self._adopted) if spool is not None]
        depths, rejected, size = 0, 0, 0
        ages: list[float | None] = []
        for spool in spools:
            try:
                depths += spool.depth()
                ages.append(spool.oldest_age_seconds())
                rejected += spool.rejected_count()
                size += spool.size_bytes()
            except sqlite3.ProgrammingError:
                continue  # A spool that was taken over has just been emptied and closed.
        return DrainStatus(
            depth=depths,
            oldest_age_seconds=max((age for age in ages if age is not None), default=None),
            database=self._state,
            last_error=self._last_error,
            drained_rows=self._drained_rows,
            rejected=rejected,
            spool_bytes=size,
        )

    def wait_until_drained(self, timeout_seconds: float) -> bool:
        """Returns True once the database has every entry appended before the call, False after `timeout_seconds`."""
        deadline = time.monotonic() + timeout_seconds
        with self._progress:
            while self.status().depth:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._wake.set()
                self._progress.wait(min(left, 1.0))
        return True

    def _run(self) -> None:
        wait_seconds = _FIRST_WAIT_SECONDS
        while not self._stopping.is_set():
            try:
                has_more = self._drain_once()
            except Exception as err:  # A drainer that died would fill the disk in silence.
                self._disconnect()
                self._note(err)
                # Replicas that lost the database together must not come back together.
                self._stopping.wait(wait_seconds * random.uniform(0.5, 1.0))
                wait_seconds = min(2 * wait_seconds, _LONGEST_WAIT_SECONDS)
                continue
            wait_seconds = _FIRST_WAIT_SECONDS
            with self._progress:
                self._progress.notify_all()
            if not has_more:
                self._wake.wait(_IDLE_SECONDS)
                self._wake.clear()
                self._stopping.wait(_LINGER_SECONDS)
        self._disconnect()
        if self._adopted is not None:
            self._adopted.close()
        if self._engine is not None:
            self._engine.dispose()

    def _drain_once(self) -> bool:
        """Drains one batch of each spool; returns whether there may be more."""
        if self._engine is None:
            return False
        if self._connection is None:
            self._connection = _connect(self._engine)
            self._state, self._last_error = "ok", None
        has_more = self._drain_batch(self._connection, self._spool)
        has_more = self._drain_orphan(self._connection) or has_more
        if not has_more:
            with _cursor(self._connection) as cursor:
                check_revision(cursor)
            self._connection.rollback()
        return has_more

    def _drain_batch(self, connection: PoolProxiedConnection, spool: Spool) -> bool:
        rows = spool.read_batch(_BATCH_ROWS, _BATCH_IMAGE_BYTES)
        if not rows:
            spool.shrink()
            return False
        try:
            self._write_or_halve(connection, spool, rows)
        except _ChangedMeanwhileError:
            logger.info("An entry was deleted on its way to the database; the batch is read again.")
        return True

    def _write_or_halve(self, connection: PoolProxiedConnection, spool: Spool, rows: Sequence[SpoolRow]) -> None:
        try:
            _write(connection, spool, rows)
        except _PoisonError as err:
            if len(rows) == 1:
                logger.error("The request log refuses entry %s for good: %s", rows[0].entry_id, err)
                spool.reject(rows[0], str(err))
                return
            middle = len(rows) // 2
            self._write_or_halve(connection, spool, rows[:middle])
            self._write_or_halve(connection, spool, rows[middle:])
            return
        spool.delete(rows)
        self._drained_rows += len(rows)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.invalidate()
            self._connection = None

    def _note(self, err: Exception) -> None:
        if isinstance(err, psycopg2.Error) and self._url is not None:
            err = typed_error(err, self._url) or err
        if isinstance(err, SpoolFullError | sqlite3.Error):
            message = f"The spool fails: {err}"
        else:
            self._state = "schema mismatch" if isinstance(err, SchemaMismatchError) else "unreachable"
            message = str(err).strip()
        if message != self._last_error:
            logger.warning("The request log stays in the spool: %s", message)
        self._last_error = message

    def _drain_orphan(self, connection: PoolProxiedConnection) -> bool:
        if self._adopted is None and self._adopts and time.monotonic() >= self._next_adoption:
            self._adopted = _adopt_orphan(self._spool.path.parent, self._unusable)
            if self._adopted is None:
                self._next_adoption = time.monotonic() + _IDLE_SECONDS
        orphan = self._adopted
        if orphan is None:
            return False
        try:
            if not self._drain_batch(connection, orphan):
                self._spool.take_rejected(orphan)
                self._adopted = None
                orphan.close()
        except sqlite3.OperationalError:
            raise  # The disk, which may get better.
        except sqlite3.DatabaseError as err:
            self._adopted = None
            orphan.close()
            _put_aside(orphan.path, err)
        return True


def _cursor(connection: PoolProxiedConnection) -> AbstractContextManager[Cursor]:
    return closing(cast(Cursor, connection.cursor()))  # SQLAlchemy's type is that of any driver.


def _connect(engine: Engine) -> PoolProxiedConnection:
    connection = engine.raw_connection()
    try:
        with _cursor(connection) as cursor:
            prepare_session(cursor)
        connection.commit()
    except BaseException:
        connection.invalidate()
        raise
    return connection


def _write(connection: PoolProxiedConnection, spool: Spool, rows: Sequence[SpoolRow]) -> None:
    try:
        with _cursor(connection) as cursor:
            write_entries(cursor, rows, spool.read_image)
        _require_unchanged(connection, spool, rows)  # What was deleted meanwhile must not arrive.
        connection.commit()
    except psycopg2.Error as err:
        if (err.pgcode or "")[:2] in _POISON_CLASSES:
            connection.rollback()
            _require_unchanged(connection, spool, rows)
            raise _PoisonError(str(err).strip()) from err
        raise
    except _DAMAGED_RECORD as err:
        connection.rollback()
        _require_unchanged(connection, spool, rows)
        raise _PoisonError(f"{type(err).__name__}: {err}") from err


def _require_unchanged(connection: PoolProxiedConnection, spool: Spool, rows: Sequence[SpoolRow]) -> None:
    if not spool.still_holds(rows):
        connection.rollback()
        raise _ChangedMeanwhileError


def _adopt_orphan(directory: Path, unusable: set[str]) -> Spool | None:
    """Returns a spool that nobody owns any more, if there is one; names that cannot be used are added to `unusable`."""
    names = {path.stem for extension in (LOCK, SQLITE) for path in directory.glob(f"*{extension}")}
    for name in sorted(names - unusable):
        path = directory / f"{name}{SQLITE}"
        try:
            spool = Spool.adopt(path)
        except sqlite3.DatabaseError as err:
            _put_aside(path, err)
            continue
        except SpoolFullError as err:
            logger.warning("A spool of a replica that is gone has to wait for the next start: %s", err)
            unusable.add(name)
            continue
        if spool is not None:
            logger.info("Taking over the spool of a replica that is gone: %s", path.name)
            return spool
    return None


def _put_aside(path: Path, err: sqlite3.DatabaseError) -> None:
    """Renames a damaged spool, so that it is there for a person and in nobody's way."""
    logger.error("%s is damaged and is put aside: %s", path, err)
    for extension in EXTENSIONS:
        damaged = path.with_name(path.name + extension)
        if damaged.exists():
            damaged.rename(path.with_name(f"{path.stem}.damaged{extension}"))
