"""One thread that writes to a SQLite file for many: it commits all that has gathered since its last commit at once.

Concurrent requests then share one fsync, and no writer ever waits for another one's lock.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sqlite3
import threading
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
_MAX_QUEUED_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class _Job:
    run: Operation
    done: Future[None]
    bytes: int


class GroupCommit:
    """The writer of one file; owns the connection from its start to its end.

    Args:
        connection: in autocommit mode; used by the writer's thread only.
        path: of the file, for messages.
        on_append: called on the writer's thread after a commit with operations that have a size.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path, on_append: Callable[[], None]) -> None:
        self._connection = connection
        self._path = path
        self._on_append = on_append
        self._jobs: queue.Queue[_Job | None] = queue.Queue(_MAX_QUEUED)
        self._lock = threading.Lock()
        self._queued_bytes = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=f"spool-{path.stem[:8]}", daemon=True)
        self._thread.start()

    def submit(self, run: Operation, size_bytes: int = 0) -> Future[None]:
        """Queues an operation; the future has a result once its transaction is on disk.

        Raises:
            SpoolFullError: too much is waiting, or the file is closed. The future holds one if the disk is full.
        """
        job = _Job(run, Future(), size_bytes)
        with self._lock:
            if self._is_closed:
                raise SpoolFullError(f"Expected an open spool. Received: {self._path}, which is closed.")
            # A single one may be larger than the limit.
            if self._queued_bytes and self._queued_bytes + size_bytes > _MAX_QUEUED_BYTES:
                raise SpoolFullError(
                    f"Expected less than {_MAX_QUEUED_BYTES} bytes waiting for {self._path}. "
                    f"Received: {self._queued_bytes}. The disk is overloaded; try again later."
                )
            try:
                self._jobs.put_nowait(job)
            except queue.Full as err:
                raise SpoolFullError(
                    f"Expected at most {_MAX_QUEUED} entries waiting for {self._path}. Received: one more. "
                    "The disk is overloaded; try again later."
                ) from err
            self._queued_bytes += size_bytes
        return job.done

    def close(self) -> bool:
        """Runs what is queued and ends; returns False if it was closed before."""
        with self._lock:
            if self._is_closed:
                return False
            self._is_closed = True
        self._jobs.put(None)
        self._thread.join()
        self._connection.close()
        return True

    def _run(self) -> None:
        is_open = True
        while is_open:
            jobs, is_open = self._gather()
            if jobs and not self._commit(jobs):
                for job in jobs:  # One of them fails: find out which, so that the others do not suffer.
                    self._commit([job])
            if any(job.bytes for job in jobs):
                self._on_append()

    def _gather(self) -> tuple[list[_Job], bool]:
        """Waits for a job and returns it with all that wait behind it, and whether there will be more."""
        jobs: list[_Job] = []
        job = self._jobs.get()
        while job is not None:
            with self._lock:
                self._queued_bytes -= job.bytes
            if job.done.set_running_or_notify_cancel():
                jobs.append(job)
            if len(jobs) >= _MAX_GROUP:
                return jobs, True
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return jobs, True
        return jobs, False

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
