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
from cv_platform.serving.log.limits import LogLimits
from cv_platform.serving.log.request_log import (
    BegunEntry,
    FeedbackEntry,
    LogEntry,
    LogStatus,
    RequestLog,
    StoredPrediction,
)
from cv_platform.serving.telemetry.metrics import ServingMetrics, process_metrics
from cv_platform.serving.telemetry.observation import staged
from cv_platform.settings import Settings

logger = logging.getLogger(__name__)

APPEND_SECONDS = 15.0
"""Longest wait for an entry, once its answer is ready."""
_OVERDUE = "Expected the disk to take an entry in time. Received: no answer. Try again later."


def not_started() -> ServiceError:
    """Returns what a request is told that comes before the start has ended, or after the stop has begun."""
    return ServiceError("Expected a started service. Received: one that is starting or stopping. Send it again.")


class WorkerLog:
    """The part of `ServingContext` that logs; the context opens, tends and closes it.

    Args:
        settings: of the installation.
        metrics: None takes those of the process.

    Attributes:
        append_error: why the last log entry was not taken; None while the log works. Without a log there are no
            predictions.
    """

    def __init__(self, settings: Settings, metrics: ServingMetrics | None) -> None:
        self.settings = settings
        self.append_error: str | None = None
        self._metrics = metrics
        self._log: RequestLog | None = None
        self._log_url: str | None = None
        self._last_status: tuple[float, LogStatus] | None = None

    @property
    def metrics(self) -> ServingMetrics:
        """This worker's metrics; `prometheus_client` is imported by the first use, see `metrics`."""
        if self._metrics is None:
            self._metrics = process_metrics()
        return self._metrics

    @property
    def log(self) -> RequestLog:
        """The request log.

        Raises:
            ServiceError: the context is not started.
            SpoolFullError: there was no room for a spool.
        """
        if self._log is not None:
            return self._log
        if self.append_error is not None:
            raise SpoolFullError(self.append_error)
        raise not_started()

    async def append(self, entry: LogEntry | FeedbackEntry) -> None:
        """Returns once the entry is durable.

        Raises:
            SpoolFullError: it is not, and will not be.
        """
        with staged("append"), self._append_failures():
            await self._until_durable(self.log.submit(entry))

    def append_soon(self, entry: LogEntry) -> None:
        """Queues an entry that nobody waits for; if the disk does not take it, it is counted and gone.

        Raises:
            SpoolFullError: too much is waiting for the disk.
        """

        def note(done: Future[None]) -> None:
            if done.exception() is not None:
                self.metrics.refusal_unlogged()

        self.log.submit(entry).add_done_callback(note)

    def begin_entry(self, entry: LogEntry, *, more_follow: bool) -> BegunEntry:
        """Queues a prediction's entry, to be written while its answer is made; `entry_written` awaits its end.

        Args:
            entry: what to keep.
            more_follow: whether others are about to be queued, and share its transaction.

        Raises:
            SpoolFullError: it cannot be kept.
        """
        with self._append_failures():
            return self.log.begin(entry, more_follow=more_follow)

    async def entry_written(self, entry: BegunEntry) -> None:
        """Returns once what `begin_entry` returned is durable.

        Raises:
            SpoolFullError: it is not, and will not be.
        """
        with staged("append"), self._append_failures():
            await self._until_durable(entry.written)

    def find(self, prediction_id: UUID) -> StoredPrediction | None:
        """Returns a prediction from a spool of this host or from the database; None when there is none.

        It may hang as long as the database does: call it by `look_ups`.

        Raises:
            DatabaseError: it is in no spool, and the database cannot be asked.
        """
        found = self.log.find_prediction(prediction_id)
        if found is None and self.log.status().database == "not configured":
            raise DatabaseUnavailableError("Expected the log's database. Received: none that runs. Start it: make up.")
        return found

    def _open_log(self) -> None:
        self._log_url = self._running_database()
        try:
            self._log = RequestLog(self.settings.home / "spool", self._log_url, LogLimits.of(self.settings))
        except (SpoolFullError, OSError) as err:
            if self.append_error is None:
                logger.error("No prediction is answered until the request log can be opened: %s", err)
            self.append_error = str(err)
            return
        self.append_error = None

    def _tend_log(self) -> None:
        if self._log is None:
            self._open_log()
        if self._log is None:
            return
        self._follow_database()
        self.metrics.log_is(self._read_status())
        self._try_log()

    def _read_status(self) -> LogStatus:
        status = self.log.status()
        self._last_status = time.monotonic(), status
        return status

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
            self.metrics.append_failed()
            self.append_error = str(err)
            raise

    def _try_log(self) -> None:
        """Forgets why the last entry was not taken once the next would be; health keeps away who would show it."""
        if self.append_error is None:
            return
        with contextlib.suppress(SpoolFullError):
            self.log.try_out()
            self.append_error = None

    def _follow_database(self) -> None:
        """Moves the log to the embedded database that runs now: it may start later than the service, or change port."""
        if self.settings.database_url is not None:
            return
        url = self._running_database()
        if url is not None and url != self._log_url:
            self.log.use_database(url)
            self._log_url = url

    def _running_database(self) -> str | None:
        try:
            return running_database_url(self.settings)
        except ServiceError as err:
            logger.warning("The embedded database cannot be used: %s", err)
            return None
