"""Writes to a SQLite file for many threads: a thread commits all that has gathered since its last commit at once.

Concurrent requests then share one fsync, and nobody ever waits for another one's lock. Whoever can wait says for how
long, and shares the transaction of the next who cannot.
"""

from __future__ import annotations

import contextlib
import logging
import math
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

_MAX_GROUP = 512
_MAX_QUEUED = 4096
MAX_QUEUED_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class _Job:
    run: Operation
    done: Future[None]
    bytes: int
    is_whole: bool
    due: float
    """When it is committed at the latest, on `time.monotonic`'s clock."""


class GroupCommit:
    """The writer of one file; owns the connection from its start to its end.

    Args:
        connection: in autocommit mode, usable from any thread; only this writer's uses it.
        path: of the file, for messages.
        on_append: called after operations that have a size, by the thread that tried to commit them.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path, on_append: Callable[[], None]) -> None:
        self._connection = connection
        self._path = path
        self._on_append = on_append
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        """Of what waits, and of being closed."""
        self._queued_bytes = 0
        self._wakes_at = math.inf
        """When the thread looks next by itself, on `time.monotonic`'s clock."""
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=f"spool-{path.stem[:8]}", daemon=True)
        self._thread.start()

    def submit(
        self, run: Operation, size_bytes: int = 0, *, within_seconds: float = 0.0, is_whole: bool = False
    ) -> Future[None]:
        """Queues an operation; the future has a result once its transaction is on disk.

        Args:
            run: the operation.
            size_bytes: what it adds to the file.
            within_seconds: how long it may wait for others, to share their transaction.
            is_whole: whether it changes the file by one statement, which needs no transaction around it.

        Raises:
            SpoolFullError: too much is waiting, or the file is closed. The future holds one if the disk is full.
        """
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
            job = _Job(run, Future(), size_bytes, is_whole, due=time.monotonic() + within_seconds)
            self._waiting.append(job)
            self._queued_bytes += size_bytes
            if job.due < self._wakes_at:
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
        self._connection.close()
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._is_closed and (left := self._seconds_left()) > 0.0:
                    self._wakes_at = time.monotonic() + left
                    self._changed.wait(None if left == math.inf else left)
                if not self._waiting:
                    return
                self._wakes_at = -math.inf  # It is awake, and looks again after the commit.
                taken = [self._waiting.popleft() for _ in range(min(len(self._waiting), _MAX_GROUP))]
                self._queued_bytes -= sum(job.bytes for job in taken)
            self._write(taken)

    def _seconds_left(self) -> float:
        """Returns how long what waits may still wait; infinity when nothing does."""
        return min((job.due for job in self._waiting), default=math.inf) - time.monotonic()

    def _write(self, taken: list[_Job]) -> None:
        jobs = [job for job in taken if job.done.set_running_or_notify_cancel()]
        if jobs and not self._commit(jobs):
            for job in jobs:  # One of them fails: find out which, so that the others do not suffer.
                self._commit([job])
        if any(job.bytes for job in jobs):
            self._on_append()

    def _commit(self, jobs: list[_Job]) -> bool:
        """Runs jobs in one transaction; returns False, with nothing done, if one of several fails."""
        try:
            if len(jobs) == 1 and jobs[0].is_whole:
                jobs[0].run(self._connection)
            else:
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
