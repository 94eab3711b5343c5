"""Writes to a SQLite file for many threads: whoever writes commits all that has gathered since the last commit at once.

Concurrent requests then share one fsync, and nobody ever waits for another one's lock. A thread of its own writes what
is queued by `submit`; a caller of `write` commits in its own thread when nobody else is at it, which saves an idle
service two thread switches a request: they cost more than the commit. A busy one is slowed down by the fsync itself,
so a caller who knows that others follow leaves its operation to the next but one of them.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from cv_platform.errors import SpoolFullError

logger = logging.getLogger(__name__)

Operation = Callable[[sqlite3.Connection], object]
"""Something to do within a transaction; what it returns is ignored."""

_SHARING = 3
"""Operations of busy callers that share a transaction: with more, so many answers would leave at once that the threads
which predict would have to wait for the next requests."""
_LONGEST_WAIT_SECONDS = 0.01
"""Of an operation for those that were said to follow."""
_MAX_GROUP = 512
_MAX_QUEUED = 4096
MAX_QUEUED_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class _Job:
    run: Operation
    done: Future[None]
    bytes: int
    due: float
    """When the thread commits it, on `time.monotonic`'s clock, unless a caller has before."""


class GroupCommit:
    """The writer of one file; owns the connection from its start to its end.

    Args:
        connection: in autocommit mode, usable from any thread; only whoever holds the turn uses it.
        path: of the file, for messages.
        on_append: called after operations that have a size, by the thread that tried to commit them.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path, on_append: Callable[[], None]) -> None:
        self._connection = connection
        self._path = path
        self._on_append = on_append
        self._turn = threading.Lock()
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        """Of what waits, and of being closed."""
        self._queued_bytes = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=f"spool-{path.stem[:8]}", daemon=True)
        self._thread.start()

    def submit(self, run: Operation, size_bytes: int = 0) -> Future[None]:
        """Queues an operation; the future has a result once its transaction is on disk.

        Raises:
            SpoolFullError: too much is waiting, or the file is closed. The future holds one if the disk is full.
        """
        job = self._queue(run, size_bytes)
        with self._changed:
            self._changed.notify()
        return job.done

    def write(self, run: Operation, size_bytes: int = 0, *, more_follow: bool = False) -> Future[None]:
        """Does as `submit`, and writes in the calling thread when nobody else does: the future is then done.

        Args:
            run: the operation.
            size_bytes: what it adds to the file.
            more_follow: whether other callers are about to write, so that this operation may wait for them, a little.

        Raises:
            SpoolFullError: as `submit`.
        """
        job = self._queue(run, size_bytes, is_patient=more_follow)
        if job.due:
            return job.done
        if self._turn.acquire(blocking=False):
            try:
                self._write_group()
            finally:
                self._turn.release()
        # What came after the group was taken, or while somebody else had the turn.
        with self._changed:
            if self._waiting:
                self._changed.notify()
        return job.done

    def close(self) -> bool:
        """Runs what is queued and ends; returns False if it was closed before."""
        with self._changed:
            if self._is_closed:
                return False
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        with self._turn:
            self._connection.close()
        return True

    def _queue(self, run: Operation, size_bytes: int, *, is_patient: bool = False) -> _Job:
        with self._changed:
            if self._is_closed:
                raise SpoolFullError(f"Expected an open spool. Received: {self._path}, which is closed.")
            # A single one may be larger than the limit.
            if self._queued_bytes and self._queued_bytes + size_bytes > MAX_QUEUED_BYTES:
                raise SpoolFullError(
                    f"Expected less than {MAX_QUEUED_BYTES} bytes waiting for {self._path}. "
                    f"Received: {self._queued_bytes}. The disk is overloaded; try again later."
                )
            if len(self._waiting) >= _MAX_QUEUED:
                raise SpoolFullError(
                    f"Expected at most {_MAX_QUEUED} entries waiting for {self._path}. Received: one more. "
                    "The disk is overloaded; try again later."
                )
            waits = is_patient and len(self._waiting) + 1 < _SHARING
            job = _Job(run, Future(), size_bytes, due=time.monotonic() + _LONGEST_WAIT_SECONDS if waits else 0.0)
            self._waiting.append(job)
            self._queued_bytes += size_bytes
            if waits and len(self._waiting) == 1:
                self._changed.notify()  # The thread has to look at the clock now.
        return job

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._is_closed and (left := self._seconds_left()) != 0.0:
                    self._changed.wait(left)
                if not self._waiting:
                    return
            with self._turn:
                self._write_group()

    def _seconds_left(self) -> float | None:
        """Returns how long what waits may still wait; None when nothing does."""
        if not self._waiting:
            return None
        return max(0.0, min(job.due for job in self._waiting) - time.monotonic())

    def _write_group(self) -> None:
        """Commits what waits, at most `_MAX_GROUP` operations; the caller has the turn."""
        with self._changed:
            taken = [self._waiting.popleft() for _ in range(min(len(self._waiting), _MAX_GROUP))]
            self._queued_bytes -= sum(job.bytes for job in taken)
        jobs = [job for job in taken if job.done.set_running_or_notify_cancel()]
        if jobs and not self._commit(jobs):
            for job in jobs:  # One of them fails: find out which, so that the others do not suffer.
                self._commit([job])
        if any(job.bytes for job in jobs):
            self._on_append()

    def _commit(self, jobs: list[_Job]) -> bool:
        """Runs jobs in one transaction; returns False, with nothing done, if one of several fails."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for job in jobs:
                job.run(self._connection)
            self._connection.execute("COMMIT")
        except Exception as err:  # Whatever it is, the threads that wait for these jobs must hear of it.
            with contextlib.suppress(sqlite3.Error):  # A full disk may have rolled it back already.
                self._connection.execute("ROLLBACK")
            if len(jobs) > 1:
                return False
            logger.error("%s does not take an entry: %s", self._path, err)
            jobs[0].done.set_exception(_as_spool_error(err, self._path))
            return True
        for job in jobs:
            job.done.set_result(None)
        return True


def _as_spool_error(err: Exception, path: Path) -> Exception:
    if not isinstance(err, sqlite3.Error | OSError):
        return err
    return SpoolFullError(f"Expected {path} to take an entry. Received: {err}. Free space on its disk, and try again.")
