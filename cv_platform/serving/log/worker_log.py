"""The request log as the routes of one worker see it: entries in, stored predictions and its state out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Generator
from concurrent.futures import Future
from uuid import UUID

from cv_platform.database.address import running_database_url
from cv_platform.errors import DatabaseUnavailableError, ServiceError, SpoolFullError
from cv_platform.serving.log.entry import FeedbackEntry, LogEntry, StoredPrediction
from cv_platform.serving.log.limits import LogLimits
from cv_platform.serving.log.request_log import RequestLog
from cv_platform.serving.log.spool import BegunEntry
from cv_platform.serving.telemetry.log_status import LogStatus
from cv_platform.serving.telemetry.metrics import ServingMetrics
from cv_platform.serving.telemetry.observation import staged
from cv_platform.settings import Settings

logger = logging.getLogger(__name__)

APPEND_SECONDS = 15.0
"""Longest wait for an entry, once its answer is ready."""
_OVERDUE = "Expected the disk to take an entry in time. Received: no answer. Try again later."


class WorkerLog:
    """One worker's log, from here to `close`; where there is no room for a spool, `tend` tries again.

    Args:
        settings: of the installation.
        metrics: of the worker.

    Attributes:
        append_error: why the last log entry was not taken; None while the log works. Without a log there are no
            predictions.
    """

    def __init__(self, settings: Settings, metrics: ServingMetrics) -> None:
        self.append_error: str | None = None
        self._settings = settings
        self._metrics = metrics
        self._last_status: tuple[float, LogStatus] | None = None
        self._url = self._running_database()
        self._log = self._open()

    @property
    def opened(self) -> RequestLog:
        """The request log.

        Raises:
            SpoolFullError: there was no room for a spool.
        """
        if isinstance(self._log, RequestLog):
            return self._log
        raise SpoolFullError(self._log)

    async def append(self, entry: LogEntry | FeedbackEntry) -> None:
        """Returns once the entry is durable.

        Raises:
            SpoolFullError: it is not, and will not be.
        """
        with staged("append"), self._append_failures():
            await self._until_durable(self.opened.spool.submit(entry))

    def append_soon(self, entry: LogEntry) -> None:
        """Queues an entry that nobody waits for; if the disk does not take it, it is counted and gone.

        Raises:
            SpoolFullError: too much is waiting for the disk.
        """

        def note(done: Future[None]) -> None:
            if done.exception() is not None:
                self._metrics.unlogged_refusals.inc()

        self.opened.spool.submit(entry).add_done_callback(note)

    def begin_entry(self, entry: LogEntry, *, more_follow: bool) -> BegunEntry:
        """Queues a prediction's entry, to be written while its answer is made; `entry_written` awaits its end.

        Args:
            entry: what to keep.
            more_follow: whether others are about to be queued, and share its transaction.

        Raises:
            SpoolFullError: it cannot be kept.
        """
        with self._append_failures():
            return self.opened.spool.begin(entry, more_follow=more_follow)

    async def entry_written(self, entry: BegunEntry) -> None:
        """Returns once what `begin_entry` returned is durable.

        Raises:
            SpoolFullError: it is not, and will not be.
        """
        with staged("append"), self._append_failures():
            await self._until_durable(entry.written)

    def find(self, prediction_id: UUID) -> StoredPrediction | None:
        """Returns a prediction from a spool of this host or from the database; None when there is none.

        It may hang as long as the database does: call it where that holds up nobody.

        Raises:
            DatabaseError: it is in no spool, and the database cannot be asked.
        """
        found = self.opened.find_prediction(prediction_id)
        if found is None and self.opened.status().database == "not configured":
            raise DatabaseUnavailableError("Expected the log's database. Received: none that runs. Start it: make up.")
        return found

    def read_status(self) -> LogStatus:
        """Returns what waits in the spool and how the database is; asks the spool's file, which may hang.

        Raises:
            SpoolFullError: there is no spool.
        """
        status = self.opened.status()
        self._last_status = time.monotonic(), status
        return status

    def last_status(self) -> tuple[LogStatus | None, float]:
        """Returns what `read_status` has said last, and how many seconds ago; None where it never did."""
        if self._last_status is None:
            return None, 0.0
        at, status = self._last_status
        return status, time.monotonic() - at

    def tend(self) -> None:
        """Opens what there was no room for, follows the database, and tells the metrics; to be called every so often.

        Raises:
            CvPlatformError, OSError, sqlite3.Error: it cannot; the next time it may.
        """
        if not isinstance(self._log, RequestLog):
            self._url = self._running_database()
            self._log = self._open()
        if isinstance(self._log, RequestLog):
            self.follow_database()
            self._metrics.log_is(self.read_status())
            self._try_log()

    def follow_database(self) -> None:
        """Moves the log to the embedded database that runs now: it may start later than the service, or change port."""
        if self._settings.database_url is not None:
            return
        url = self._running_database()
        if url is not None and url != self._url:
            self.opened.use_database(url)
            self._url = url

    def close(self) -> None:
        """Lets go of it; what the database does not have yet stays in the spool."""
        if isinstance(self._log, RequestLog):
            self._log.close()

    def _open(self) -> RequestLog | str:
        """Returns the log, or why there is none."""
        try:
            log = RequestLog(self._settings.home / "spool", self._url, LogLimits.of(self._settings))
        except (SpoolFullError, OSError) as err:
            if self.append_error is None:
                logger.error("No prediction is answered until the request log can be opened: %s", err)
            self.append_error = str(err)
            return str(err)
        self.append_error = None
        return log

    async def _until_durable(self, entry: Future[None]) -> None:
        try:
            if entry.done():  # Spares a turn of the event loop.
                entry.result()
            else:
                await asyncio.wait_for(asyncio.wrap_future(entry), APPEND_SECONDS)
        except TimeoutError as err:
            raise SpoolFullError(_OVERDUE) from err
        self.append_error = None

    @contextlib.contextmanager
    def _append_failures(self) -> Generator[None]:
        """Keeps for `/health_check` why the log did not take an entry."""
        try:
            yield
        except SpoolFullError as err:
            self._metrics.append_failures.inc()
            self.append_error = str(err)
            raise

    def _try_log(self) -> None:
        """Forgets why the last entry was not taken once the next would be; health keeps away who would show it."""
        if self.append_error is None:
            return
        with contextlib.suppress(SpoolFullError):
            self.opened.spool.try_out()
            self.append_error = None

    def _running_database(self) -> str | None:
        try:
            return running_database_url(self._settings)
        except ServiceError as err:
            logger.warning("The embedded database cannot be used: %s", err)
            return None
