"""Moves spooled entries to PostgreSQL in the background, for as long as it takes.

An entry is deleted from the spool only after the database has committed it; a crash in between sends it again, which
the database ignores. While the database is away, or has another schema, entries stay. An entry that the database
refuses for its values is found by halving the batch and put aside (`rejected_entries`), so that it blocks nobody. Where
many are refused and none is taken, the fault is not theirs, but the schema's or this version's: then all stay.

Where there is no database, and none can be expected, the oldest entries leave a spool that is nearly full
(`LogLimits`), so that the service goes on answering.
"""

from __future__ import annotations

import contextlib
import logging
import random
import sqlite3
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cv_platform.database.address import postgres_url
from cv_platform.errors import SchemaMismatchError, SpoolFullError
from cv_platform.serving.log.damaged_spools import put_aside, remove_expired
from cv_platform.serving.log.limits import LogLimits
from cv_platform.serving.log.spool import ChangedMeanwhileError, PoisonError, Spool, SpoolRow
from cv_platform.serving.log.spool_file import LOCK, SQLITE
from cv_platform.serving.telemetry.log_status import DatabaseState, LogStatus

if TYPE_CHECKING:
    from cv_platform.serving.log.database import LogDatabase
    from cv_platform.serving.log.tables import RequestRows

logger = logging.getLogger(__name__)

_BATCH_ROWS = 8000
_LINGER_SECONDS = 0.5
"""After an append, and after each batch that was not full: gathers the next entries into one transaction. Under load a
transaction for each few rows would take the processor from the predictions."""
_BATCH_BYTES = 32 * 1024 * 1024
_MADE_BYTES = 16 * 1024 * 1024
"""Of records and arrays, from which on a batch is not made ahead: as rows it takes up to twice that, beside the one
that is being written."""
_PROBES = 10
"""Entries of a refused batch that are tried one by one, to learn whether any is taken."""
_IDLE_SECONDS = 5.0
"""How often an idle drainer looks whether the database is still there, and for the spools of others that are gone."""
_MOST_ADOPTED = 32
"""Spools of others that are gone, which one drainer takes over at a time."""
_NOTICE_SECONDS = 600.0
"""Between two lines that say how many entries had to leave for want of a database."""
_FIRST_WAIT_SECONDS = 0.2
_LONGEST_WAIT_SECONDS = 15.0
_NO_BOUND = 2**63 - 1


class _ReadBatch(NamedTuple):
    """A batch, and its requests as `COPY` takes them where there was time to make them."""

    rows: list[SpoolRow]
    are_all: bool
    made: RequestRows | None = None


class Drainer:
    """A thread that drains one replica's spool, and the spools of replicas that are gone.

    Args:
        spool: this replica's.
        database_url: PostgreSQL's URL; None: nothing is drained.
        limits: what leaves a full spool then.
        adopt: whether to look for the spools of others that are gone.

    Raises:
        ConfigError: the URL is no PostgreSQL URL.
    """

    def __init__(
        self, spool: Spool, database_url: str | None, limits: LogLimits | None = None, *, adopt: bool = True
    ) -> None:
        self._spool = spool
        self._limits = limits or LogLimits()
        self._url = None if database_url is None else postgres_url(database_url)
        self._database: LogDatabase | None = None
        self._adopts = adopt
        self._adopted: list[Spool] = []
        self._archive: Spool | None = None
        self._ahead: dict[Spool, Future[_ReadBatch]] = {}
        """Of each spool, the batch that is read and made while the database takes the one before."""
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="request-log-reader")
        self._next_adoption = 0.0
        self._known_unusable: set[str] = set()
        # State and error, in one piece: another thread's status must not see one without the other.
        self._state: tuple[DatabaseState, str | None] = (
            ("not configured", None) if database_url is None else ("unreachable", "not connected yet")
        )
        self._drained_rows = self._dropped_rows = self._archived_rows = 0
        self._next_notice = 0.0
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="request-log-drainer", daemon=True)

    def start(self) -> None:
        """Starts draining."""
        self._spool.on_change(self._wake.set)
        self._thread.start()

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Stops after the batch that is under way; what is left stays in the spool."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def status(self) -> LogStatus:
        """Returns the state now; `depth` includes the spools that were taken over."""
        depths, rejected, size = 0, 0, 0
        ages: list[float | None] = []
        for spool in (self._spool, *self._adopted):
            try:
                depths += spool.depth()
                ages.append(spool.oldest_age_seconds())
                rejected += spool.rejected_count()
                size += spool.size_bytes()
            except sqlite3.ProgrammingError:
                continue  # A spool that was taken over has just been emptied and closed.
        database, last_error = self._state
        return LogStatus(
            depth=depths,
            oldest_age_seconds=max((age for age in ages if age is not None), default=None),
            database=database,
            last_error=last_error,
            drained_rows=self._drained_rows,
            rejected=rejected,
            spool_bytes=size,
            dropped_rows=self._dropped_rows,
            archived_rows=self._archived_rows,
        )

    def _run(self) -> None:
        wait_seconds = _FIRST_WAIT_SECONDS
        while not self._stopping.is_set():
            try:
                has_more = self._drain_once()
            except Exception as err:  # A drainer that died would fill the disk in silence.
                if self._database is not None:
                    self._database.disconnect()
                self._note(err)
                # Replicas that lost the database together must not come back together.
                self._stopping.wait(wait_seconds * random.uniform(0.5, 1.0))
                wait_seconds = min(2 * wait_seconds, _LONGEST_WAIT_SECONDS)
                continue
            wait_seconds = _FIRST_WAIT_SECONDS
            if not has_more:
                self._wake.wait(_IDLE_SECONDS)
                self._wake.clear()
                self._stopping.wait(_LINGER_SECONDS)
        self._reader.shutdown()
        for spool in (*self._adopted, *([self._archive] if self._archive is not None else [])):
            spool.close()
        if self._database is not None:
            self._database.close()

    def _drain_once(self) -> bool:
        """Drains one batch of each spool; returns whether there was more than that."""
        self._spool.write_outcomes()
        self._adopt_orphans()  # Before anything that the database may hinder: they count in the status.
        if self._url is None:
            has_more = self._make_room()
            self._state = "not configured", None
            return has_more
        if self._database is None:
            from cv_platform.serving.log.database import LogDatabase

            self._database = LogDatabase(self._url)
        database = self._database
        if database.connect():
            self._state = "ok", None
        has_more = self._drain_batch(database, self._spool)
        for orphan in tuple(self._adopted):
            with self._damage_set_aside(orphan):
                if self._drain_batch(database, orphan):
                    has_more = True
                else:
                    self._release(orphan)  # Nobody adds to it any more.
        if not has_more:
            database.check()
        return has_more

    def _drain_batch(self, database: LogDatabase, spool: Spool) -> bool:
        """Returns whether there was more than one batch."""
        rows, are_all, made = self._next_batch(spool)
        try:
            if rows:
                if not are_all:
                    self._ahead[spool] = self._reader.submit(_read_ahead, spool, rows[-1].id)
                self._write(database, spool, rows, made)
        except ChangedMeanwhileError:
            logger.info("An entry was deleted on its way to the database; the batch is read again.")
            self._forget_ahead(spool)
            return True
        except BaseException:  # What was not written has to come first.
            self._forget_ahead(spool)
            raise
        if are_all:
            spool.finish_delete()
            spool.shrink()
        return not are_all

    def _next_batch(self, spool: Spool) -> _ReadBatch:
        if (ahead := self._ahead.pop(spool, None)) is not None:
            return ahead.result()
        return _ReadBatch(*spool.read_batch(_BATCH_ROWS, _BATCH_BYTES))  # Made while the database takes it.

    def _forget_ahead(self, spool: Spool) -> None:
        """Returns once nobody reads ahead in a spool any more."""
        if (ahead := self._ahead.pop(spool, None)) is not None:
            ahead.exception()

    def _write(self, database: LogDatabase, spool: Spool, rows: Sequence[SpoolRow], made: RequestRows | None) -> None:
        try:
            database.write(spool, rows, made)
        except PoisonError as err:
            if len(rows) >= _PROBES:
                self._require_one_taken(database, spool, rows, err)
            self._write_or_halve(database, spool, rows)
        else:
            self._forget(spool, rows)

    def _require_one_taken(
        self, database: LogDatabase, spool: Spool, rows: Sequence[SpoolRow], refused: PoisonError
    ) -> None:
        """Returns if the database takes at least one of some rows that are chosen by chance.

        Raises:
            SchemaMismatchError: it takes none.
        """
        for row in random.sample(rows, _PROBES):
            try:
                database.write(spool, [row])  # Writing it again is no harm.
            except PoisonError as err:
                refused = err
            else:
                return
        raise SchemaMismatchError(
            f"Expected the database to take at least one of {_PROBES} log entries that were chosen by chance of "
            f"{len(rows)}. Received: none; the last one: {refused}. They stay in the spool: another program has "
            "changed the tables, or another version of cv_platform has written the entries."
        ) from refused

    def _forget(self, spool: Spool, rows: Sequence[SpoolRow]) -> None:
        spool.begin_delete(rows)
        self._drained_rows += len(rows)

    def _write_or_halve(self, database: LogDatabase, spool: Spool, rows: Sequence[SpoolRow]) -> None:
        try:
            database.write(spool, rows)
        except PoisonError as err:
            if len(rows) == 1:
                logger.error(
                    "The database refuses log entry %s, which is put aside: %s. `cv-platform log rejected` shows it.",
                    rows[0].entry_id,
                    err,
                )
                spool.reject(rows[0], str(err))
                return
            middle = len(rows) // 2
            self._write_or_halve(database, spool, rows[:middle])
            self._write_or_halve(database, spool, rows[middle:])
            return
        self._forget(spool, rows)

    def _note(self, err: Exception) -> None:
        state, last_error = self._state
        of_database = self._database.explained(err) if self._database is not None else None
        if of_database is not None:
            state = "schema mismatch" if isinstance(of_database, SchemaMismatchError) else "unreachable"
            message = str(of_database).strip()
        else:  # What the database answered last is still so, as far as anybody knows.
            is_of_disk = isinstance(err, SpoolFullError | sqlite3.Error | OSError)
            message = f"The spool fails: {err}" if is_of_disk else f"The drainer fails: {err!r}"
        self._state = state, message
        if message != last_error:
            logger.warning("The request log stays in the spool: %s", message)

    def _make_room(self) -> bool:
        """Takes the oldest entries out of a spool that is nearly full; returns whether that may not be enough."""
        others_bytes = sum(orphan.used_bytes() for orphan in self._adopted)
        if self._limits.may_have_database() or not self._spool.is_crowded(others_bytes):
            return False
        image_bytes = min(_BATCH_BYTES, self._limits.max_bytes // 20)
        for spool in (*self._adopted, self._spool):
            with self._damage_set_aside(spool):
                rows, are_all = spool.read_batch(_BATCH_ROWS, image_bytes)
                self._let_go(spool, rows)
                if are_all and spool is not self._spool:
                    self._release(spool)
                if rows:
                    return True
        return False  # What fills the disk is somebody else's.

    def _let_go(self, spool: Spool, rows: Sequence[SpoolRow]) -> None:
        if not rows:
            return
        if self._limits.archive is not None:
            if self._archive is None:
                self._archive = Spool(self._limits.archive, replace(self._limits, max_bytes=_NO_BOUND))
            self._archive.take(spool, rows)
            self._archived_rows += len(rows)
        else:
            self._dropped_rows += len(rows)
        spool.delete(rows)
        if time.monotonic() >= self._next_notice:
            self._next_notice = time.monotonic() + _NOTICE_SECONDS
            logger.warning(
                "There is no database, and the spool %s is nearly full (CV_SPOOL_MAX_BYTES, CV_SPARE_DISK_BYTES): its "
                "oldest entries %s; %d so far. Set DATABASE_URL to keep them.",
                self._spool.path,
                f"go to {self._limits.archive}" if self._limits.archive is not None else "are dropped",
                self._archived_rows + self._dropped_rows,
            )

    def _adopt_orphans(self) -> None:
        if not self._adopts or time.monotonic() < self._next_adoption:
            return
        self._next_adoption = time.monotonic() + _IDLE_SECONDS  # First: whatever fails here must not hold up the rest.
        unusable: set[str] = set()
        while len(self._adopted) < _MOST_ADOPTED:
            orphan = _adopt_orphan(self._spool.path.parent, unusable, self._known_unusable)
            if orphan is None:
                break
            self._adopted.append(orphan)
            with self._damage_set_aside(orphan):
                if not orphan.depth() and not orphan.rejected_count():
                    self._release(orphan)
        self._known_unusable = unusable
        remove_expired(self._spool.path.parent, self._limits.keep_days)
        self._spool.forget_rejected(self._limits.keep_days)

    def _release(self, orphan: Spool) -> None:
        self._spool.take_rejected(orphan)
        self._adopted.remove(orphan)
        orphan.close()

    @contextlib.contextmanager
    def _damage_set_aside(self, spool: Spool) -> Generator[None]:
        try:
            yield
        except sqlite3.OperationalError:
            raise  # The disk, which may get better.
        except sqlite3.DatabaseError as err:
            if spool is self._spool:
                raise
            self._adopted.remove(spool)
            spool.close()
            put_aside(spool.path, err)


def _read_ahead(spool: Spool, after: int) -> _ReadBatch:
    from cv_platform.serving.log.tables import make_requests

    rows, are_all = spool.read_batch(_BATCH_ROWS, _BATCH_BYTES, after=after)
    is_small = sum(len(row.record) + len(row.vectors) for row in rows) <= _MADE_BYTES
    return _ReadBatch(rows, are_all, make_requests(rows) if is_small else None)


def _adopt_orphan(directory: Path, unusable: set[str], known: set[str]) -> Spool | None:
    """Returns a spool that nobody owns any more, if there is one.

    Args:
        directory: of all spools.
        unusable: names that are left alone; those that turn out to be unusable now are added.
        known: names that need no line in the log.
    """
    names = {path.stem for extension in (LOCK, SQLITE) for path in directory.glob(f"*{extension}")}
    for name in sorted(names - unusable):
        path = directory / f"{name}{SQLITE}"
        try:
            spool = Spool.adopt(path)
        except sqlite3.DatabaseError as err:
            put_aside(path, err)
            continue
        except SpoolFullError as err:
            if name not in known:
                logger.warning("A spool of a replica that is gone has to wait: %s", err)
            unusable.add(name)
            continue
        if spool is not None:
            logger.info("Taking over the spool of a replica that is gone: %s", path.name)
            return spool
    return None
