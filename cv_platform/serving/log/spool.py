"""The local durable queue of the request log: what `append` has taken survives the process and the machine.

One SQLite file per replica process (`<uuid>.sqlite`, write-ahead log, `synchronous=FULL`) and beside it `<uuid>.lock`,
which its owner keeps locked; the kernel drops the lock with the process, and then a successor may adopt the file. (The
lock is a file of its own because closing any descriptor of a database file drops SQLite's own locks on it.)

One thread at a time writes (`group_commit.py`), any number read. https://www.sqlite.org/wal.html
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple
from uuid import UUID, uuid4

from cv_platform.errors import SpoolFullError
from cv_platform.serving.log.entry import (
    FeedbackEntry,
    LogEntry,
    StoredPrediction,
    encode,
)
from cv_platform.serving.log.group_commit import GroupCommit, Operation
from cv_platform.serving.log.limits import LogLimits
from cv_platform.serving.log.outcomes import Outcomes
from cv_platform.serving.log.room import Room
from cv_platform.serving.log.spool_file import (
    EXTENSIONS,
    LOCK,
    SQLITE,
    VACUUM_PAGES,
    connect,
    copy_entries,
    copy_rejected,
    delete_entries,
    find_in_file,
    free_pages,
    insert_entry,
    lengthen_log,
    move_to_rejected,
    prepare,
    try_insert,
)

logger = logging.getLogger(__name__)

_TRY_SECONDS = 10.0
_JOB_SECONDS = 60.0
_DELETED_BYTES = 2 * 1024 * 1024
"""By one transaction, whose write-ahead log must have room in the reserve when the disk is full."""
_ENTRY_BYTES = 4096
"""Of an entry, beside its upload and map."""
_GONE = object()
_SHARING_SECONDS = 0.01
"""How long a busy worker's entry waits for others to share its transaction: each one costs more than an entry, but with
too many of them so many answers would leave at once that the threads which predict would have to wait for requests."""


class BegunEntry(NamedTuple):
    """An entry that is written while its answer is still being made.

    Attributes:
        written: done once the entry is durable; it may hold a SpoolFullError.
        settle: takes the message that the client gets and the seconds from reception to answer. `Spool.write_outcomes`
            writes them; what they replace is what a crash before leaves.
    """

    written: Future[None]
    settle: Callable[[str, float], None]


class SpoolRow(NamedTuple):
    """One entry on its way to the database; `image_sha256` names its upload, which `Spool.read_image` returns."""

    id: int
    entry_id: str
    kind: str
    prediction_id: str | None
    record: str
    vectors: bytes
    image_sha256: str | None
    image_bytes: int


class SpoolBatch(NamedTuple):
    """The oldest entries of a spool, and whether there are no others."""

    rows: list[SpoolRow]
    are_all: bool


class RejectedEntry(NamedTuple):
    """An entry that the database refuses, with the reason; it keeps its record and arrays for a person to look at."""

    entry_id: str
    kind: str
    record: str
    reason: str


class PoisonError(Exception):
    """The database refuses the values of at least one row of a batch, or a row's record is damaged."""


class ChangedMeanwhileError(Exception):
    """A deletion has changed an entry between its reading and its commit."""


class Spool:
    """One spool file, owned by this process; safe to use from many threads.

    Args:
        directory: of all replicas' spool files; made with mode 700, as it holds uploads.
        limits: of this process.
    """

    def __init__(self, directory: Path, limits: LogLimits | None = None) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._open(*_own_new(directory), limits or LogLimits())
        with contextlib.suppress(OSError):  # Who appends hears of a disk that is full.
            if self._room.is_ample():
                lengthen_log(self.path)

    @classmethod
    def adopt(cls, path: Path) -> Spool | None:
        """Returns the spool of a process that is gone; None if it lives, or if its file is gone too.

        Raises:
            sqlite3.DatabaseError: the file is damaged.
        """
        lock_path = path.with_suffix(LOCK)
        lock = _try_to_own(lock_path)
        if lock is None:
            return None
        if not path.exists():
            lock_path.unlink(missing_ok=True)
            os.close(lock)
            return None
        spool = cls.__new__(cls)
        spool._open(path, lock, LogLimits(max_bytes=2**63 - 1))
        return spool

    def _open(self, path: Path, lock: int, limits: LogLimits) -> None:
        self.path = path
        self._lock = lock
        self._room = Room(path, limits)
        self._listener: Callable[[], None] = lambda: None
        self._leaving: tuple[Future[None], int] | None = None
        """Entries that are being deleted, up to an id; set by the thread that deletes."""
        self._read_lock = threading.Lock()
        writing = None
        try:
            writing = connect(path)
            prepare(writing, path)
            self._reading = connect(path)
        except sqlite3.DatabaseError as err:
            if writing is not None:
                writing.close()
            os.close(lock)
            if isinstance(err, sqlite3.OperationalError):
                raise SpoolFullError(
                    f"{path}: expected a writable spool. Received: {err}. Free space or fix rights."
                ) from err
            raise
        self._writer = GroupCommit(writing, path, lambda: self._listener())
        self._outcomes = Outcomes(self._writer, lambda: self._listener())

    def submit(self, entry: LogEntry | FeedbackEntry) -> Future[None]:
        """Queues the entry and returns at once; the future has a result when the entry is durable.

        Raises:
            SpoolFullError: too much is waiting for the disk. The future may hold a SpoolFullError, too.
        """
        return self._writer.submit(*self._insertion(entry), is_whole=True)

    def begin(self, entry: LogEntry, *, more_follow: bool = False) -> BegunEntry:
        """Queues the entry of a prediction whose answer is still being made; `settle` it, whatever happens.

        Args:
            entry: what is known so far, all of it but message and time.
            more_follow: whether others are about to be queued, and share its transaction.

        Raises:
            SpoolFullError: as `submit`.
        """
        within_seconds = _SHARING_SECONDS if more_follow else 0.0
        with self._outcomes.begun(entry) as settle:
            written = self._writer.submit(*self._insertion(entry), within_seconds=within_seconds, is_whole=True)
            return BegunEntry(written, settle)

    def write_outcomes(self) -> None:
        """Returns once the disk has what entries were settled with, or refuses it: they are drained as they began.

        Raises:
            SpoolFullError: the disk does not answer.
        """
        while self._outcomes.are_waiting:
            self._wait_for(self._outcomes.queue())

    def try_out(self) -> None:
        """Returns once the disk has shown that it would take an entry: one is written and removed in one transaction.

        Raises:
            SpoolFullError: it would not.
        """

        def write_and_remove(connection: sqlite3.Connection) -> None:
            self._room.require(connection)
            try_insert(connection)

        try:
            self._writer.submit(write_and_remove).result(_TRY_SECONDS)
        except TimeoutError as err:
            raise SpoolFullError(
                f"Expected {self.path} to be written to within {_TRY_SECONDS:g} s. Received: no answer."
            ) from err

    def on_change(self, listener: Callable[[], None]) -> None:
        """Calls `listener` whenever there may be something to drain: after a commit of entries, after a settling."""
        self._listener = listener

    def read_batch(self, max_rows: int, max_bytes: int, *, after: int = 0) -> SpoolBatch:
        """Returns the oldest settled entries, of at most `max_bytes` in all with their uploads, but at least one entry.

        Those that are not settled, or not as they were settled (`write_outcomes`), count as not there. While some are
        being deleted (`begin_delete`), so do all before them, and all up to the id `after`.
        """
        leaving = self._leaving
        after = max(after, leaving[1] if leaving else 0)
        unsettled = self._outcomes.unsettled.copy()  # First: what is added later must not be in what is read.
        rows: list[SpoolRow] = []
        seen: set[str | None] = set()
        size, is_cut = 0, False
        query = (
            "SELECT e.id, e.entry_id, e.kind, e.prediction_id, e.record, e.vectors, e.image_sha256, "
            "coalesce(i.bytes, 0) FROM entries e LEFT JOIN images i ON i.sha256 = e.image_sha256 "
            "WHERE e.id > ? ORDER BY e.id LIMIT ?"
        )
        with (
            self._reader() as connection,
            contextlib.closing(connection.execute(query, (after, max_rows + 1))) as found,
        ):
            for row in map(SpoolRow._make, found):
                size += len(row.record) + len(row.vectors) + (0 if row.image_sha256 in seen else row.image_bytes)
                if is_cut := len(rows) == max_rows or (bool(rows) and size > max_bytes):
                    break
                seen.add(row.image_sha256)
                rows.append(row)
        unsettled |= self._outcomes.unsettled
        settled = [row for row in rows if row.entry_id not in unsettled]
        return SpoolBatch(settled, are_all=not (is_cut and settled))

    def still_holds(self, rows: Sequence[SpoolRow]) -> bool:
        """Returns whether the entries are as they were read: a deletion may have stripped one since."""
        span = (rows[0].id, rows[-1].id)
        with self._reader() as connection:
            query = "SELECT id, prediction_id FROM entries WHERE id BETWEEN ? AND ?"
            found = dict(connection.execute(query, span).fetchall())
        return all(found.get(row.id, _GONE) == row.prediction_id for row in rows)

    def read_image(self, sha256: str) -> tuple[bytes, str, str] | None:
        """Returns an upload's content, media type and time of first reception (ISO 8601)."""
        with self._reader() as connection:
            return connection.execute(
                "SELECT content, media_type, created_on FROM images WHERE sha256 = ?", (sha256,)
            ).fetchone()

    def delete(self, rows: Sequence[SpoolRow]) -> None:
        """Forgets entries, and uploads that no other entry needs."""
        self.begin_delete(rows)
        self.finish_delete()

    def begin_delete(self, rows: Sequence[SpoolRow]) -> None:
        """As `delete`, but returns before it is done; `finish_delete` waits, and so does the next one.

        Raises:
            SpoolFullError: as `finish_delete`, of those before.
        """
        self.finish_delete()
        parts, done = _parts(rows), Future[None]()
        self._leaving = done, rows[-1].id

        def go_on(last: Future[None] | None = None) -> None:
            try:
                if last is not None:
                    last.result()
                if (ids := next(parts, None)) is None:
                    done.set_result(None)
                else:  # One after the other, as those that wait together share a transaction.
                    self._writer.submit(functools.partial(_delete, ids)).add_done_callback(go_on)
            except Exception as err:
                done.set_exception(err)

        go_on()

    def finish_delete(self) -> None:
        """Returns once the last deletion that was begun is on disk.

        Raises:
            SpoolFullError: the disk refuses it, or does not answer.
        """
        leaving, self._leaving = self._leaving, None
        if leaving is not None:
            self._wait_for(leaving[0])

    def reject(self, row: SpoolRow, reason: str) -> None:
        """Puts an entry aside with the reason, until somebody has it tried again (`rejected_entries`)."""
        self._wait_for(self._writer.submit(lambda connection: move_to_rejected(connection, row.id, reason)))

    def rejected(self) -> list[RejectedEntry]:
        """Returns the entries that the database refuses."""
        with self._reader() as connection:
            rows = connection.execute("SELECT entry_id, kind, record, reason FROM rejected ORDER BY rowid").fetchall()
        return [RejectedEntry._make(row) for row in rows]

    def rejected_count(self) -> int:
        """Returns how many entries the database refuses."""
        with self._reader() as connection:
            return int(connection.execute("SELECT count(*) FROM rejected").fetchone()[0])

    def forget_rejected(self, keep_days: int | None) -> None:
        """Deletes entries that the database refused more than `keep_days` ago; None: none."""
        if keep_days is None:
            return
        before = time.time() - keep_days * 86_400
        with self._reader() as connection:
            query = "SELECT EXISTS (SELECT 1 FROM rejected WHERE rejected_on < ?)"
            has_old = connection.execute(query, (before,)).fetchone()[0]
        if has_old:
            delete = "DELETE FROM rejected WHERE rejected_on < ?"
            self._wait_for(self._writer.submit(lambda writing: writing.execute(delete, (before,))))

    def take_rejected(self, other: Spool) -> None:
        """Moves another spool's rejected entries here; after a crash in between, doing it again changes nothing."""
        if not other.rejected_count():
            return
        with other._reader() as source:
            self._wait_for(self._writer.submit(lambda target: copy_rejected(source, target)))
        other._wait_for(other._writer.submit(lambda connection: connection.execute("DELETE FROM rejected")))

    def depth(self) -> int:
        """Returns how many entries the database does not have yet."""
        with self._reader() as connection:
            return int(connection.execute("SELECT count(*) FROM entries").fetchone()[0])

    def oldest_age_seconds(self) -> float | None:
        """Returns how long the oldest entry has waited; None when nothing waits."""
        with self._reader() as connection:
            row = connection.execute("SELECT spooled_on FROM entries ORDER BY id LIMIT 1").fetchone()
        return None if row is None else max(0.0, time.time() - row[0])

    def size_bytes(self) -> int:
        """Returns the size of the file and its write-ahead log; 0 once they are gone."""
        size = 0
        for extension in EXTENSIONS:
            with contextlib.suppress(FileNotFoundError):
                size += self.path.with_name(self.path.name + extension).stat().st_size
        return size

    def used_bytes(self) -> int:
        """Returns how much of the file entries take."""
        with self._reader() as connection:
            return self._room.usage(connection).used

    def is_crowded(self, others_bytes: int = 0) -> bool:
        """Returns whether there is little room left, in this spool together with `others_bytes` of others.

        Where no database takes the oldest entries, they have to go now, before any is refused.
        """
        with self._reader() as connection:
            return self._room.is_crowded(connection, others_bytes)

    def take(self, other: Spool, rows: Sequence[SpoolRow]) -> None:
        """Copies another spool's entries with their uploads here; they are durable when it returns.

        Raises:
            SpoolFullError: there is no room.
        """
        ids = [row.id for row in rows]
        with other._reader() as source:

            def copy(target: sqlite3.Connection) -> None:
                self._room.require(target)
                copy_entries(source, target, ids)

            self._wait_for(self._writer.submit(copy))

    def find(self, prediction_id: UUID) -> StoredPrediction | None:
        """Returns a prediction that is still here; None when there is none, or no more."""
        with self._reader() as connection:
            return find_in_file(connection, prediction_id)

    def shrink(self) -> None:
        """Gives a part of the file's unused space back to the system; cheap when there is little."""
        with self._reader() as connection:
            unused = int(connection.execute("PRAGMA freelist_count").fetchone()[0])
        if unused > VACUUM_PAGES:
            self._wait_for(self._writer.submit(free_pages))

    def close(self) -> None:
        """Writes what is queued and lets go of the file; an empty one is deleted, another is left to a successor."""
        with contextlib.suppress(SpoolFullError):
            self.write_outcomes()
        if not self._writer.close():
            return
        with self._read_lock:
            try:
                is_empty = not self._reading.execute(
                    "SELECT EXISTS (SELECT 1 FROM entries) OR EXISTS (SELECT 1 FROM rejected)"
                ).fetchone()[0]
            except sqlite3.DatabaseError as err:
                logger.error("%s stays as it is: %s", self.path, err)
                is_empty = False
            self._reading.close()
        if is_empty:
            for extension in EXTENSIONS:
                self.path.with_name(self.path.name + extension).unlink(missing_ok=True)
            self.path.with_suffix(LOCK).unlink(missing_ok=True)
        os.close(self._lock)

    def _insertion(self, entry: LogEntry | FeedbackEntry) -> tuple[Operation, int]:
        """Returns what adds the entry, and about how many bytes it needs in memory and on disk."""
        size = _ENTRY_BYTES
        if isinstance(entry, LogEntry):
            size += len(entry.image or b"") + (0 if entry.raw_hm is None else entry.raw_hm.nbytes)
        return lambda connection: self._insert(connection, entry), size

    def _insert(self, connection: sqlite3.Connection, entry: LogEntry | FeedbackEntry) -> None:
        self._room.require(connection)
        insert_entry(connection, encode(entry))

    def _wait_for(self, done: Future[None]) -> None:
        try:
            done.result(_JOB_SECONDS)
        except TimeoutError as err:
            raise SpoolFullError(
                f"Expected the disk of {self.path} to answer within {_JOB_SECONDS:g} s. Received: nothing. "
                "It is overloaded or broken."
            ) from err

    @contextlib.contextmanager
    def _reader(self) -> Generator[sqlite3.Connection]:
        with self._read_lock:
            yield self._reading


def _delete(ids: Sequence[int], connection: sqlite3.Connection) -> None:
    delete_entries(connection, ids)


def _parts(rows: Sequence[SpoolRow]) -> Generator[list[int]]:
    """Yields the rows' ids in parts that are deleted at once."""
    part: list[int] = []
    size = 0
    for row in rows:
        size += len(row.record) + len(row.vectors) + row.image_bytes
        part.append(row.id)
        if size >= _DELETED_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _own_new(directory: Path) -> tuple[Path, int]:
    """Returns a path without a spool, and the descriptor that holds its lock.

    Another replica that looks for orphans may lock it first, as the lock of what is gone: then by another name.
    """
    while True:
        path = directory / f"{uuid4().hex}{SQLITE}"
        lock = _try_to_own(path.with_suffix(LOCK))
        if lock is not None:
            return path, lock


def _try_to_own(path: Path) -> int | None:
    """Returns the descriptor that holds the lock file, made if it is missing; None if another process holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between the two calls its last owner may have deleted it: then this is a lock on nothing.
        is_current = path.exists() and os.path.samestat(os.fstat(handle), path.stat())
    except (BlockingIOError, FileNotFoundError):
        is_current = False
    if is_current:
        return handle
    os.close(handle)
    return None
