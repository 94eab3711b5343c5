"""Everything that the routes of one worker share: settings, model, request log, limits, metrics.

`ServingContext` is made once per worker process, started before the first request and stopped after the last. Making
one touches neither disk nor network.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar
from uuid import UUID

from starlette.routing import Mount, Route

from cv_platform.database.connection import running_database_url
from cv_platform.errors import CvPlatformError, DatabaseUnavailableError, ServiceError, SpoolFullError
from cv_platform.serving.bounded_calls import BoundedCalls
from cv_platform.serving.holder import ModelHolder, make_worker_id
from cv_platform.serving.limits import Gate, ServingLimits, overloaded
from cv_platform.serving.metrics import ServingMetrics, SwapOutcome, process_metrics
from cv_platform.serving.observation import note_stage, staged
from cv_platform.serving.problems import Problem, try_later
from cv_platform.serving.promotion import PROMOTION_LOCK
from cv_platform.serving.rate_limit import RateLimiter
from cv_platform.serving.request_log import DrainStatus, FeedbackEntry, LogEntry, RequestLog, StoredPrediction
from cv_platform.serving.runtime import LoadedModel
from cv_platform.serving.security import Guard
from cv_platform.serving.tracing import Tracing
from cv_platform.serving.worker_threads import WorkerThreads
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage

logger = logging.getLogger(__name__)

APPEND_SECONDS = 15.0
"""Longest wait for a log entry to become durable; the spool's own limit is shorter."""
LOOK_UP_THREADS = 8
"""Predictions looked up or deleted at the same time. A database that hangs takes no more of them than its engine has
connections (four); the others go on finding what is in the spool."""
LOOK_UP_SECONDS = 8.0
"""Longest wait for one: a little longer than the database allows itself for a statement."""
DELETION_SECONDS = 20.0
"""Longest wait for a deletion, which may first wait for the spool to reach the database."""
STORAGE_THREADS = 4
STORAGE_SECONDS = 20.0
_HOUSEKEEPING_SECONDS = 2.0
_STATUS_SECONDS = 1.0
"""A health check waits no longer for the spool's disk, and shows the figures that it had last."""
_STOP_SECONDS = 10.0

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
    """

    def __init__(
        self,
        settings: Settings,
        *,
        bundled: Path | None = None,
        limits: ServingLimits | None = None,
        models: ModelSource | None = None,
        metrics: ServingMetrics | None = None,
    ) -> None:
        self.settings = settings
        self.limits = limits or ServingLimits.of(settings)
        self.cache = settings.home / "cache"
        self.storage = CentralStorage(settings.storage_url)
        self.guard = Guard(settings)
        self.uploads = Gate(self.limits.max_uploads)
        self.small_bodies = Gate(self.limits.max_small_bodies)
        self.in_flight = Gate(self.limits.max_in_flight)
        self.promotion_lock = self.cache / PROMOTION_LOCK
        self.models: ModelSource = models or ModelHolder(
            self.storage,
            service=settings.service_name,
            worker_id=make_worker_id(),
            cache=self.cache,
            bundled=bundled,
            threads=self.limits.model_threads,
            on_swap=self._note_swap,
        )
        self.routes: list[Route | Mount] = []
        """Of the app; what is refused before it gets to one is counted by the route that it wanted."""
        self.tracing: Tracing | None = None
        """Where traces go; None without an endpoint, and while the context is not started."""
        self.append_error: str | None = None
        """Why the last log entry was not taken; None while the log works. Without a log there are no predictions."""
        self._metrics = metrics
        self._lifecycle = threading.Lock()
        self._log: RequestLog | None = None
        self._log_url: str | None = None
        self._predict_pool: WorkerThreads | None = None
        self._look_ups: BoundedCalls | None = None
        self._storage_reads: BoundedCalls | None = None
        self._status_reads: BoundedCalls | None = None
        self._last_status: tuple[float, DrainStatus] | None = None
        self._rate_limiter: RateLimiter | None = None
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

    @property
    def look_ups(self) -> BoundedCalls:
        """Where predictions are looked up and deleted.

        Raises:
            SpoolFullError: the context is not started.
        """
        return _started(self._look_ups)

    @property
    def storage_reads(self) -> BoundedCalls:
        """Where central storage is read for a page.

        Raises:
            SpoolFullError: the context is not started.
        """
        return _started(self._storage_reads)

    def admit(self, images: int = 1) -> None:
        """Takes a place for each image; `compute_admitted` gives one back, or `in_flight.leave` what was not used.

        Raises:
            Problem: 429 when too much is under way.
        """
        if not self.in_flight.enter(images):
            raise overloaded("predictions", self.in_flight.limit)

    def charge(self, client: bytes, images: int) -> None:
        """Counts a client's images against its limit per minute, where there is one.

        Raises:
            Problem: 429 when it has none left, with the time until it has.
        """
        if self._rate_limiter is None:
            return
        seconds = self._rate_limiter.take(client, images)
        if seconds is not None:
            limit = self._rate_limiter.images_per_minute
            raise try_later(
                429,
                f"More than {limit} images per minute. Send these again in {seconds} s.",
                expected=f"at most {limit} images per minute of each client",
                seconds=seconds,
            )

    async def compute(self, work: Callable[[], _T]) -> _T:
        """Runs `work` in one of the threads that predict, and returns what it returns.

        Everything that decodes an image goes through here, so that its memory and CPU are bounded. Its place is held
        until its thread is free, even when the answer is a 504: abandoned work still costs.

        Raises:
            Problem: 429 when too much is under way, 504 when it takes too long, 503 while the service stops.
        """
        self.admit()
        return await self.compute_admitted(work)

    async def compute_admitted(self, work: Callable[[], _T]) -> _T:
        """Does as `compute`, for something that was admitted before; its place is given back whatever happens.

        Raises:
            Problem: 504 when it takes too long, 503 while the service stops.
        """
        submitted = time.perf_counter()

        def in_thread() -> _T:
            note_stage("wait", submitted)
            return work()

        try:
            job = self.predict_pool.submit(in_thread)
        except (RuntimeError, SpoolFullError) as err:
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

        It may hang as long as the database does: call it by `look_ups`.

        Raises:
            DatabaseError: it is in no spool, and the database cannot be asked.
        """
        found = self.log.find_prediction(prediction_id)
        if found is None and self.log.status().database == "not configured":
            raise DatabaseUnavailableError("Expected the log's database. Received: none that runs. Start it: make up.")
        return found

    def is_stuck(self) -> bool:
        """Says whether every thread that predicts is at work that its client was told 504 about."""
        return self._predict_pool is not None and self._predict_pool.are_stuck(self.limits.predict_seconds)

    async def log_status(self) -> tuple[DrainStatus | None, float]:
        """Returns what waits in the spool and how the database is, and how many seconds ago that was so.

        Counting asks the spool's file, so it is not done on the event loop; while the disk does not answer, these are
        the figures that it had last. None before `start`.
        """
        if self._status_reads is not None:
            # Too late, too many at a time, or a broken disk: the former figures have to do.
            with contextlib.suppress(Problem, CvPlatformError, sqlite3.Error, OSError):
                await self._status_reads.run(self._read_status)
        if self._last_status is None:
            return None, 0.0
        at, status = self._last_status
        return status, time.monotonic() - at

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
            self._look_ups = BoundedCalls(
                "look-ups", "the request log", threads=LOOK_UP_THREADS, seconds=LOOK_UP_SECONDS
            )
            self._storage_reads = BoundedCalls(
                "reads of storage", "central storage", threads=STORAGE_THREADS, seconds=STORAGE_SECONDS
            )
            self._status_reads = BoundedCalls(
                "looks at the spool", "its disk", threads=1, places=1, seconds=_STATUS_SECONDS
            )
            if self.settings.rate_limit_per_minute is not None:
                self._rate_limiter = RateLimiter(self.cache / "rate_limits", self.settings.rate_limit_per_minute)
            if self.settings.otlp_endpoint is not None:
                self.tracing = Tracing(
                    self.settings.otlp_endpoint, service_name=self.settings.service_name, worker_id=make_worker_id()
                )
            self.models.start()
            self.note_load()
            self._housekeeper = threading.Thread(target=self._keep_house, name="housekeeper", daemon=True)
            self._housekeeper.start()

    def stop(self) -> None:
        """Finishes what is under way, then lets go; what the database does not have yet stays in the spool."""
        with self._lifecycle:
            log, pool, housekeeper = self._log, self._predict_pool, self._housekeeper
            if log is None or pool is None or housekeeper is None:
                return
            self._stopping.set()
            housekeeper.join(_STOP_SECONDS)  # It may wait for a disk that hangs.
            for calls in (self._look_ups, self._storage_reads, self._status_reads):
                if calls is not None:
                    calls.close(_STOP_SECONDS)
            # Whoever waited for anything older has been told 504.
            if not pool.close(self.limits.predict_seconds):
                logger.warning("Predictions that never ended are left behind")
            self.models.stop()
            self._log = self._predict_pool = self._housekeeper = None
            self._look_ups = self._storage_reads = self._status_reads = self._last_status = None
            if self._rate_limiter is not None:
                self._rate_limiter.close()
                self._rate_limiter = None
            log.close()
            if self.tracing is not None:
                self.tracing.stop()
                self.tracing = None

    async def append(self, entry: LogEntry | FeedbackEntry) -> None:
        """Returns once the entry is durable.

        Raises:
            SpoolFullError: it is not, and will not be.
        """
        with staged("append"):
            await self._append(entry)

    async def _append(self, entry: LogEntry | FeedbackEntry) -> None:
        try:
            log = self.log
            if isinstance(entry, LogEntry) and entry.image is not None:
                # Hashing a large upload would hold up the event loop.
                done = await asyncio.get_running_loop().run_in_executor(None, log.submit, entry)
            else:
                done = log.submit(entry)
            await asyncio.wait_for(asyncio.wrap_future(done), APPEND_SECONDS)
        except TimeoutError as err:
            self.metrics.append_failed()
            self.append_error = f"Expected the disk to take an entry within {APPEND_SECONDS:g} s. Received: no answer."
            raise SpoolFullError(f"{self.append_error} Try again later.") from err
        except SpoolFullError as err:
            self.metrics.append_failed()
            self.append_error = str(err)
            raise
        self.append_error = None

    def _keep_house(self) -> None:
        while not self._stopping.wait(_HOUSEKEEPING_SECONDS):
            try:
                self._follow_database()
                self.metrics.log_is(self._read_status())
                self._try_log()
                self.note_load()
            except (CvPlatformError, OSError):
                logger.exception("The request log's housekeeping failed; it goes on")

    def _try_log(self) -> None:
        """Forgets why the last entry was not taken once the next would be; health keeps away who would show it."""
        if self.append_error is None:
            return
        with contextlib.suppress(SpoolFullError):
            self.log.try_out()
            self.append_error = None

    def _read_status(self) -> DrainStatus:
        status = self.log.status()
        self._last_status = time.monotonic(), status
        return status

    def note_load(self) -> None:
        """Tells the metrics how full the worker is, and whether it reaches central storage."""
        self.metrics.storage_is(reachable=self.models.status().get("storage_error") is None)
        for name, gate in (("predictions", self.in_flight), ("uploads", self.uploads), ("bodies", self.small_bodies)):
            self.metrics.places_are(name, gate.inside, gate.limit)

    def _note_swap(self, outcome: SwapOutcome, seconds: float, model: LoadedModel | None) -> None:
        self.metrics.swap_ended(outcome, seconds)
        if model is not None:
            metadata = model.metadata
            self.metrics.serves(metadata.model_name, metadata.version, metadata.runtime)

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


def _started(calls: BoundedCalls | None) -> BoundedCalls:
    if calls is None:
        raise SpoolFullError("Expected a started service. Received: one that is starting or stopping. Try again.")
    return calls
