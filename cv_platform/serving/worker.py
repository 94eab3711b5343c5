"""Everything that the routes of one worker share: settings, model, request log, limits, metrics.

What is admitted and computed is in `admission`, what is logged in `worker_log`; here they are put together, started and
stopped.

`ServingContext` is made once per worker process, started before the first request and stopped after the last. Making
one touches neither disk nor network.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from cv_platform.errors import CvPlatformError
from cv_platform.serving.capacity.admission import Admission
from cv_platform.serving.capacity.bounded_calls import BoundedCalls
from cv_platform.serving.capacity.limits import PROMOTION_SECONDS, ServingLimits
from cv_platform.serving.capacity.memory import RequestMemory
from cv_platform.serving.capacity.rate_limit import RateLimiter
from cv_platform.serving.capacity.refusal_bounds import RefusalBounds
from cv_platform.serving.capacity.worker_threads import WorkerThreads
from cv_platform.serving.http.security import Guard
from cv_platform.serving.log.worker_log import WorkerLog, not_started
from cv_platform.serving.model.holder import ModelHolder, make_worker_id
from cv_platform.serving.model.promotion import PROMOTION_LOCK
from cv_platform.serving.model.runtime import LoadedModel
from cv_platform.serving.model.worker_watch import WorkerWatch
from cv_platform.serving.problem import Problem
from cv_platform.serving.telemetry.log_status import LogStatus
from cv_platform.serving.telemetry.metrics import ServingMetrics, SwapOutcome
from cv_platform.serving.telemetry.tracing import Tracing
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage

logger = logging.getLogger(__name__)

LOOK_UP_THREADS = 8
"""Predictions looked up or deleted at the same time. A database that hangs takes no more of them than its engine has
connections (four); the others go on finding what is in the spool."""
LOOK_UP_SECONDS = 8.0
"""Longest wait for one: a little longer than the database allows itself for a statement."""
DELETION_SECONDS = 20.0
"""Longest wait for a deletion, which may wait for entries that are being committed."""
STORAGE_THREADS = 4
STORAGE_SECONDS = 20.0
PROMOTION_THREADS = 2
"""One moves the pointer, the other says that somebody does."""
_HOUSEKEEPING_SECONDS = 2.0
_STOP_SECONDS = 10.0
_STATUS_SECONDS = 1.0
"""A health check waits no longer for the spool's disk, and shows the figures that it had last."""


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


class ServingContext(Admission, WorkerLog):
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
        limits = limits or ServingLimits.of(settings)
        memory = RequestMemory(
            limits.memory_bytes,
            max_upload_bytes=settings.max_upload_bytes,
            max_pixels=settings.max_upload_pixels,
        )
        Admission.__init__(self, limits, memory)
        WorkerLog.__init__(self, settings, metrics)
        self.cache = settings.home / "cache"
        self.storage = CentralStorage(settings.storage_url)
        self.guard = Guard(settings)
        self.refusals = RefusalBounds()
        self.promotion_lock = self.cache / PROMOTION_LOCK
        self.workers = WorkerWatch(self.storage, settings.service_name)
        self.models: ModelSource = models or ModelHolder(
            self.storage,
            service=settings.service_name,
            worker_id=make_worker_id(),
            cache=self.cache,
            bundled=bundled,
            threads=self.limits.model_threads,
            on_swap=self._note_swap,
            watch=self.workers,
        )
        self.tracing: Tracing | None = None
        """Where traces go; None without an endpoint, and while the context is not started."""
        self._lifecycle = threading.Lock()
        self._is_started = False
        self._look_ups: BoundedCalls | None = None
        self._storage_reads: BoundedCalls | None = None
        self._promotions: BoundedCalls | None = None
        self._status_reads: BoundedCalls | None = None
        self._stopping = threading.Event()
        self._housekeeper: threading.Thread | None = None

    @property
    def look_ups(self) -> BoundedCalls:
        """Where predictions are looked up and deleted.

        Raises:
            ServiceError: the context is not started.
        """
        return _started(self._look_ups)

    @property
    def storage_reads(self) -> BoundedCalls:
        """Where central storage is read for a page.

        Raises:
            ServiceError: the context is not started.
        """
        return _started(self._storage_reads)

    @property
    def promotions(self) -> BoundedCalls:
        """Where another model is put into production.

        Raises:
            ServiceError: the context is not started.
        """
        return _started(self._promotions)

    @property
    def is_started(self) -> bool:
        """Whether requests can be answered: between the end of `start` and the beginning of `stop`."""
        return self._is_started

    async def log_status(self) -> tuple[LogStatus | None, float]:
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
        """Opens the request log and loads the model.

        A database or storage that is away stops nothing. Nor does a disk that has no room for the spool: without one no
        prediction is answered, and it is tried again until there is.
        """
        with self._lifecycle:
            if self._is_started:
                return
            try:
                self._open()
            except BaseException:
                self._close()
                raise
            self._is_started = True

    def stop(self) -> None:
        """Finishes what is under way, then lets go; what the database does not have yet stays in the spool."""
        with self._lifecycle:
            if self._is_started:
                self._is_started = False
                self._close()

    def _open(self) -> None:
        self._stopping.clear()
        self._predict_pool = WorkerThreads(self.limits.predict_threads, "predict")
        self._open_log()
        self._look_ups = BoundedCalls("look-ups", "the request log", threads=LOOK_UP_THREADS, seconds=LOOK_UP_SECONDS)
        self._storage_reads = BoundedCalls(
            "reads of storage", "central storage", threads=STORAGE_THREADS, seconds=STORAGE_SECONDS
        )
        self._promotions = BoundedCalls(
            "updates",
            "fetching or testing the model (see /models/current)",
            threads=PROMOTION_THREADS,
            seconds=PROMOTION_SECONDS,
            may_succeed=True,
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

    def _close(self) -> None:
        """Lets go of what `_open` has made, also of a part of it."""
        self._stopping.set()
        if self._housekeeper is not None:
            self._housekeeper.join(_STOP_SECONDS)  # It may wait for a disk that hangs.
        for calls in (self._look_ups, self._storage_reads, self._promotions, self._status_reads):
            if calls is not None:
                calls.close(_STOP_SECONDS)
        # Whoever waited for anything older has been told 504.
        if self._predict_pool is not None and not self._predict_pool.close(self.limits.predict_seconds):
            logger.warning("Predictions that never ended are left behind")
        self.models.stop()
        log, self._log, self._predict_pool, self._housekeeper = self._log, None, None, None
        self._look_ups = self._storage_reads = self._promotions = self._status_reads = self._last_status = None
        if self._rate_limiter is not None:
            self._rate_limiter.close()
            self._rate_limiter = None
        if log is not None:
            log.close()
        if self.tracing is not None:
            self.tracing.stop()
            self.tracing = None

    def _keep_house(self) -> None:
        while not self._stopping.wait(_HOUSEKEEPING_SECONDS):
            try:
                self._tend_log()
                self.note_load()
            except (CvPlatformError, OSError, sqlite3.Error):
                logger.exception("The request log's housekeeping failed; it goes on")

    def note_load(self) -> None:
        """Tells the metrics how full the worker is, and whether it reaches central storage."""
        self.metrics.storage_is(reachable=self.models.status().get("storage_error") is None)
        for name, gate in (("predictions", self.in_flight), ("uploads", self.uploads), ("bodies", self.small_bodies)):
            self.metrics.places_are(name, gate.inside, gate.limit)
        self.metrics.memory_is(self.memory.taken_bytes, self.memory.limit_bytes)

    def _note_swap(self, outcome: SwapOutcome, seconds: float, model: LoadedModel | None) -> None:
        self.metrics.swap_ended(outcome, seconds)
        if model is not None:
            metadata = model.metadata
            self.metrics.serves(metadata.model_name, metadata.version, metadata.runtime)


def _started(calls: BoundedCalls | None) -> BoundedCalls:
    if calls is None:
        raise not_started()
    return calls
