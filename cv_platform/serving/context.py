"""Everything that the routes of one worker share: settings, model, request log, limits, metrics.

`ServingContext` is made once per worker process, started before the first request and stopped after the last. Making
one touches neither disk nor network.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar
from uuid import UUID

from cv_platform.database.connection import running_database_url
from cv_platform.errors import CvPlatformError, DatabaseUnavailableError, ServiceError, SpoolFullError
from cv_platform.serving.holder import ModelHolder, make_worker_id
from cv_platform.serving.limits import Gate, ServingLimits, overloaded
from cv_platform.serving.metrics import ServingMetrics, process_metrics
from cv_platform.serving.problems import try_later
from cv_platform.serving.request_log import DrainStatus, FeedbackEntry, LogEntry, RequestLog, StoredPrediction
from cv_platform.serving.runtime import LoadedModel
from cv_platform.serving.security import Guard
from cv_platform.serving.worker_threads import WorkerThreads
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage

logger = logging.getLogger(__name__)

APPEND_SECONDS = 15.0
"""Longest wait for a log entry to become durable; the spool's own limit is shorter."""
MAX_READS = 8
"""Predictions looked up at the same time; a database that hangs takes no more threads than these."""
_HOUSEKEEPING_SECONDS = 2.0

_T = TypeVar("_T")


class ModelSource(Protocol):
    """Where the routes get the model from; `ModelHolder` is the one of the service."""

    def current(self) -> LoadedModel | None:
        """Returns the model to answer a request with, or None while there is none."""
        ...

    def start(self) -> None:
        """Begins to look for models."""
        ...

    def stop(self) -> None:
        """Ends it."""
        ...

    def status(self) -> dict[str, Any]:
        """Returns what a health page shows."""
        ...


class ServingContext:
    """One worker's state; `start` and `stop` may each be called more than once.

    Args:
        settings: of the installation.
        bundled: folder of the model inside a Bento, see `fallback.write_fallback`; None without one.
        limits: what this worker allows itself.
        models: where models come from; None makes a `ModelHolder` for `settings.service_name`.
        metrics: None takes those of the process.
        model_threads: threads of one model call, see `runtime.load_bundle`.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        bundled: Path | None = None,
        limits: ServingLimits | None = None,
        models: ModelSource | None = None,
        metrics: ServingMetrics | None = None,
        model_threads: int | None = 1,
    ) -> None:
        self.settings = settings
        self.limits = limits or ServingLimits()
        self.cache = settings.home / "cache"
        self.storage = CentralStorage(settings.storage_url)
        self.guard = Guard(settings)
        self.uploads = Gate(self.limits.max_uploads)
        self.in_flight = Gate(self.limits.max_in_flight)
        self.reads = Gate(MAX_READS)
        self.promotion = threading.Lock()
        """Held while a model is load-tested and promoted: two at once would cost memory for two."""
        self.model_threads = model_threads
        self.models: ModelSource = models or ModelHolder(
            self.storage,
            service=settings.service_name,
            worker_id=make_worker_id(),
            cache=self.cache,
            bundled=bundled,
            threads=model_threads,
        )
        self.append_error: str | None = None
        """Why the last log entry was not taken; None while the log works. Without a log there are no predictions."""
        self._metrics = metrics
        self._lifecycle = threading.Lock()
        self._log: RequestLog | None = None
        self._log_url: str | None = None
        self._predict_pool: WorkerThreads | None = None
        self._stopping = threading.Event()
        self._housekeeper: threading.Thread | None = None

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
            SpoolFullError: the context is not started.
        """
        if self._log is None:
            raise SpoolFullError("Expected a started service. Received: one that is starting or stopping. Try again.")
        return self._log

    @property
    def predict_pool(self) -> WorkerThreads:
        """The threads that predict.

        Raises:
            RuntimeError: the context is not started.
        """
        if self._predict_pool is None:
            raise RuntimeError("Expected a started context.")
        return self._predict_pool

    async def compute(self, work: Callable[[], _T]) -> _T:
        """Runs `work` in one of the threads that predict, and returns what it returns.

        Everything that decodes an image goes through here, so that its memory and CPU are bounded. Its place is held
        until its thread is free, even when the answer is a 504: abandoned work still costs.

        Raises:
            Problem: 429 when too much is under way, 504 when it takes too long, 503 while the service stops.
        """
        if not self.in_flight.enter():
            raise overloaded("predictions", self.in_flight.limit)
        try:
            job = self.predict_pool.submit(work)
        except RuntimeError as err:
            self.in_flight.leave()
            raise try_later(503, "The service is stopping. Send it again.", expected="a running service") from err
        # Also called when the job is cancelled before it began: each place is given back exactly once.
        job.add_done_callback(lambda _: self.in_flight.leave())
        seconds = self.limits.predict_seconds
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job), seconds)
        except TimeoutError as err:
            raise try_later(
                504,
                f"The answer was not ready after {seconds:g} s. Try again later.",
                expected=f"an answer within {seconds:g} s",
            ) from err

    def find(self, prediction_id: UUID) -> StoredPrediction | None:
        """Returns a prediction from a spool of this host or from the database; None when there is none.

        Raises:
            DatabaseError: it is in no spool, and the database cannot be asked.
            Problem: 429, too many are being looked up.
        """
        if not self.reads.enter():
            raise overloaded("look-ups", self.reads.limit)
        try:
            found = self.log.find_prediction(prediction_id)
        finally:
            self.reads.leave()
        if found is None and self.log.status().database == "not configured":
            raise DatabaseUnavailableError("Expected the log's database. Received: none that runs. Start it: make up.")
        return found

    def is_stuck(self) -> bool:
        """Says whether every thread that predicts is at work that its client was told 504 about."""
        return self._predict_pool is not None and self._predict_pool.are_stuck(self.limits.predict_seconds)

    def log_status(self) -> DrainStatus | None:
        """Returns what waits in the spool and how the database is; None before `start`."""
        return self._log.status() if self._log is not None else None

    def start(self) -> None:
        """Opens the request log and loads the model. A database or storage that is away stops nothing.

        Raises:
            SpoolFullError: the spool cannot be made: nothing could be promised.
        """
        with self._lifecycle:
            if self._log is not None:
                return
            self._stopping.clear()
            self._predict_pool = WorkerThreads(self.limits.predict_threads, "predict")
            self._log_url = self._running_database()
            self._log = RequestLog(self.settings.home / "spool", self._log_url)
            self.models.start()
            self._housekeeper = threading.Thread(target=self._keep_house, name="housekeeper", daemon=True)
            self._housekeeper.start()

    def stop(self) -> None:
        """Finishes what is under way, then lets go; what the database does not have yet stays in the spool."""
        with self._lifecycle:
            log, pool, housekeeper = self._log, self._predict_pool, self._housekeeper
            if log is None or pool is None or housekeeper is None:
                return
            self._stopping.set()
            housekeeper.join()
            # Whoever waited for anything older has been told 504.
            if not pool.close(self.limits.predict_seconds):
                logger.warning("Predictions that never ended are left behind")
            self.models.stop()
            self._log = self._predict_pool = self._housekeeper = None
            log.close()

    async def append(self, entry: LogEntry | FeedbackEntry) -> None:
        """Returns once the entry is durable.

        Raises:
            SpoolFullError: it is not, and will not be.
        """
        try:
            log = self.log
            if isinstance(entry, LogEntry) and entry.image is not None:
                # Hashing a large upload would hold up the event loop.
                done = await asyncio.get_running_loop().run_in_executor(None, log.submit, entry)
            else:
                done = log.submit(entry)
            await asyncio.wait_for(asyncio.wrap_future(done), APPEND_SECONDS)
        except TimeoutError as err:
            self.append_error = f"Expected the disk to take an entry within {APPEND_SECONDS:g} s. Received: no answer."
            raise SpoolFullError(f"{self.append_error} Try again later.") from err
        except SpoolFullError as err:
            self.append_error = str(err)
            raise
        self.append_error = None

    def _keep_house(self) -> None:
        while not self._stopping.wait(_HOUSEKEEPING_SECONDS):
            try:
                self._follow_database()
                status = self.log_status()
                if status is not None:
                    self.metrics.spool(status.depth, status.oldest_age_seconds)
            except (CvPlatformError, OSError):
                logger.exception("The request log's housekeeping failed; it goes on")

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
